"""COCO-format detection data: instances JSON plus a folder of images."""
from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

from datasets import transforms as T
from datasets.checks import (Problem, class_names, draw_segmentation, encode_segmentation, ground_truth_problems,
                             image_doubts, is_count, raise_first, read_labelled_image)
from datasets.image_io import UnreadableImage, read_sizes, warn_once
from datasets.packed import checksum, pack_records
from datasets.subsets import restriction
from datasets.targets import ConvertCocoPolysToMask, convert_coco_poly_to_mask
from datasets.two_arguments import adapt, wants_pillow
from datasets.usable_images import UsableImages
from util import recipes
from util.distributed import print_main
from util.errors import InputError
from util.files import folder_fault, open_regular, read_json, shown

__all__ = [
    "CROP_RESIZES", "CROP_SIZES", "CocoDetection", "ConvertCocoPolysToMask", "DetectionDataset", "build",
    "check_ground_truth", "class_names", "convert_coco_poly_to_mask", "forget_files", "image_folder",
    "index_ground_truth", "index_instances", "locate", "make_coco_transforms", "may_know_fewer", "num_classes_and_names",
    "num_classes_of", "paths", "read_ground_truth", "report_left_out", "training_augmentation", "training_categories",
    "transform_sizes",
]

TRAIN_SIZES = tuple(range(480, 801, 32))
MOST_CLASSES = 100_000  # that are read from annotations; larger ids are numbers of other things
_SIZE_FLAGS = ("train_sizes", "val_size", "max_size", "crop_resize", "crop_size")
CROP_RESIZES = (400, 500, 600)
CROP_SIZES = (384, 600)
# Tells where the annotations of "train" or "val" lie by the flags; None if no flag says.
AnnFileOf = Callable[[str, argparse.Namespace], Path | None]


def build(image_set: str, args: argparse.Namespace, augment: bool = True) -> "CocoDetection":
    """Builds the COCO data set of `args`.

    Reads `coco_path`, `train_images`, `train_annotations`, `val_images`, `val_annotations` and `masks` where they are
    there, `eval`, `seed`, `num_classes` and the sizes.

    Args:
        image_set: "train" or "val".
        args: parsed flags.
        augment: False prepares training images as evaluation does.

    Raises:
        InputError: something in the folder or the annotations is missing or wrong.
    """
    args = recipes.settled(args)
    folder, ann_file = paths(image_set, args)
    num_classes = args.num_classes if args.num_classes is not None else num_classes_and_names(args)[0]
    transforms = make_coco_transforms(image_set if augment else "val", **transform_sizes(args))
    training = image_set == "train" and augment
    dataset = CocoDetection(folder, ann_file, transforms, getattr(args, "masks", False), seed=args.seed,
                            num_classes=num_classes, fewer_classes=may_know_fewer(args),
                            restrict=restriction(image_set, args), training=training,
                            apply_exif=bool(getattr(args, "apply_exif", False)))
    if training:
        forget_files()
    return dataset


def may_know_fewer(args: argparse.Namespace) -> bool:
    """Tells whether the model that is evaluated may know fewer classes than the annotations hold: `--num_classes` says so."""
    return bool(args.eval) and "num_classes" in args.given


def num_classes_and_names(args: argparse.Namespace, ann_file_of: AnnFileOf | None = None) -> tuple[int, dict[int, str]]:
    """Reads how many classes a model for `args` needs, from the training annotations.

    Args:
        args: parsed flags.
        ann_file_of: see `training_categories`; None for this module's.

    Returns:
        `args.num_classes`, or the highest category id + 1; and the class name of each category id.

    Raises:
        InputError: the annotations are missing or broken.
    """
    ann_file, categories = training_categories(args, ann_file_of or _ann_file)
    return num_classes_of(categories, ann_file, args.num_classes), class_names(categories)


