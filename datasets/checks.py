"""What can be wrong with labelled data: training stops at the first fatal problem, `tools.check_data` lists all."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_codec

from datasets.image_io import Decoded, UnreadableImage, decode
from util.errors import InputError
from util.files import shown

__all__ = [
    "KINDS", "Fault", "Problem", "box_faults", "class_names", "decode_segmentation", "draw_segmentation",
    "encode_segmentation", "ground_truth_problems", "header_problems", "image_doubts", "image_entry_problems", "is_box", "is_count",
    "leaves_folder", "mask_box_fault", "object_faults", "raise_first", "read_labelled_image", "segmentation_rle",
]

# Every kind of problem, and what it means.
KINDS = {
    "json": "an annotation file or a folder that is missing or not what it should be",
    "image_entry": "an image without a usable id, file name or size",
    "image_id": "two images with one id",
    "file_name": "two images with one file",
    "image_file": "an image that is missing or cannot be decoded",
    "image_size": "an image file of another size than annotated",
    "image_range": "a 16- or 32-bit image whose numbers don't go with the range of their type",
    "image_orientation": "an image file with an EXIF orientation that is not applied",
    "image_small": "an image too small to pre-train on",
    "category_entry": "a category whose id or name another one has",
    "annotation_entry": "an annotation without a usable id, or of an unknown image",
    "annotation_id": "two annotations with one id",
    "category": "an object of an unknown category",
    "num_classes": "a category beyond the model's classes",
    "box": "a box that is not four numbers, or has a negative side",
    "box_empty": "a box without area",
    "box_outside": "a box outside its image",
    "box_clipped": "a box that reaches over its image's edge by more than a pixel",
    "area": "an area that is not a number, or not the segment's",
    "iscrowd": "a crowd mark that is neither 0 nor 1",
    "segmentation": "a mask that is missing, empty or cannot be drawn",
    "mask_box": "a mask and a box that don't match",
    "stray_pixels": "pixels of a panoptic picture that belong to no segment",
    "no_objects": "a part of the set without a single object to learn from or to evaluate on",
    "num_queries": "an image with more objects than the model has queries",
}

# A box may reach over the edge by so many pixels, and miss its mask's by the larger of so many and a share of its side.
_OVERHANG = 1.0
_MASK_SLACK, _MASK_SLACK_SHARE = 2.0, 0.1
_LARGEST_COORDINATE = 1e5  # of a polygon, in pixels
_LARGEST_NUMBER = 1e15
_LONGEST_SENTENCE = 1000


class Fault(NamedTuple):
    """What is wrong with an entry, whatever file it is in; see `Problem`."""

    kind: str
    text: str
    fatal: bool = True
    cure: dict | None = None


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: a key of `KINDS`.
        where: the file and the id.
        fault: what is wrong there.
        fatal: whether training refuses it; if not, the object is left out, or only doubtful.
        image: position in the file's list of images, where it concerns an image.
        annotation: position in its list of annotations, where it concerns an annotation.
        segment: position in that annotation's `segments_info`, where it concerns a panoptic segment.
        cure: fields of the entry that would mend it.
    """

    kind: str
    where: str
    fault: str
    fatal: bool = True
    image: int | None = None
    annotation: int | None = None
    segment: int | None = None
    cure: dict | None = None

    @classmethod
    def of(cls, fault: Fault, where: str, **place: int | None) -> "Problem":
        """The problem that an entry with this fault is; `place` gives its positions."""
        return cls(fault.kind, where, fault.text, fault.fatal, cure=fault.cure, **place)

    @property
    def sentence(self) -> str:
        """The whole sentence, on one line whatever the names in it hold."""
        sentence = printable(f"{self.where} {self.fault}".rstrip())
        return sentence if len(sentence) <= _LONGEST_SENTENCE else sentence[:_LONGEST_SENTENCE] + "…"


