"""COCO-format detection data: instances JSON plus a folder of images."""
from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from datasets import transforms as T
from datasets.image_io import UnreadableImage, read_image
from util.distributed import print_main
from util.errors import InputError

__all__ = [
    "CocoDetection", "DetectionDataset", "build", "check_ground_truth", "class_names", "index_ground_truth",
    "make_coco_transforms", "num_classes_and_names", "num_classes_of", "read_ground_truth", "transform_sizes",
]

TRAIN_SIZES = tuple(range(480, 801, 32))
_SIZE_FLAGS = ("train_sizes", "val_size", "max_size", "crop_resize", "crop_size")
_CROP_RESIZES = (400, 500, 600)
_CROP_SIZES = (384, 600)


def build(image_set: str, args: argparse.Namespace) -> "CocoDetection":
    """Builds the COCO data set of `args` (`coco_path`, `eval`, `masks` if there, `seed`, `num_classes`, the sizes).

    Args:
        image_set: "train" or "val".
        args: parsed flags.

    Raises:
        InputError: something in the folder or the annotations is missing or wrong.
    """
    folder, ann_file = _paths(image_set, args)
    num_classes = args.num_classes if args.num_classes is not None else num_classes_and_names(args)[0]
    transforms = make_coco_transforms(image_set, **transform_sizes(args))
    return CocoDetection(folder, ann_file, transforms, getattr(args, "masks", False), seed=args.seed,
                         num_classes=num_classes)


def num_classes_and_names(args: argparse.Namespace) -> tuple[int, dict[int, str]]:
    """Reads how many classes a model for `args` needs, from the training annotations.

    Returns:
        `args.num_classes`, or the highest category id + 1; and the class name of each category id.

    Raises:
        InputError: the annotations are missing or broken.
    """
    image_set = "train"
    if args.eval and not _paths("train", args)[1].is_file():
        image_set = "val"
    ann_file = _paths(image_set, args)[1]
    ground_truth = read_ground_truth(ann_file)
    if args.eval and image_set == "train":
        _read_json.cache_clear()  # an evaluation has no further use for gigabytes of training annotations
    return num_classes_of(ground_truth, ann_file, args.num_classes), class_names(ground_truth)


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
    if min([val_size, max_size, *(train_sizes or ()), *(crop_resize or ()), *(crop_size or ())]) < 1:
        raise InputError("--train_sizes, --val_size, --max_size, --crop_resize and --crop_size must be at least 1")
    if image_set == "val":
        return T.Compose([T.RandomResize([val_size], max_size), T.Normalize()])
    if image_set != "train":
        raise ValueError(f'image_set must be "train" or "val", got {image_set!r}')
    train_sizes = list(train_sizes or TRAIN_SIZES)
    if crop_size and not (len(crop_size) == 2 and crop_size[0] <= crop_size[1]):
        raise InputError(f"--crop_size {crop_size} is not a smallest and a largest side")
    scale = max(train_sizes) / max(TRAIN_SIZES)
    smallest, largest = crop_size or [round(side * scale) for side in _CROP_SIZES]
    resize = T.RandomResize(train_sizes, max_size)
    crop_and_resize = T.Compose([
        T.RandomResize(crop_resize or [round(side * scale) for side in _CROP_RESIZES]),
        T.RandomSizeCrop(smallest, largest),
        resize,
    ])
    return T.Compose([T.RandomHorizontalFlip(), T.RandomSelect(resize, crop_and_resize), T.Normalize()])