def training_categories(args: argparse.Namespace, ann_file_of: AnnFileOf) -> tuple[Path, dict]:
    """Reads the categories that a model for `args` is trained on.

    Args:
        args: parsed flags.
        ann_file_of: tells the annotation files.

    Returns:
        The training annotations, or the validation ones in an evaluation that has no others; and a dict with their
        list "categories" alone.

    Raises:
        InputError: the file is missing or broken.
    """
    ann_file = ann_file_of("train", args)
    of_training = not args.eval or (ann_file is not None and os.path.isfile(ann_file))
    if not of_training:
        ann_file = ann_file_of("val", args)
    if ann_file is None:
        flag = "train_annotations" if of_training else "val_annotations"
        raise InputError(f"--coco_path is needed, the folder that holds annotations/, or --{flag}")
    # An evaluation has no further use for gigabytes of training annotations.
    categories = _read_categories(*_version(ann_file), keep=not (args.eval and of_training))
    return ann_file, {"categories": list(categories)}


def transform_sizes(args: argparse.Namespace) -> dict:
    """The keyword arguments of `make_coco_transforms` that flags decide; a flag that is None leaves the default."""
    return {name: getattr(args, name) for name in _SIZE_FLAGS if getattr(args, name) is not None}


def make_coco_transforms(
    image_set: str,
    *,
    train_sizes: list[int] | None = None,
    val_size: int = 800,
    max_size: int = 1333,
    crop_resize: list[int] | None = None,
    crop_size: list[int] | None = None,
) -> T.Compose:
    """DETR's augmentation. Training: a flip, then a resize, or a resize, a crop and a resize; validation: one resize.

    Args:
        image_set: "train" or "val".
        train_sizes: short sides to draw from in training, in pixels; None for 480, 512, …, 800.
        val_size: short side in validation, in pixels.
        max_size: largest long side, in pixels.
        crop_resize: short sides before the crop; None for 400, 500, 600, scaled by max(train_sizes) / 800.
        crop_size: smallest and largest side of the crop; None for 384 and 600, scaled likewise.

    Returns:
        A callable `(image, target, rng=None) -> (image, target)`, see `transforms.Compose`.

    Raises:
        ValueError: `image_set` is neither "train" nor "val".
        InputError: a size is less than 1, or `crop_size` is not two ascending numbers.
    """
    _check_sizes(train_sizes=train_sizes, val_size=[val_size], max_size=[max_size])
    if image_set == "val":
        return T.Compose([T.RandomResize([val_size], max_size), T.Normalize()])
    if image_set != "train":
        raise ValueError(f'image_set must be "train" or "val", got {image_set!r}')
    return T.Compose([training_augmentation(list(train_sizes or TRAIN_SIZES), max_size, crop_resize, crop_size),
                      T.Normalize()])


def training_augmentation(
    train_sizes: Sequence[int], max_size: int, crop_resize: list[int] | None, crop_size: list[int] | None
) -> T.Compose:
    """DETR's augmentation in training up to the bytes of the image, arguments as in `make_coco_transforms`.

    Raises:
        InputError: a size of the crop is less than 1, or `crop_size` is not two ascending numbers.
    """
    _check_sizes(crop_resize=crop_resize, crop_size=crop_size)
    if crop_size and not (len(crop_size) == 2 and crop_size[0] <= crop_size[1]):
        raise InputError(f"--crop_size {crop_size} is not a smallest and a largest side")
    scale = max(train_sizes) / max(TRAIN_SIZES)
    smallest, largest = crop_size or [round(side * scale) for side in CROP_SIZES]
    resize = T.RandomResize(train_sizes, max_size)
    crop_and_resize = T.Compose([
        T.RandomResize(crop_resize or [round(side * scale) for side in CROP_RESIZES]),
        T.RandomSizeCrop(smallest, largest),
        resize,
    ])
    return T.Compose([T.RandomHorizontalFlip(), T.RandomSelect(resize, crop_and_resize)])


def _check_sizes(**sizes: list[int] | None) -> None:
    for name, values in sizes.items():
        if values and min(values) < 1:
            raise InputError(f"--{name} {min(values)} must be at least 1")


