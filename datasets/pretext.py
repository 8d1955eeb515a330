"""The pretext of pre-training: unlabelled images, boxes in them to find, and the crops of these boxes.

One data set class serves every pretext; a *proposer* says which boxes to find. UP-DETR's are random patches.
"""
from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets import transforms as T
from datasets.image_io import IMAGE_EXTENSIONS, UnreadableImage, read_image
from datasets.patches import PatchAugmentation, augment_patches, cut_patches, normalize_patches
from util.box_ops import box_xyxy_to_cxcywh
from util.distributed import all_gather
from util.errors import InputError

__all__ = ["PRETRAIN_SIZES", "PretextDataset", "Proposer", "RandomPatches", "build", "is_held_out", "list_images",
           "num_classes_and_names"]

PRETRAIN_SIZES = tuple(range(320, 481, 16))
PRETRAIN_MAX_SIZE = 600
PATCH_LABEL = 1

# Images with a shorter side than this, in pixels, are icons and thumbnails: there is nothing in them to find.
MIN_IMAGE_SIDE = 16
UNREADABLE_SHARE = 0.01
_USABLE, _UNREADABLE, _TOO_SMALL = 0, 1, 2


def build(image_set: str, args: argparse.Namespace, augment: bool = True) -> "PretextDataset":
    """Builds the random-patch pretext of `args`.

    Reads `imagenet_path`, `imagenet_val_path`, `held_out_share`, `num_patches`, `min_patch`, `max_patch`, `patch_size`,
    `pretrain_sizes`, `pretrain_max_size`, `seed`. Held-out images ("val") are those of `imagenet_val_path`, or the
    share of `imagenet_path`, or, with neither, all of `imagenet_path`.

    Args:
        image_set: "train" or "val".
        args: parsed flags.
        augment: False prepares training images as evaluation does: the same patches in every epoch.

    Raises:
        InputError: a folder is missing or has no images, or a flag makes no sense.
    """
    root, files = _choose_files(image_set, args)
    proposer = RandomPatches(args.num_patches, args.min_patch, args.max_patch)
    return PretextDataset(
        root, files, proposer, training=image_set == "train" and augment, sizes=args.pretrain_sizes or PRETRAIN_SIZES,
        max_size=args.pretrain_max_size or PRETRAIN_MAX_SIZE, patch_size=args.patch_size, seed=args.seed)


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
    if not root.is_dir():
        raise InputError(f"image folder {root} does not exist")
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
    """Whether an image belongs to the held-out share: decided by its relative path alone, so that it stays on its side
    when other images are added.

    Args:
        path: path relative to the folder tree.
        share: wanted share of held-out images, 0..1.
    """
    return zlib.crc32(os.fsencode(path)) < share * 2**32


def _choose_files(image_set: str, args: argparse.Namespace) -> tuple[str, list[str]]:
    """Returns the top folder and the relative paths of the images of an image set."""
    if not args.imagenet_path:
        raise InputError("--imagenet_path is needed: a folder tree of images")
    if image_set == "val" and args.imagenet_val_path:
        return args.imagenet_val_path, list_images(args.imagenet_val_path)
    files = list_images(args.imagenet_path)
    share = args.held_out_share or 0.0
    if not 0 <= share < 1:
        raise InputError(f"--held_out_share {share} is not in 0..1")
    if args.imagenet_val_path or not share:
        return args.imagenet_path, files
    files = [path for path in files if is_held_out(path, share) == (image_set == "val")]
    if not files:
        raise InputError(f"--held_out_share {share} of {args.imagenet_path} leaves no images to "
                         f"{'train on' if image_set == 'train' else 'hold out'}")
    return args.imagenet_path, files


