"""DETReg's pretext: the detector finds regions that selective search proposes, and predicts what is in them
(Bar et al., 2022, section 3).

Where the proposals come from is a *source*: a cache made beforehand (`tools.cache_proposals`), or selective search on
the spot, which takes some tenth of a second per image.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets import transforms as T
from datasets.coco import CROP_RESIZES, CROP_SIZES, training_augmentation
from datasets.pretext import (PRETRAIN_MAX_SIZE, PRETRAIN_SIZES, PretextDataset, View, check_sizes, choose_files,
                              open_image)
from datasets.proposal_cache import CachedProposals
from datasets.selective_search import GRID, draw_order, find_regions, require_opencv
from util.distributed import print_main
from util.errors import InputError

__all__ = ["NUM_CLASSES", "STRATEGIES", "RegionPretext", "build", "choose_regions", "num_classes_and_names"]

STRATEGIES = ("topk", "random", "importance")
REGION_LABEL = 1
# The published pre-trained models have COCO's 91 outputs, of which REGION_LABEL alone is used.
NUM_CLASSES = 91

# An image with fewer proposals shows nothing: selective search returns the whole image if there is no structure.
_MIN_REGIONS = 2


def build(image_set: str, args: argparse.Namespace, augment: bool = True) -> PretextDataset:
    """Builds the region pretext of `args`.

    Reads `strategy`, `max_prop`, `cache_path`, `patch_size`, `pretrain_sizes`, `pretrain_max_size`, `crop_resize`,
    `crop_size`, `seed`, and what `datasets.pretext.choose_files` reads.

    Args:
        image_set: "train" or "val".
        args: parsed flags.
        augment: False prepares training images as evaluation does: not augmented, the same regions in every epoch.

    Raises:
        InputError: a folder is missing or has no images, a flag makes no sense, the cache is not one of these images,
            or there is none and OpenCV is not installed.
    """
    root, files = choose_files(image_set, args)
    training = image_set == "train" and augment
    sizes = args.pretrain_sizes or PRETRAIN_SIZES
    max_size = args.pretrain_max_size or PRETRAIN_MAX_SIZE
    check_sizes(sizes)
    if training:
        # The published crops are those of detection, not scaled to the smaller sizes of pre-training.
        transform = training_augmentation(sizes, max_size, args.crop_resize or CROP_RESIZES,
                                          args.crop_size or CROP_SIZES)
    else:
        transform = T.RandomResize([max(sizes)], max_size)
    if args.cache_path:
        source: Callable = CachedProposals(args.cache_path, root, files)
    else:
        require_opencv()
        print_main(f"regions of {root} are proposed anew in every epoch; to do it once, run python -m "
                   f"tools.cache_proposals --imagenet_path {root} --cache_path DIR and give --cache_path DIR")
        source = _propose_on_the_spot
    return PretextDataset(root, files, RegionPretext(source, args.strategy, args.max_prop, transform),
                          training=training, patch_size=args.patch_size, seed=args.seed)


def num_classes_and_names(args: argparse.Namespace) -> tuple[int, dict[int, str]]:
    """Returns the number of classes a model for `args` needs, and the name of the only class label that is used."""
    return args.num_classes or NUM_CLASSES, {REGION_LABEL: "region"}


def choose_regions(strategy: str, count: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Chooses among ranked proposals (section 3.1).

    Args:
        strategy: "topk" takes the best; "random" draws without regard to the rank; "importance" draws the i-th of n
            with a weight of -log(i / n), so that good ones come often and others sometimes.
        count: number n of proposals.
        wanted: number of regions to choose; all are taken if there are no more.
        rng: random source of the sample.

    Returns:
        int64 [min(n, wanted)], different indices, ascending.
    """
    if count <= wanted or strategy == "topk":
        return np.arange(min(count, wanted))
    weights = None
    if strategy == "importance":
        weights = -np.log(np.arange(1, count + 1) / count)
        weights /= weights.sum()
    return np.sort(rng.choice(count, wanted, replace=False, p=weights))


class RegionPretext:
    """Images augmented as for detection, and proposed regions in them, whose contents the model is to predict.

    The order of an image's proposals is drawn anew at each visit, as by the published program, whose selective search
    runs each time. Regions are chosen among them first; the augmentation then clips those that it cuts, and drops those
    that it cuts away, so that a training sample may have none. What is in a region is shown whole and unmirrored.

    Args:
        source: called with an image's index, file and bytes, uint8 [3, H, W]; returns its regions, uint8 [n, 6], see
            `datasets.selective_search.find_regions`.
        strategy: one of `STRATEGIES`.
        max_prop: most regions in an image.
        transform: what is done to image and boxes, `(image, target, rng)`.

    Raises:
        InputError: `strategy` is unknown or `max_prop` too small.
    """

    patches_are_given = False

    def __init__(self, source: Callable[[int, Path, Tensor], np.ndarray], strategy: str, max_prop: int,
                 transform: T.Transform) -> None:
        if strategy not in STRATEGIES:
            raise InputError(f"--strategy {strategy} is not one of {', '.join(STRATEGIES)}")
        if max_prop < 1:
            raise InputError(f"--max_prop {max_prop} must be at least 1")
        self.source = source
        self.strategy = strategy
        self.max_prop = max_prop
        self.transform = transform

    def view(self, path: Path, index: int, rng: np.random.Generator) -> View | None:
        """Shows an image, see `Pretext`; None if it is tiny or has fewer than two proposals."""
        image = open_image(path)
        if image is None:
            return None
        proposals = draw_order(self.source(index, path, image), rng)
        if len(proposals) < _MIN_REGIONS:
            return None
        chosen = proposals[choose_regions(self.strategy, len(proposals), self.max_prop, rng)]
        height, width = image.shape[-2:]
        boxes = torch.from_numpy(chosen).float() * (torch.tensor([width, height, width, height]) / GRID)
        # The numbers of the regions go through the augmentation as labels, and tell which ones are left.
        shown, target = self.transform(image, {"boxes": boxes, "labels": torch.arange(len(boxes))}, rng)
        return View(shown, target["boxes"], image, boxes[target["labels"]])


def _propose_on_the_spot(index: int, path: Path, image: Tensor) -> np.ndarray:
    return find_regions(image)