def class_names(ground_truth: dict) -> dict[int, str]:
    """Returns the class name of each category id (the id itself where there is no name), by ascending id."""
    names = {category["id"]: printable(str(category.get("name", category["id"])))
             for category in ground_truth["categories"]}
    return dict(sorted(names.items()))


def printable(text: str) -> str:
    """Returns a text on one line, with what can't be encoded (lone surrogates) escaped."""
    return text if text.isprintable() else " ".join(text.split()).encode("utf-8", "backslashreplace").decode()


def raise_first(problems: Iterable[Problem]) -> list[Problem]:
    """Raises `InputError` for the first fatal problem; returns the others."""
    passed = []
    for problem in problems:
        if problem.fatal:
            raise InputError(problem.sentence)
        passed.append(problem)
    return passed


def ground_truth_problems(
    ground_truth: dict, source: str | os.PathLike, num_classes: int, need_masks: bool = False
) -> Iterator[Problem]:
    """Finds what is wrong in an instances file without looking at the images.

    Args:
        ground_truth: COCO dict.
        source: file it comes from, for the sentences.
        num_classes: category ids must be below this.
        need_masks: whether every annotation must have a segmentation.
    """
    images, categories, problems = header_problems(ground_truth, source)
    yield from problems
    if need_masks:
        yield from _unsized_images(ground_truth["images"], images, source)
    seen: set[int] = set()
    for position, annotation in enumerate(ground_truth["annotations"]):
        if not isinstance(annotation, dict) or not is_count(annotation.get("id")):
            yield Problem("annotation_entry", str(source),
                          f"has an annotation without an id >= 0: {str(annotation)[:200]}", annotation=position)
            continue
        where, image_id = f"annotation id {annotation['id']} of {source}", annotation.get("image_id")
        if not is_count(image_id) or image_id not in images:
            yield Problem("annotation_entry", where, f"belongs to image id {image_id!r}, which is not in the file",
                          annotation=position)
            continue
        image = images[image_id]
        where = f"annotation id {annotation['id']} (image {image['file_name']}) of {source}"
        if annotation["id"] in seen:
            yield Problem("annotation_id", where, "is not the only annotation with this id", annotation=position)
        seen.add(annotation["id"])
        for fault in object_faults(annotation, image, categories, num_classes):
            yield Problem.of(fault, where, annotation=position)
        segmentation = annotation.get("segmentation")
        if need_masks and not (isinstance(segmentation, (list, dict)) and segmentation):
            yield Problem("segmentation", where, "has no segmentation, which --masks needs", annotation=position)


def header_problems(content: dict, source: str | os.PathLike) -> tuple[dict[int, dict], set[int], list[Problem]]:
    """Returns the usable image entries by id, the category ids, and what is wrong with images and categories.

    Args:
        content: a COCO or panoptic dict.
        source: file it comes from, for the sentences.
    """
    images, problems = image_entry_problems(content["images"], source)
    problems += _category_problems(content["categories"], source)
    return images, {category["id"] for category in content["categories"]}, problems


def image_entry_problems(images: list, source: str | os.PathLike) -> tuple[dict[int, dict], list[Problem]]:
    """Returns the usable image entries by id, and what is wrong with the others.

    Args:
        images: the list "images" of a COCO or panoptic file.
        source: file it comes from, for the sentences.
    """
    by_id: dict[int, dict] = {}
    files: dict[str, int] = {}
    problems = []
    for position, image in enumerate(images):
        if not isinstance(image, dict) or not is_count(image.get("id")):
            problems.append(Problem("image_entry", str(source), f"has an image without an id >= 0: {str(image)[:200]}",
                                    image=position))
            continue
        where = f"image id {image['id']} of {source}"
        sides = [image[name] for name in ("width", "height") if name in image]
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            problems.append(Problem("image_entry", where, "has no file_name", image=position))
        elif leaves_folder(image["file_name"]):
            problems.append(Problem("image_entry", where, f"has the file_name {image['file_name']!r}, which leads out "
                                    "of the image folder", image=position))
        elif not all(_is_number(side) and side >= 1 and side == int(side) for side in sides):
            problems.append(Problem("image_entry", where, f"has the size "
                                    f"{image.get('width')!r}x{image.get('height')!r}, "
                                    "not two positive whole numbers", image=position))
        elif image["id"] in by_id:
            problems.append(Problem("image_id", where, "is not the only image with this id", image=position))
        else:
            by_id[image["id"]] = image
            first = files.setdefault(image["file_name"], image["id"])
            if first != image["id"]:
                problems.append(Problem("file_name", where, f"shows the same file {image['file_name']} as image id "
                                        f"{first}", fatal=False, image=position))
    if not images:
        problems.append(Problem("image_entry", str(source), "lists no images"))
    return by_id, problems


