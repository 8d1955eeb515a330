"""Pascal VOC, read directly from its development kit: VOCdevkit/VOC2007 and VOCdevkit/VOC2012."""
from __future__ import annotations

import argparse
import functools
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets.checks import Fault, Problem, leaves_folder, raise_first
from datasets.coco import (DetectionDataset, check_ground_truth, make_coco_transforms, may_know_fewer,
                           transform_sizes)
from datasets.image_io import IMAGE_EXTENSIONS
from datasets.subsets import restriction
from util import recipes
from util.distributed import print_main
from util.errors import InputError
from util.files import folder_fault, open_regular, read_text, shown

__all__ = ["Object", "Picture", "VOC_CLASSES", "VocDetection", "as_coco", "build", "class_problems", "devkit",
           "find_pictures", "names_of", "naming_part", "num_classes_and_names", "read_annotation"]

DIFFICULT_MARKS = ("1", "1.0", "true", "yes")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# The image lists of the usual protocol: trainval of both years to train, the test part of 2007 to evaluate.
_PARTS = {"train": (("VOC2007", "trainval"), ("VOC2012", "trainval")), "val": (("VOC2007", "test"),)}
# The list, of the first that is there, in a folder that itself has ImageSets/Main; and, without lists, the folder.
_OWN_PARTS = {"train": ("trainval", "train"), "val": ("test", "val")}
_PART_FOLDERS = {"train": ("train",), "val": ("val", "valid", "test")}


@dataclass(frozen=True)
class Object:
    """An annotated object; its box is x0, y0, x1, y1 in pixels counted from 0, the ends exclusive."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class Picture:
    """An image by its path in the VOCdevkit, its annotation file and its objects."""

    file_name: str
    annotation: Path
    objects: tuple[Object, ...]


def build(image_set: str, args: argparse.Namespace, augment: bool = True) -> "VocDetection":
    """Builds the VOC data set of `args` (`voc_path`, `eval`, `remove_difficult`, `seed`, `num_classes`, the sizes).

    Args:
        image_set: "train" (trainval of 2007 and 2012) or "val" (test of 2007).
        args: parsed flags.
        augment: False prepares training images as evaluation does.

    Raises:
        InputError: something in the folder is missing or wrong.
    """
    args = recipes.settled(args)
    num_classes, names = num_classes_and_names(args)
    transforms = make_coco_transforms(image_set if augment else "val", **transform_sizes(args))
    return VocDetection(devkit(args), image_set, transforms, names, seed=args.seed, num_classes=num_classes,
                        fewer_classes=may_know_fewer(args),
                        remove_difficult=bool(args.remove_difficult) and image_set == "train",
                        restrict=restriction(image_set, args), training=image_set == "train" and augment,
                        apply_exif=bool(getattr(args, "apply_exif", False)))


def num_classes_and_names(args: argparse.Namespace) -> tuple[int, dict[int, str]]:
    """Returns the number of classes a model for `args` needs, and the class name of each label, from 1 up.

    The labels are VOC's 20 classes in alphabetic order. If the training annotations hold any other name, the set is
    taken for one of the user's own in VOC's layout, and the labels are the names found there, sorted.

    Raises:
        InputError: the folder or a file in it is missing or broken.
    """
    root = devkit(args)
    names = _class_names(root, naming_part(args))
    return args.num_classes or len(names) + 1, dict(enumerate(names, start=1))


class VocDetection(DetectionDataset):
    """Images and boxes of a VOCdevkit; samples as in `DetectionDataset`.

    Boxes are those of the XML files with the left and upper edge one pixel lower (VOC counts pixels from 1 and includes
    the last one). In `coco`, objects marked difficult carry `difficult: 1`, which `CocoEvaluator` ignores. The sizes in
    the XML files are not used, since some of VOC2012's are wrong.

    Args:
        root: the VOCdevkit folder.
        image_set: "train" or "val".
        transforms: callable `(image, target, rng)`, or None.
        names: class name of each label.
        seed: seed of the run.
        num_classes: number of classes of the model; None for the highest label + 1.
        fewer_classes: take annotations of more classes, whose objects are then evaluated on, but no targets.
        remove_difficult: leave difficult objects out of the targets.
        restrict: makes of the checked COCO dict the one to use, see `datasets.subsets`; None uses it all.
        training: whether this is for training or for evaluation.
        apply_exif: turn images as their EXIF orientation says.

    Raises:
        InputError: names the file that is missing or wrong.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        image_set: str,
        transforms: Callable | None,
        names: dict[int, str],
        *,
        seed: int = 0,
        num_classes: int | None = None,
        fewer_classes: bool = False,
        remove_difficult: bool = False,
        restrict: Callable[[dict], dict] | None = None,
        training: bool = False,
        apply_exif: bool = False,
    ) -> None:
        root = Path(root)
        pictures = _read_pictures(root, image_set)
        raise_first(class_problems(pictures, names))
        ground_truth = as_coco(pictures, names)
        num_classes = num_classes or max(names) + 1
        check_ground_truth(ground_truth, root, num_classes, fewer_classes=fewer_classes)
        ground_truth = restrict(ground_truth) if restrict else ground_truth
        super().__init__(root, ground_truth, root, transforms, seed=seed, remove_difficult=remove_difficult,
                         num_classes=num_classes, training=training, apply_exif=apply_exif)