class DetectionDataset(Dataset):
    """Labelled images: samples are (image, target), the randomness of each a function of (seed, epoch, index).

    Crowd annotations and boxes without area are left out of the targets; `coco` keeps everything for evaluation.
    Images without annotations are kept.

    In training an image that is missing or broken, or doesn't go with its annotations, is reported once on standard
    error, and the next usable one takes its place, up to 1 % of all. In evaluation, whose numbers it would change, it
    is refused.

    Args:
        img_folder: folder that the file names of the ground truth are relative to.
        ground_truth: checked COCO dict (see `check_ground_truth`).
        source: the file or folder the ground truth comes from, for messages.
        transforms: callable `(image, target, rng)` of uint8 images; or `(image, target)`, which gets Pillow images, as
            do all transforms around one that is written so; None gives uint8 images and absolute x0, y0, x1, y1 boxes.
        return_masks: whether targets hold `masks`.
        seed: seed of the run.
        remove_difficult: leave annotations marked `difficult` out of the targets.
        num_classes: objects of higher labels, which the model doesn't know, are left out of the targets; None for none.
        training: whether this is for training or for evaluation.
        apply_exif: turn images as their EXIF orientation says; the annotations are those of the turned images.
        coco: an empty `COCO` object to fill with the ground truth; None for an ordinary one.

    Attributes:
        coco: the ground truth as a pycocotools COCO object (in training made anew from packed records when asked for,
            without segmentations unless masks are asked for).
        ids: image ids, ascending; sample i shows image ids[i].
    """

    def __init__(
        self,
        img_folder: str | os.PathLike,
        ground_truth: dict,
        source: str | os.PathLike,
        transforms: Callable | None,
        return_masks: bool = False,
        *,
        seed: int = 0,
        remove_difficult: bool = False,
        num_classes: int | None = None,
        training: bool = False,
        apply_exif: bool = False,
        coco: COCO | None = None,
    ) -> None:
        self.img_folder = Path(img_folder)
        self.source = source
        self.transforms = transforms
        self.return_masks = return_masks
        self.seed = seed
        self.remove_difficult = remove_difficult
        self.num_classes = num_classes
        self.training = training
        self.apply_exif = apply_exif
        self._empty_coco = coco
        self._rest = {name: value for name, value in ground_truth.items() if name not in ("images", "annotations")}
        self._images = pack_records(ground_truth["images"])
        unused = () if return_masks or not training else ("segmentation",)  # most of a file's bytes
        self._annotations = pack_records({name: value for name, value in annotation.items() if name not in unused}
                                         for annotation in ground_truth["annotations"])
        self.ids = sorted(image["id"] for image in ground_truth["images"])
        self._lay_out(ground_truth)
        if training:
            self._require_objects(ground_truth)
        if not training:
            self.coco = index_ground_truth(ground_truth, coco)
        self._usable = UsableImages(len(self.ids), str(source), self._name)
        # In shared memory, so that workers which outlive an epoch see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @functools.cached_property
    def coco(self) -> COCO:
        """The ground truth."""
        content = {**self._rest, "images": list(self._images), "annotations": list(self._annotations)}
        return index_ground_truth(content, self._empty_coco)

    @property
    def transforms(self) -> Callable | None:
        """The transforms of the samples, callable with a random source."""
        return self._transforms

    @transforms.setter
    def transforms(self, transforms: Callable | None) -> None:
        self._transforms = None if transforms is None else adapt(transforms)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the randomness of the samples depends on; call it before iterating."""
        self._epoch.fill_(epoch)

    def keep_first(self, count: int) -> None:
        """Keeps the images with the `count` lowest ids.

        Raises:
            InputError: there are fewer, or none of them has an object.
        """
        if count > len(self.ids):
            raise InputError(f"--overfit {count} is more than the {len(self.ids)} images of {self.source}")
        if not self._starts[count]:
            raise InputError(f"--overfit {count}: the first {count} images of {self.source} have no objects")
        self.ids = self.ids[:count]

    def objects_per_image(self) -> Tensor:
        """Returns how many annotations each sample's target is made from, int64 [len(self)]."""
        return self._starts[:len(self.ids) + 1].diff()

    @property
    def unreadable(self) -> list[str]:
        """File names of the images that this process or its workers could not read so far."""
        return self._usable.unreadable

    def recall_unreadable(self, names: Iterable[str]) -> None:
        """Counts the images that the run which is continued could not read, see `UsableImages.recall_unreadable`."""
        self._usable.recall_unreadable(names)

    def samples_checksum(self) -> int:
        """Returns a checksum of which image each sample shows: of image ids and file names, in the samples' order."""
        return checksum((self.ids[index], self._name(index)) for index in range(len(self)))

    def gather_unreadable(self) -> list[str]:
        """Returns the file names of images that no process could read so far; each process must call this.

        Raises:
            InputError: on all processes, when these are more than 1 % of the images (and more than one).
        """
        return self._usable.gather_unreadable()

    def file_sizes(self) -> Tensor:
        """Returns the (height, width) of each sample's image file, int64 [len(self), 2]: as annotated, or, where
        any image has no annotated size, as the files say."""
        entries = [self._entry(index) for index in range(len(self))]
        if all({"height", "width"} <= set(entry) for entry in entries):
            return torch.tensor([(entry["height"], entry["width"]) for entry in entries], dtype=torch.int64).view(-1, 2)
        return read_sizes((self.img_folder / entry["file_name"] for entry in entries), self.apply_exif)

    def shown_sizes(self) -> Tensor | None:
        """Returns the (height, width) of each sample, int64 [len(self), 2]; None where that is random or not known."""
        size_of = getattr(self.transforms, "output_size", lambda height, width: None)
        sizes = [size_of(*size) for size in self.file_sizes().tolist()]
        return None if None in sizes else torch.tensor(sizes, dtype=torch.int64).view(-1, 2)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns one sample.

        Returns:
            With transforms: the image, float32 [3, H, W], and its target with `image_id` [1], `labels` [n], `boxes`
            [n, 4] (cx, cy, w, h in 0..1), `area` [n] in pixels, `iscrowd` [n], `orig_size` and `size` [2] (height,
            width), and `masks` bool [n, H, W] where asked.

        Raises:
            InputError: the image is missing, broken or of another size than its annotation says, or a mask can't be
                drawn; in training, too many are.
        """
        if self.training:
            count = len(self)
            index, (image, target) = self._usable.first(((index + step) % count for step in range(count)), self._show)
        else:
            image, target = self._read(index)
        if self.transforms is None:
            return image, target
        if wants_pillow(self.transforms):
            image = to_pil_image(image)
        return self.transforms(image, target, T.sample_rng(self.seed, int(self._epoch), index))

    def _read(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        entry = self._entry(index)
        decoded, problem = read_labelled_image(self.img_folder, entry, self.source, apply_exif=self.apply_exif)
        if problem:
            raise InputError(problem.sentence)
        for fault in image_doubts(decoded):
            warn_once(fault.kind, f"image file {shown(self.img_folder / entry['file_name'])} {fault.text}")
        return decoded.image, self._target(index, *decoded.size)

    def _show(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            return self._read(index)
        except InputError as error:
            raise UnreadableImage(str(error)) from error

    def _name(self, index: int) -> str:
        return self._entry(index)["file_name"]

    def _entry(self, index: int) -> dict:
        """Returns the image entry of a sample."""
        return self._images[self._places[index]]

    def _objects_of(self, index: int) -> list[dict]:
        """Returns the annotations that a sample's target is made from."""
        return [self._annotations[place] for place in self._kept[self._starts[index]:self._starts[index + 1]].tolist()]

    def _lay_out(self, ground_truth: dict) -> None:
        """Lays the annotations of all images out in flat tensors, which worker processes share.

        Sets `_places`, each sample's place among the image entries; `_kept`, the places of the annotations that
        targets are made from, those of the first sample first; `_objects`, their fields; and `_starts`, where the
        objects of each sample start (and end).
        """
        images, annotations = ground_truth["images"], ground_truth["annotations"]
        self._places = torch.tensor([image["id"] for image in images]).argsort()
        sample_of = {image_id: index for index, image_id in enumerate(self.ids)}
        kept = [place for place, annotation in enumerate(annotations) if self._is_target(annotation)]
        samples = torch.tensor([sample_of[annotations[place]["image_id"]] for place in kept], dtype=torch.int64)
        samples, order = samples.sort(stable=True)
        self._kept = torch.tensor(kept, dtype=torch.int64)[order]
        self._starts = torch.searchsorted(samples, torch.arange(len(self.ids) + 1))
        kept = [annotations[place] for place in self._kept.tolist()]
        boxes = torch.tensor([annotation["bbox"] for annotation in kept], dtype=torch.float64).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        self._objects = {
            "boxes": boxes.float(),
            "labels": torch.tensor([annotation["category_id"] for annotation in kept], dtype=torch.int64),
            "area": torch.tensor([annotation["area"] for annotation in kept], dtype=torch.float32),
            "iscrowd": torch.tensor([int(annotation["iscrowd"]) for annotation in kept], dtype=torch.int64),
        }

    def _require_objects(self, ground_truth: dict) -> None:
        """Raises InputError if no target of a training would hold an object."""
        boxes = self._objects["boxes"]
        if not ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] > 0)).all(1).any():
            annotations = ground_truth["annotations"]
            crowds = sum(bool(annotation["iscrowd"]) for annotation in annotations)
            difficult = sum(bool(annotation.get("difficult")) for annotation in annotations)
            left_out = f"{crowds} crowds" + (f", {difficult} difficult ones" if self.remove_difficult else "")
            raise InputError(f"{self.source} has no object to learn from: of {len(annotations)} objects in "
                             f"{len(self.ids)} images {left_out} are left out, and boxes without area")

    def _is_target(self, annotation: dict) -> bool:
        known = self.num_classes is None or annotation["category_id"] < self.num_classes
        return known and not annotation["iscrowd"] and not (self.remove_difficult and annotation.get("difficult"))

    def _target(self, index: int, height: int, width: int) -> dict[str, Tensor]:
        mine = slice(self._starts[index], self._starts[index + 1])
        target = {name: values[mine].clone() for name, values in self._objects.items()}
        boxes = target["boxes"]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        if self.return_masks:
            target["masks"] = self._masks(index, height, width)
        T.remove_objects(target, (boxes[:, 2:] > boxes[:, :2]).all(1))
        size = torch.tensor([height, width])
        return {"image_id": torch.tensor([self.ids[index]]), **target, "orig_size": size, "size": size.clone()}

    def _masks(self, index: int, height: int, width: int) -> Tensor:
        """Draws the masks of a sample's objects, bool [n, height, width]."""
        annotations = self._objects_of(index)
        masks = np.zeros((len(annotations), height, width), dtype=bool)
        for mask, annotation in zip(masks, annotations):
            drawn, problem = draw_segmentation(annotation, self.source, height, width)
            if problem:
                raise InputError(problem.sentence)
            if not drawn.any():
                warn_once("segmentation", f"annotation id {annotation['id']} of {self.source} has the box "
                          f"{annotation['bbox']}, but a segmentation that covers no pixel")
            mask[:] = drawn
        return torch.from_numpy(masks)


