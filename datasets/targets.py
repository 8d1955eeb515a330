"""Targets made of COCO annotations one by one, for data sets that users write."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datasets import transforms as T
from datasets.checks import decode_segmentation

__all__ = ["ConvertCocoPolysToMask", "convert_coco_poly_to_mask"]


def convert_coco_poly_to_mask(segmentations: Sequence[list | dict], height: int, width: int) -> Tensor:
    """Draws segmentations, each a list of polygons or run lengths, as bool [n, height, width].

    Raises:
        ValueError: as `datasets.checks.segmentation_rle`.
    """
    masks = torch.zeros(len(segmentations), height, width, dtype=torch.bool)
    for mask, segmentation in zip(masks, segmentations):
        mask.copy_(torch.from_numpy(decode_segmentation(segmentation, height, width)))
    return masks


class ConvertCocoPolysToMask:
    """Makes the target of an image of its annotations, for data sets of users; crowds and empty boxes are left out.

    Args:
        return_masks: whether targets hold `masks`.
    """

    def __init__(self, return_masks: bool = False) -> None:
        self.return_masks = return_masks

    def __call__(self, image: T.Image, target: dict) -> tuple[T.Image, dict[str, Tensor]]:
        """Returns the image as it is and its target with absolute x0, y0, x1, y1 boxes, see `DetectionDataset`; with
        `keypoints` [n, k, 3] where the annotations have them.

        Args:
            image: Pillow image or uint8 [3, H, W].
            target: `image_id` and the COCO `annotations` of the image.
        """
        height, width = T.image_size(image)
        objects = [entry for entry in target["annotations"] if not entry.get("iscrowd", 0)]
        boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        areas = [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in objects]
        size = torch.tensor([height, width])
        made = {"boxes": boxes, "labels": torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64),
                "area": torch.tensor(areas, dtype=torch.float32),
                "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
                "image_id": torch.as_tensor(target["image_id"]).view(1), "orig_size": size, "size": size.clone()}
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if self.return_masks:
            made["masks"] = convert_coco_poly_to_mask([entry["segmentation"] for entry in objects], height, width)
        if objects and "keypoints" in objects[0]:
            points = torch.tensor([entry["keypoints"] for entry in objects], dtype=torch.float32)
            made["keypoints"] = points.view(len(objects), -1, 3)[keep]
        T.remove_objects(made, keep)
        return image, made
