"""Names that no file system takes are files that don't exist: one sentence."""
import pytest

from datasets import build_dataset
from util.errors import InputError


@pytest.mark.parametrize("flags", [dict(coco_path="x" * 300), dict(voc_path="x" * 300, dataset_file="voc"),
                                   dict(imagenet_path="x" * 300, dataset_file="imagenet", num_patches=2)])
def test_a_path_that_is_too_long_is_one_sentence(tiny_args, flags):
    with pytest.raises(InputError):
        build_dataset("train", tiny_args(**flags))