class CocoDetection(DetectionDataset):
    """A COCO-format data set: a folder of images and an instances JSON.

    Args:
        img_folder: folder of the images.
        ann_file: instances JSON.
        transforms: callable `(image, target, rng)` or `(image, target)`, or None; see `DetectionDataset`.
        return_masks: whether targets hold `masks`, from polygons or run lengths.
        seed: seed of the run.
        num_classes: number of classes of the model; None for the highest category id + 1.
        fewer_classes: take annotations of more classes, whose objects are then evaluated on, but no targets.
        restrict: makes of the checked COCO dict the one to use, see `datasets.subsets`; None uses it all.
        training: whether this is for training or for evaluation.
        apply_exif: turn images as their EXIF orientation says.

    Raises:
        InputError: the folder is missing, or the JSON is missing, broken, or wrong in a way `check_ground_truth` finds.
    """

    def __init__(
        self,
        img_folder: str | os.PathLike,
        ann_file: str | os.PathLike,
        transforms: Callable | None = None,
        return_masks: bool = False,
        *,
        seed: int = 0,
        num_classes: int | None = None,
        fewer_classes: bool = False,
        restrict: Callable[[dict], dict] | None = None,
        training: bool = False,
        apply_exif: bool = False,
    ) -> None:
        if not os.path.isdir(img_folder):
            raise InputError(f"image folder {shown(img_folder)} {folder_fault(img_folder)}")
        ground_truth = read_ground_truth(ann_file)
        num_classes = num_classes_of(ground_truth, ann_file, num_classes)
        check_ground_truth(ground_truth, ann_file, num_classes, need_masks=return_masks, fewer_classes=fewer_classes)
        ground_truth = restrict(ground_truth) if restrict else ground_truth
        super().__init__(img_folder, ground_truth, ann_file, transforms, return_masks, seed=seed, num_classes=num_classes,
                         training=training, apply_exif=apply_exif, coco=_Instances(ann_file))


