"""COCO's matching, precision and recall for all images at once; the numbers are pycocotools', bit for bit.

pycocotools visits each image, class, size range and threshold by itself. Here the objects and detections of one image
and class form a group, groups of like size are laid side by side, and one step matches the k-th best detection of every
group, at every threshold and size range.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["CocoMeasures", "Shapes"]

# Overlaps held at a time, which bounds the memory: some tens of bytes for each, times thresholds and size ranges for
# those of one detection of each group.
_LARGEST_BLOCK = 2**18


@dataclass
class Shapes:
    """Objects, or detections, one after the other.

    Attributes:
        image_ids: int64 [n].
        labels: int64 [n], category ids.
        areas: float64 [n] in pixels.
        outlines: boxes float64 [n, 4] (x, y, width, height), or object [n] of run lengths.
        scores: float64 [n], of detections.
        crowd: bool [n], of objects.
        ignore: bool [n], of objects: finding them is neither right nor wrong.
    """

    image_ids: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    outlines: np.ndarray
    scores: np.ndarray | None = None
    crowd: np.ndarray | None = None
    ignore: np.ndarray | None = None

    def __getitem__(self, which: np.ndarray) -> "Shapes":
        return Shapes(*(None if values is None else values[which] for values in vars(self).values()))


class CocoMeasures(COCOeval):
    """pycocotools' evaluation object with `evaluate` and `accumulate` of its own.

    `params`, `eval` ("precision" [T, R, K, A, M], "recall" [T, K, A, M], "scores"), `summarize` and `stats` are
    pycocotools'; what it keeps of single images (`evalImgs`, `ious`) isn't there. Objects with `difficult: 1` are
    ignored; unlike a crowd they keep the usual IoU. The ground truth stays as it is.

    Args:
        ground_truth: pycocotools' object.
        iou_type: "bbox" or "segm".
    """

    def __init__(self, ground_truth: COCO, iou_type: str) -> None:
        super().__init__(ground_truth, iouType=iou_type)
        self.detections: Shapes | None = None

    def evaluate(self) -> None:
        """Matches `detections` with the objects of the images `params.imgIds`."""
        params = self.params
        params.imgIds, params.catIds = np.unique(params.imgIds).tolist(), np.unique(params.catIds).tolist()
        params.maxDets = sorted(params.maxDets)
        objects, object_groups = self._grouped(self._objects())
        found, groups = self._grouped(self.detections)
        rank = np.arange(len(groups)) - np.searchsorted(groups, groups)  # detections of a group, the best first
        kept = rank < params.maxDets[-1]
        self._found, self._groups, self._rank = found[kept], groups[kept], rank[kept]
        self._object_groups = object_groups
        ranges = np.asarray(params.areaRng, dtype=np.float64)
        outside = lambda areas: (areas < ranges[:, :1]) | (areas > ranges[:, 1:])
        self._ignored_objects = objects.ignore | outside(objects.areas)                            # [A, objects]
        shape = (len(ranges), len(params.iouThrs), len(self._groups))                              # A, T, detections
        self._matched = np.zeros(shape, dtype=bool)
        self._ignored = np.zeros_like(self._matched)
        for block in self._blocks():
            self._match(block, objects)
        self._ignored |= ~self._matched & outside(self._found.areas)[:, None]

    def accumulate(self, p: object = None) -> None:
        """Makes `eval`: precision at each recall, for thresholds, classes, size ranges and numbers of detections."""
        params = self.params
        classes = len(params.catIds) if params.useCats else 1
        shape = (len(params.iouThrs), len(params.recThrs), classes, len(params.areaRng), len(params.maxDets))
        precision, scores = -np.ones(shape), -np.ones(shape)
        recall = -np.ones((shape[0], *shape[2:]))
        for k in range(shape[2]):
            ends = np.array([k, k + 1]) * len(params.imgIds)
            mine, objects = (slice(*np.searchsorted(groups, ends)) for groups in (self._groups, self._object_groups))
            by_score = mine.start + np.argsort(-self._found.scores[mine], kind="stable")
            wanted = (~self._ignored_objects[:, objects]).sum(axis=1)
            for m, most in enumerate(params.maxDets):
                order = by_score[self._rank[by_score] < most]
                for a in np.flatnonzero(wanted):
                    counted = ~self._ignored[a][:, order]
                    right = self._matched[a][:, order] & counted
                    curves = _precision_curves(right, counted, wanted[a], np.asarray(params.recThrs))
                    recall[:, k, a, m], precision[:, :, k, a, m], reached = curves
                    scores[:, :, k, a, m] = np.append(self._found.scores[order], 0)[reached]
        self.eval = {"params": params, "counts": list(shape), "precision": precision, "recall": recall,
                     "scores": scores}

    def _objects(self) -> Shapes:
        """Lays out the ground truth of the images that are evaluated."""
        annotations = [ann for image_id in self.params.imgIds for ann in self.cocoGt.imgToAnns.get(image_id, ())]
        column = lambda name, kind: np.array([ann.get(name, 0) for ann in annotations], dtype=kind)
        crowd = column("iscrowd", bool)
        if self.params.iouType == "bbox":
            outlines = np.array([ann["bbox"] for ann in annotations], dtype=np.float64).reshape(-1, 4)
        else:
            outlines = np.empty(len(annotations), dtype=object)
            outlines[:] = [self.cocoGt.annToRLE(ann) for ann in annotations]
        return Shapes(column("image_id", np.int64), column("category_id", np.int64), column("area", np.float64),
                      outlines, crowd=crowd, ignore=crowd | column("difficult", bool))

    def _grouped(self, shapes: Shapes) -> tuple[Shapes, np.ndarray]:
        """Keeps what is of known images and classes; sorts by class, then image, then score.

        Returns:
            The shapes, and their groups: place of the class (0 with `useCats` off) × number of images + place of the
            image, int64 [n].
        """
        images, labels = np.asarray(self.params.imgIds, np.int64), np.asarray(self.params.catIds, np.int64)
        shapes = shapes[np.isin(shapes.image_ids, images) & np.isin(shapes.labels, labels)]
        groups = np.searchsorted(images, shapes.image_ids)
        if self.params.useCats:
            groups += np.searchsorted(labels, shapes.labels) * len(images)
        keys = [shapes.labels, groups] if shapes.scores is None else [shapes.labels, -shapes.scores, groups]
        order = np.lexsort(keys)
        return shapes[order], groups[order]

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yields groups that have objects and detections, of like size together, the most detections first.

        Each is int64 [4, g]: first object, number of objects, first detection, number of detections.
        """
        groups, first, objects = np.unique(self._object_groups, return_index=True, return_counts=True)
        start = np.searchsorted(self._groups, groups)
        number = np.searchsorted(self._groups, groups, side="right") - start
        table = np.stack([first, objects, start, number])[:, number > 0]
        size = np.ceil(np.log2(table[1]))
        for width in np.unique(size):
            alike = table[:, size == width]
            alike = alike[:, np.argsort(-alike[3], kind="stable")]
            while alike.shape[1]:
                count = max(1, _LARGEST_BLOCK // int(alike[3, 0] * 2**width))
                yield alike[:, :count]
                alike = alike[:, count:]

    def _match(self, block: np.ndarray, objects: Shapes) -> None:
        """Gives every detection of some groups, the best first, the free object that it overlaps most.

        An object that counts is preferred to one that is ignored; crowds stay free; of equal overlaps the last wins.
        """
        first, number, start, length = block
        slots = np.arange(number.max())
        present = slots < number[:, None]                                        # [g, n]
        member = np.where(present, first[:, None] + slots, first[:, None])
        overlaps = self._overlaps(block, objects, member)                        # [g, detections, n]
        overlaps[~present[:, None].repeat(overlaps.shape[1], axis=1)] = -1
        ignore = self._ignored_objects[:, member].transpose(1, 0, 2)[:, :, None]  # [g, A, 1, n]
        crowd = objects.crowd[member][:, None, None]
        thresholds = np.minimum(self.params.iouThrs, 1 - 1e-10)[:, None]         # [T, 1]
        taken = np.zeros((len(first), len(self.params.areaRng), len(thresholds), len(slots)), dtype=bool)
        best_overlap = overlaps.max(axis=2)
        for k in range(length[0]):
            near = np.flatnonzero((length > k) & (best_overlap[:, k] >= thresholds.min()))
            if not len(near):
                continue
            overlap = overlaps[near, k][:, None, None]
            free = (overlap >= thresholds) & (~taken[near] | crowd[near])        # [near, A, T, n]
            counting = free & ~ignore[near]
            candidates = np.where(counting.any(-1, keepdims=True), counting, free)
            best = len(slots) - 1 - np.where(candidates, overlap, -1)[..., ::-1].argmax(-1)
            chosen = candidates & (slots == best[..., None])
            taken[near] |= chosen
            self._matched[:, :, start[near] + k] = chosen.any(-1).transpose(1, 2, 0)
            self._ignored[:, :, start[near] + k] = (chosen & ignore[near]).any(-1).transpose(1, 2, 0)

    def _overlaps(self, block: np.ndarray, objects: Shapes, member: np.ndarray) -> np.ndarray:
        """Returns the IoU of the detections of some groups with their objects [g, n], float64 [g, detections, n]."""
        first, number, start, length = block
        steps = np.minimum(np.arange(length[0]), length[:, None] - 1)
        if self.params.iouType == "bbox":
            return _box_overlaps(self._found.outlines[start[:, None] + steps][:, :, None],
                                 objects.outlines[member][:, None], objects.crowd[member][:, None])
        overlaps = np.zeros((*steps.shape, member.shape[1]))
        for place, (from_object, objects_here, from_found, found_here) in enumerate(block.T):
            theirs = slice(from_object, from_object + objects_here)
            overlaps[place, :found_here, :objects_here] = mask_codec.iou(
                self._found.outlines[from_found:from_found + found_here].tolist(), objects.outlines[theirs].tolist(),
                objects.crowd[theirs].tolist())
        return overlaps


def _box_overlaps(found: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU of boxes [..., 4] (x, y, width, height), in pycocotools' order of operations; of a crowd, the share of the
    detection that lies in it."""
    sides = (np.minimum(found[..., :2] + found[..., 2:], objects[..., :2] + objects[..., 2:])
             - np.maximum(found[..., :2], objects[..., :2])).clip(min=0)
    shared = sides[..., 0] * sides[..., 1]
    area = found[..., 2] * found[..., 3]
    union = np.where(crowd, area, area + objects[..., 2] * objects[..., 3] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def _precision_curves(
    right: np.ndarray, counted: np.ndarray, wanted: int, recalls: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes precision-recall curves.

    Args:
        right: bool [T, n], whether a detection found an object; the best scores first.
        counted: bool [T, n], whether it is right or wrong at all.
        wanted: number of objects.
        recalls: float64 [R], where to read precision.

    Returns:
        Recall at the end [T]; the best precision at each recall or beyond it [T, R], 0 where it isn't reached; and
        which detection reached that recall [T, R], -1 where none did.
    """
    hits = right.cumsum(axis=1).astype(np.float64)
    misses = (counted & ~right).cumsum(axis=1).astype(np.float64)
    recall, precision = hits / wanted, hits / (misses + hits + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.stack([np.searchsorted(row, recalls, side="left") for row in recall])
    beyond = reached == recall.shape[1]
    padded = np.append(precision, np.zeros((len(precision), 1)), axis=1)
    final = recall[:, -1] if recall.shape[1] else np.zeros(len(recall))
    return final, np.take_along_axis(padded, reached, axis=1), np.where(beyond, -1, reached)
