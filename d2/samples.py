"""The arithmetic of `DetrDatasetMapper`: transforms from a config, targets from annotations. Needs no Detectron2.

Images are resized, flipped and cut by this project's own transforms, not by Detectron2's: DETR rounds sizes in its own
way, and a pixel more or less changes every score.
"""
from typing import Any, Dict, Optional, Sequence

import torch
from torch import Tensor

from datasets.checks import decode_segmentation
from datasets.coco import training_augmentation
from datasets.transforms import Compose, RandomResize, remove_objects
from util.box_ops import box_xyxy_to_cxcywh
from util.errors import InputError

ALLOWED = {"FORMAT": ("RGB", "BGR"), "RANDOM_FLIP": ("horizontal", "none"), "MIN_SIZE_TRAIN_SAMPLING": ("choice",)}


def build_transform(config: Any, is_train: bool) -> Compose:
    """Resizing and augmentation, without the normalisation, which in Detectron2 is the model's.

    Args:
        config: the config's `INPUT` node: `FORMAT`, `MIN_SIZE_TRAIN`, `MAX_SIZE_TRAIN`, `MIN_SIZE_TRAIN_SAMPLING`,
            `RANDOM_FLIP`, `CROP` (`ENABLED`, `TYPE`, `SIZE`: smallest and largest side), `MIN_SIZE_TEST` (0: no
            resizing), `MAX_SIZE_TEST`.

    Returns:
        a callable `(image uint8 [3, H, W], target or None) -> (image, target)`; boxes stay xyxy pixels.

    Raises:
        InputError: for a value that DETR's augmentation doesn't know.
    """
    for name, allowed in ALLOWED.items():
        if config[name] not in allowed:
            raise InputError(f"INPUT.{name} {config[name]} is not one of {', '.join(allowed)}")
    if not is_train:
        size = config["MIN_SIZE_TEST"]
        return Compose([RandomResize([size], config["MAX_SIZE_TEST"])] if size else [])
    crop, sizes, max_size = config["CROP"], list(config["MIN_SIZE_TRAIN"]), config["MAX_SIZE_TRAIN"]
    if crop["ENABLED"] and crop["TYPE"] != "absolute_range":
        raise InputError(f"INPUT.CROP.TYPE {crop['TYPE']}: DETR cuts by a range of pixels, absolute_range")
    # DETR's pipeline is flip, resize (or cut).
    crop_size = list(crop["SIZE"]) if crop["ENABLED"] else None
    flip, resize_or_crop = training_augmentation(sizes, max_size, None, crop_size).transforms
    resize = resize_or_crop if crop["ENABLED"] else RandomResize(sizes, max_size)
    return Compose([flip, resize] if config["RANDOM_FLIP"] == "horizontal" else [resize])


def training_target(boxes: Sequence[Sequence[float]], classes: Sequence[int], segmentations: Optional[Sequence[Any]],
                    height: int, width: int, source: str = "the image") -> Dict[str, Tensor]:
    """What is to be found in one image, before its transforms.

    Args:
        boxes: n boxes, xyxy in pixels; they are clipped to the image, and objects without area are left out.
        classes: n class numbers.
        segmentations: n polygon lists or run lengths, None for no masks.
        height, width: of the image in pixels.
        source: what to call the image in messages.

    Returns:
        `boxes` float [n, 4] xyxy in pixels, `labels` int64 [n], and with segmentations `masks` bool [n, H, W].

    Raises:
        InputError: if a segmentation can't be drawn.
    """
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
              "labels": torch.tensor(classes, dtype=torch.int64)}
    target["boxes"][:, 0::2].clamp_(0, width)
    target["boxes"][:, 1::2].clamp_(0, height)
    if segmentations is not None:
        masks = torch.zeros(len(segmentations), height, width, dtype=torch.bool)
        for mask, segmentation in zip(masks, segmentations):
            try:
                mask.copy_(torch.from_numpy(decode_segmentation(segmentation, height, width)))
            except Exception as error:  # pycocotools raises plain Exception, and others of its C code, on bad input
                raise InputError(f"{source} has a segmentation that cannot be drawn on {width}x{height} pixels "
                                 f"({error})") from error
        target["masks"] = masks
    remove_objects(target, (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(1))
    return target


def relative_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes xyxy in pixels [n, 4] -> cxcywh in 0..1 of the image, as the criterion wants them."""
    return box_xyxy_to_cxcywh(boxes) / boxes.new_tensor([width, height, width, height])
