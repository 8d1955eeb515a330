"""COCO's measures of detections, exact under any number of processes."""
from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from faster_coco_eval import COCOeval_faster
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from datasets.coco import class_names, index_ground_truth
from datasets.voc_ap import all_points_ap, eleven_points_ap, judge
from util.distributed import all_gather, print_main

__all__ = ["CocoEvaluator", "convert_to_xywh", "create_common_coco_eval", "evaluate", "merge"]

IOU_TYPES = ("bbox", "segm")


class CocoEvaluator:
    """Collects detections, brings those of all processes together and evaluates them once, with faster-coco-eval.

    Only images that were given to `update` count. Objects of the ground truth with `difficult: 1` (Pascal VOC) are
    ignored: finding them, however often, is neither right nor wrong.

    Args:
        coco_gt: ground truth.
        iou_types: any of "bbox" and "segm".

    Attributes:
        coco_eval: by IoU type, faster-coco-eval's object, used as pycocotools' `COCOeval`; its `eval` is there after
            `accumulate`, its `stats` after `summarize`.

    Raises:
        ValueError: an IoU type is unknown.
    """

    def __init__(self, coco_gt: COCO, iou_types: Sequence[str]) -> None:
        for iou_type in iou_types:
            if iou_type not in IOU_TYPES:
                raise ValueError(f"unknown IoU type {iou_type!r}, expected one of {', '.join(IOU_TYPES)}")
        self.coco_gt = coco_gt
        self.iou_types = list(iou_types)
        self.coco_eval = {iou_type: _Evaluation(coco_gt, iouType=iou_type, print_function=_say_nothing)
                          for iou_type in iou_types}
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
                self._detections[image_id] = _pack(found, self.iou_types)

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
            evaluation.cocoDt = self._as_coco(iou_type)
            evaluation.params.imgIds = image_ids
            evaluation.evaluate()
            evaluation.accumulate()

    def summarize(self) -> None:
        """Computes the 12 numbers (`coco_eval[iou_type].stats`) on every process, and prints them on the main one."""
        for iou_type, evaluation in self.coco_eval.items():
            lines = [f"IoU metric: {iou_type}"]
            evaluation.print_function = lines.append
            evaluation.summarize()
            evaluation.print_function = _say_nothing
            print_main("\n".join(lines[:1 + len(evaluation.stats)]))  # two more numbers than COCO's follow
        for points, ap50 in self.voc_ap50().items():
            print_main(f" VOC's AP50 by {points.replace('_', ' ')}: {ap50:.3f}")

    def voc_ap50(self) -> dict[str, float]:
        """Returns VOC's mean AP50 (0..1, -1 without objects) by "11_points" and by "all_points"; after `accumulate`.

        The 11 points are of COCO's table, every tenth of its 101; the area of all points is by VOC's own rule. Returns {}
        for a ground truth that isn't VOC's: it doesn't say which objects are difficult.
        """
        annotations = self.coco_gt.anns.values()
        if "bbox" not in self.iou_types or not any("difficult" in annotation for annotation in annotations):
            return {}
        evaluation = self.coco_eval["bbox"]
        at_50 = int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, 0.5))[0])
        table = evaluation.eval["precision"][at_50, ..., 0, -1]  # recalls, classes
        eleven = [eleven_points_ap(column) for column in table.T]
        everything = [self._all_points_ap(category) for category in evaluation.params.catIds]
        return {"11_points": _mean(np.array(eleven)), "all_points": _mean(np.array(everything))}

    def _all_points_ap(self, category: int) -> float:
        scores, verdicts, num_objects = [np.zeros(0)], [np.zeros(0, dtype=np.int64)], 0
        for image_id, found in sorted(self._detections.items()):
            objects = [annotation for annotation in self.coco_gt.imgToAnns[image_id]
                       if annotation["category_id"] == category]
            difficult = np.array([bool(item.get("difficult") or item.get("iscrowd")) for item in objects], dtype=bool)
            num_objects += int((~difficult).sum())
            mine = np.flatnonzero(found["labels"] == category)
            mine = mine[np.argsort(-found["scores"][mine], kind="stable")]
            boxes = np.array([item["bbox"] for item in objects], dtype=np.float64).reshape(-1, 4)
            scores.append(found["scores"][mine])
            verdicts.append(judge(found["bbox"][mine], boxes, difficult))
        return all_points_ap(np.concatenate(scores), np.concatenate(verdicts), num_objects)

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

    def prepare(self, predictions: dict[int, dict[str, Tensor]], iou_type: str) -> list[dict]:
        """Returns detections, as `update` takes them, as entries of COCO's results files; for "bbox", "segm" or, with
        `keypoints` [n, k, 3] (x, y, visibility) instead of boxes, "keypoints"."""
        if iou_type == "keypoints":
            return self.prepare_for_coco_keypoint(predictions)
        field = "bbox" if iou_type == "bbox" else "segmentation"
        return [{"image_id": image_id, "category_id": category, field: shape, "score": score}
                for image_id, found in predictions.items()
                for category, score, shape in _entries(_pack(found, (iou_type,)), iou_type)]

    def prepare_for_coco_detection(self, predictions: dict[int, dict[str, Tensor]]) -> list[dict]:
        """Returns boxes as entries of COCO's results files, `bbox` as x0, y0, width, height in pixels."""
        return self.prepare(predictions, "bbox")

    def prepare_for_coco_segmentation(self, predictions: dict[int, dict[str, Tensor]]) -> list[dict]:
        """Returns masks as entries of COCO's results files, `segmentation` as compressed run lengths."""
        entries = self.prepare(predictions, "segm")
        for entry in entries:
            entry["segmentation"] = {**entry["segmentation"], "counts": entry["segmentation"]["counts"].decode()}
        return entries

    def prepare_for_coco_keypoint(self, predictions: dict[int, dict[str, Tensor]]) -> list[dict]:
        """Returns keypoints as entries of COCO's results files, `keypoints` as a flat list for each object."""
        return [{"image_id": image_id, "category_id": category, "keypoints": points, "score": score}
                for image_id, found in predictions.items() if found
                for category, score, points in zip(found["labels"].tolist(), found["scores"].tolist(),
                                                   found["keypoints"].flatten(1).tolist())]

    def _as_coco(self, iou_type: str) -> COCO:
        """Makes the pycocotools object of the detections, as `COCO.loadRes` would (which fails when there are none)."""
        field = "bbox" if iou_type == "bbox" else "segmentation"
        annotations: list[dict] = []
        for image_id, found in sorted(self._detections.items()):
            for category, score, shape in _entries(found, iou_type):
                area = shape[2] * shape[3] if iou_type == "bbox" else float(mask_codec.area(shape))
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category,
                                    "score": score, field: shape, "area": area, "iscrowd": 0})
        return index_ground_truth({**self.coco_gt.dataset, "annotations": annotations})


