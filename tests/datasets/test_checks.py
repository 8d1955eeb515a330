"""Masks from what a JSON file may hold: COCO's compressed run lengths, and damaged ones without reading wild memory."""
import re

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
    ([600.5], "are not whole numbers from 0 up"),
])
def test_damaged_run_lengths_are_refused(counts, message):
    with pytest.raises(ValueError, match=f"its run lengths {message}"):
        decode_segmentation({"size": [20, 30], "counts": counts}, 20, 30)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e10, -1e10, "3", None, [3]])
def test_impossible_coordinates_are_refused(value):
    """Of these pycocotools makes a crash of the process."""
    with pytest.raises(ValueError, match=re.escape(f"it has the coordinate {value!r}")):
        decode_segmentation([[0, 0, 10, 0, value, 10]], 20, 30)
    assert decode_segmentation([[0, 0, 99999, 0, 99999, 10, 0, 10]], 20, 30).sum() == 300


def test_segmentations_are_drawn_as_pycocotools_draws_them():
    """A list of run lengths is their union; short parts enclose nothing beside others."""
    runs = {"size": [20, 30], "counts": [100, 20.0, 480]}  # columns 5
    other = {"size": [20, 30], "counts": [200, 20, 380]}  # columns 10
    assert decode_segmentation([runs, other], 20, 30).any(axis=0).nonzero()[0].tolist() == [5, 10]
    square = [2, 3, 8, 3, 8, 9, 2, 9]
    assert decode_segmentation([square, [], [1, 1], [4, 5, 10, 6]], 20, 30).sum() == 36
    assert decode_segmentation([[*square, 7]], 20, 30).sum() == 36  # half a point more


@pytest.mark.parametrize("segmentation, message", [
    ([], "without a polygon of three points"), ([[]], "without a polygon"), ([[4, 5, 10, 6]], "without a polygon"),
    ([[1, 2], [5, 2], [5, 9]], "without a polygon"),
    ([1, 2, 5, 2, 5, 9], "neither run lengths nor a list of polygons"), ({"counts": [600]}, "it has no 'size'"),
    ([[[1, 2], [5, 2], [5, 9]]], r"has the coordinate \[1, 2\], not a number"),
    ({"size": ["20", "30"], "counts": [600]}, "made for '30'x'20'"),
])
def test_what_is_no_segmentation_is_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, 20, 30)
