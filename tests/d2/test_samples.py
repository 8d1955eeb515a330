"""The arithmetic of the data set mapper, by hand. Nothing here needs Detectron2."""
from typing import Any, Dict

import pytest
import torch

from d2.samples import build_transform, relative_boxes, training_target
from util.errors import InputError


def input_node(**changes: Any) -> Dict[str, Any]:
    """The `INPUT` node of a config, for small images."""
    return {"FORMAT": "RGB", "MIN_SIZE_TRAIN": (20,), "MAX_SIZE_TRAIN": 100, "MIN_SIZE_TRAIN_SAMPLING": "choice",
            "RANDOM_FLIP": "none", "CROP": {"ENABLED": False}, "MIN_SIZE_TEST": 30, "MAX_SIZE_TEST": 100, **changes}


def test_boxes_are_clipped_and_those_without_area_left_out() -> None:
    boxes = [[-5, 2, 10, 60], [8, 8, 8, 20], [45, 0, 70, 5], [30, 30, 20, 40]]
    target = training_target(boxes, [4, 5, 6, 7], None, 40, 50)
    assert target["boxes"].tolist() == [[0, 2, 10, 40], [45, 0, 50, 5]] and target["labels"].tolist() == [4, 6]
    assert "masks" not in target


def test_masks_are_drawn_from_polygons_and_run_lengths_and_stay_with_their_boxes() -> None:
    square = [[2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]]
    column = {"size": [5, 8], "counts": [5, 5, 30]}  # the second column, counted downwards
    boxes = [[2, 1, 6, 4], [3, 3, 3, 3], [1, 0, 2, 5]]
    target = training_target(boxes, [0, 1, 2], [square, square, column], 5, 8)
    assert target["labels"].tolist() == [0, 2] and target["masks"].dtype == torch.bool
    expected = torch.zeros(2, 5, 8, dtype=torch.bool)
    expected[0, 1:4, 2:6] = True
    expected[1, :, 1] = True
    assert torch.equal(target["masks"], expected)


def test_a_segmentation_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(InputError, match="^image 7 has a segmentation that cannot be drawn on 8x5 pixels .*3 pixels"):
        training_target([[2, 1, 6, 4]], [0], [{"size": [5, 8], "counts": [1, 2]}], 5, 8, "image 7")


def test_an_image_without_objects() -> None:
    target = training_target([], [], [], 5, 8)
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["masks"].shape == (0, 5, 8)
    assert relative_boxes(target["boxes"], 5, 8).shape == (0, 4)


def test_relative_boxes() -> None:
    assert relative_boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), 80, 40).tolist() == [[0.5, 0.5, 0.5, 0.5]]


def test_evaluation_resizes_by_detrs_rule_and_keeps_bytes() -> None:
    image = torch.randint(0, 256, (3, 41, 97), dtype=torch.uint8)
    resized, target = build_transform(input_node(), is_train=False)(image)
    # 30 * 97 / 41 = 70.98, cut to 70 (Detectron2 would round to 71).
    assert resized.shape == (3, 30, 70) and resized.dtype == torch.uint8 and target is None
    assert build_transform(input_node(MIN_SIZE_TEST=0), is_train=False)(image)[0].shape == image.shape
    # 97 / 41 * 50 = 118.3 > 100: the long side decides, 41 / 97 * 100 = 42.3 becomes 42, and 42 * 97 / 41 = 99.4.
    assert build_transform(input_node(MIN_SIZE_TEST=50), is_train=False)(image)[0].shape == (3, 42, 99)


def test_training_without_crop_scales_boxes_and_masks_with_the_image() -> None:
    target = training_target([[4, 8, 20, 40]], [2], [[[4, 8, 20, 8, 20, 40, 4, 40]]], 40, 80)
    image, target = build_transform(input_node(), is_train=True)(torch.zeros(3, 40, 80, dtype=torch.uint8), target)
    assert image.shape == (3, 20, 40) and target["boxes"].tolist() == [[2, 4, 10, 20]]
    assert target["masks"].shape == (1, 20, 40) and target["masks"].sum() == 16 * 8
    assert target["masks"][0, 4:, 2:10].all()


def test_flipping_half_of_the_images() -> None:
    target = training_target([[0, 0, 10, 20]], [2], None, 20, 40)
    transform = build_transform(input_node(RANDOM_FLIP="horizontal"), is_train=True)
    lefts = [transform(torch.zeros(3, 20, 40, dtype=torch.uint8), target)[1]["boxes"][0, 0].item() for _ in range(200)]
    assert set(lefts) == {0.0, 30.0} and 70 < lefts.count(30.0) < 130
    assert target["boxes"].tolist() == [[0, 0, 10, 20]]


def test_cropping_half_of_the_images_and_always_resizing_to_a_size_of_the_list() -> None:
    crop = {"ENABLED": True, "TYPE": "absolute_range", "SIZE": (10, 12)}
    transform = build_transform(input_node(MIN_SIZE_TRAIN=(20, 24), CROP=crop), is_train=True)
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    sizes = [transform(image, training_target([], [], None, 40, 80))[0].shape[1:] for _ in range(200)]
    assert {min(size) for size in sizes} == {20, 24}
    pieces = [size for size in sizes if size[1] != 2 * size[0]]
    assert 70 < len(pieces) < 130 and all(max(size) / min(size) <= 1.2 for size in pieces)  # 10 to 12 pixels on a side


@pytest.mark.parametrize("change, words", [
    ({"FORMAT": "L"}, "INPUT.FORMAT L is not one of RGB, BGR"),
    ({"RANDOM_FLIP": "vertical"}, "INPUT.RANDOM_FLIP vertical is not one of horizontal, none"),
    ({"MIN_SIZE_TRAIN_SAMPLING": "range"}, "INPUT.MIN_SIZE_TRAIN_SAMPLING range is not one of choice"),
    ({"CROP": {"ENABLED": True, "TYPE": "relative", "SIZE": [0.9, 0.9]}}, "INPUT.CROP.TYPE relative: DETR cuts by"),
])
def test_an_option_that_detr_does_not_know_is_refused(change: Dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_transform(input_node(**change), is_train=True)
