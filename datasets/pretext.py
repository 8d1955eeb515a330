"""The pretext of pre-training: unlabelled images, boxes in them to find, and the crops of these boxes.

One data set class serves every pretext; a `Pretext` says how an image is shown and which boxes of it are to be found.
UP-DETR's are random patches (here), DETReg's are proposed regions (`datasets.regions`).
"""
from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets import transforms as T
from datasets.image_io import IMAGE_EXTENSIONS, read_image, read_sizes
from datasets.packed import checksum, pack_paths
from datasets.patches import PatchAugmentation, augment_patches, cut_patches
from datasets.usable_images import UsableImages
from util.box_ops import box_xyxy_to_cxcywh
from util.errors import InputError
from util.files import folder_fault, read_text, shown

__all__ = ["PRETRAIN_MAX_SIZE", "PRETRAIN_SIZES", "PatchPretext", "Pretext", "PretextDataset", "RandomPatches", "View",
           "build", "check_sizes", "choose_files", "is_held_out", "list_images", "num_classes_and_names", "open_image",
           "scale_boxes"]

PRETRAIN_SIZES = tuple(range(320, 481, 16))
PRETRAIN_MAX_SIZE = 600
PATCH_LABEL = 1

# Images with a shorter side than this, in pixels, are icons and thumbnails: there is nothing in them to find.
MIN_IMAGE_SIDE = 16


def build(image_set: str, args: argparse.Namespace, augment: bool = True) -> "PretextDataset":
    """Builds the random-patch pretext of `args`.

    Reads `num_patches`, `min_patch`, `max_patch`, `patch_size`, `pretrain_sizes`, `pretrain_max_size`, `seed`, and what
    `choose_files` reads.

    Args:
        image_set: "train" or "val".
        args: parsed flags.
        augment: False prepares training images as evaluation does: the same patches in every epoch.

    Raises:
        InputError: a folder is missing or has no images, or a flag makes no sense.
    """
    root, files = choose_files(image_set, args)
    sizes = args.pretrain_sizes or PRETRAIN_SIZES
    training = image_set == "train" and augment
    pretext = PatchPretext(RandomPatches(args.num_patches, args.min_patch, args.max_patch),
                           sizes if training else [max(sizes)], args.pretrain_max_size or PRETRAIN_MAX_SIZE)
    return PretextDataset(root, files, pretext, training=training, patch_size=args.patch_size, seed=args.seed)


def num_classes_and_names(args: argparse.Namespace) -> tuple[int, dict[int, str]]:
    """Returns UP-DETR's number of classes (label 0 unused, 1 patch) and their names."""
    return PATCH_LABEL + 1, {PATCH_LABEL: "patch"}


