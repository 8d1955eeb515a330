"""Reading image files: whatever a file holds becomes RGB bytes, whatever is broken becomes one exception."""
from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS as IMAGE_EXTENSIONS

__all__ = ["IMAGE_EXTENSIONS", "MAX_PIXELS", "UnreadableImage", "pil_to_rgb_tensor", "read_image", "read_size",
           "read_sizes"]

# A file of a few kilobytes may decode to gigabytes. Larger images than this, 400 MB as RGB, count as unreadable; Pillow
# would only warn of them, and refuse those of twice the size.
MAX_PIXELS = 2**27
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# A reduced JPEG decode keeps at least this many times the wanted resolution, so that the antialiased resize
# which follows still does the filtering (the value of Pillow's own thumbnails).
_REDUCING_GAP = 2
# Files whose first bytes are waited for at a time; nearly nothing is computed.
_READERS = 8


class UnreadableImage(Exception):
    """An image file that is missing or cannot be decoded; the message names the file and says why."""


def read_image(path: str | os.PathLike, short_side: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Decodes one image file to RGB, ignoring any EXIF orientation.

    Args:
        path: file of any format Pillow reads.
        short_side: shortest side, in pixels, that the caller is going to resize the image to. A much larger JPEG is
            then decoded at 1/2, 1/4 or 1/8 of its size, which saves most of the time. None decodes at full size.

    Returns:
        The image, uint8 [3, H, W] (stored channels last), and the (height, width) the file says it has.

    Raises:
        UnreadableImage: the file is missing, truncated, too large to decode, or not an image.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(f"image file {path} has {width}x{height} pixels, more than {MAX_PIXELS}")
            if short_side is not None:
                picture.draft(None, (_REDUCING_GAP * short_side, _REDUCING_GAP * short_side))
            return pil_to_rgb_tensor(picture), (height, width)
    except UnreadableImage:
        raise
    except FileNotFoundError as error:
        raise UnreadableImage(f"image file {path} does not exist") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes, even IndexError
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UnreadableImage(f"image file {path} cannot be decoded ({reason})") from error


def read_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """Reads the (height, width) an image file says it has, without decoding it; None if it can't be read."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except Exception:  # whoever loads the image says what is wrong with it
        return None


def read_sizes(paths: Iterable[str | os.PathLike]) -> Tensor:
    """Reads the sizes of many files, int64 [n, 2], (height, width); (1, 1) where `read_size` can't."""
    with ThreadPoolExecutor(_READERS) as pool:
        return torch.tensor([size or (1, 1) for size in pool.map(read_size, paths)]).view(-1, 2)


def pil_to_rgb_tensor(picture: Image.Image) -> Tensor:
    """Converts a Pillow image of any mode to RGB bytes.

    Grey is repeated, alpha is dropped, palettes and CMYK are resolved, and 16-bit grey keeps its upper 8 bits.

    Args:
        picture: image of any mode.

    Returns:
        uint8 [3, H, W], a view of channels-last memory (which torchvision resizes fastest).
    """
    if picture.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255 and leave a white image
        grey = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    else:
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