class Proposer(Protocol):
    """Says which boxes of an image are to be found."""

    def __call__(self, image: Tensor, rng: np.random.Generator) -> Tensor | None:
        """Proposes boxes.

        Args:
            image: uint8 [3, H, W].
            rng: random source of the sample.

        Returns:
            int64 [M, 4], x0, y0, x1, y1 in pixels of `image`, the ends exclusive; None if the image does not suit, and
            another is to take its place.
        """


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
        """Draws boxes, see `Proposer`; None for an image too small for them."""
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
    """Images of a folder tree, with boxes to find and their patches, as (image, patches, target).

    The image is resized first; boxes lie on its pixels and the patches are cut from it, so that a patch shows what the
    model can see in the image. In training, patches are augmented and sample i is a function of (seed, epoch, i). In
    evaluation nothing is random but the boxes, which depend on (seed, i) alone, and the target also holds
    `control_patches`: patches of another image, which a model must not find.

    Files that cannot be read are reported once each on standard error, and the next usable image takes their place, as
    it does, silently, for images that are too small.

    Args:
        root: top folder.
        files: paths relative to it.
        proposer: says which boxes to find.
        training: whether this is for training or for evaluation.
        sizes: short sides to draw from, in pixels; evaluation takes the largest.
        max_size: largest long side in pixels.
        patch_size: side P to which patches are resized, in pixels.
        seed: seed of the run.

    Raises:
        InputError: there are too few images (none; for evaluation one), or a size is too small.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        files: Sequence[str],
        proposer: Proposer,
        *,
        training: bool,
        sizes: Sequence[int] = PRETRAIN_SIZES,
        max_size: int = PRETRAIN_MAX_SIZE,
        patch_size: int = 128,
        seed: int = 0,
    ) -> None:
        if not files:
            raise InputError(f"image folder {root} has no images")
        if not training and len(files) < 2:
            raise InputError(f"evaluation of a pre-trained model compares with patches of another image, so needs two "
                             f"images at least, but {root} has one")
        if patch_size < 2:
            raise InputError(f"--patch_size {patch_size} must be at least 2")
        if min(sizes) < MIN_IMAGE_SIDE:
            raise InputError(f"--pretrain_sizes {min(sizes)} must be at least {MIN_IMAGE_SIDE}")
        self.root = Path(root)
        self.files = _PathTable(files)
        self.proposer = proposer
        self.training = training
        self.sizes = list(sizes) if training else [max(sizes)]
        self.max_size = max_size
        self.patch_size = patch_size
        self.seed = seed
        self.augmentation = PatchAugmentation()
        # In shared memory: workers tell the main process what they could not read, and see the epoch change.
        self._state = torch.full((len(files),), _USABLE, dtype=torch.uint8).share_memory_()
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
        if count < 2:
            raise InputError(f"--overfit {count}: a pre-training needs two images at least, since it is evaluated with "
                             "patches of another image")
        self.files = _PathTable(self.files[index] for index in range(count))
        self._state = torch.full((count,), _USABLE, dtype=torch.uint8).share_memory_()

    @property
    def unreadable(self) -> list[str]:
        """Relative paths of the files that this process or its workers could not read so far."""
        return [self.files[index] for index in self._indices(_UNREADABLE)]

    @property
    def too_small(self) -> list[str]:
        """Relative paths of the images passed over so far because they are too small."""
        return [self.files[index] for index in self._indices(_TOO_SMALL)]

    def gather_unreadable(self) -> list[str]:
        """Returns `unreadable` over all processes, each of which must call this.

        Raises:
            InputError: on all processes, when these are more than 1 % of the images (and more than one file).
        """
        for indices in all_gather(self._indices(_UNREADABLE)):
            self._state[indices] = _UNREADABLE
        unreadable = self.unreadable
        if unreadable:
            self._refuse_too_many(f"among them {self.root / unreadable[0]}")
        return unreadable

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns one sample.

        Returns:
            image: float32 [3, H, W], normalised.
            patches: float32 [M, 3, P, P], normalised.
            target: `image_id` [1] (index of the image shown), `labels` int64 [M] (all 1), `boxes` [M, 4] (cx, cy, w, h
                in 0..1), `area` [M] in pixels of the image, `iscrowd` [M], `orig_size` and `size` [2] (height, width);
                in evaluation `control_patches` float32 [M, 3, P, P].

        Raises:
            InputError: more than 1 % of the files (and more than one) cannot be read, or no image is usable.
        """
        count = len(self)
        shown, image, orig_size, boxes, rng = self._first_usable((index + step) % count for step in range(count))
        patches = cut_patches(image, boxes, self.patch_size)
        target = _make_target(shown, image.shape[-2:], orig_size, boxes)
        if self.training:
            patches = augment_patches(patches, self.augmentation.draw(len(boxes), rng))
            return T.normalize_image(image), normalize_patches(patches), target
        opposite = ((index + count // 2 + step) % count for step in range(count))
        _, other, _, other_boxes, _ = self._first_usable(candidate for candidate in opposite if candidate != shown)
        target["control_patches"] = T.normalize_image(cut_patches(other, other_boxes, self.patch_size))
        return T.normalize_image(image), T.normalize_image(patches), target

    def _first_usable(
        self, candidates: Iterable[int]
    ) -> tuple[int, Tensor, tuple[int, int], Tensor, np.random.Generator]:
        """Loads the first candidate that can be: its index, resized image, original size, boxes and random source."""
        for index in candidates:
            if self._state[index] != _USABLE:
                continue
            rng = T.sample_rng(self.seed, int(self._epoch) if self.training else 0, index)
            short_side = self.sizes[rng.integers(len(self.sizes))]
            try:
                image, orig_size = read_image(self.root / self.files[index], short_side)
            except UnreadableImage as error:
                self._mark_unreadable(index, error)
                continue
            boxes = None
            if min(orig_size) >= MIN_IMAGE_SIDE:
                image = T.resize_to(image, T.resized_size(*orig_size, short_side, self.max_size))
                boxes = self.proposer(image, rng)
            if boxes is not None:
                return index, image, orig_size, boxes, rng
            self._state[index] = _TOO_SMALL
        raise InputError(
            f"image folder {self.root} has too few usable images: of {len(self)}, {len(self.unreadable)} cannot be "
            f"read and {len(self.too_small)} are too small")

    def _mark_unreadable(self, index: int, error: UnreadableImage) -> None:
        self._state[index] = _UNREADABLE
        print(f"passed over: {error}", file=sys.stderr, flush=True)
        self._refuse_too_many(f"the latest: {error}")

    def _refuse_too_many(self, example: str) -> None:
        count = len(self._indices(_UNREADABLE))
        if count > max(1, UNREADABLE_SHARE * len(self)):
            raise InputError(f"{count} of the {len(self)} images of {self.root} cannot be read, which is more than "
                             f"{UNREADABLE_SHARE:.0%}; {example}")

    def _indices(self, state: int) -> Tensor:
        return (self._state == state).nonzero()[:, 0]


def _make_target(index: int, size: Sequence[int], orig_size: Sequence[int], boxes: Tensor) -> dict[str, Tensor]:
    height, width = size
    sides = boxes[:, 2:] - boxes[:, :2]
    return {
        "image_id": torch.tensor([index]),
        "labels": torch.full((len(boxes),), PATCH_LABEL),
        "boxes": box_xyxy_to_cxcywh(boxes.float()) / torch.tensor([width, height, width, height]),
        "area": sides.prod(1).float(),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "orig_size": torch.tensor(orig_size),
        "size": torch.tensor([height, width]),
    }


class _PathTable(Sequence):
    """Paths in one block of bytes: a list of a million strings would be copied, page by page, into every worker."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index]:self._ends[index + 1]])
