"""A survey of one part of a data set: what its annotations show to be wrong, what is to be decoded, what it holds.

Training stops at the first thing that is wrong; `tools.check_data` shows everything that a survey finds.
"""
from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import coco, coco_panoptic, num_classes_and_names, voc
from datasets.checks import Problem, ground_truth_problems, is_count
from datasets.image_checks import ImageCheck, InstancesCheck, PanopticCheck
from datasets.panoptic import panoptic_problems, read_panoptic
from datasets.pretext import list_images
from util.errors import InputError
from util.files import folder_fault, shown

__all__ = ["Files", "Survey", "find_files", "survey"]

_LEFT_OUT = ("box_empty", "box_outside")  # kinds of problems for which an object is no target


class Files(NamedTuple):
    """Where a part of a data set lies: the folder of its images, and where there are such, its JSON and its PNGs."""

    images: Path
    annotations: Path | None = None
    segments: Path | None = None

    def __str__(self) -> str:
        return (f"images in {self.images}" + (f", segments in {self.segments}" if self.segments else "")
                + (f", annotations in {self.annotations}" if self.annotations else ""))


@dataclass
class Survey:
    """What a part of a data set is, before any image is decoded.

    Attributes:
        problems: what is wrong so far.
        checks: one for each image, whose `run()` decodes it and returns further problems.
        objects: number of objects that are targets, by image; None for images without labels.
        classes: number of such objects by class name.
        crowds: number of crowds that are no targets.
        num_classes: number of classes of the model.
        content: the JSON, None if there is none.
    """

    problems: list[Problem] = field(default_factory=list)
    checks: Sequence[Any] = ()
    objects: list[int] | None = None
    classes: dict[str, int] = field(default_factory=dict)
    crowds: int = 0
    num_classes: int | None = None
    content: dict | None = None

    @property
    def unreadable(self) -> bool:
        """Whether an annotation file or a folder could not be read, so that no image is checked."""
        return any(problem.kind == "json" for problem in self.problems)


def find_files(part: str, args: argparse.Namespace) -> Files:
    """Finds out where "train" or "val" lies; nothing need be there.

    Raises:
        InputError: the flags don't say.
    """
    if args.dataset_file == "coco":
        return Files(*coco.paths(part, args))
    if args.dataset_file == "coco_panoptic":
        segments, annotations = coco_panoptic.paths(part, args)
        return Files(coco.image_folder(part, args), annotations, segments)
    if args.dataset_file == "voc":
        return Files(voc.devkit(args))
    flag = {"train": "imagenet_path", "val": "imagenet_val_path"}[part]
    if not getattr(args, flag):
        raise InputError(f"--{flag} is needed: a folder tree of images")
    return Files(Path(getattr(args, flag)))


def survey(part: str, files: Files, args: argparse.Namespace) -> Survey:
    """Reads the annotations of a part of a data set.

    Args:
        part: "train" or "val".
        files: where it lies.
        args: as for training: `dataset_file`, the paths, `num_classes`, `num_queries` and `masks`.

    Returns:
        The survey; whatever is wrong is among its problems.
    """
    args = argparse.Namespace(**{**vars(args), "eval": part == "val"})
    found = Survey([Problem("json", f"folder {shown(folder)}", folder_fault(folder))
                    for folder in (files.images, files.segments) if folder and not os.path.isdir(folder)])
    fill = {"coco": _survey_coco, "coco_panoptic": _survey_panoptic, "voc": _survey_voc, "imagenet": _survey_images}
    try:
        fill[args.dataset_file](found, part, files, args)
    except InputError as error:
        found.problems.append(Problem("json", str(error), ""))
    if found.unreadable:
        found.checks = ()  # without its folder every image would be missing
    return found


def _survey_coco(found: Survey, part: str, files: Files, args: argparse.Namespace) -> None:
    found.content = coco.read_ground_truth(files.annotations)
    found.num_classes = args.num_classes or num_classes_and_names(args)[0]
    _survey_instances(found, found.content, files.annotations, files, args)


