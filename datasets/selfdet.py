"""UP-DETR's pretext as a data set by the published names, for users' programs; `datasets.pretext` is the program's own.

The difference: transforms are given as callables, and all randomness comes from torch's and numpy's global states.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

from datasets import transforms as T
from datasets.image_io import pil_to_rgb_tensor
from datasets.patches import PatchAugmentation, augment_patches
from datasets.pretext import PATCH_LABEL, PRETRAIN_MAX_SIZE, PRETRAIN_SIZES, RandomPatches, list_images, open_image
from datasets.two_arguments import adapt
from datasets.usable_images import UsableImages

__all__ = ["SelfDet", "build_selfdet", "get_query_transforms", "get_random_patch_from_img", "make_self_det_transforms"]

PATCH_SIZE = 128


def get_random_patch_from_img(img: PIL.Image.Image, min_pixel: int = 8) -> tuple[PIL.Image.Image, int, int, int, int]:
    """Cuts a random patch, see `datasets.pretext.RandomPatches`.

    Args:
        img: an image with sides of at least 2 * `min_pixel`.
        min_pixel: smallest side of the patch in pixels.

    Returns:
        The patch, and its left edge, upper edge, width and height in pixels.

    Raises:
        ValueError: the image is smaller.
    """
    boxes = RandomPatches(1, min_pixel)(torch.empty(3, img.height, img.width, device="meta"), _numbers())
    if boxes is None:
        raise ValueError(f"an image of {img.width}x{img.height} pixels has no patch of at least {min_pixel} and at most "
                         f"its sides less {min_pixel}")
    x0, y0, x1, y1 = boxes[0].tolist()
    return img.crop((x0, y0, x1, y1)), x0, y0, x1 - x0, y1 - y0


class SelfDet(Dataset):
    """Images of a folder tree with random patches to find; samples as in `datasets.pretext.PretextDataset` in training.

    An image that can't be read, which is reported, or is too small for patches is replaced by the next usable one.

    Args:
        root: top folder.
        detection_transform: `(image, target)` or `(image, target, rng)`, from a Pillow image and absolute x0, y0, x1, y1
            boxes to a tensor and relative cx, cy, w, h.
        query_transform: `(patch)`, from a Pillow image to float [3, P, P].
        num_patches: number M of patches of an image.
    """

    def __init__(
        self, root: str | os.PathLike, detection_transform: Callable, query_transform: Callable, num_patches: int = 10
    ) -> None:
        self.root = Path(root)
        self.files = list_images(root)
        self.detection_transform = adapt(detection_transform)
        self.query_transform = query_transform
        self.num_patches = num_patches
        self._usable = UsableImages(len(self.files), f"image folder {self.root}", self.files.__getitem__)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns the image, the patches [M, 3, P, P] and the target.

        Raises:
            InputError: more than 1 % of the files (and more than one) cannot be read, or no image is usable.
        """
        candidates = ((item + step) % len(self) for step in range(len(self)))
        index, image = self._usable.first(candidates, self._open)
        cut = [get_random_patch_from_img(image) for _ in range(self.num_patches)]
        boxes = torch.tensor([[x, y, x + width, y + height] for _, x, y, width, height in cut], dtype=torch.float32)
        size = torch.tensor([image.height, image.width])
        target = {"image_id": torch.tensor([index]), "boxes": boxes,
                  "labels": torch.full((len(cut),), PATCH_LABEL), "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
                  "iscrowd": torch.zeros(len(cut), dtype=torch.int64), "orig_size": size, "size": size.clone()}
        patches = torch.stack([self.query_transform(patch) for patch, *_ in cut])
        shown, target = self.detection_transform(image, target, None)
        return shown, patches, target

    def _open(self, index: int) -> PIL.Image.Image | None:
        image = open_image(self.root / self.files[index])
        return None if image is None else to_pil_image(image)


def make_self_det_transforms(image_set: str) -> T.Compose:
    """Returns UP-DETR's transforms of an image: "train" resizes to a short side of 320 … 480, "val" to 480, at most 600."""
    if image_set not in ("train", "val"):
        raise ValueError(f'image_set must be "train" or "val", got {image_set!r}')
    sizes = PRETRAIN_SIZES if image_set == "train" else PRETRAIN_SIZES[-1:]
    return T.Compose([T.RandomResize(sizes, max_size=PRETRAIN_MAX_SIZE), T.Normalize()])


def get_query_transforms(image_set: str) -> Callable[[PIL.Image.Image], Tensor]:
    """Returns UP-DETR's transform of a patch to float [3, 128, 128], normalised; "train" changes colours and blurs."""
    if image_set not in ("train", "val"):
        raise ValueError(f'image_set must be "train" or "val", got {image_set!r}')

    def transform(patch: PIL.Image.Image) -> Tensor:
        pixels = T.resize_to(pil_to_rgb_tensor(patch), (PATCH_SIZE, PATCH_SIZE))
        if image_set == "val":
            return T.normalize_image(pixels)
        return augment_patches(pixels[None], PatchAugmentation().draw(1, _numbers()), normalize=True)[0]

    return transform


def build_selfdet(image_set: str, args: argparse.Namespace, p: str | os.PathLike) -> SelfDet:
    """Builds the data set of the images in the folder `p`, with `args.num_patches` patches each."""
    return SelfDet(p, make_self_det_transforms(image_set), get_query_transforms(image_set), args.num_patches)


def _numbers() -> np.random.Generator:
    return np.random.default_rng(np.random.randint(2**32, dtype=np.uint64))