def _unsized_images(entries: list, images: dict[int, dict], source: str | os.PathLike) -> Iterator[Problem]:
    """Finds usable image entries that don't say the image's size."""
    usable = {id(image) for image in images.values()}
    for position, entry in enumerate(entries):
        if id(entry) in usable and not {"width", "height"} <= set(entry):
            yield Problem("image_entry", f"image id {entry['id']} of {source}",
                          "has no width and height, which --masks needs", image=position)


def _category_problems(categories: list[dict], source: str | os.PathLike) -> Iterator[Problem]:
    """Finds categories whose id or name another one has."""
    for field in ("id", "name"):
        counts = Counter(str(category.get(field, category["id"])) for category in categories)
        for category in categories:
            value = str(category.get(field, category["id"]))
            if counts[value] > 1:
                yield Problem("category_entry", f"category id {category['id']} of {source}",
                              f"is not the only category with the {field} {value}", fatal=False)


def object_faults(entry: dict, image: dict, categories: set[int], num_classes: int) -> Iterator[Fault]:
    """Finds what is wrong with an object's category, box, area and crowd mark.

    Args:
        entry: annotation of an instances file, or segment of a panoptic one.
        image: the entry of its image.
        categories: category ids of the file.
        num_classes: category ids must be below this.
    """
    category, box = entry.get("category_id"), entry.get("bbox")
    if not is_count(category) or category not in categories:
        yield Fault("category", f"has category_id {category!r}, which is not among the categories of the file")
    elif category >= num_classes:
        yield Fault("num_classes",
                    f"has category_id {category}, but the model has {num_classes} classes (--num_classes)")
    yield from box_faults(box, image.get("width"), image.get("height"))
    if "area" in entry and not _is_number(entry["area"]):
        area = {"area": box[2] * box[3]} if is_box(box) else None
        yield Fault("area", f"has the area {entry['area']!r}, not a finite number", cure=area)
    if entry.get("iscrowd", 0) not in (0, 1):
        yield Fault("iscrowd", f"has iscrowd {entry['iscrowd']!r}, neither 0 nor 1")


