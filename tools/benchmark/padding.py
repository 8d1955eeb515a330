"""How much of training batches is padding, with and without `--group_by_aspect`."""
import argparse
from typing import Any, Dict

import numpy as np
import torch
from torch import Tensor

from datasets import build_dataset, file_sizes
from datasets.batching import aspect_groups, padding_share
from datasets.coco import make_coco_transforms, transform_sizes
from datasets.sampling import TrainBatches
from datasets.transforms import sample_rng
from tools.benchmark.workloads import SEED, model_flags, parse_main_flags

BATCHES = (2, 4, 8, 16)  # images
IMAGES = 4000
# Made-up photographs: (height, width) and their share. Three of four are landscapes, as in most collections.
SHAPES = {(480, 640): 0.45, (427, 640): 0.3, (640, 480): 0.13, (640, 427): 0.09, (640, 640): 0.03}


def measure_padding(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Shares of pixels that are padding in an epoch's batches, by their size, as augmented for training.

    Of the data set that main.py's flags name (`-- --coco_path DIR`), else of `IMAGES` made-up ones. Only sizes are worked
    out; no image is read.
    """
    options = parse_main_flags(model_flags("--dataset_file coco", args))
    named = options.coco_path or options.train_images
    sizes = file_sizes(build_dataset("train", options)) if named else made_up_sizes()
    shown = shown_sizes(sizes, options)
    groups = aspect_groups(sizes)
    shares = {}
    for batch_size in BATCHES:
        plain, grouped = (TrainBatches(len(shown), batch_size, SEED, groups=by) for by in (None, groups))
        shares[batch_size] = {"share": padding_share(shown[batch].tolist() for batch in plain),
                              "share_grouped": padding_share(shown[batch].tolist() for batch in grouped)}
    return {"title": f"padding of batches of {len(sizes)} {'images' if named else 'made-up images'}", "padding": shares}


def made_up_sizes() -> Tensor:
    """(height, width) of so many images, int64 [IMAGES, 2]."""
    shapes = np.random.default_rng(SEED).choice(len(SHAPES), IMAGES, p=list(SHAPES.values()))
    return torch.tensor(list(SHAPES))[shapes]


def shown_sizes(sizes: Tensor, options: argparse.Namespace) -> Tensor:
    """(height, width) after the augmentation, of images without pixels."""
    augment = make_coco_transforms("train", **transform_sizes(options)).transforms[0]
    images = (torch.empty(3, *size, dtype=torch.uint8, device="meta") for size in sizes.tolist())
    return torch.tensor([augment(image, None, sample_rng(SEED, 0, index))[0].shape[1:] for index, image in enumerate(images)])