def _pack(found: dict[str, Tensor], iou_types: Sequence[str]) -> dict[str, np.ndarray]:
    """Turns the detections of one image into arrays, as small as they can travel between processes."""
    if not found:  # published programs' word for an image without detections
        return {name: np.empty(0) for name in ("labels", "scores", *iou_types)}
    packed = {"labels": found["labels"].cpu().numpy(), "scores": found["scores"].double().cpu().numpy()}
    if "bbox" in iou_types:
        packed["bbox"] = convert_to_xywh(found["boxes"].double()).cpu().numpy()
    if "segm" in iou_types:
        masks = (found["masks"] > 0.5).cpu().flatten(0, -3).numpy().astype(np.uint8).transpose(1, 2, 0)
        packed["segm"] = np.empty(masks.shape[2], dtype=object)
        packed["segm"][:] = mask_codec.encode(np.asfortranarray(masks))
    return packed


def _entries(packed: dict[str, np.ndarray], iou_type: str) -> Iterator[tuple[int, float, list[float] | dict]]:
    """The category, score and box or mask of each packed detection."""
    return zip(*(packed[name].tolist() for name in ("labels", "scores", iou_type)))


def convert_to_xywh(boxes: Tensor) -> Tensor:
    """Turns boxes [n, 4] from x0, y0, x1, y1 into x0, y0, width, height."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def merge(img_ids: Sequence[int], eval_imgs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brings what `evaluate` found on each process together, once for each image; every process must call this.

    Args:
        img_ids: ids of the images of this process.
        eval_imgs: [classes, areas, images], see `evaluate`.

    Returns:
        The ids of all images, ascending, and the results in this order, [classes, areas, all images].
    """
    ids = np.concatenate([np.asarray(part) for part in all_gather(list(img_ids))])
    results = np.concatenate(all_gather(eval_imgs), axis=2)
    ids, first = np.unique(ids, return_index=True)
    return ids, results[..., first]


