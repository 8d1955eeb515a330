"""COCO's measures of detections, exact under any number of processes."""
from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from torch import Tensor

from datasets.coco import class_names
from datasets.coco_measures import CocoMeasures, Shapes
from util.distributed import all_gather, is_main_process, print_main

__all__ = ["CocoEvaluator"]

IOU_TYPES = ("bbox", "segm")


class CocoEvaluator:
    """Collects detections, brings those of all processes together and evaluates them once.

    Only images that were given to `update` count. Objects of the ground truth with `difficult: 1` (Pascal VOC) are
    ignored: finding them is neither right nor wrong.

    Args:
        coco_gt: ground truth.
        iou_types: any of "bbox" and "segm".

    Attributes:
        coco_eval: by IoU type, `datasets.coco_measures.CocoMeasures`, a pycocotools `COCOeval`; its `stats` are there
            after `summarize`.

    Raises:
        ValueError: an IoU type is unknown.
    """

    def __init__(self, coco_gt: COCO, iou_types: Sequence[str]) -> None:
        for iou_type in iou_types:
            if iou_type not in IOU_TYPES:
                raise ValueError(f"unknown IoU type {iou_type!r}, expected one of {', '.join(IOU_TYPES)}")
        self.coco_gt = coco_gt
        self.iou_types = list(iou_types)
        self.coco_eval = {iou_type: CocoMeasures(coco_gt, iou_type) for iou_type in iou_types}
        self._detections: dict[int, dict[str, np.ndarray]] = {}

    def update(self, predictions: dict[int, dict[str, Tensor]]) -> None:
        """Adds detections; those of an image that already has some are passed over.

        Args:
            predictions: by image id, `scores` [n] in 0..1, `labels` int64 [n], `boxes` [n, 4] (x0, y0, x1, y1 in pixels
                of the original image) for "bbox", `masks` [n, H, W] or [n, 1, H, W] (above 0.5 inside; of the original
                image's size) for "segm".

        Raises:
            ValueError: an image id is not in the ground truth.
        """
        for image_id, found in predictions.items():
            if image_id not in self.coco_gt.imgs:
                raise ValueError(f"image id {image_id} is not in the ground truth")
            if image_id not in self._detections:
                self._detections[image_id] = self._pack(found)

    def synchronize_between_processes(self) -> None:
        """Brings the detections of all processes together on each of them; every process must call this."""
        merged: dict[int, dict[str, np.ndarray]] = {}
        for detections in all_gather(self._detections):
            for image_id, found in detections.items():
                merged.setdefault(image_id, found)
        self._detections = merged

    def accumulate(self) -> None:
        """Matches the detections with the ground truth, and computes precision and recall at every threshold."""
        image_ids = sorted(self._detections)
        for iou_type, evaluation in self.coco_eval.items():
            evaluation.detections = self._lay_out(iou_type)
            evaluation.params.imgIds = image_ids
            evaluation.evaluate()
            evaluation.accumulate()

    def summarize(self) -> None:
        """Computes the 12 numbers (`coco_eval[iou_type].stats`) on every process, and prints them on the main one."""
        for iou_type, evaluation in self.coco_eval.items():
            print_main(f"IoU metric: {iou_type}")
            with contextlib.nullcontext() if is_main_process() else contextlib.redirect_stdout(io.StringIO()):
                evaluation.summarize()

    def per_class(self, iou_type: str = "bbox") -> dict[str, tuple[float, float]]:
        """Returns AP and AP50 (0..1) of each class by its name, -1 for classes without objects; after `accumulate`."""
        evaluation = self.coco_eval[iou_type]
        precision = evaluation.eval["precision"][..., 0, -1]  # thresholds, recalls, classes; all areas, most detections
        names = class_names(self.coco_gt.dataset)
        at_50 = int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, 0.5))[0])
        return {
            names[category]: (_mean(precision[:, :, position]), _mean(precision[at_50, :, position]))
            for position, category in enumerate(evaluation.params.catIds)
        }

    def _pack(self, found: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Turns the detections of one image into arrays, as small as they can travel between processes."""
        packed = {"labels": found["labels"].cpu().numpy(), "scores": found["scores"].double().cpu().numpy()}
        if "bbox" in self.iou_types:
            packed["bbox"] = found["boxes"].double().cpu().numpy().copy()
            packed["bbox"][:, 2:] -= packed["bbox"][:, :2]
        if "segm" in self.iou_types:
            masks = (found["masks"] > 0.5).cpu().flatten(0, -3).numpy().astype(np.uint8).transpose(1, 2, 0)
            packed["segm"] = np.empty(masks.shape[2], dtype=object)
            packed["segm"][:] = mask_codec.encode(np.asfortranarray(masks))
        return packed

    def _lay_out(self, iou_type: str) -> Shapes:
        """Lays the detections of all images out in order of the images' ids."""
        found = sorted(self._detections.items())
        columns = {name: np.concatenate([empty, *(packed[name] for _, packed in found)]) for name, empty in (
            ("labels", np.empty(0, np.int64)), ("scores", np.empty(0)),
            (iou_type, np.empty((0, 4)) if iou_type == "bbox" else np.empty(0, object)))}
        outlines = columns[iou_type]
        areas = (outlines[:, 2] * outlines[:, 3] if iou_type == "bbox"
                 else np.array([mask_codec.area(mask) for mask in outlines], dtype=np.float64))
        image_ids = np.repeat(np.array([image_id for image_id, _ in found], dtype=np.int64),
                              [len(packed["labels"]) for _, packed in found])
        return Shapes(image_ids, columns["labels"], areas, outlines, columns["scores"])


def _mean(precision: np.ndarray) -> float:
    """Mean over the recall points that exist (others hold -1), or -1 if none does."""
    precision = precision[precision > -1]
    return float(precision.mean()) if precision.size else -1.0
