"""COCO's panoptic format: a JSON with the segments of each image, and for each a PNG of the pixels' segment ids."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.checks import (Problem, header_problems, is_box, is_count, leaves_folder, mask_box_fault,
                             object_faults)
from datasets.coco import read_ground_truth
from datasets.image_io import UnreadableImage, pil_to_rgb_tensor, read_image
from util.errors import InputError
from util.panoptic_ids import rgb_to_ids

__all__ = ["VOID", "ids_of_picture", "is_thing_of", "panoptic_problems", "read_panoptic", "read_segment_ids",
           "segment_problems"]

VOID = 0  # id of pixels that belong to no segment
_LARGEST_ID = 256**3 - 1


def read_panoptic(ann_file: str | os.PathLike) -> dict:
    """Reads a panoptic JSON and checks that it is one.

    Raises:
        InputError: the file is missing, not JSON, lacks a list, or a category says neither thing nor stuff.
    """
    content = read_ground_truth(ann_file)
    is_thing_of(content, ann_file)
    return content


def is_thing_of(content: dict, ann_file: str | os.PathLike) -> dict[int, bool]:
    """Returns whether each category id is a thing (countable objects) rather than stuff.

    Args:
        content: dict with the list "categories" of a panoptic file.
        ann_file: that file, for messages.

    Raises:
        InputError: a category doesn't say.
    """
    for category in content["categories"]:
        if category.get("isthing") not in (0, 1):
            raise InputError(f"category id {category['id']} of {ann_file} has no isthing, 1 for a thing and 0 for "
                             "stuff: is it a panoptic file?")
    return {category["id"]: bool(category["isthing"]) for category in content["categories"]}


def read_segment_ids(
    path: Path, size: tuple[int, int] | None, where: str, position: int | None = None
) -> tuple[np.ndarray | None, Problem | None]:
    """Decodes the picture of an image's segment ids.

    Args:
        path: PNG file; a pixel's id is red + 256 green + 256² blue.
        size: (height, width) of the image; None for any.
        where: what names the image in sentences.
        position: place of the annotation in its file.

    Returns:
        The ids, int32 [H, W], and None; or None and what is wrong, a fatal problem.
    """
    try:
        picture, found = read_image(path)
    except UnreadableImage as error:
        return None, Problem("image_file", str(error), f"({where})", annotation=position)
    if size is not None and found != tuple(size):
        return None, Problem("image_size", f"segment file {path}", f"is {found[1]}x{found[0]} pixels, but {where} is "
                             f"{size[1]}x{size[0]}", annotation=position)
    return rgb_to_ids(picture.permute(1, 2, 0).numpy()), None


def ids_of_picture(picture: Image.Image) -> np.ndarray:
    """Returns the segment ids, int32 [H, W], of an opened PNG."""
    return rgb_to_ids(pil_to_rgb_tensor(picture).permute(1, 2, 0).numpy())


def panoptic_problems(content: dict, source: str | os.PathLike, num_classes: int) -> Iterator[Problem]:
    """Finds what is wrong in a panoptic JSON without looking at images and PNGs.

    Args:
        content: what `read_panoptic` returns.
        source: file it comes from, for the sentences.
        num_classes: category ids must be below this.
    """
    images, categories, problems = header_problems(content, source)
    yield from problems
    annotated: set[int] = set()
    for position, annotation in enumerate(content["annotations"]):
        fault = _annotation_fault(annotation, images)
        if fault:
            yield Problem("annotation_entry", str(source), fault, annotation=position)
            continue
        image_id = annotation["image_id"]
        if image_id in annotated:
            yield Problem("annotation_id", f"image id {image_id} of {source}", "has two annotations",
                          annotation=position)
            continue
        annotated.add(image_id)
        yield from _entry_problems(annotation, images[image_id], source, categories, num_classes, position)
    for position, image in enumerate(content["images"]):
        if is_count(_id(image)) and images.get(image["id"]) is image and image["id"] not in annotated:
            yield Problem("annotation_entry", f"image id {image['id']} of {source}", "has no annotation",
                          fatal=not annotated, image=position)


def _annotation_fault(annotation: object, images: dict[int, dict]) -> str | None:
    if not isinstance(annotation, dict) or not is_count(annotation.get("image_id")):
        return f"has an annotation without an image_id >= 0: {str(annotation)[:200]}"
    image_id = annotation["image_id"]
    if image_id not in images:
        return f"has an annotation of image id {image_id}, which is not in the file"
    if not isinstance(annotation.get("file_name"), str) or not isinstance(annotation.get("segments_info"), list):
        return f"has an annotation of image id {image_id} without file_name and segments_info"
    if leaves_folder(annotation["file_name"]):
        return (f"has an annotation of image id {image_id} with the file_name {annotation['file_name']!r}, which "
                "leads out of the folder of the PNGs")
    return None


def _entry_problems(
    annotation: dict, image: dict, source: str | os.PathLike, categories: set[int], num_classes: int, position: int
) -> Iterator[Problem]:
    """Finds what is wrong with the segments of one annotation."""
    seen: set[int] = set()
    for number, segment in enumerate(annotation["segments_info"]):
        place = {"annotation": position, "segment": number}
        segment_id = _id(segment)
        if not _is_segment_id(segment_id):
            yield Problem("annotation_entry", f"image id {image['id']} of {source}", "has a segment without an id from "
                          f"1 to {_LARGEST_ID}: {str(segment)[:200]}", **place)
            continue
        where = f"segment id {segment_id} (image id {image['id']}) of {source}"
        if segment_id in seen:
            yield Problem("annotation_id", where, "is not the image's only segment with this id", **place)
        seen.add(segment_id)
        for fault in object_faults(segment, image, categories, num_classes):
            yield Problem.of(fault, where, **place)


def segment_problems(
    ids: np.ndarray, annotation: dict, source: str | os.PathLike, path: Path, position: int | None = None
) -> Iterator[Problem]:
    """Compares the pixels of a PNG with the segments that its annotation lists.

    Args:
        ids: int32 [H, W], see `read_segment_ids`.
        annotation: an entry of a panoptic file's annotations.
        source: that file, for the sentences.
        path: the PNG, likewise.
        position: place of the annotation in the file.
    """
    found = dict(zip(*(values.tolist() for values in np.unique(ids, return_counts=True))))
    found.pop(VOID, None)
    where_image = f"(image id {annotation['image_id']}) of {source}"
    for number, segment in enumerate(annotation["segments_info"]):
        if not _is_segment_id(_id(segment)):
            continue
        where, place = f"segment id {segment['id']} {where_image}", {"annotation": position, "segment": number}
        pixels = found.pop(segment["id"], 0)
        if not pixels:
            yield Problem("segmentation", where, f"has no pixel in {path}", **place)
            continue
        if segment.get("area", pixels) != pixels:
            yield Problem("area", where, f"has the area {segment['area']}, but {pixels} pixels in {path}", fatal=False,
                          cure={"area": pixels}, **place)
        fault = mask_box_fault(ids == segment["id"], segment["bbox"]) if is_box(segment.get("bbox")) else None
        if fault:
            yield Problem.of(fault, where, **place)
    for stray, pixels in found.items():
        yield Problem("stray_pixels", f"{path} (image id {annotation['image_id']} of {source})",
                      f"has {pixels} pixels of id {stray}, which is not among its segments", fatal=False,
                      annotation=position)


def _id(entry: object) -> object:
    return entry.get("id") if isinstance(entry, dict) else None


def _is_segment_id(value: object) -> bool:
    return is_count(value) and VOID < value <= _LARGEST_ID
