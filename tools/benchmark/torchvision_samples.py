"""Training samples as they are usually made, with Pillow images and torchvision's first transforms, as contenders.

Distributions and sizes are those of our samples; what is drawn isn't.
"""
import random
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Optional, Sequence, Tuple

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import CocoDetection
from torchvision.transforms import functional as F

from datasets.coco import TRAIN_SIZES, paths
from datasets.pretext import PRETRAIN_MAX_SIZE, PRETRAIN_SIZES, list_images
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, resized_size
from tools.benchmark.contender import Checkout
from util.recipes import resolve

CROP_RESIZES, CROP_SIZES = (400, 500, 600), (384, 600)  # DETR's, in pixels
TO_INPUT = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
Target = Dict[str, Tensor]


class TorchvisionSamples(Checkout):
    """A training sample of `--dataset_file imagenet` or `coco`, one after the other."""

    comparable = False  # what is drawn is other

    def __init__(self, spec: Dict[str, Any]) -> None:
        super().__init__(spec)
        random.seed(spec["seed"])
        self.dataset = DATA_SETS[self.args.dataset_file](self.args)

    def prepare(self) -> None:
        resolve(self.args)  # and no more: the system's memory is used as it comes

    def run(self, turns: Iterable[Any]) -> None:
        for turn, _ in enumerate(turns):
            self.dataset[turn % len(self.dataset)]


class Patches:
    """UP-DETR's: an image, and random patches of it with colour jitter, grey and blur."""

    def __init__(self, args: Any) -> None:
        self.paths = [Path(args.imagenet_path, name) for name in list_images(args.imagenet_path)]
        self.sizes, self.max_size = args.pretrain_sizes or PRETRAIN_SIZES, args.pretrain_max_size or PRETRAIN_MAX_SIZE
        self.num_patches, self.min_patch = args.num_patches, args.min_patch
        self.of_patch = transforms.Compose([
            transforms.Resize((args.patch_size, args.patch_size)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blurred], p=0.5),
            TO_INPUT])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[Tensor, Tensor, Target]:
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        image, _ = resized(image, {}, random.choice(self.sizes), self.max_size)
        boxes = [self._box(*image.size) for _ in range(self.num_patches)]
        patches = torch.stack([self.of_patch(image.crop(box)) for box in boxes])
        labels = torch.ones(len(boxes), dtype=torch.int64)
        shown, target = finished(image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": labels})
        return shown, patches, target

    def _box(self, width: int, height: int) -> Tuple[int, int, int, int]:
        w, h = (random.randint(self.min_patch, length - self.min_patch) for length in (width, height))
        x, y = random.randint(0, width - w), random.randint(0, height - h)
        return x, y, x + w, y + h


class Objects:
    """DETR's: a flip, then a resize, or a resize, a crop and a resize, of an image and its boxes."""

    def __init__(self, args: Any) -> None:
        self.files = CocoDetection(*map(str, paths("train", args)))
        self.sizes, self.max_size = args.train_sizes or TRAIN_SIZES, args.max_size or 1333
        self.crop_resize, self.crop_size = args.crop_resize or CROP_RESIZES, args.crop_size or CROP_SIZES

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tuple[Tensor, Target]:
        image, annotations = self.files[index]
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {"boxes": boxes, "labels": torch.tensor([annotation["category_id"] for annotation in annotations]),
                  "area": torch.tensor([annotation["area"] for annotation in annotations]),
                  "iscrowd": torch.tensor([annotation["iscrowd"] for annotation in annotations])}
        if random.random() < 0.5:
            image = F.hflip(image)
            target["boxes"] = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor(
                [image.width, 0, image.width, 0])
        if random.random() < 0.5:
            image, target = cropped(*resized(image, target, random.choice(self.crop_resize)), self.crop_size)
        return finished(*resized(image, target, random.choice(self.sizes), self.max_size))


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))


def resized(image: Image.Image, target: Target, short_side: int, max_size: Optional[int] = None) -> Tuple[Image.Image, Target]:
    """An image with this short side, and its boxes and areas."""
    height, width = resized_size(image.height, image.width, short_side, max_size)
    scale = torch.tensor([width / image.width, height / image.height]).repeat(2)
    image = F.resize(image, [height, width])
    if "boxes" in target:
        target = {**target, "boxes": target["boxes"] * scale, "area": target["area"] * scale[:2].prod()}
    return image, target


def cropped(image: Image.Image, target: Target, limits: Sequence[int]) -> Tuple[Image.Image, Target]:
    """A random part of an image, its sides within limits, and the objects that are left in it."""
    width, height = (random.randint(*(min(limit, length) for limit in limits)) for length in image.size)
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    boxes = target["boxes"] - torch.tensor([left, top, left, top])
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    sides = boxes[:, 2:] - boxes[:, :2]
    target = {**target, "boxes": boxes, "area": sides.prod(1)}
    keep = (sides > 0).all(1)
    return F.crop(image, top, left, height, width), {name: values[keep] for name, values in target.items()}


def finished(image: Image.Image, target: Target) -> Tuple[Tensor, Target]:
    """The normalised image, and boxes as cx, cy, w, h in 0..1."""
    low, high = target["boxes"][:, :2], target["boxes"][:, 2:]
    scale = torch.tensor([image.width, image.height, image.width, image.height])
    return TO_INPUT(image), {**target, "boxes": torch.cat([(low + high) / 2, high - low], 1) / scale}


DATA_SETS: Dict[str, Callable[[Any], Any]] = {"imagenet": Patches, "coco": Objects}
CONTENDERS = {"samples": TorchvisionSamples}