def list_images(root: str | os.PathLike) -> list[str]:
    """Lists the images of a folder tree by their extension, links to files and folders followed.

    A folder that is reached a second time, by a link, is passed over; so are hidden files. The order is that of the
    sorted paths.

    Args:
        root: top folder.

    Returns:
        Paths relative to `root`, with "/" between folders.

    Raises:
        InputError: the folder, or one inside it, does not exist or cannot be listed, or there are no images.
    """
    def refuse(error: OSError) -> None:
        raise InputError(f"image folder {error.filename} cannot be listed ({error.strerror})") from error

    root = Path(root)
    if not os.path.isdir(root):
        raise InputError(f"image folder {shown(root)} {folder_fault(root)}")
    found, visited = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders.sort()
        relative = Path(folder).relative_to(root)
        images = (name for name in names if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."))
        found += [(relative / name).as_posix() for name in images]
    if not found:
        raise InputError(f"image folder {root} has no images (files ending in {', '.join(IMAGE_EXTENSIONS)})")
    return sorted(found)


def is_held_out(path: str, share: float) -> bool:
    """Tells if an image belongs to the held-out share: its relative path alone decides, so that it stays on its side
    when other images are added.

    Args:
        path: path relative to the folder tree.
        share: wanted share of held-out images, 0..1.
    """
    return zlib.crc32(os.fsencode(path)) < share * 2**32


def choose_files(image_set: str, args: argparse.Namespace) -> tuple[str, list[str]]:
    """Chooses the images of an image set.

    Held-out images ("val") are those of `imagenet_val_path`, or the share `held_out_share` of `imagenet_path`, or, with
    neither, all of `imagenet_path`. Of the folders of `imagenet_path`, `class_list` may name those that count.

    Returns:
        The top folder, and the paths of the images relative to it.

    Raises:
        InputError: a folder is missing or has no images, or a flag makes no sense.
    """
    if not args.imagenet_path:
        raise InputError("--imagenet_path is needed: a folder tree of images")
    if image_set == "val" and args.imagenet_val_path:
        return args.imagenet_val_path, list_images(args.imagenet_val_path)
    files = list_images(args.imagenet_path)
    if args.class_list:
        files = keep_classes(files, args.class_list, args.imagenet_path)
    share = args.held_out_share or 0.0
    if args.imagenet_val_path or not share:
        return args.imagenet_path, files
    files = [path for path in files if is_held_out(path, share) == (image_set == "val")]
    if not files:
        raise InputError(f"--held_out_share {share} of {args.imagenet_path} leaves no images to "
                         f"{'train on' if image_set == 'train' else 'hold out'}")
    return args.imagenet_path, files


def keep_classes(files: Sequence[str], class_list: str | os.PathLike, root: str | os.PathLike) -> list[str]:
    """Keeps the images that lie, at any depth, in folders which a list names, such as ImageNet100's.

    Args:
        files: paths relative to `root`.
        class_list: text file whose lines begin with the name of a folder (ImageNet's are WordNet ids, "n01440764");
            what follows a blank, empty lines and lines that begin with "#" don't count.
        root: for messages.

    Raises:
        InputError: the file is missing, or it is empty, or it names a folder without images.
    """
    lines = [line.split() for line in read_text(class_list, "--class_list").splitlines()]
    names = {words[0] for words in lines if words and not words[0].startswith("#")}
    if not names:
        raise InputError(f"--class_list {class_list} names no classes")
    kept, found = [], set()
    for path in files:
        mine = names.intersection(path.split("/")[:-1])
        if mine:
            kept.append(path)
            found |= mine
    if found != names:
        raise InputError(f"--class_list {class_list}: {len(names - found)} of its {len(names)} classes have no images "
                         f"in {root}, the first is {min(names - found)}")
    return kept


@dataclass(frozen=True)
class View:
    """An image as a sample shows it, and the image of the file, which patches are cut from in full detail.

    Attributes:
        image: uint8 [3, H, W].
        boxes: [M, 4], x0, y0, x1, y1 in pixels of `image`, the ends exclusive.
        source: uint8 [3, H', W'], as decoded from the file.
        source_boxes: [M, 4], what to cut for each box: x0, y0, x1, y1 in pixels of `source`, the ends exclusive.
    """

    image: Tensor
    boxes: Tensor
    source: Tensor
    source_boxes: Tensor


class Pretext(Protocol):
    """Says how an image is shown and which boxes of it are to be found.

    Attributes:
        patches_are_given: True if the model is given the patches and says where they are (UP-DETR); False if it is to
            find the boxes by itself and to predict what is in them (DETReg).
    """

    patches_are_given: bool

    def view(self, path: Path, index: int, rng: np.random.Generator) -> View | None:
        """Shows an image.

        Args:
            path: image file.
            index: its index in the data set.
            rng: random source of the sample.

        Returns:
            What to show; None if the image does not suit, and another is to take its place.

        Raises:
            UnreadableImage: the file is missing or cannot be decoded.
        """


def open_image(path: Path) -> Tensor | None:
    """Decodes an image at full size, uint8 [3, H, W]; None for one in which there is nothing to find."""
    image, size = read_image(path)
    return image if min(size) >= MIN_IMAGE_SIDE else None


def scale_boxes(boxes: Tensor, source: Tensor, image: Tensor) -> Tensor:
    """Returns xyxy boxes [M, 4] in pixels of `source` [3, H', W'] as those of `image` [3, H, W], float32: the same
    picture at another size."""
    return boxes * torch.tensor([image.shape[-1] / source.shape[-1], image.shape[-2] / source.shape[-2]]).repeat(2)


class PatchPretext:
    """UP-DETR's pretext: the image resized, and random patches of its file, which the model is given.

    Args:
        propose: draws the boxes.
        sizes: short sides to draw from, in pixels.
        max_size: largest long side in pixels.

    Raises:
        InputError: a size is too small.
    """

    patches_are_given = True

    def __init__(self, propose: "RandomPatches", sizes: Sequence[int] = PRETRAIN_SIZES,
                 max_size: int = PRETRAIN_MAX_SIZE) -> None:
        check_sizes(sizes)
        self.propose = propose
        self.sizes = list(sizes)
        self.max_size = max_size

    def view(self, path: Path, index: int, rng: np.random.Generator) -> View | None:
        """Shows an image, see `Pretext`."""
        short_side = self.sizes[rng.integers(len(self.sizes))]
        source = open_image(path)
        if source is None:
            return None
        size = T.resized_size(*source.shape[-2:], short_side, self.max_size)
        boxes = self.propose(source, rng)
        if boxes is None or min(size) < MIN_IMAGE_SIDE:
            return None
        image = T.resize_to(source, size)
        return View(image, scale_boxes(boxes, source, image), source, boxes)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (height, width) that images of a size are shown at, where there is but one short side."""
        return T.resized_size(height, width, self.sizes[0], self.max_size)


def check_sizes(sizes: Sequence[int]) -> None:
    """Raises InputError if a short side is so small that nothing can be found."""
    if min(sizes) < MIN_IMAGE_SIDE:
        raise InputError(f"--pretrain_sizes {min(sizes)} must be at least {MIN_IMAGE_SIDE}")


class RandomPatches:
    """UP-DETR's boxes: width and height uniform, position uniform, every edge of the image within reach.

    Args:
        num_patches: number M of boxes.
        min_side: smallest side in pixels.
        max_side: largest side in pixels; None for the image's side less `min_side`, which is the limit in any case.

    Raises:
        InputError: the numbers are not positive, or the wrong way round.
    """

    def __init__(self, num_patches: int, min_side: int = 8, max_side: int | None = None) -> None:
        if num_patches < 1 or min_side < 1:
            raise InputError(f"--num_patches {num_patches} and --min_patch {min_side} must be at least 1")
        if max_side is not None and max_side < min_side:
            raise InputError(f"--max_patch {max_side} is less than --min_patch {min_side}")
        self.num_patches = num_patches
        self.min_side = min_side
        self.max_side = max_side

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor | None:
        """Draws boxes of an image, uint8 [3, H, W].

        Returns:
            int64 [M, 4], x0, y0, x1, y1 in pixels, the ends exclusive; None for an image too small for them.
        """
        lengths = np.array([image.shape[-1], image.shape[-2]])
        largest = lengths - self.min_side
        if self.max_side is not None:
            largest = np.minimum(largest, self.max_side)
        if (largest < self.min_side).any():
            return None
        sides = rng.integers(self.min_side, largest, (self.num_patches, 2), endpoint=True)
        corners = rng.integers(0, lengths - sides, endpoint=True)
        return torch.from_numpy(np.concatenate([corners, corners + sides], axis=1))


class PretextDataset(Dataset):
    """Images of a folder tree, with boxes to find and their patches.

    Boxes lie on the image as it is shown; the patches are cut from the image of the file, in its full detail. In
    training they are augmented, in evaluation they are not. In training, sample i is a function of (seed, epoch, i); in
    evaluation of (seed, i) alone.

    Where the model is given the patches, samples are (image, patches, target), and in evaluation the target also holds
    `control_patches`: patches of another image, which a model must not find. Otherwise samples are (image, target), as
    those of labelled data sets, and the target holds the `patches`.

    Files that cannot be read are reported once each on standard error, and the next usable image takes their place, as
    it does, silently, for images that do not suit.

    Args:
        root: top folder.
        files: paths relative to it.
        pretext: says how images are shown and which boxes are to be found.
        training: whether this is for training or for evaluation.
        patch_size: side P to which patches are resized, in pixels.
        seed: seed of the run.

    Raises:
        InputError: there are too few images (none; one, where evaluation needs another), or the patches are too small.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        files: Sequence[str],
        pretext: Pretext,
        *,
        training: bool,
        patch_size: int = 128,
        seed: int = 0,
    ) -> None:
        if not files:
            raise InputError(f"image folder {root} has no images")
        if not training and pretext.patches_are_given and len(files) < 2:
            raise InputError(f"evaluation of a pre-trained model compares with patches of another image, so needs two "
                             f"images at least, but {root} has one")
        if patch_size < 2:
            raise InputError(f"--patch_size {patch_size} must be at least 2")
        self.root = Path(root)
        self.files = pack_paths(files)
        self.pretext = pretext
        self.training = training
        self.patch_size = patch_size
        self.seed = seed
        self.augmentation = PatchAugmentation()
        self._usable = self._all_usable()
        # In shared memory, so that workers which outlive an epoch see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the randomness of training samples depends on; call it before iterating."""
        self._epoch.fill_(epoch)

    def keep_first(self, count: int) -> None:
        """Keeps the first `count` images in the order of their paths.

        Raises:
            InputError: there are fewer, or they are too few for an evaluation.
        """
        if count > len(self.files):
            raise InputError(f"--overfit {count} is more than the {len(self.files)} images of {self.root}")
        if count < 2 and self.pretext.patches_are_given:
            raise InputError(f"--overfit {count}: a pre-training needs two images at least, since it is evaluated with "
                             "patches of another image")
        self.files = pack_paths(self.files[index] for index in range(count))
        self._usable = self._all_usable()

    def _all_usable(self) -> UsableImages:
        return UsableImages(len(self.files), f"image folder {self.root}", self.files.__getitem__)

    @property
    def unreadable(self) -> list[str]:
        """Relative paths of the files that this process or its workers could not read so far."""
        return self._usable.unreadable

    @property
    def unsuited(self) -> list[str]:
        """Relative paths of the images passed over so far because they are too small, or show nothing."""
        return self._usable.unsuited

    def recall_unreadable(self, names: Iterable[str]) -> None:
        """Counts the images that the run which is continued could not read, see `UsableImages.recall_unreadable`."""
        self._usable.recall_unreadable(names)

    def samples_checksum(self) -> int:
        """Returns a checksum of which image each sample shows: of paths, in the samples' order."""
        return checksum(self.files)

    def gather_unreadable(self) -> list[str]:
        """Returns `unreadable` over all processes, each of which must call this.

        Raises:
            InputError: on all processes, when these are more than 1 % of the images (and more than one file).
        """
        return self._usable.gather_unreadable()

    def shown_sizes(self) -> Tensor | None:
        """Returns the (height, width) of each sample of an evaluation, int64 [len(self), 2], as the files' headers
        tell; None where they are random or not known. A sample whose file can't be used shows another image."""
        if self.training or not hasattr(self.pretext, "output_size"):
            return None
        sizes = read_sizes(self.root / path for path in self.files).tolist()
        return torch.tensor([self.pretext.output_size(*size) for size in sizes])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor]]:
        """Returns one sample: (image, patches, target), or (image, target) where the model is not given the patches.

        Returns:
            image: float32 [3, H, W], normalised.
            patches: float32 [M, 3, P, P], normalised.
            target: `image_id` [1] (index of the image shown), `labels` int64 [M] (all 1), `boxes` [M, 4] (cx, cy, w, h
                in 0..1), `area` [M] in pixels of the image, `iscrowd` [M], `orig_size` and `size` [2] (height, width);
                the `patches` if they are not given to the model; else, in evaluation, `control_patches` float32
                [M, 3, P, P].

        Raises:
            InputError: more than 1 % of the files (and more than one) cannot be read, or no image is usable.
        """
        count = len(self)
        shown, view, rng = self._first_usable((index + step) % count for step in range(count))
        image, patches, target = T.normalize_image(view.image), self._cut(view), _make_target(shown, view)
        if self.training:
            patches = augment_patches(patches, self.augmentation.draw(len(patches), rng), normalize=True)
        else:
            patches = T.normalize_image(patches)
        if not self.pretext.patches_are_given:
            target["patches"] = patches
            return image, target
        if not self.training:
            opposite = ((index + count // 2 + step) % count for step in range(count))
            _, other, _ = self._first_usable(candidate for candidate in opposite if candidate != shown)
            target["control_patches"] = T.normalize_image(self._cut(other))
        return image, patches, target

    def _cut(self, view: View) -> Tensor:
        """Cuts the patches of a view, uint8 [M, 3, P, P]; parts of a pixel count as the whole."""
        boxes = torch.cat([view.source_boxes[:, :2].floor(), view.source_boxes[:, 2:].ceil()], dim=1).long()
        return cut_patches(view.source, boxes, self.patch_size)

    def _first_usable(self, candidates: Iterable[int]) -> tuple[int, View, np.random.Generator]:
        """Loads the first candidate that can be shown: its index, how it is shown and its random source."""
        def show(index: int) -> tuple[View, np.random.Generator] | None:
            rng = T.sample_rng(self.seed, int(self._epoch) if self.training else 0, index)
            view = self.pretext.view(self.root / self.files[index], index, rng)
            return None if view is None else (view, rng)

        index, (view, rng) = self._usable.first(candidates, show)
        return index, view, rng


def _make_target(index: int, view: View) -> dict[str, Tensor]:
    height, width = view.image.shape[-2:]
    boxes = view.boxes
    return {
        "image_id": torch.tensor([index]),
        "labels": torch.full((len(boxes),), PATCH_LABEL),
        "boxes": box_xyxy_to_cxcywh(boxes.float()) / torch.tensor([width, height, width, height]),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1).float(),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "orig_size": torch.tensor(view.source.shape[-2:]),
        "size": torch.tensor([height, width]),
    }