def read_ground_truth(ann_file: str | os.PathLike) -> dict:
    """Reads an instances JSON and checks that it is one.

    The latest three files are remembered, since their categories are wanted before their annotations are.

    Raises:
        InputError: the file is missing, not JSON, or lacks one of the lists of a COCO file.
    """
    return _read_json(*_version(Path(ann_file)))


def forget_files() -> None:
    """Lets go of the files that are remembered: gigabytes, of no use to a training that has packed its part."""
    _read_json.cache_clear()


def _version(path: Path) -> tuple[Path, int, int]:
    """A file with what tells its versions apart."""
    with open_regular(path, "annotation file") as file:
        status = os.fstat(file.fileno())
    return path, status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)
def _read_categories(path: Path, modified: int, size: int, keep: bool) -> tuple[dict, ...]:
    """Reads the categories of a file; `keep` remembers everything else in it, too."""
    read = _read_json if keep else _read_json.__wrapped__
    return tuple(read(path, modified, size)["categories"])


@functools.lru_cache(maxsize=3)
def _read_json(path: Path, modified: int, size: int) -> dict:
    """Reads one version of a file; `modified` and `size` only tell versions apart."""
    content = read_json(path, "annotation file")
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(f'annotation file {path} is not in COCO format: it has no list "{name}"')
    _make_whole(content["categories"], "id", "isthing")
    _make_whole(content["images"], "id", "width", "height")
    _make_whole(content["annotations"], "id", "image_id", "category_id", "iscrowd")
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and isinstance(annotation.get("segments_info"), list):
            _make_whole(annotation["segments_info"], "id", "category_id", "iscrowd", "area")
    for category in content["categories"]:
        if not isinstance(category, dict) or not is_count(category.get("id")):
            raise InputError(f"annotation file {path} has a category without an id >= 0: {category!r}")
    return content