class DetectionDataset(Dataset):
    """Labelled images: samples are (image, target), the randomness of each a function of (seed, epoch, index).

    Crowd annotations and boxes without area are left out of the targets; `coco` keeps everything for evaluation.
    Images without annotations are kept.

    Args:
        img_folder: folder that the file names of the ground truth are relative to.
        ground_truth: checked COCO dict (see `check_ground_truth`).
        source: the file or folder the ground truth comes from, for messages.
        transforms: callable `(image, target, rng)`; None gives uint8 images and absolute x0, y0, x1, y1 boxes.
        return_masks: whether targets hold `masks`.
        seed: seed of the run.
        remove_difficult: leave annotations marked `difficult` out of the targets.

    Attributes:
        coco: the ground truth as a pycocotools COCO object.
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
    ) -> None:
        self.img_folder = Path(img_folder)
        self.source = source
        self.transforms = transforms
        self.return_masks = return_masks
        self.seed = seed
        self.remove_difficult = remove_difficult
        self.coco = index_ground_truth(ground_truth)
        self.ids = sorted(self.coco.imgs)
        self._objects, self._starts = self._pack_annotations()
        # In shared memory, so that workers which outlive an epoch see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the randomness of the samples depends on; call it before iterating."""
        self._epoch.fill_(epoch)

    def objects_per_image(self) -> Tensor:
        """Returns how many annotations each sample's target is made from, int64 [len(self)]."""
        return torch.tensor(self._starts).diff()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns one sample.

        Returns:
            With transforms: the image, float32 [3, H, W], and its target with `image_id` [1], `labels` [n], `boxes`
            [n, 4] (cx, cy, w, h in 0..1), `area` [n] in pixels, `iscrowd` [n], `orig_size` and `size` [2] (height,
            width), and `masks` bool [n, H, W] where asked.

        Raises:
            InputError: the image is missing, broken or of another size than its annotation says.
        """
        image = self._read_image(self.ids[index])
        target = self._target(index, *image.shape[-2:])
        if self.transforms is None:
            return image, target
        return self.transforms(image, target, T.sample_rng(self.seed, int(self._epoch), index))

    def _read_image(self, image_id: int) -> Tensor:
        entry = self.coco.imgs[image_id]
        path = self.img_folder / entry["file_name"]
        try:
            image, size = read_image(path)
        except UnreadableImage as error:
            raise InputError(f"{error} (image id {image_id} of {self.source})") from error
        annotated = (entry.get("height", size[0]), entry.get("width", size[1]))
        if annotated != size:
            raise InputError(
                f"image file {path} is {size[1]}x{size[0]} pixels, but image id {image_id} of {self.source} says "
                f"{annotated[1]}x{annotated[0]}")
        return image

    def _pack_annotations(self) -> tuple[dict[str, Tensor], list[int]]:
        """Lays the annotations of all images out in flat tensors.

        Worker processes then share them, whereas reading a Python object copies its memory page into each worker.

        Returns:
            Per-object fields of all images one after the other, and where each image's objects start (and end).
        """
        kept, starts = [], [0]
        for image_id in self.ids:
            kept += [ann for ann in self.coco.imgToAnns[image_id] if self._is_target(ann)]
            starts.append(len(kept))
        boxes = torch.tensor([ann["bbox"] for ann in kept], dtype=torch.float64).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        fields = {
            "boxes": boxes.float(),
            "labels": torch.tensor([ann["category_id"] for ann in kept], dtype=torch.int64),
            "area": torch.tensor([ann["area"] for ann in kept], dtype=torch.float32),
        }
        return fields, starts

    def _is_target(self, annotation: dict) -> bool:
        return not annotation["iscrowd"] and not (self.remove_difficult and annotation.get("difficult"))

    def _target(self, index: int, height: int, width: int) -> dict[str, Tensor]:
        image_id, mine = self.ids[index], slice(self._starts[index], self._starts[index + 1])
        target = {name: values[mine].clone() for name, values in self._objects.items()}
        target["iscrowd"] = torch.zeros_like(target["labels"])
        boxes = target["boxes"]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        if self.return_masks:
            target["masks"] = self._masks(image_id, height, width)
        T.remove_objects(target, (boxes[:, 2:] > boxes[:, :2]).all(1))
        size = torch.tensor([height, width])
        return {"image_id": torch.tensor([image_id]), **target, "orig_size": size, "size": size.clone()}

    def _masks(self, image_id: int, height: int, width: int) -> Tensor:
        """Draws the masks of an image's objects, bool [n, height, width]."""
        masks = np.zeros((0, height, width), dtype=bool)
        for annotation in filter(self._is_target, self.coco.imgToAnns[image_id]):
            try:
                mask = decode_segmentation(annotation["segmentation"], height, width)
                masks = np.concatenate([masks, mask[None]])
            except Exception as error:  # pycocotools raises plain Exception, and others of its C code, on bad input
                raise InputError(
                    f"annotation id {annotation['id']} (image id {image_id}) of {self.source} has a segmentation that "
                    f"cannot be drawn on {width}x{height} pixels ({error})") from error
        return torch.from_numpy(masks)


