"""Panoptic quality, exact under any number of processes (Kirillov et al., Panoptic Segmentation, 2019, section 4)."""
from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.coco import class_names
from datasets.panoptic import VOID, ids_of_picture, is_thing_of, read_panoptic, read_segment_ids
from util.distributed import all_gather, is_main_process, print_main
from util.errors import InputError

__all__ = ["PanopticEvaluator", "match_segments"]

# Counts of a category: sum of the IoUs of its true positives, their number, false positives, false negatives.
Tally = tuple[float, int, int, int]


class PanopticEvaluator:
    """Compares panoptic predictions with the ground truth, image by image as they come.

    Only images that were given to `update` count. Of each only the tallies of its categories are kept, a few numbers,
    so that memory stays flat and processes have little to exchange. The results are those of the official `panopticapi`
    wherever its input is sound: areas are counted in pixels here, not read from the JSON.

    Args:
        ann_file: panoptic JSON.
        ann_folder: folder of its PNGs.
        output_dir: folder to write the predictions to, in the format that COCO's server and `panopticapi` take: a PNG
            for each image, and `predictions.json`, which `summarize` writes; None or "" writes nothing.

    Raises:
        InputError: the folder or the file is missing or broken.
    """

    def __init__(
        self, ann_file: str | os.PathLike, ann_folder: str | os.PathLike, output_dir: str | os.PathLike | None = None
    ) -> None:
        content = read_panoptic(ann_file)
        if not os.path.isdir(ann_folder):
            raise InputError(f"folder {ann_folder} of the segments' PNGs does not exist")
        self.ann_file, self.ann_folder = ann_file, Path(ann_folder)
        self.output_dir = Path(output_dir) if output_dir else None
        self.is_thing = is_thing_of(content, ann_file)
        self.names = class_names(content)
        self._annotations = {annotation["image_id"]: annotation for annotation in content["annotations"]}
        self._tallies: dict[int, dict[int, Tally]] = {}
        self._written: dict[int, dict] = {}

    def update(self, predictions: Iterable[dict]) -> None:
        """Evaluates predictions; a second one for an image is passed over.

        Args:
            predictions: dicts with `image_id`; `png_string`, the bytes of a PNG of the image's original size whose
                pixels are segment ids (red + 256 green + 256² blue, 0 for none unless listed); `segments_info`, dicts
                with the segments' `id` and `category_id`; and optionally `file_name`, the PNG's name in `output_dir`.

        Raises:
            InputError: the ground truth's PNG is missing or broken, or the prediction can't be written.
            ValueError: an image is not in the ground truth, or a prediction contradicts itself or has another size.
        """
        for prediction in predictions:
            image_id = int(prediction["image_id"])
            if image_id not in self._annotations:
                raise ValueError(f"image id {image_id} is not in the ground truth {self.ann_file}")
            if image_id not in self._tallies:
                self._tallies[image_id] = self._evaluate(image_id, prediction)
                if self.output_dir:
                    self._write(image_id, prediction)

    def synchronize_between_processes(self) -> None:
        """Brings the tallies of all processes together on each of them; every process must call this."""
        tallies, written = {}, {}
        for their_tallies, their_written in all_gather((self._tallies, self._written)):
            tallies = {**their_tallies, **tallies}
            written = {**their_written, **written}
        self._tallies, self._written = tallies, written

    def summarize(self) -> dict[str, dict[str, float]]:
        """Computes the results on every process, and prints their table on the main one.

        Returns:
            For "All", "Things" and "Stuff", the means over the categories that occur in the ground truth or the
            predictions: `pq` (panoptic quality), `sq` (segmentation), `rq` (recognition), 0..1, and their number `n`;
            0 where there are none.
        """
        sums = self._sums()
        groups = {"All": sums, "Things": {number: tally for number, tally in sums.items() if self.is_thing[number]},
                  "Stuff": {number: tally for number, tally in sums.items() if not self.is_thing[number]}}
        results = {}
        print_main(f"{'':8}|{'PQ':>7}{'SQ':>7}{'RQ':>7}{'N':>6}")
        for name, tallies in groups.items():
            qualities = np.array([_quality(tally) for tally in tallies.values()]).reshape(-1, 3)
            pq, sq, rq = qualities.mean(0).tolist() if len(qualities) else (0.0, 0.0, 0.0)
            results[name] = {"pq": pq, "sq": sq, "rq": rq, "n": len(qualities)}
            print_main(f"{name:8}|{100 * pq:7.1f}{100 * sq:7.1f}{100 * rq:7.1f}{len(qualities):6}")
        if self.output_dir and is_main_process():
            annotations = [self._written[image_id] for image_id in sorted(self._written)]
            _write_file(self.output_dir / "predictions.json", json.dumps({"annotations": annotations}).encode())
        return results

    def per_class(self) -> dict[str, tuple[float, float, float]]:
        """Returns PQ, SQ and RQ of each category by name, 0..1, or -1 for one that occurs nowhere."""
        sums = self._sums()
        return {name: _quality(sums[number]) if number in sums else (-1.0, -1.0, -1.0)
                for number, name in self.names.items()}

    def _evaluate(self, image_id: int, prediction: dict) -> dict[int, Tally]:
        annotation = self._annotations[image_id]
        ids, problem = read_segment_ids(self.ann_folder / annotation["file_name"], None,
                                        f"image id {image_id} of {self.ann_file}")
        if problem:
            raise InputError(problem.sentence)
        with Image.open(io.BytesIO(prediction["png_string"])) as picture:
            found_ids = ids_of_picture(picture)
        where = f"panoptic prediction of image id {image_id}"
        if found_ids.shape != ids.shape:
            raise ValueError(f"{where} is {found_ids.shape[1]}x{found_ids.shape[0]} pixels, its ground truth "
                             f"{ids.shape[1]}x{ids.shape[0]}")
        for segment in prediction["segments_info"]:
            if segment["category_id"] not in self.is_thing:
                raise ValueError(f"{where} has category_id {segment['category_id']}, which is not in {self.ann_file}")
        try:
            return match_segments(ids, annotation["segments_info"], found_ids, prediction["segments_info"])
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error

    def _write(self, image_id: int, prediction: dict) -> None:
        name = str(prediction.get("file_name") or self._annotations[image_id]["file_name"])
        path = (self.output_dir / name).with_suffix(".png")
        _write_file(path, prediction["png_string"])
        segments = [{"id": int(segment["id"]), "category_id": int(segment["category_id"])}
                    for segment in prediction["segments_info"]]
        self._written[image_id] = {"image_id": image_id, "file_name": path.relative_to(self.output_dir).as_posix(),
                                   "segments_info": segments}

    def _sums(self) -> dict[int, Tally]:
        """Adds up the tallies of all images, always in the same order, so that the last digit is the same, too."""
        sums: dict[int, Tally] = {}
        for image_id in sorted(self._tallies):
            for category, tally in self._tallies[image_id].items():
                sums[category] = tuple(a + b for a, b in zip(sums.get(category, (0.0, 0, 0, 0)), tally))
        return dict(sorted(sums.items()))


