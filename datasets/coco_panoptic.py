"""COCO-format panoptic data: things and stuff as segments of every image (Kirillov et al., 2019)."""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from torch import Tensor

from datasets import coco
from datasets.checks import image_entry_problems, raise_first
from datasets.coco import (DetectionDataset, check_ground_truth, class_names, forget_files, image_folder,
                           index_instances, locate, make_coco_transforms, num_classes_of, read_ground_truth,
                           report_left_out, training_categories, transform_sizes)
from datasets.image_io import read_sizes
from datasets.panoptic import is_thing_of, panoptic_problems, read_panoptic, read_segment_ids
from util import recipes
from util.box_ops import masks_to_boxes
from util.distributed import print_main
from util.errors import InputError

__all__ = ["CocoPanoptic", "build", "is_thing_map", "num_classes_and_names", "paths"]


def build(image_set: str, args: argparse.Namespace, augment: bool = True) -> "CocoPanoptic":
    """Builds the panoptic data set of `args`.

    Reads `coco_path`, `coco_panoptic_path`, `train_images`, `train_annotations`, `val_images`, `val_annotations` and
    `masks` where they are there, `eval`, `seed`, `num_classes` and the sizes.

    Boxes of COCO's validation set are evaluated on its objects, as published numbers are, where
    `annotations/instances_val2017.json` lies in `coco_path`; otherwise on all segments, stuff too.

    Args:
        image_set: "train" or "val".
        args: parsed flags.
        augment: False prepares training images as evaluation does.

    Raises:
        InputError: something in the folders or the annotations is missing or wrong.
    """
    args = recipes.settled(args)
    ann_folder, ann_file = paths(image_set, args)
    num_classes = args.num_classes if args.num_classes is not None else num_classes_and_names(args)[0]
    transforms = make_coco_transforms(image_set if augment else "val", **transform_sizes(args))
    training = image_set == "train" and augment
    dataset = CocoPanoptic(image_folder(image_set, args), ann_folder, ann_file, transforms,
                           getattr(args, "masks", False), seed=args.seed, num_classes=num_classes, training=training,
                           apply_exif=bool(getattr(args, "apply_exif", False)))
    if training:
        forget_files()
    if image_set == "val" and args.coco_path and not getattr(args, "val_annotations", None):
        dataset.instances = _read_instances(Path(args.coco_path) / "annotations" / "instances_val2017.json", dataset)
    if image_set == "val" and dataset.return_masks:
        _check_categories(dataset, args)
    return dataset


def num_classes_and_names(args: argparse.Namespace) -> tuple[int, dict[int, str]]:
    """`datasets.coco.num_classes_and_names`, of things and stuff."""
    return coco.num_classes_and_names(args, _ann_file)


def is_thing_map(args: argparse.Namespace) -> dict[int, bool]:
    """Reads which category ids of the training annotations are things (countable objects); the others are stuff.

    Raises:
        InputError: the annotations are missing or broken.
    """
    ann_file, categories = training_categories(args, _ann_file)
    return is_thing_of(categories, ann_file)