class CocoDetection(DetectionDataset):
    """A COCO-format data set: a folder of images and an instances JSON.

    Args:
        img_folder: folder of the images.
        ann_file: instances JSON.
        transforms: callable `(image, target, rng)`, or None; see `DetectionDataset`.
        return_masks: whether targets hold `masks`, from polygons or run lengths.
        seed: seed of the run.
        num_classes: number of classes of the model; None for the highest category id + 1.

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
    ) -> None:
        if not Path(img_folder).is_dir():
            raise InputError(f"image folder {img_folder} does not exist")
        ground_truth = read_ground_truth(ann_file)
        num_classes = num_classes_of(ground_truth, ann_file, num_classes)
        check_ground_truth(ground_truth, ann_file, num_classes, need_masks=return_masks)
        super().__init__(img_folder, ground_truth, ann_file, transforms, return_masks, seed=seed)


def read_ground_truth(ann_file: str | os.PathLike) -> dict:
    """Reads an instances JSON and checks that it is one.

    The latest two files are remembered, since their categories are wanted before their annotations are.

    Raises:
        InputError: the file is missing, not JSON, or lacks one of the lists of a COCO file.
    """
    path = Path(ann_file)
    if not path.is_file():
        raise InputError(f"annotation file {path} does not exist")
    status = path.stat()
    return _read_json(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2)
def _read_json(path: Path, modified: int, size: int) -> dict:
    """Reads one version of a file; `modified` and `size` only tell versions apart."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"annotation file {path} is not valid JSON ({error})") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(f'annotation file {path} is not in COCO format: it has no list "{name}"')
    for category in content["categories"]:
        if not isinstance(category, dict) or not _is_count(category.get("id")):
            raise InputError(f"annotation file {path} has a category without an id >= 0: {category}")
    return content


def class_names(ground_truth: dict) -> dict[int, str]:
    """Returns the class name of each category id (the id itself where there is no name), by ascending id."""
    names = {category["id"]: str(category.get("name", category["id"])) for category in ground_truth["categories"]}
    return dict(sorted(names.items()))


def num_classes_of(ground_truth: dict, source: str | os.PathLike, num_classes: int | None = None) -> int:
    """Returns `num_classes` if given, else the highest category id of the ground truth + 1.

    Raises:
        InputError: there are no categories to read it from.
    """
    if num_classes is not None:
        return num_classes
    if not ground_truth["categories"]:
        raise InputError(f"annotation file {source} has no categories, so --num_classes must be given")
    return max(category["id"] for category in ground_truth["categories"]) + 1


