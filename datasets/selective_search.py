"""Region proposals without labels: selective search (Uijlings et al., 2013) as DETReg uses it (section 3.1)."""
from __future__ import annotations

import ctypes
import functools
import os
from types import ModuleType

import numpy as np
from torch import Tensor

from datasets.image_io import read_image
from datasets.transforms import resize_to
from util.errors import InputError

__all__ = ["GRID", "SETTINGS", "propose_regions", "require_opencv", "selective_search"]

# Proposals are computed on the image squeezed to GRID × GRID pixels; a corner then fits in a byte.
GRID = 128
# What decides the proposals of an image. A cache made with other settings is refused.
SETTINGS = {"method": "selective search", "mode": "fast", "grid": GRID, "order_seed": 1}


def propose_regions(path: str | os.PathLike) -> np.ndarray:
    """Proposes regions of an image file, see `selective_search`.

    Raises:
        UnreadableImage: the file is missing or cannot be decoded.
        InputError: OpenCV's contrib modules are not installed.
    """
    return selective_search(read_image(path)[0])


def selective_search(image: Tensor) -> np.ndarray:
    """Runs selective search in its fast mode.

    Its order mixes the level at which a region was merged with chance, which it takes from the C library. That is
    seeded here, so that an image always gets the same proposals in the same order.

    Args:
        image: uint8 [3, H, W], RGB.

    Returns:
        uint8 [n, 4]: x0, y0, x1, y1 on a grid of `GRID` × `GRID` over the image, the ends exclusive, best first, all
        different; n >= 1 (of an image without any structure, the image itself).

    Raises:
        InputError: OpenCV's contrib modules are not installed.
    """
    cv2 = require_opencv()
    pixels = resize_to(image, (GRID, GRID)).flip(0).permute(1, 2, 0).contiguous().numpy()  # OpenCV's BGR
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(pixels)
    search.switchToSelectiveSearchFast()
    ctypes.CDLL(None).srand(SETTINGS["order_seed"])
    boxes = search.process()
    boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.uint8)


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
