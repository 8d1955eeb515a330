"""Data sets: labelled images (COCO, VOC), unlabelled images for pre-training, and how they are evaluated."""
from __future__ import annotations

import argparse

import util.openmp  # noqa: F401  (before torch)

import torch
from pycocotools.coco import COCO
from torch.utils.data import Dataset, Subset

from datasets import coco, coco_panoptic, pretext, regions, voc
from util import recipes
from util.errors import InputError

__all__ = ["build_dataset", "file_sizes", "get_coco_api_from_dataset", "num_classes_and_names", "objects_per_image",
           "shown_sizes"]

# `--dataset_file` to the module that builds it.
_DATASETS = {"coco": coco, "coco_panoptic": coco_panoptic, "voc": voc, "imagenet": pretext,
             "regions": regions}


def build_dataset(image_set: str, args: argparse.Namespace) -> Dataset:
    """Builds the data set that `args.dataset_file` ("coco", "coco_panoptic", "voc", "imagenet" or "regions") names.

    With `args.overfit` both image sets are the first so many training images, prepared as in evaluation.

    Args:
        image_set: "train" or "val".
        args: parsed flags; each module's `build` says which ones it reads.

    Raises:
        InputError: the name is unknown, or the data is missing or wrong.
    """
    args = recipes.settled(args)
    count = args.overfit
    if count is None:
        return _module(args).build(image_set, args)
    dataset = _module(args).build("train", args, augment=False)
    dataset.keep_first(count)
    return dataset


def num_classes_and_names(args: argparse.Namespace) -> tuple[int, dict[int, str]]:
    """Returns the number of classes a model for `args` needs, and the name of each class label that has one.

    `args.num_classes` overrides the number; otherwise it is the highest label of the training annotations + 1.

    Raises:
        InputError: the data set's name is unknown, or its annotations are missing or broken.
    """
    args = recipes.settled(args)
    return _module(args).num_classes_and_names(args)


def get_coco_api_from_dataset(dataset: Dataset) -> COCO | None:
    """Returns the ground truth that boxes are evaluated on, also inside a `Subset`; None for unlabelled images."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, "instances", None) or getattr(dataset, "coco", None)


def objects_per_image(dataset: Dataset) -> torch.Tensor | None:
    """Returns how many objects (or patches) each sample has, int64 [len(dataset)], also for a `Subset`; None if unknown."""
    return _of_samples(dataset, "objects_per_image")


def shown_sizes(dataset: Dataset) -> torch.Tensor | None:
    """Returns the (height, width) at which each sample shows its image, int64 [len(dataset), 2], also for a `Subset`;
    None if they are random or not known."""
    return _of_samples(dataset, "shown_sizes")


def file_sizes(dataset: Dataset) -> torch.Tensor | None:
    """Returns the (height, width) of each sample's image file, int64 [len(dataset), 2], also for a `Subset`; None
    for unlabelled images."""
    return _of_samples(dataset, "file_sizes")


def _of_samples(dataset: Dataset, method: str) -> torch.Tensor | None:
    if isinstance(dataset, Subset):
        values = _of_samples(dataset.dataset, method)
        return None if values is None else values[torch.as_tensor(dataset.indices)]
    return getattr(dataset, method)() if hasattr(dataset, method) else None


def _module(args: argparse.Namespace):
    if args.dataset_file not in _DATASETS:
        raise InputError(f"--dataset_file {args.dataset_file} is not one of {', '.join(_DATASETS)}")
    return _DATASETS[args.dataset_file]