def check_ground_truth(
    ground_truth: dict, source: str | os.PathLike, num_classes: int, need_masks: bool = False
) -> None:
    """Checks every image and annotation, and fills in absent `iscrowd` (0) and `area` (that of the box).

    A box that lies wholly outside its image is only reported: its object is left out, as everywhere in DETR.

    Args:
        ground_truth: COCO dict, changed in place.
        source: file it comes from, for messages.
        num_classes: category ids must be below this.
        need_masks: whether every annotation must have a segmentation.

    Raises:
        InputError: names the first image or annotation that is wrong.
    """
    images = _check_images(ground_truth["images"], source)
    categories = set(class_names(ground_truth))
    seen: set[int] = set()
    outside = []
    for annotation in ground_truth["annotations"]:
        if not isinstance(annotation, dict) or not _is_count(annotation.get("id")):
            raise InputError(f"{source} has an annotation without an id >= 0: {str(annotation)[:200]}")
        image_id = annotation.get("image_id")
        where = f"annotation id {annotation['id']} of {source}"
        if not _is_count(image_id) or image_id not in images:
            raise InputError(f"{where} belongs to image id {image_id}, which is not in the file")
        image = images[image_id]
        where = f"annotation id {annotation['id']} (image {image['file_name']}) of {source}"
        if annotation["id"] in seen:
            raise InputError(f"{where} is not the only annotation with this id")
        seen.add(annotation["id"])
        _check_category(annotation, categories, num_classes, where)
        _check_box(annotation, where)
        if need_masks and not isinstance(annotation.get("segmentation"), (list, dict)):
            raise InputError(f"{where} has no segmentation, which --masks needs")
        if _is_outside(annotation["bbox"], image):
            outside.append(where)
    if outside:
        print_main(f"{len(outside)} boxes lie outside their images and are left out, the first is {outside[0]}")


def _check_images(images: list, source: str | os.PathLike) -> dict[int, dict]:
    """Returns the image entries by id."""
    by_id: dict[int, dict] = {}
    for image in images:
        if not isinstance(image, dict) or not _is_count(image.get("id")):
            raise InputError(f"{source} has an image without an id >= 0: {str(image)[:200]}")
        if not isinstance(image.get("file_name"), str):
            raise InputError(f"image id {image['id']} of {source} has no file_name")
        if image["id"] in by_id:
            raise InputError(f"image id {image['id']} occurs twice in {source}")
        by_id[image["id"]] = image
    if not by_id:
        raise InputError(f"{source} lists no images")
    return by_id


def _check_category(annotation: dict, categories: set[int], num_classes: int, where: str) -> None:
    category = annotation.get("category_id")
    if not _is_count(category) or category not in categories:
        raise InputError(f"{where} has category_id {category}, which is not among the categories of the file")
    if category >= num_classes:
        raise InputError(f"{where} has category_id {category}, but the model has {num_classes} classes (--num_classes)")


def _check_box(annotation: dict, where: str) -> None:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise InputError(f"{where} has the box {box}, not four finite numbers")
    if box[2] < 0 or box[3] < 0:
        raise InputError(f"{where} has the box {box} with a negative width or height")
    if not _is_number(annotation.setdefault("area", box[2] * box[3])):
        raise InputError(f"{where} has the area {annotation['area']}, not a finite number")
    annotation.setdefault("iscrowd", 0)


def _is_outside(box: list[float], image: dict) -> bool:
    x, y, width, height = box
    below_or_right = x >= image.get("width", math.inf) or y >= image.get("height", math.inf)
    return width > 0 and height > 0 and (below_or_right or x + width <= 0 or y + height <= 0)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def index_ground_truth(ground_truth: dict) -> COCO:
    """Makes the pycocotools object of a COCO dict, without its chatter."""
    coco = COCO()
    coco.dataset = ground_truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def decode_segmentation(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Draws a segmentation: a list of polygons, or run lengths (compressed or not), as bool [height, width]."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        encoded = mask_codec.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
        return mask_codec.decode(encoded).astype(bool)
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    return mask_codec.decode(mask_codec.frPyObjects(polygons, height, width)).any(axis=2)


def _paths(image_set: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the image folder and the annotation file of an image set."""
    if not args.coco_path:
        raise InputError("--coco_path is needed: the folder that holds annotations/, train2017/ and val2017/")
    root = Path(args.coco_path)
    if not root.is_dir():
        raise InputError(f"--coco_path {root} does not exist")
    return root / f"{image_set}2017", root / "annotations" / f"instances_{image_set}2017.json"