def create_common_coco_eval(coco_eval: COCOeval, img_ids: Sequence[int], eval_imgs: np.ndarray) -> None:
    """Puts the merged results of all processes, arguments as in `merge`, into an evaluation, to be accumulated there."""
    ids, results = merge(img_ids, eval_imgs)
    coco_eval.evalImgs = list(results.flatten())
    coco_eval.params.imgIds = ids.tolist()
    coco_eval._paramsEval = copy.deepcopy(coco_eval.params)


def evaluate(coco_eval: COCOeval) -> tuple[list[int], np.ndarray]:
    """Matches the detections of pycocotools' evaluation with its ground truth, without its chatter.

    Returns:
        The ids of its images, and what was found on each, object [classes, areas, images].
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval.evaluate()
    params = coco_eval.params
    found = np.empty(len(coco_eval.evalImgs), dtype=object)
    found[:] = coco_eval.evalImgs
    return params.imgIds, found.reshape(-1, len(params.areaRng), len(params.imgIds))


class _Evaluation(COCOeval_faster):
    """faster-coco-eval's evaluation that ignores difficult objects and leaves the ground truth as it was."""

    def _prepare(self) -> None:
        ground_truth = self.cocoGt
        self._evaluated = set(self.params.imgIds)
        self._difficult: dict[int, list[dict]] = {}
        self.cocoGt = copy.copy(ground_truth)
        self.cocoGt.anns = {key: self._own(annotation) for key, annotation in ground_truth.anns.items()}
        # Sizes are asked for, but of no use to masks that are run lengths already; panoptic files may lack them.
        for coco in (self.cocoGt, self.cocoDt):
            coco.imgs = {key: {"height": 0, "width": 0, **image} for key, image in coco.imgs.items()}
        super()._prepare()
        # A match with annotation id 0 is taken for none: these private copies, which `gt_dataset` refers to, are counted
        # from 1. super() has just set `ignore` to `iscrowd`; unlike a crowd, a difficult object keeps the usual IoU.
        for number, annotation in enumerate(self.cocoGt.anns.values(), start=1):
            annotation["id"] = number
            annotation["ignore"] = annotation.get("ignore", 0) or annotation.get("difficult", 0)
            if annotation.get("difficult") and not annotation.get("iscrowd", 0):
                annotation["iscrowd"] = 1  # so that it can be found more than once
                self._difficult.setdefault(annotation["image_id"], []).append(annotation)
        self.cocoGt = ground_truth

    def computeIoU(self, imgId: int, catId: int) -> list[float] | np.ndarray:
        """Computes the IoUs of an image's detections and objects; difficult objects are crowds in the matching alone."""
        difficult = self._difficult.get(imgId, [])
        for annotation in difficult:
            annotation["iscrowd"] = 0
        ious = super().computeIoU(imgId, catId)
        for annotation in difficult:
            annotation["iscrowd"] = 1
        return ious

    def _own(self, annotation: dict) -> dict:
        """Copies an annotation; its mask is what the ground truth says, which knows where it is and what is wrong with it."""
        if self.params.iouType == "bbox" or annotation["image_id"] not in self._evaluated:
            return dict(annotation)
        return {**annotation, "segmentation": self.cocoGt.annToRLE(annotation)}


def _say_nothing(text: str) -> None:
    """Takes the progress messages of faster-coco-eval and drops them."""


def _mean(precision: np.ndarray) -> float:
    """Mean over the recall points that exist (others hold -1), or -1 if none does."""
    precision = precision[precision > -1]
    return float(precision.mean()) if precision.size else -1.0