def _survey_instances(found: Survey, content: dict, source: Path, files: Files, args: argparse.Namespace) -> None:
    found.problems += ground_truth_problems(content, source, found.num_classes, args.masks)
    images = _usable_images(found, content)
    of_image: dict[int, list[tuple[int, dict]]] = {image_id: [] for image_id in images}
    for position, annotation in enumerate(content["annotations"]):
        if isinstance(annotation, dict) and is_count(annotation.get("id")) and is_count(annotation.get("image_id")):
            of_image.get(annotation["image_id"], []).append((position, annotation))
    found.checks = [InstancesCheck(files.images, source, position, entry, of_image[image_id], args.masks,
                                   bool(getattr(args, "apply_exif", False)))
                    for image_id, (position, entry) in images.items()]
    useless = {problem.annotation for problem in found.problems if problem.fatal or problem.kind in _LEFT_OUT}
    objects = {image_id: [annotation for position, annotation in annotations if position not in useless]
               for image_id, annotations in of_image.items()}
    _count_objects(found, content, images, objects, source, args)


def _survey_panoptic(found: Survey, part: str, files: Files, args: argparse.Namespace) -> None:
    source = files.annotations
    found.content = content = read_panoptic(source)
    found.num_classes = args.num_classes or num_classes_and_names(args)[0]
    found.problems += panoptic_problems(content, source, found.num_classes)
    images = _usable_images(found, content)
    broken = {problem.annotation for problem in found.problems if problem.segment is None}
    useless = {(problem.annotation, problem.segment) for problem in found.problems
               if problem.fatal or problem.kind in _LEFT_OUT}
    checks, objects = [], {}
    for position, annotation in enumerate(content["annotations"]):
        if position not in broken:
            image_id = annotation["image_id"]
            checks.append(PanopticCheck(files.images, files.segments, source, *images[image_id], position, annotation,
                                        bool(getattr(args, "apply_exif", False))))
            objects[image_id] = [segment for number, segment in enumerate(annotation["segments_info"])
                                 if (position, number) not in useless]
    found.checks = checks
    annotated = {image_id: image for image_id, image in images.items() if image_id in objects}
    _count_objects(found, content, annotated, objects, source, args)


def _survey_voc(found: Survey, part: str, files: Files, args: argparse.Namespace) -> None:
    root = files.images
    names = dict(enumerate(voc.names_of(voc.find_pictures(root, voc.naming_part(args))[0]), start=1))
    pictures, problems = voc.find_pictures(root, part)
    found.num_classes = args.num_classes or len(names) + 1
    found.problems += [*problems, *voc.class_problems(pictures, names)]
    _survey_instances(found, voc.as_coco(pictures, names), root, files, args)


def _survey_images(found: Survey, part: str, files: Files, args: argparse.Namespace) -> None:
    if not found.unreadable:
        found.checks = [ImageCheck(files.images / path) for path in list_images(files.images)]


def _usable_images(found: Survey, content: dict) -> dict[int, tuple[int, dict]]:
    """Returns place and entry of each image that training could use, by id."""
    broken = {problem.image for problem in found.problems if problem.fatal}
    return {entry["id"]: (position, entry) for position, entry in enumerate(content["images"])
            if position not in broken}


def _count_objects(found: Survey, content: dict, images: dict[int, tuple[int, dict]], objects: dict[int, list[dict]],
                   source: Path, args: argparse.Namespace) -> None:
    """Counts the objects of each class and image, and compares them with the number of queries."""
    names = coco.class_names(content)
    counts: Counter = Counter()
    found.objects = []
    with_crowds = args.dataset_file == "coco_panoptic" and not args.eval  # a panoptic training learns crowds too
    for image_id, (position, entry) in images.items():
        mine = objects.get(image_id, [])
        targets = [item for item in mine if with_crowds or not item.get("iscrowd")]
        found.crowds += len(mine) - len(targets)
        counts.update(names[item["category_id"]] for item in targets)
        found.objects.append(len(targets))
        if len(targets) > args.num_queries:
            found.problems.append(Problem(
                "num_queries", f"image id {image_id} ({entry['file_name']}) of {source}",
                f"has {len(targets)} objects, but the model has {args.num_queries} queries (--num_queries)", fatal=False,
                image=position))
    found.classes = {name: counts[name] for name in names.values()}
    if not any(found.objects) and not any(problem.fatal for problem in found.problems):
        found.problems.append(Problem("no_objects", str(source), f"has no object to learn from or to evaluate on: of "
                                      f"{sum(map(len, objects.values()))} usable objects in {len(images)} images "
                                      f"{found.crowds} are crowds", fatal=not args.eval))
