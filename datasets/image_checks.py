"""What decoding an image shows to be wrong; each check is made of plain values, so that another process can do it."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from datasets.checks import (Problem, box_faults, draw_segmentation, image_doubts, mask_box_fault,
                             read_labelled_image)
from datasets.image_io import Decoded, UnreadableImage, decode
from datasets.panoptic import read_segment_ids, segment_problems
from datasets.pretext import MIN_IMAGE_SIDE
from datasets.usable_images import UNREADABLE_SHARE
from util.files import shown

__all__ = ["ImageCheck", "InstancesCheck", "PanopticCheck"]


class ImageCheck(NamedTuple):
    """An unlabelled image."""

    path: Path

    def run(self) -> list[Problem]:
        """Decodes the image; returns what is wrong."""
        try:
            decoded = decode(self.path)
        except UnreadableImage as error:
            return [Problem("image_file", str(error), "(pre-training passes over such images, up to "
                            f"{UNREADABLE_SHARE:.0%} of all)", fatal=False)]
        size, where = decoded.size, f"image file {shown(self.path)}"
        if min(size) < MIN_IMAGE_SIDE:
            return [Problem("image_small", where, f"has only {size[1]}x{size[0]} pixels "
                            "(pre-training passes over it)", fatal=False)]
        return [Problem.of(fault, where) for fault in image_doubts(decoded) if fault.kind == "image_range"]


class InstancesCheck(NamedTuple):
    """An image of an instances file.

    Attributes:
        folder: folder of the images.
        source: the file, or what else the annotations come from.
        position: the image entry's place in the file.
        entry: the image entry.
        annotations: the image's annotations with their places in the file.
        masks: whether masks are trained.
        apply_exif: whether images are turned as their EXIF orientation says.
    """

    folder: Path
    source: Path
    position: int
    entry: dict
    annotations: list[tuple[int, dict]]
    masks: bool
    apply_exif: bool = False

    def run(self) -> list[Problem]:
        """Decodes the image and draws the masks; returns what is wrong."""
        decoded, problem = read_labelled_image(self.folder, self.entry, self.source, self.position, self.apply_exif)
        if problem:
            return [problem]
        height, width = decoded.size
        doubts = _doubts(decoded, self.folder, self.entry, self.source, self.position)
        return doubts + [problem for position, annotation in self.annotations
                for problem in self._check_annotation(position, annotation, height, width)]

    def _check_annotation(self, position: int, annotation: dict, height: int, width: int) -> list[Problem]:
        where = f"annotation id {annotation['id']} (image {self.entry['file_name']}) of {self.source}"
        faults = list(box_faults(annotation.get("bbox"), width, height))
        problems = []
        if not {"width", "height"} <= set(self.entry):  # only now the image's size is known
            problems += [Problem.of(fault, where, annotation=position) for fault in faults
                         if fault.kind in ("box_outside", "box_clipped")]
        if not annotation.get("segmentation"):
            return problems
        mask, problem = draw_segmentation(annotation, self.source, height, width, position)
        if problem:
            return [*problems, dataclasses.replace(problem, fatal=self.masks)]
        if all(fault.kind == "box_clipped" for fault in faults):
            fault = mask_box_fault(mask, annotation["bbox"])
            problems += [Problem.of(fault, where, annotation=position)] if fault else []
        return problems


class PanopticCheck(NamedTuple):
    """An image of a panoptic file.

    Attributes:
        folder: folder of the images.
        ann_folder: folder of the PNGs with the segments' ids.
        source: the file.
        position: the image entry's place in the file.
        entry: the image entry.
        annotation_position: the annotation's place in the file.
        annotation: the image's annotation.
        apply_exif: whether images are turned as their EXIF orientation says.
    """

    folder: Path
    ann_folder: Path
    source: Path
    position: int
    entry: dict
    annotation_position: int
    annotation: dict
    apply_exif: bool = False

    def run(self) -> list[Problem]:
        """Decodes the image and the PNG; returns what is wrong."""
        decoded, image_problem = read_labelled_image(self.folder, self.entry, self.source, self.position,
                                                     self.apply_exif)
        path = self.ann_folder / self.annotation["file_name"]
        ids, ids_problem = read_segment_ids(path, None if decoded is None else decoded.size,
                                            f"image id {self.entry['id']} of {self.source}", self.annotation_position)
        if image_problem or ids_problem:
            return [problem for problem in (image_problem, ids_problem) if problem]
        return (_doubts(decoded, self.folder, self.entry, self.source, self.position)
                + list(segment_problems(ids, self.annotation, self.source, path, self.annotation_position)))


def _doubts(decoded: Decoded, folder: Path, entry: dict, source: Path, position: int) -> list[Problem]:
    where = f"image file {shown(folder / entry['file_name'])} (image id {entry['id']} of {source})"
    return [Problem.of(fault, where, image=position) for fault in image_doubts(decoded)]
