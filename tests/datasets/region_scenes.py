"""Images in which there are regions to find, and the flags of a pre-training on them."""
import argparse

import numpy as np
from PIL import Image


def write_scene(path, size=(96, 64), seed=0):
    """Writes an image with three plain rectangles on plain ground; PNG keeps it exactly."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), rng.integers(0, 256, 3), dtype=np.uint8)
    for _ in range(3):
        x, y = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        pixels[y:y + size[1] // 3, x:x + size[0] // 3] = rng.integers(0, 256, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def arguments(root, **changes):
    """Resolved flags as `datasets.regions.build` reads them."""
    values = dict(dataset_file="regions", imagenet_path=str(root), imagenet_val_path=None, held_out_share=None,
                  class_list=None, strategy="topk", max_prop=5, cache_path=None, patch_size=24, pretrain_sizes=[32, 40],
                  pretrain_max_size=60, crop_resize=None, crop_size=None, seed=0, num_classes=None)
    return argparse.Namespace(**{**values, **changes})
