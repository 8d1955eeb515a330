"""Average precision by Pascal VOC's rules, at an IoU of one half."""
from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_codec

__all__ = ["all_points_ap", "eleven_points_ap", "judge"]

_MIN_IOU = 0.5


def judge(boxes: np.ndarray, objects: np.ndarray, difficult: np.ndarray) -> np.ndarray:
    """Decides which detections of one class in one image are right, by VOC's rule.

    A detection belongs to the object that it overlaps most. All that belong to a difficult object are ignored; of those
    that belong to another one, the first is right.

    Args:
        boxes: detections, best first, [n, 4] (x, y, width, height).
        objects: the objects, [m, 4], likewise.
        difficult: bool [m].

    Returns:
        int64 [n]: 1 for right, 0 for wrong, -1 for ignored.
    """
    verdicts = np.zeros(len(boxes), dtype=np.int64)
    if not len(objects) or not len(boxes):
        return verdicts
    ious = mask_codec.iou(boxes.astype(np.float64), objects.astype(np.float64), [0] * len(objects))
    taken = np.zeros(len(objects), dtype=bool)
    for number, (best, iou) in enumerate(zip(ious.argmax(1), ious.max(1))):
        if iou >= _MIN_IOU:
            verdicts[number] = -1 if difficult[best] else int(not taken[best])
            taken[best] = True
    return verdicts


def all_points_ap(scores: np.ndarray, verdicts: np.ndarray, num_objects: int) -> float:
    """Returns the area under the curve of a class: at each recall the best precision of this or a larger recall.

    Args:
        scores: of all its detections, [n].
        verdicts: see `judge`, [n].
        num_objects: number of its objects that aren't difficult; -1 is returned for 0.
    """
    if not num_objects:
        return -1.0
    order = np.argsort(-scores[verdicts >= 0], kind="stable")
    right = verdicts[verdicts >= 0][order].cumsum()
    precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
    return float((precision * np.diff(right, prepend=0)).sum() / num_objects)


def eleven_points_ap(precision: np.ndarray) -> float:
    """Returns the mean precision of a class at recalls 0, 0.1, … 1 (VOC2007's), from COCO's 101; -1 without objects."""
    return float(precision[::10].mean()) if (precision > -1).all() else -1.0
