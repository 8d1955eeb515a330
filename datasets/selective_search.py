"""Region proposals without labels: selective search (Uijlings et al., 2013) as DETReg uses it (section 3.1).

The search groups the segments of an image step by step into larger ones, in several hierarchies; every segment
and group is a region. OpenCV's `createSelectiveSearchSegmentation` returns them in an order that it draws anew at
each call, without the levels that it draws it by. Here the same regions are found with OpenCV's own segmentations
and similarities, and come with their levels, so that such an order can be drawn at any time, from any random source.
"""
from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import numpy as np
from scipy.ndimage import find_objects
from torch import Tensor

from datasets.image_io import read_image
from datasets.transforms import resize_to
from util.errors import InputError

__all__ = ["GRID", "SETTINGS", "count_boxes", "draw_order", "find_regions", "propose_regions", "require_opencv",
           "selective_search"]

# Proposals are computed on the image squeezed to GRID × GRID pixels; a corner then fits in a byte.
GRID = 128
# What decides the regions of an image. A cache made with other settings is refused.
SETTINGS = {"method": "selective search", "mode": "fast", "grid": GRID}
# The fast mode's segmentations: scales of the observation, blur in pixels, fewest pixels of a segment.
_SCALES, _BLUR, _MIN_PIXELS = (150, 300, 450), 0.8, 100


def propose_regions(path: str | os.PathLike) -> np.ndarray:
    """Finds the regions of an image file, see `find_regions`.

    Raises:
        UnreadableImage: the file is missing or cannot be decoded.
        InputError: OpenCV's contrib modules are not installed.
    """
    return find_regions(read_image(path)[0])


def selective_search(image: Tensor, rng: np.random.Generator | None = None) -> np.ndarray:
    """Runs selective search in its fast mode.

    Args:
        image: uint8 [3, H, W], RGB.
        rng: random source of the order; None for an order that is always the same.

    Returns:
        The proposals, see `draw_order`.

    Raises:
        InputError: OpenCV's contrib modules are not installed.
    """
    return draw_order(find_regions(image), np.random.default_rng(0) if rng is None else rng)


def draw_order(regions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws an order of regions: each has a rank, uniform from 0 to its level, and small ranks come first.

    Args:
        regions: uint8 [n, 6] from `find_regions`.
        rng: random source.

    Returns:
        uint8 [m, 4]: x0, y0, x1, y1 on a grid of `GRID` × `GRID` over the image, the ends exclusive, best first, all
        different: of regions with the same box, the first counts.
    """
    # The smallest of k numbers that are uniform in 0..1 has the distribution of 1 - u^(1/k), u being uniform.
    ranks = (1 - rng.random(len(regions)) ** (1 / regions[:, 5])) * regions[:, 4]
    boxes = regions[np.argsort(ranks, kind="stable"), :4]
    _, first = np.unique(np.ascontiguousarray(boxes).view(np.uint32), return_index=True)
    return boxes[np.sort(first)]


def count_boxes(regions: np.ndarray) -> int:
    """Returns how many different boxes there are among regions, uint8 [n, 6]."""
    return len(np.unique(regions[:, :4], axis=0))


def find_regions(image: Tensor) -> np.ndarray:
    """Finds the regions of an image in all hierarchies.

    Args:
        image: uint8 [3, H, W], RGB.

    Returns:
        uint8 [n, 6], all rows different: x0, y0, x1, y1 as in `draw_order`; the level, 1 for a segment and one more
        than the higher of its parts' for a group; and how many such regions there are. n >= 1 (of an image without any
        structure, the image itself, once in each hierarchy).

    Raises:
        InputError: OpenCV's contrib modules are not installed.
    """
    regions, counts = np.unique(np.array(_group_all(image)), axis=0, return_counts=True)
    return np.column_stack([regions, counts]).astype(np.uint8)


def _group_all(image: Tensor) -> list[tuple[int, ...]]:
    """Returns the regions of the fast mode's twelve hierarchies (two colour spaces, three segmentations, two
    similarities), (x0, y0, x1, y1, level) each, in OpenCV's order."""
    cv2 = require_opencv()
    segmentation = cv2.ximgproc.segmentation
    pixels = resize_to(image, (GRID, GRID)).permute(1, 2, 0).contiguous().numpy()
    segmenters = [segmentation.createGraphSegmentation(_BLUR, scale, _MIN_PIXELS) for scale in _SCALES]
    color = segmentation.createSelectiveSearchSegmentationStrategyColor()
    fill = segmentation.createSelectiveSearchSegmentationStrategyFill()
    texture = segmentation.createSelectiveSearchSegmentationStrategyTexture()
    size = segmentation.createSelectiveSearchSegmentationStrategySize()
    combine = segmentation.createSelectiveSearchSegmentationStrategyMultiple
    regions, number = [], 0
    for space in (cv2.COLOR_RGB2HSV, cv2.COLOR_RGB2Lab):
        converted = cv2.cvtColor(pixels, space)
        for segmenter in segmenters:
            segments = segmenter.processImage(converted)
            for similarity in (combine(color, fill, texture, size), combine(fill, texture, size)):
                regions += _group(converted, segments, similarity, number)
            number += 1  # by which the similarities know what they can use again
    return regions