def _make_whole(entries: list, *fields: str) -> None:
    """Turns whole numbers that were written as floats (80.0) into integers, in place."""
    for entry in entries:
        if isinstance(entry, dict):
            for name in fields:
                value = entry.get(name)
                if type(value) is float and value.is_integer():
                    entry[name] = int(value)


def num_classes_of(ground_truth: dict, source: str | os.PathLike, num_classes: int | None = None) -> int:
    """Returns `num_classes` if given, else the highest category id of the ground truth + 1.

    Raises:
        InputError: there are no categories to read it from.
    """
    if num_classes is not None:
        return num_classes
    if not ground_truth["categories"]:
        raise InputError(f"annotation file {source} has no categories, so --num_classes must be given")
    largest = max(category["id"] for category in ground_truth["categories"])
    if largest >= MOST_CLASSES:
        raise InputError(f"annotation file {source} has the category id {largest}, which would need a model of as many "
                         f"classes, more than {MOST_CLASSES}: number the categories anew")
    return largest + 1


def check_ground_truth(
    ground_truth: dict, source: str | os.PathLike, num_classes: int, need_masks: bool = False, fewer_classes: bool = False
) -> None:
    """Checks every image and annotation, and fills in absent `iscrowd` (0) and `area` (that of the box).

    Boxes that lie wholly outside their image or have no area are only reported: their objects are left out, as
    everywhere in DETR.

    Args:
        ground_truth: COCO dict, changed in place.
        source: file it comes from, for messages.
        num_classes: category ids must be below this.
        need_masks: whether every annotation must have a segmentation.
        fewer_classes: only say which aren't.

    Raises:
        InputError: names the first image or annotation that is wrong.
    """
    if fewer_classes:
        _report_unknown(ground_truth, source, num_classes)
        num_classes = max([num_classes, *(category["id"] + 1 for category in ground_truth["categories"])])
    passed = raise_first(ground_truth_problems(ground_truth, source, num_classes, need_masks))
    for annotation in ground_truth["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    report_left_out(passed)


def _report_unknown(ground_truth: dict, source: str | os.PathLike, num_classes: int) -> None:
    names = [name for label, name in class_names(ground_truth).items() if label >= num_classes]
    if names:
        print_main(f"the model has {num_classes} classes: it doesn't know {', '.join(names[:5])}"
                   + (", …" if len(names) > 5 else "") + f" of {source}, whose objects count as not found")


def report_left_out(problems: list[Problem]) -> None:
    """Says how many objects no target will show, and which is the first; likewise of panoptic images."""
    for kind, what in (("box_outside", "boxes lie outside their images"), ("box_empty", "boxes have no area"),
                       ("annotation_entry", "images have no annotation")):
        found = [problem for problem in problems if problem.kind == kind]
        if found:
            print_main(f"{len(found)} {what} and are left out, the first is {found[0].where}")


class _Instances(COCO):
    """Objects whose masks are checked before pycocotools sees them: it reads outside its memory where they are damaged."""

    def __init__(self, source: str | os.PathLike) -> None:
        super().__init__()
        self.source = source

    def annToRLE(self, ann: dict) -> dict:
        """Run lengths of an object's mask, as pycocotools' evaluation wants them."""
        image = self.imgs[ann["image_id"]]
        rle, problem = encode_segmentation(ann, self.source, image["height"], image["width"])
        if problem:
            raise InputError(problem.sentence)
        return rle


def index_instances(ground_truth: dict, source: str | os.PathLike) -> COCO:
    """Makes the pycocotools object of a checked COCO dict that comes from the file `source`."""
    return index_ground_truth(ground_truth, _Instances(source))


def index_ground_truth(ground_truth: dict, coco: COCO | None = None) -> COCO:
    """Makes the pycocotools object of a COCO dict, without its chatter; `coco` may be an empty one to fill."""
    coco = coco or COCO()
    coco.dataset = ground_truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def image_folder(image_set: str, args: argparse.Namespace) -> Path:
    """Returns the image folder of an image set: `--{train,val}_images`, or COCO's own in `coco_path`.

    Raises:
        InputError: nothing says where it is.
    """
    folder = locate(args, "coco_path", f"{image_set}_images", f"{image_set}2017")
    if folder is None:
        raise InputError("--coco_path is needed, the folder that holds annotations/, train2017/ and val2017/, or "
                         f"--{image_set}_images and --{image_set}_annotations")
    return folder


def locate(args: argparse.Namespace, root_flag: str, flag: str, usual: str) -> Path | None:
    """Finds out where a part of a data set lies.

    Args:
        args: parsed flags.
        root_flag: the flag of the folder that paths are relative to.
        flag: the flag that may name this part, absolute or relative to that folder.
        usual: the part's name in COCO's layout.

    Returns:
        The path, which may not exist; None if neither flag is given.

    Raises:
        InputError: the folder of `root_flag` doesn't exist.
    """
    root, given = getattr(args, root_flag, None), getattr(args, flag, None)
    if root and not os.path.isdir(root):
        raise InputError(f"--{root_flag} {shown(root)} {folder_fault(root)}")
    return Path(root or "", given or usual) if root or given else None


def _ann_file(image_set: str, args: argparse.Namespace) -> Path | None:
    return locate(args, "coco_path", f"{image_set}_annotations", f"annotations/instances_{image_set}2017.json")


def paths(image_set: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the image folder and the annotation file of an image set.

    Raises:
        InputError: no flag says where they are.
    """
    folder, ann_file = image_folder(image_set, args), _ann_file(image_set, args)
    if ann_file is None:
        raise InputError(f"--{image_set}_annotations is needed with --{image_set}_images, or --coco_path")
    return folder, ann_file