def box_faults(box: object, width: float | None, height: float | None) -> Iterator[Fault]:
    """Finds what is wrong with a box [x, y, width, height] in an image of a size in pixels, None where not known."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        yield Fault("box", f"has the box {box}, not four finite numbers")
    elif box[2] < 0 or box[3] < 0:
        yield Fault("box", f"has the box {box} with a negative width or height")
    elif box[2] == 0 or box[3] == 0:
        yield Fault("box_empty", f"has the box {box} without area", fatal=False)
    elif width is not None and height is not None:
        yield from _place_faults(box, width, height)
    elif box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
        yield Fault("box_outside", f"has the box {box} outside its image", fatal=False)


def _place_faults(box: list[float], width: float, height: float) -> Iterator[Fault]:
    """Finds whether a box of positive sides lies outside its image or reaches over its edge (see `box_faults`)."""
    x, y, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if x >= width or y >= height or right <= 0 or bottom <= 0:
        yield Fault("box_outside", f"has the box {box} outside its image of {width}x{height} pixels", fatal=False)
    elif max(-x, -y, right - width, bottom - height) > _OVERHANG:
        left, top = max(x, 0), max(y, 0)
        clipped = [left, top, min(right, width) - left, min(bottom, height) - top]
        yield Fault("box_clipped", f"has the box {box} reaching over the edge of its image of {width}x{height} pixels",
                    fatal=False, cure={"bbox": clipped})


def is_box(box: object) -> bool:
    """Whether a JSON value is four numbers that make a box, if perhaps an empty one."""
    return not any(fault.fatal for fault in box_faults(box, None, None))


def read_labelled_image(
    folder: Path, entry: dict, source: str | os.PathLike, position: int | None = None, apply_exif: bool = False
) -> tuple[Decoded | None, Problem | None]:
    """Decodes the image of an entry and compares its size with the one annotated.

    Args:
        folder: folder that the entry's `file_name` is relative to.
        entry: image entry of a COCO or panoptic file; without `width` and `height` any size is right.
        source: that file, for the sentences.
        position: place of the entry in the file.
        apply_exif: turn the image as its EXIF orientation says.

    Returns:
        The image, and None; or None and what is wrong.
    """
    path = folder / entry["file_name"]
    try:
        decoded = decode(path, apply_exif=apply_exif)
    except UnreadableImage as error:
        return None, Problem("image_file", str(error), f"(image id {entry['id']} of {source})", image=position)
    size = decoded.size
    annotated = (entry.get("height", size[0]), entry.get("width", size[1]))
    if annotated != size:
        reason = ""
        if annotated == size[::-1] and (apply_exif or decoded.orientation != 1):
            reason = ("; the file is shown as its EXIF orientation says (--apply_exif)" if apply_exif else
                      f"; the file has the EXIF orientation {decoded.orientation}, which --apply_exif would apply")
        return None, Problem(
            "image_size", f"image file {shown(path)}", f"is {size[1]}x{size[0]} pixels, but image id {entry['id']} of "
            f"{source} says {annotated[1]}x{annotated[0]}{reason}", image=position)
    return decoded, None


def image_doubts(decoded: Decoded) -> Iterator[Fault]:
    """Finds what makes a decoded image doubtful."""
    if decoded.orientation != 1:
        yield Fault("image_orientation", f"has the EXIF orientation {decoded.orientation}, which is not applied: its "
                    "boxes should be those of the pixels as stored (else --apply_exif)", fatal=False)
    if decoded.doubt:
        yield Fault("image_range", decoded.doubt, fatal=False)


def draw_segmentation(
    annotation: dict, source: str | os.PathLike, height: int, width: int, position: int | None = None
) -> tuple[np.ndarray | None, Problem | None]:
    """Draws the mask of an annotation.

    Returns:
        The mask, bool [height, width], and None; or None and what is wrong with it, a fatal problem.
    """
    rle, problem = encode_segmentation(annotation, source, height, width, position)
    return (None, problem) if problem else (mask_codec.decode(rle) > 0, None)


def encode_segmentation(
    annotation: dict, source: str | os.PathLike, height: int, width: int, position: int | None = None
) -> tuple[dict | None, Problem | None]:
    """Like `draw_segmentation`, but returns the mask as compressed run lengths."""
    try:
        return segmentation_rle(annotation["segmentation"], height, width), None
    except Exception as error:  # whatever the JSON holds instead: pycocotools raises plain Exception, too
        return None, Problem(
            "segmentation", f"annotation id {annotation['id']} (image id {annotation['image_id']}) of {source}",
            f"has a segmentation that cannot be drawn on {width}x{height} pixels ({error})", annotation=position)


def decode_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Draws a segmentation: a list of polygons, or run lengths (compressed or not), as bool [height, width].

    Raises:
        as `segmentation_rle`.
    """
    return mask_codec.decode(segmentation_rle(segmentation, height, width)) > 0