class CocoPanoptic(DetectionDataset):
    """A panoptic data set; samples as in `DetectionDataset`, with an object for every segment, of things and of stuff.

    Crowd segments are among the targets, and with masks the boxes are those of the masks (the outermost pixels' indices),
    as in DETR's program; without masks they are the JSON's. Images without annotation are left out.

    Args:
        img_folder: folder of the images.
        ann_folder: folder of the PNGs with the segments' ids; looked into only for masks.
        ann_file: panoptic JSON.
        transforms: callable `(image, target, rng)`, or None; see `DetectionDataset`.
        return_masks: whether targets hold `masks`.
        seed: seed of the run.
        num_classes: number of classes of the model; None for the highest category id + 1.
        training: whether this is for training or for evaluation.
        apply_exif: turn images, not the PNGs, as their EXIF orientation says.

    Attributes:
        coco: the segments as a COCO ground truth, numbered anew from 1, each with its `segment_id`; their masks are
            read from the PNGs when an evaluation asks for them.
        instances: another ground truth that boxes and masks are to be evaluated on, or None.
        coco_panoptic_json: the panoptic JSON, and `coco_panoptic_folder` the folder of the PNGs, for the evaluator.

    Raises:
        InputError: a folder is missing, or the JSON is missing, broken or wrong. Reading a sample raises it, with file
            and id, where the image or the PNG is missing, broken or of another size, or a segment has no pixel (in
            training: where too many are so).
    """

    def __init__(
        self,
        img_folder: str | os.PathLike,
        ann_folder: str | os.PathLike,
        ann_file: str | os.PathLike,
        transforms: Callable | None = None,
        return_masks: bool = True,
        *,
        seed: int = 0,
        num_classes: int | None = None,
        training: bool = False,
        apply_exif: bool = False,
    ) -> None:
        if not os.path.isdir(img_folder):
            raise InputError(f"image folder {img_folder} does not exist")
        if return_masks and not os.path.isdir(ann_folder):
            raise InputError(f"folder {ann_folder} of the segments' PNGs does not exist")
        content = read_panoptic(ann_file)
        passed = raise_first(panoptic_problems(content, ann_file, num_classes_of(content, ann_file, num_classes)))
        report_left_out(passed)
        self.coco_panoptic_json, self.coco_panoptic_folder = Path(ann_file), Path(ann_folder)
        self.instances: COCO | None = None
        super().__init__(img_folder, as_ground_truth(content), ann_file, transforms, return_masks, seed=seed,
                         training=training, apply_exif=apply_exif, coco=_Segments(Path(ann_folder), ann_file))

    def get_height_and_width(self, idx: int) -> tuple[int, int]:
        """Returns the size of a sample's image in pixels, as annotated, or as the file says where that is not."""
        entry = self._entry(idx)
        if {"height", "width"} <= set(entry):
            return entry["height"], entry["width"]
        return tuple(read_sizes([self.img_folder / entry["file_name"]], self.apply_exif)[0].tolist())

    def _is_target(self, annotation: dict) -> bool:
        return True

    def _target(self, index: int, height: int, width: int) -> dict[str, Tensor]:
        target = super()._target(index, height, width)
        if self.return_masks:
            target["boxes"] = masks_to_boxes(target["masks"])
        return target

    def _masks(self, index: int, height: int, width: int) -> Tensor:
        """Reads the masks of a sample's objects, bool [n, height, width]."""
        image = self._entry(index)
        ids = torch.from_numpy(_segment_ids(self.coco_panoptic_folder, image, self.source, (height, width)))
        segments = [annotation["segment_id"] for annotation in self._objects_of(index)]
        masks = ids == torch.tensor(segments, dtype=ids.dtype).view(-1, 1, 1)
        for segment_id, there in zip(segments, masks.flatten(1).any(1).tolist()):
            if not there:
                raise InputError(f"segment id {segment_id} (image id {image['id']}) of {self.source} has no pixel in "
                                 f"{self.coco_panoptic_folder / image['segments_file']}")
        return masks


class _Segments(COCO):
    """The segments as a ground truth whose masks lie in the PNGs."""

    def __init__(self, ann_folder: Path, source: str | os.PathLike) -> None:
        super().__init__()
        self.ann_folder = ann_folder
        self.source = source
        self._run_lengths: dict[int, dict] = {}  # by annotation id

    def annToRLE(self, ann: dict) -> dict:
        """Run lengths of a segment's mask; those of all the image's segments are remembered for later evaluations."""
        if ann["id"] not in self._run_lengths:
            image = self.imgs[ann["image_id"]]
            size = (image["height"], image["width"]) if {"height", "width"} <= set(image) else None
            ids = _segment_ids(self.ann_folder, image, self.source, size)
            for segment in self.imgToAnns[image["id"]]:
                mask = np.asfortranarray(ids == segment["segment_id"], dtype=np.uint8)
                self._run_lengths[segment["id"]] = mask_codec.encode(mask)
        return self._run_lengths[ann["id"]]


