"""Masks from what a JSON file may hold: COCO's compressed run lengths, and damaged ones without reading wild memory."""
import numpy as np
import pytest
from pycocotools import mask as mask_codec

from datasets.checks import decode_segmentation


@pytest.mark.parametrize("share", [0, 0.03, 0.5, 0.97, 1])
def test_compressed_run_lengths_are_pycocotools(share):
    rng = np.random.default_rng(int(100 * share))
    for height, width in ((1, 1), (7, 3), (40, 60), (300, 200)):
        mask = rng.random((height, width)) < share
        mask[height // 3:height // 2] = True  # runs of a size that take several characters
        encoded = mask_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
        for counts in (encoded["counts"], encoded["counts"].decode()):
            drawn = decode_segmentation({"size": [height, width], "counts": counts}, height, width)
            assert drawn.dtype == bool and (drawn == mask).all()


@pytest.mark.parametrize("counts, message", [
    ("", "make 0 pixels"),
    ("zzzz", "have the character 'z'"),
    ("PYk0P", "end in the middle of a number"),
    ([599], "make 599 pixels"),
    ([-5, 605], "are not whole numbers from 0 up"),
    ([600.0], "are not whole numbers from 0 up"),
])
def test_damaged_run_lengths_are_refused(counts, message):
    with pytest.raises(ValueError, match=f"its run lengths {message}"):
        decode_segmentation({"size": [20, 30], "counts": counts}, 20, 30)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e10, -1e10, "3", None])
def test_impossible_coordinates_are_refused(value):
    """Of these pycocotools makes a crash of the process."""
    with pytest.raises(ValueError, match=f"it has the coordinate {value}"):
        decode_segmentation([[0, 0, 10, 0, value, 10]], 20, 30)
    assert decode_segmentation([[0, 0, 99999, 0, 99999, 10, 0, 10]], 20, 30).sum() == 300
