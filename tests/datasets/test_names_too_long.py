"""Names that no file system takes are files that don't exist: one sentence."""
import pytest

from datasets import build_dataset
from tools.clean_copy import targets
from tools.output import refuse_others
from tools.predict import find_images
from util.errors import InputError


@pytest.mark.parametrize("flags", [dict(coco_path="x" * 300), dict(voc_path="x" * 300, dataset_file="voc"),
                                   dict(imagenet_path="x" * 300, dataset_file="imagenet", num_patches=2)])
def test_a_path_that_is_too_long_is_one_sentence(tiny_args, flags):
    with pytest.raises(InputError):
        build_dataset("train", tiny_args(**flags))


def test_tools_take_them_for_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        find_images(["x" * 300], str(tmp_path))
    refuse_others("--output", [tmp_path / ("x" * 300)])
    assert targets("x" * 300, {"val": tmp_path / "a.json"})