def _segment_ids(ann_folder: Path, image: dict, source: str | os.PathLike, size: tuple[int, int] | None) -> np.ndarray:
    """Decodes the segment ids, int32 [H, W], of an image entry's PNG, of `size` (height, width), or any for None."""
    ids, problem = read_segment_ids(ann_folder / image["segments_file"], size, f"image id {image['id']} of {source}")
    if problem:
        raise InputError(problem.sentence)
    return ids


def as_ground_truth(content: dict) -> dict:
    """Turns a checked panoptic file into a COCO dict with an annotation for every segment, numbered from 1.

    Returns:
        The dict; its images, those that are annotated, hold the PNG's name as `segments_file`.
    """
    images = {image["id"]: image for image in content["images"]}
    kept, annotations = [], []
    for annotation in content["annotations"]:
        kept.append({**images[annotation["image_id"]], "segments_file": annotation["file_name"]})
        for segment in annotation["segments_info"]:
            box = segment["bbox"]
            annotations.append({
                "id": len(annotations) + 1, "segment_id": segment["id"], "image_id": annotation["image_id"],
                "category_id": segment["category_id"], "bbox": box, "area": segment.get("area", box[2] * box[3]),
                "iscrowd": segment.get("iscrowd", 0)})
    return {"images": kept, "annotations": annotations, "categories": content["categories"]}


def _read_instances(ann_file: Path, dataset: CocoPanoptic) -> COCO | None:
    """Reads COCO's own objects of the images of `dataset`, if they are there and belong to it."""
    if not os.path.isfile(ann_file):
        return None
    content = read_ground_truth(ann_file)
    things = {number for number, is_thing in is_thing_of(dataset.coco.dataset, dataset.source).items() if is_thing}
    images, _ = image_entry_problems(content["images"], ann_file)
    if not (set(images) >= set(dataset.ids) and set(class_names(content)) <= things):
        print_main(f"{ann_file} has other images or classes than {dataset.source}: boxes are evaluated on the segments")
        return None
    check_ground_truth(content, ann_file, num_classes_of(content, ann_file), need_masks=dataset.return_masks)
    return index_instances(content, ann_file)


def _check_categories(dataset: CocoPanoptic, args: argparse.Namespace) -> None:
    """Raises InputError if panoptic maps may hold a category of the training that their ground truth doesn't list."""
    listed = {category["id"] for category in dataset.coco.dataset["categories"]}
    ann_file, trained = training_categories(args, _ann_file)
    for category in trained["categories"]:
        if category["id"] not in listed:
            raise InputError(f"category id {category['id']} of {ann_file} is missing among the categories of "
                             f"{dataset.source}; list it there, even if no segment is of it")


def _ann_file(image_set: str, args: argparse.Namespace) -> Path | None:
    return locate(args, "coco_panoptic_path", f"{image_set}_annotations", f"annotations/panoptic_{image_set}2017.json")


def paths(image_set: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the folder of the PNGs and the panoptic file of an image set.

    The PNGs lie in a folder that is named as the file, beside it, as in COCO's archive, or in `coco_panoptic_path`.

    Raises:
        InputError: no flag says where they are.
    """
    ann_file = _ann_file(image_set, args)
    if ann_file is None:
        raise InputError("--coco_panoptic_path is needed, the folder that holds annotations/panoptic_train2017.json "
                         f"and panoptic_train2017/, or --{image_set}_annotations")
    beside, root = ann_file.with_suffix(""), getattr(args, "coco_panoptic_path", None)
    return beside if os.path.isdir(beside) or not root else Path(root, ann_file.stem), ann_file