def segmentation_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """Returns a segmentation as the compressed run lengths that pycocotools works with.

    Raises:
        ValueError: damaged run lengths, or such for another size or number of pixels; an impossible coordinate. Python
            and pycocotools raise other exceptions for what isn't a segmentation at all.
    """
    if isinstance(segmentation, dict):
        return _run_length_mask(segmentation, height, width)
    if not isinstance(segmentation, list) or not all(isinstance(part, (list, dict)) for part in segmentation):
        raise ValueError(f"it is {str(segmentation)[:50]!r}, neither run lengths nor a list of polygons, each a list "
                         "x, y, x, y, …")
    if segmentation and all(isinstance(part, dict) for part in segmentation):
        return mask_codec.merge([_run_length_mask(part, height, width) for part in segmentation])
    for value in (value for part in segmentation for value in part):
        if not _is_number(value) or abs(value) > _LARGEST_COORDINATE:  # pycocotools would crash the process
            raise ValueError(f"it has the coordinate {value!r}, not a number of pixels")
    polygons = [part for part in segmentation if len(part) >= 6]  # two points beside them enclose nothing
    if not polygons:
        raise ValueError(f"it is {str(segmentation)[:50]!r}, without a polygon of three points")
    return mask_codec.merge(mask_codec.frPyObjects(polygons, height, width))


def _run_length_mask(segmentation: dict, height: int, width: int) -> dict:
    """Returns run lengths, compressed or not, as checked compressed ones."""
    for name in ("size", "counts"):
        if name not in segmentation:
            raise ValueError(f"it has no {name!r}")
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        made_for = "x".join(map(repr, size[::-1])) if isinstance(size, (list, tuple)) else repr(size)
        raise ValueError(f"it is made for {made_for}")
    if not isinstance(counts, (list, str, bytes)):
        raise ValueError(f"its run lengths are {counts!r}")
    counts = counts if isinstance(counts, list) else _run_lengths(counts)
    if not all(_is_number(count) and count >= 0 and count == int(count) for count in counts):
        raise ValueError("its run lengths are not whole numbers from 0 up")
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths make {sum(counts)} pixels")
    return mask_codec.frPyObjects({"size": [height, width], "counts": list(map(int, counts))}, height, width)


def _run_lengths(text: str | bytes) -> list[int]:
    """Unpacks COCO's compressed run lengths, since pycocotools reads outside its memory where they are damaged.

    A character holds 5 bits, the lowest first, and whether another follows; a number is signed, and from the fourth on
    counted from the one two places before.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text if isinstance(text, bytes) else text.encode():
        bits = code - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its run lengths have the character {chr(code)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its run lengths end in the middle of a number")
    return counts


def mask_box_fault(mask: np.ndarray, box: list[float]) -> Fault | None:
    """Compares a mask with the box [x, y, width, height] that goes with it.

    Args:
        mask: bool [H, W].
        box: in pixels; what reaches over the image's edge is left aside.

    Returns:
        None if each side of the box lies within 2 pixels, or a tenth of the box's side if that is more, of the mask's.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Fault("segmentation", "has a segmentation that covers no pixel", fatal=False)
    drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    corners = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]])
    corners = corners.clip(0, np.tile(mask.shape[::-1], 2))
    slack = np.maximum(_MASK_SLACK, _MASK_SLACK_SHARE * np.tile(corners[2:] - corners[:2], 2))
    if (np.abs(drawn - corners) <= slack).all():
        return None
    x0, y0, x1, y1 = drawn.tolist()
    return Fault("mask_box", f"has the box {box}, but its mask's is {[x0, y0, x1 - x0, y1 - y0]}", fatal=False)


def leaves_folder(name: str) -> bool:
    """Whether a path out of a data file, which should be relative to a folder, leads out of it (links aside)."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def is_count(value: object) -> bool:
    """Whether a JSON value is a whole number from 0 up (to what 64 bits hold)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    # Larger numbers than that are nonsense, which arithmetic in 32 bits would make infinite.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER
