"""Image transforms that treat an image, its boxes and its masks together.

A transform is called as `transform(image, target, rng)`. The image is uint8 [3, H, W] until `Normalize`, or a Pillow
image until `ToTensor`; the target is a dict whose `boxes` are absolute x0, y0, x1, y1 until `Normalize` makes them
relative cx, cy, w, h; all randomness comes from `rng`, a `numpy.random.Generator`, so that a sample can be made to
depend on (seed, epoch, index) alone. Without `rng` it comes from torch's global generator.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import torch
import torchvision
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from datasets.image_io import pil_to_rgb_tensor
from datasets.two_arguments import adapt, draw_globally_from, wants_pillow
from util.box_ops import box_xyxy_to_cxcywh

__all__ = [
    "IMAGENET_MEAN", "IMAGENET_STD", "CenterCrop", "Compose", "Normalize", "RandomCrop", "RandomErasing",
    "RandomHorizontalFlip", "RandomPad", "RandomResize", "RandomSelect", "RandomSizeCrop", "ToTensor", "crop", "hflip",
    "image_size", "normalize_image", "pad", "remove_objects", "resize", "resize_to", "resized_size", "sample_rng",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Image = Tensor | PIL.Image.Image  # uint8 [3, H, W], or Pillow's
Transform = Callable[[Image, "dict | None", np.random.Generator], "tuple[Image, dict | None]"]

_OBJECT_FIELDS = ("boxes", "labels", "area", "iscrowd", "masks")
# Bytes to normalised floats in one multiply-add: (x / 255 - mean) / std = x * scale + offset.
_SCALE = 1 / (255 * torch.tensor(IMAGENET_STD)).view(3, 1, 1)
_OFFSET = -(torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)).view(3, 1, 1)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Returns the random source of one sample, a function of the three numbers alone.

    Args:
        seed: seed of the run.
        epoch: epoch number, at least 0.
        index: index of the image in its data set, at least 0.
    """
    return np.random.default_rng((seed % 2**64, epoch, index))


def _source(rng: np.random.Generator | None) -> np.random.Generator:
    """Returns the random source, or one seeded from torch's global generator."""
    return np.random.default_rng(int(torch.randint(2**62, ()))) if rng is None else rng


def image_size(image: Image) -> tuple[int, int]:
    """Returns the (height, width) of an image in pixels."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    return image.shape[-2], image.shape[-1]


def resized_size(height: int, width: int, size: int, max_size: int | None = None) -> tuple[int, int]:
    """DETR's size rule: the short side becomes `size`, or less where the long side would pass `max_size`.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        size: wanted short side in pixels.
        max_size: largest long side in pixels; None for no limit.

    Returns:
        The new (height, width).
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
    size = max(size, 1)
    other = int(size * long / short)
    return (size, other) if height <= width else (other, size)


def resize(
    image: Image, target: dict | None, size: int | Sequence[int], max_size: int | None = None
) -> tuple[Image, dict | None]:
    """Resizes image, boxes, areas and masks by `resized_size` (antialiased bilinear; nearest for masks).

    Args:
        image: uint8 [3, H, W], or a Pillow image.
        target: dict with absolute `boxes`, or None.
        size: wanted short side in pixels; or wanted (width, height).
        max_size: largest long side in pixels; None for no limit. A wanted (width, height) has none.
    """
    old_height, old_width = image_size(image)
    new_size = list(size[::-1] if isinstance(size, (list, tuple))
                    else resized_size(old_height, old_width, size, max_size))
    if new_size == [old_height, old_width]:
        return image, target
    image = resize_to(image, new_size)
    if target is None:
        return image, None
    target = _apply_to_geometry(target, (old_height, old_width), lambda x: F.resize(x, new_size))
    if "area" in target:
        target["area"] = target["area"] * (new_size[0] / old_height * (new_size[1] / old_width))
    target["size"] = torch.tensor(new_size)
    return image, target


def resize_to(image: Image, size: Sequence[int]) -> Image:
    """Resizes an image, uint8 [3, H, W] or Pillow's, to `size` (height, width), bilinear and antialiased."""
    return F.resize(image, list(size), antialias=True)


def crop(image: Image, target: dict | None, region: tuple[int, int, int, int]) -> tuple[Image, dict | None]:
    """Cuts a region; boxes are clipped to it, areas become those of the clipped boxes, vanished objects are dropped.

    Args:
        image: uint8 [3, H, W], or a Pillow image.
        target: dict with absolute `boxes`, or None.
        region: (top, left, height, width) in pixels, inside the image.
    """
    canvas = image_size(image)
    image = F.crop(image, *region)
    if target is None:
        return image, None
    target = _apply_to_geometry(target, canvas, lambda x: F.crop(x, *region))
    target["size"] = torch.tensor(region[2:])
    if "boxes" in target:
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        if "area" in target:
            target["area"] = sides.prod(1)
        remove_objects(target, (sides > 0).all(1))
    elif "masks" in target:
        remove_objects(target, target["masks"].flatten(1).any(1))
    return image, target


def pad(image: Image, target: dict | None, padding: Sequence[int]) -> tuple[Image, dict | None]:
    """Adds `padding` (x, y) pixels of zeros on the right and below; boxes stay where they are."""
    right, below = padding
    image = F.pad(image, [0, 0, right, below])
    if target is None:
        return image, None
    target = {**target, "size": torch.tensor(image_size(image))}
    if "masks" in target:
        target["masks"] = torch.nn.functional.pad(target["masks"], (0, right, 0, below))
    return image, target


def hflip(image: Image, target: dict | None) -> tuple[Image, dict | None]:
    """Mirrors image, boxes and masks left to right."""
    canvas = image_size(image)
    image = F.horizontal_flip(image)
    return image, None if target is None else _apply_to_geometry(target, canvas, F.horizontal_flip)


def remove_objects(target: dict, keep: Tensor) -> None:
    """Keeps, in place, only the objects of `target` where `keep` (bool [n]) is true, in all per-object fields."""
    if not bool(keep.all()):
        for name in _OBJECT_FIELDS:
            if name in target:
                target[name] = target[name][keep]


def normalize_image(image: Tensor) -> Tensor:
    """Turns bytes into floats with ImageNet's mean 0 and deviation 1.

    Args:
        image: uint8 [..., 3, H, W].

    Returns:
        float32 of the same shape; channels last if the image is, else contiguous.
    """
    if image.stride(-3) != 1:
        image = image.contiguous().float()
        return torch.addcmul(_OFFSET, image, _SCALE, out=image)
    # Over whole rows of pixels: three channels by themselves are too few for the processor's vectors.
    width = image.shape[-1]
    scale, offset = _SCALE.flatten().repeat(width), _OFFSET.flatten().repeat(width)
    rows = image.movedim(-3, -1).flatten(-2).float()
    torch.addcmul(offset, rows, scale, out=rows)
    return rows.unflatten(-1, (width, 3)).movedim(-1, -3)


class Compose:
    """Runs transforms one after the other; the entry point for callers outside.

    Args:
        transforms: callables `(image, target, rng) -> (image, target)`, or `(image, target) -> (image, target)`.
    """

    def __init__(self, transforms: Sequence[Callable]) -> None:
        self.transforms = [adapt(transform) for transform in transforms]

    def __call__(
        self, image: Image, target: dict | None = None, rng: np.random.Generator | None = None
    ) -> tuple[Image, dict | None]:
        """Transforms one image and its target; the target given is left unchanged.

        A Pillow image stays one up to `ToTensor`, and for callables of two arguments; else bytes are worked on.

        Args:
            image: Pillow image of any mode, or uint8 [3, H, W].
            target: dict with absolute x0, y0, x1, y1 `boxes` [n, 4] and optionally `labels`, `area`, `iscrowd` [n],
                `masks` [n, H, W]; or None.
            rng: random source; None takes ones seeded from torch's global generator.
        """
        if isinstance(image, PIL.Image.Image) and (self._works_on_bytes() or image.mode != "RGB"):
            image = pil_to_rgb_tensor(image)
            if not self._works_on_bytes():
                image = F.to_pil_image(image)
        target = None if target is None else dict(target)
        for transform in self.transforms:
            image, target = transform(image, target, rng)
        return image, target

    def _works_on_bytes(self) -> bool:
        tensors = any(isinstance(transform, ToTensor) for transform in self.transforms)
        return bool(self.transforms) and isinstance(self.transforms[-1], Normalize) and not (
            tensors or wants_pillow(self))

    def output_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Returns the (height, width) that images of a size get; None where that is random."""
        for transform in self.transforms:
            if not hasattr(transform, "output_size"):
                return None
            size = transform.output_size(height, width)
            if size is None:
                return None
            height, width = size
        return height, width


class RandomHorizontalFlip:
    """Mirrors with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(
        self, image: Image, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Image, dict | None]:
        return hflip(image, target) if _source(rng).random() < self.p else (image, target)


class RandomResize:
    """Resizes the short side to one of `sizes`, the long side at most `max_size` (pixels; None for no limit)."""

    def __init__(self, sizes: Sequence[int | Sequence[int]], max_size: int | None = None) -> None:
        self.sizes = list(sizes)
        self.max_size = max_size

    def __call__(
        self, image: Image, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Image, dict | None]:
        return resize(image, target, self.sizes[_source(rng).integers(len(self.sizes))], self.max_size)

    def output_size(self, height: int, width: int) -> tuple[int, int] | None:
        """See `Compose.output_size`."""
        if len(self.sizes) > 1:
            return None
        size = self.sizes[0]
        return resized_size(height, width, size, self.max_size) if isinstance(size, int) else tuple(size[::-1])


class RandomSizeCrop:
    """Cuts a random rectangle with sides uniform in `min_size`..`max_size` pixels, or up to the image where it is
    smaller."""

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size = min_size
        self.max_size = max_size

    def __call__(
        self, image: Image, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Image, dict | None]:
        rng = _source(rng)
        return _crop_anywhere(image, target, [self._side(length, rng) for length in image_size(image)], rng)

    def _side(self, length: int, rng: np.random.Generator) -> int:
        largest = min(length, self.max_size)
        return int(rng.integers(min(self.min_size, largest), largest, endpoint=True))


def _crop_anywhere(
    image: Image, target: dict | None, sides: Sequence[int], rng: np.random.Generator
) -> tuple[Image, dict | None]:
    corner = [int(rng.integers(0, length - side, endpoint=True)) for length, side in zip(image_size(image), sides)]
    return crop(image, target, (*corner, *sides))


class RandomCrop:
    """Cuts a rectangle of `size` (height, width) anywhere."""

    def __init__(self, size: Sequence[int]) -> None:
        self.size = tuple(size)

    def __call__(
        self, image: Image, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Image, dict | None]:
        if any(side > length for side, length in zip(self.size, image_size(image))):
            raise ValueError(f"a crop of {self.size} is larger than the image of {image_size(image)}")
        return _crop_anywhere(image, target, self.size, _source(rng))


class CenterCrop:
    """Cuts a rectangle of `size` (height, width) in the middle."""

    def __init__(self, size: Sequence[int]) -> None:
        self.size = tuple(size)

    def __call__(
        self, image: Image, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Image, dict | None]:
        corner = [round((length - side) / 2) for length, side in zip(image_size(image), self.size)]
        return crop(image, target, (*corner, *self.size))


class RandomPad:
    """Pads 0 to `max_pad` pixels on the right and below, see `pad`."""

    def __init__(self, max_pad: int) -> None:
        self.max_pad = max_pad

    def __call__(
        self, image: Image, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Image, dict | None]:
        return pad(image, target, _source(rng).integers(0, self.max_pad, size=2, endpoint=True).tolist())


class RandomErasing:
    """Blanks a random rectangle of a tensor image by `torchvision.transforms.RandomErasing`, whose arguments it takes."""

    def __init__(self, *args, **kwargs) -> None:
        self.eraser = torchvision.transforms.RandomErasing(*args, **kwargs)

    def __call__(
        self, image: Tensor, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, dict | None]:
        with draw_globally_from(rng):
            return self.eraser(image), target


class ToTensor:
    """Makes an image of bytes float32 [3, H, W] in 0..1; the target stays as it is."""

    def __call__(
        self, image: Image, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, dict | None]:
        image = pil_to_rgb_tensor(image) if isinstance(image, PIL.Image.Image) else image
        return F.to_dtype(image, torch.float32, scale=True), target

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """See `Compose.output_size`."""
        return height, width


class RandomSelect:
    """Runs `first` with probability `p`, else `second`."""

    def __init__(self, first: Callable, second: Callable, p: float = 0.5) -> None:
        self.first = adapt(first)
        self.second = adapt(second)
        self.p = p

    def __call__(
        self, image: Image, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Image, dict | None]:
        return (self.first if _source(rng).random() < self.p else self.second)(image, target, rng)


class Normalize:
    """Ends a pipeline: the image becomes normalised float32, boxes become cx, cy, w, h in 0..1.

    Args:
        mean: mean of each channel of images in 0..1, ImageNet's if not given.
        std: standard deviation of each channel, likewise.
    """

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)

    def __call__(
        self, image: Image, target: dict | None, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, dict | None]:
        height, width = image_size(image)
        if target is not None and "boxes" in target:
            scale = torch.tensor([width, height, width, height], dtype=torch.float32)
            target = {**target, "boxes": box_xyxy_to_cxcywh(target["boxes"]) / scale}
        return self._normalized(image), target

    def _normalized(self, image: Image) -> Tensor:
        if isinstance(image, PIL.Image.Image):
            image = pil_to_rgb_tensor(image)
        if image.dtype == torch.uint8:
            if (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD):
                return normalize_image(image)
            image = F.to_dtype(image, torch.float32, scale=True)
        return F.normalize(image, list(self.mean), list(self.std))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """See `Compose.output_size`."""
        return height, width


def _apply_to_geometry(target: dict, canvas: tuple[int, int], operation: Callable[[Tensor], Tensor]) -> dict:
    """Returns a copy of `target` with torchvision's `operation` applied to boxes and masks on an image of `canvas`."""
    target = dict(target)
    if "boxes" in target:
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=canvas)
        target["boxes"] = operation(boxes).as_subclass(Tensor)
    if "masks" in target:
        target["masks"] = operation(tv_tensors.Mask(target["masks"])).as_subclass(Tensor)
    return target