def _write_file(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path} can't be written ({error})") from error


def match_segments(
    truth_ids: np.ndarray, truth: Sequence[dict], found_ids: np.ndarray, found: Sequence[dict]
) -> dict[int, Tally]:
    """Matches the predicted segments of one image with the true ones.

    A pair of one category matches if its IoU is above 0.5, where pixels that are void in the truth don't count. Crowds
    are never matched or missed; a prediction that lies by more than half on void pixels and its category's crowd is
    passed over rather than wrong.

    Args:
        truth_ids: segment ids of the pixels, int [H, W], 0 for void.
        truth: the true segments: dicts with `id`, `category_id` and optionally `iscrowd`.
        found_ids: predicted segment ids, int [H, W], 0 for none unless it is listed in `found`.
        found: the predicted segments: dicts with `id` and `category_id`.

    Returns:
        The tally of each category that has any.

    Raises:
        ValueError: a predicted segment has no pixel, or a pixel has an id that is not listed.
    """
    # Rows: void, the true segments, pixels of unlisted ids. Columns: none, the predicted segments, unlisted ids.
    rows, columns = (_positions(ids, [segment["id"] for segment in segments])
                     for ids, segments in ((truth_ids, truth), (found_ids, found)))
    shape = len(truth) + 2, len(found) + 2
    overlap = np.bincount((rows * shape[1] + columns).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    if overlap[:, -1].any():
        raise ValueError("has pixels whose id is not among its segments")
    areas, void = overlap.sum(0)[1:-1], overlap[0, 1:-1]
    if not areas.all():
        raise ValueError(f"lists segment id {found[int(areas.argmin())]['id']}, which has no pixel")
    true_categories, categories = (np.array([segment["category_id"] for segment in segments], dtype=np.int64)
                                   for segments in (truth, found))
    crowd = np.array([bool(segment.get("iscrowd", 0)) for segment in truth], dtype=bool)
    inside = overlap[1:-1, 1:-1]
    union = overlap.sum(1)[1:-1, None] + (areas - void) - inside
    iou = inside / np.maximum(union, 1)
    matched = (iou > 0.5) & (true_categories[:, None] == categories) & ~crowd[:, None]

    tallies: dict[int, list] = {}

    def count(category: int, place: int, value: float = 1) -> None:
        tallies.setdefault(int(category), [0.0, 0, 0, 0])[place] += value

    for row, column in zip(*matched.nonzero()):
        count(categories[column], 0, float(iou[row, column]))
        count(categories[column], 1)
    for row in np.flatnonzero(~crowd & ~matched.any(1)):
        count(true_categories[row], 3)
    crowd_rows = {int(true_categories[row]): row for row in np.flatnonzero(crowd)}  # the format has one per category
    for column in np.flatnonzero(~matched.any(0)):
        excused = void[column]
        if int(categories[column]) in crowd_rows:
            excused = excused + inside[crowd_rows[int(categories[column])], column]
        if excused / areas[column] <= 0.5:
            count(categories[column], 2)
    return {category: tuple(tally) for category, tally in tallies.items()}


def _positions(ids: np.ndarray, listed: Sequence[int]) -> np.ndarray:
    """Replaces void by 0, each listed id by its place from 1, and every other id by the place after the last.

    Predictions may list 0, DETR's published ones do: it then names a segment, not void.
    """
    table = np.array([*listed, VOID], dtype=np.int64)
    order = table.argsort(kind="stable")
    places = order[np.searchsorted(table, ids, sorter=order).clip(max=len(table) - 1)]
    return np.where(table[places] == ids, (places + 1) % len(table), len(table))


def _quality(tally: Tally) -> tuple[float, float, float]:
    """PQ, SQ and RQ of one category (equation 1)."""
    iou, true_positives, false_positives, false_negatives = tally
    objects = true_positives + 0.5 * false_positives + 0.5 * false_negatives
    return iou / objects, iou / true_positives if true_positives else 0.0, true_positives / objects