def as_coco(pictures: Iterable[Picture], names: dict[int, str]) -> dict:
    """Turns pictures into a COCO dict; image ids count from 1 in the order of the lists. Other classes are left out."""
    labels = {name: label for label, name in names.items()}
    images, annotations = [], []
    for image_id, picture in enumerate(pictures, start=1):
        images.append({"id": image_id, "file_name": picture.file_name})
        for item in picture.objects:
            if item.name in labels:
                x0, y0, x1, y1 = item.box
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": labels[item.name],
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0,
                    "difficult": int(item.difficult),
                })
    categories = [{"id": label, "name": name} for label, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def class_problems(pictures: Iterable[Picture], names: dict[int, str]) -> Iterator[Problem]:
    """Finds objects of classes that are not among `names`."""
    known = set(names.values())
    for picture in pictures:
        for item in picture.objects:
            if item.name not in known:
                yield Problem("category", str(picture.annotation),
                              f"has an object of class {item.name!r}, which training lacks")


def naming_part(args: argparse.Namespace) -> str:
    """Returns the image set that the class names come from: "train", or "val" in an evaluation that has no other."""
    has_training = bool(_listings("train", devkit(args)))
    return "val" if args.eval and not has_training else "train"


class _Listing(NamedTuple):
    """Where images of a set lie; `names` is the file that lists them, or None for all XML files of the folder."""

    title: str
    annotations: Path
    images: Path
    names: Path | None


def _listings(image_set: str, root: Path) -> list[_Listing]:
    """Finds the images of an image set: by the lists of the years or of the folder itself, else by XML files alone.

    Without lists they are the XML files in Annotations/, or beside their images, in a folder train/, or val/, valid/ or
    test/, or else in the folder itself for both image sets.
    """
    def listed(folder: Path, part: str) -> _Listing:
        return _Listing(f"{folder.name} ({part})", folder / "Annotations", folder / "JPEGImages",
                        folder / "ImageSets" / "Main" / f"{part}.txt")

    found = [listed(root / year, part) for year, part in _PARTS[image_set]]
    found = [listing for listing in found if os.path.exists(listing.names)]
    for part in () if found else _OWN_PARTS[image_set]:
        if os.path.exists(listed(root, part).names):
            return [listed(root, part)]
    folders = [root / name for name in _PART_FOLDERS[image_set]]
    if not any(os.path.isdir(root / name) for names in _PART_FOLDERS.values() for name in names):
        folders = [root]  # one folder for everything
    has_lists = any(os.path.isdir(folder / "ImageSets" / "Main") for folder in (root, root / "VOC2007", root / "VOC2012"))
    for folder in () if found or has_lists else folders:
        for annotations in (folder / "Annotations", folder / "annotations", folder):
            if _xml_names(annotations):
                images = [path for path in (folder / "JPEGImages", folder / "images") if os.path.isdir(path)]
                beside = [] if any(name.lower().endswith(IMAGE_EXTENSIONS) for name in os.listdir(annotations)) else [folder]
                return [_Listing(f"{folder.name} (no lists)", annotations, [*images, *beside, annotations][0], None)]
    return found


def _xml_names(folder: Path) -> list[str]:
    """Returns the names of a folder's XML files without their ending, ascending; hidden ones, as macOS adds, don't count."""
    try:
        names = os.listdir(folder) if os.path.isdir(folder) else ()
    except OSError as error:
        raise InputError(f"folder {shown(folder)} cannot be listed ({error.strerror})") from error
    return sorted(name[:-4] for name in names if name.lower().endswith(".xml") and not name.startswith("."))


def _read_pictures(root: Path, image_set: str) -> tuple[Picture, ...]:
    """Reads all annotations of an image set.

    Raises:
        InputError: a file is missing or broken.
    """
    pictures, problems = find_pictures(root, image_set)
    raise_first(problems)
    return pictures


@functools.lru_cache(maxsize=2)
def find_pictures(root: Path, image_set: str) -> tuple[tuple[Picture, ...], tuple[Problem, ...]]:
    """Reads the annotations of an image set, and what is wrong with them.

    The result is remembered, since the class names are wanted before the boxes.

    Raises:
        InputError: the image lists are missing or empty.
    """
    listings = _listings(image_set, root)
    if not listings:
        lists = [f"{year}/ImageSets/Main/{part}.txt" for year, part in _PARTS[image_set]]
        own = [f"ImageSets/Main/{part}.txt" for part in _OWN_PARTS[image_set]]
        raise InputError(f"--voc_path {root} has no {' or '.join([*lists, *own])}, and no XML files of its own in "
                         f"{' or '.join(_PART_FOLDERS[image_set])}")
    pictures: list[Picture] = []
    problems: list[Problem] = []
    for listing in listings:
        names = _read_list(listing) if listing.names else _xml_names(listing.annotations)
        pictures += [_read_picture(root, listing, name, problems) for name in names]
        print_main(f"VOC {image_set}: {len(names)} images of {listing.title}")
    for year, part in _PARTS[image_set]:
        if listings[0].names and len(listings) < len(_PARTS[image_set]) and not _mentions(listings, year) and (
                listings[0].annotations.parent != root):
            print_main(f"VOC {image_set}: no images of {year}, {root / year}/ImageSets/Main/{part}.txt does not exist")
    if not pictures:
        raise InputError(f"the image lists {', '.join(str(listing.names) for listing in listings)} name no images")
    return tuple(pictures), tuple(problems)


def _mentions(listings: list[_Listing], year: str) -> bool:
    return any(listing.annotations.parent.name == year for listing in listings)


def _read_list(listing: _Listing) -> list[str]:
    """Returns the names in an image list; a name may have blanks, and be followed by a class list's mark."""
    names = []
    for line in re.split("[\r\n]", read_text(listing.names, "image list")):  # names may have other ends of lines
        name = line.strip()
        marked = re.fullmatch(r"(.*\S)\s+-?[01]", name)
        if marked and not os.path.exists(listing.annotations / f"{name}.xml"):
            name = marked[1]
        stem, ending = os.path.splitext(name)
        if ending.lower() in IMAGE_EXTENSIONS and not os.path.exists(listing.annotations / f"{name}.xml"):
            name = stem
        if name:
            names.append(name)
    for name in names:
        if leaves_folder(name):
            raise InputError(f"image list {listing.names} names {name!r}, which leads out of the folder of the images")
    return names


@functools.lru_cache(maxsize=2)
def _class_names(root: Path, image_set: str) -> tuple[str, ...]:
    """Returns VOC's class names, or those of the user's own set."""
    names = names_of(_read_pictures(root, image_set))
    if names is not VOC_CLASSES:
        print_main(f"{root} does not have VOC's 20 classes but its own {len(names)}: {', '.join(names)}")
    return names


def names_of(pictures: Iterable[Picture]) -> tuple[str, ...]:
    """Returns VOC's class names, or, if any object is of another class, the sorted names of all objects."""
    found = {item.name for picture in pictures for item in picture.objects}
    return VOC_CLASSES if found <= set(VOC_CLASSES) else tuple(sorted(found))


def _read_picture(root: Path, listing: _Listing, name: str, problems: list[Problem]) -> Picture:
    """Reads one image's annotation; what is wrong with it is added to `problems`."""
    path = _in_any_case(listing.annotations / f"{name}.xml")
    objects, file_name = read_annotation(path, problems)
    image = _image_of(listing.images, name, file_name)
    return Picture(image.relative_to(root).as_posix(), path, objects)


def read_annotation(path: Path, problems: list[Problem]) -> tuple[tuple[Object, ...], str]:
    """Reads the objects of an XML file and the image's name in it; what is wrong is added to `problems`."""
    where = f"annotation file {shown(path)}"
    elements: list[ElementTree.Element] = []
    file_name = ""
    try:
        with open_regular(path, "annotation file") as file:
            element = ElementTree.parse(file).getroot()
        elements, file_name = element.findall("object"), (element.findtext("filename") or "").strip()
    except InputError as error:
        problems.append(Problem("annotation_entry", str(error), ""))
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # the latter two: of its encoding
        problems.append(Problem("annotation_entry", where, f"is not valid XML ({error})"))
    read = [_read_object(element) for element in elements]
    problems += [Problem.of(fault, where) for fault in read if isinstance(fault, Fault)]
    return tuple(item for item in read if isinstance(item, Object)), file_name


def _image_of(folder: Path, name: str, file_name: str) -> Path:
    """Finds an image: the .jpg of its name, the file that the XML names, or its name with another ending."""
    usual = folder / f"{name}.jpg"
    if os.path.exists(usual):  # unlike pathlib's, it takes names that no file can have
        return usual
    candidates = [folder / os.path.basename(file_name.replace("\\", "/"))] if file_name else []
    candidates += [_in_any_case(folder / f"{name}{ending}") for ending in IMAGE_EXTENSIONS]
    return next((path for path in candidates if os.path.isfile(path)), usual)


def _in_any_case(path: Path) -> Path:
    """Returns the file itself, or the one whose ending has the same letters, large or small, if there is only that."""
    if os.path.exists(path):
        return path
    same = {path.stem + ending for ending in _endings(path.parent) if ending.lower() == path.suffix}
    return next((path.with_name(name) for name in sorted(same) if os.path.exists(path.with_name(name))), path)


@functools.lru_cache(maxsize=4)
def _endings(folder: Path) -> frozenset[str]:
    """Returns the endings that files of a folder have, none if it can't be listed."""
    try:
        return frozenset(os.path.splitext(name)[1] for name in os.listdir(folder))
    except OSError:
        return frozenset()


def _read_object(element: ElementTree.Element) -> Object | Fault:
    name = (element.findtext("name") or "").strip()
    if not name:
        return Fault("category", "has an object without a name")
    try:
        x0, y0, x1, y1 = (float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except (TypeError, ValueError):
        return Fault("box", f"has an object {name!r} without four numbers in bndbox")
    if not (x1 >= x0 and y1 >= y0):
        return Fault("box", f"has an object {name!r} whose box ends before it begins")
    difficult = (element.findtext("difficult") or "0").strip().lower() in DIFFICULT_MARKS
    return Object(name, (x0 - 1, y0 - 1, x1, y1), difficult)


def devkit(args: argparse.Namespace) -> Path:
    """Returns the VOCdevkit folder of `args`.

    Raises:
        InputError: `voc_path` isn't given or doesn't exist.
    """
    if not args.voc_path:
        raise InputError("--voc_path is needed: the VOCdevkit folder that holds VOC2007 and VOC2012")
    root = Path(args.voc_path)
    if not os.path.isdir(root):
        raise InputError(f"--voc_path {shown(root)} {folder_fault(root)}")
    return root