def _group(image: np.ndarray, segments: np.ndarray, similarity: Any, number: int) -> list[tuple[int, ...]]:
    """Merges the two most similar neighbours until no neighbours are left.

    Returns all regions, (x0, y0, x1, y1, level), in the order in which they come into being.

    Args:
        image: uint8 [GRID, GRID, 3].
        segments: int32 [GRID, GRID], the segment of each pixel, 0, 1, …
        similarity: OpenCV's strategy.
        number: tells images and segmentations apart.
    """
    # Shared with OpenCV, which reads what changes here.
    sizes = np.bincount(segments.ravel()).astype(np.int32)[:, None]
    similarity.setImage(image, segments, sizes, number)
    regions = [(columns.start, rows.start, columns.stop, rows.stop, 1)
               for rows, columns in find_objects(segments + 1)]
    names = list(range(len(regions)))  # by which the similarities know a region: a group has that of one of its parts
    similar = {pair: similarity.get(*pair) for pair in _neighbours(segments)}
    while similar:
        one, other = max(similar, key=similar.__getitem__)
        (x0, y0, x1, y1, level), (x2, y2, x3, y3, other_level) = regions[one], regions[other]
        regions.append((min(x0, x2), min(y0, y2), max(x1, x3), max(y1, y3), max(level, other_level) + 1))
        new, kept, gone = len(names), names[one], names[other]
        names.append(min(kept, gone))
        similarity.merge(kept, gone)
        sizes[kept] += sizes[gone]
        sizes[gone] = sizes[kept]
        touched = [pair for pair in similar if one in pair or other in pair]
        for pair in touched:
            del similar[pair]
        around = dict.fromkeys(index for pair in touched for index in pair if index not in (one, other))
        similar.update({(new, index): similarity.get(names[new], names[index]) for index in around})
    return regions


def _neighbours(segments: np.ndarray) -> list[tuple[int, int]]:
    """Returns the pairs of segments (the smaller first) where a pixel of one has one of the other on its left, above
    it, or left above; the first row and column ask for none, as in OpenCV."""
    touch = np.zeros([segments.max() + 1] * 2, dtype=bool)
    for other in (segments[1:, :-1], segments[:-1, 1:], segments[:-1, :-1]):
        touch[segments[1:, 1:], other] = True
    return [tuple(pair) for pair in np.argwhere(np.triu(touch | touch.T, 1)).tolist()]


@functools.lru_cache(maxsize=1)
def require_opencv() -> ModuleType:
    """Imports OpenCV, which then runs on one thread: there is a process for each image at work already.

    Raises:
        InputError: it, or the contrib modules that selective search is one of, are not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise InputError(f"selective search needs OpenCV with its contrib modules ({error}): "
                         "pip install -r requirements/detreg.txt") from error
    if not hasattr(cv2, "ximgproc"):
        raise InputError(f"selective search is one of OpenCV's contrib modules, which the OpenCV {cv2.__version__} of "
                         "this environment lacks: pip uninstall it, then pip install -r requirements/detreg.txt")
    cv2.setNumThreads(1)
    return cv2
