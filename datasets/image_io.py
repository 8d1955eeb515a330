"""Reading image files: whatever a file holds becomes RGB bytes, whatever is broken becomes one exception."""
from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS as IMAGE_EXTENSIONS

from util.errors import InputError
from util.files import open_regular, shown

__all__ = ["IMAGE_EXTENSIONS", "MAX_PIXELS", "Decoded", "UnreadableImage", "decode", "open_picture",
           "pil_to_rgb_tensor", "read_image", "read_size", "read_sizes", "warn_once"]

# A file of a few kilobytes may decode to gigabytes. Larger images than this, 400 MB as RGB, count as unreadable; Pillow
# would only warn of them, and refuse those of twice the size.
MAX_PIXELS = 2**27
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# The only formats that are opened, whatever a file is called: others of Pillow's run programs (EPS) or are no photographs.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF", "JPEG2000")

# A reduced JPEG decode keeps at least this many times the wanted resolution, so that the antialiased resize
# which follows still does the filtering (the value of Pillow's own thumbnails).
_REDUCING_GAP = 2
# Files whose first bytes are waited for at a time; nearly nothing is computed.
_READERS = 8

_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}
# Grey images that don't reach this share of their type's range are told of.
_FILLED_SHARE = 0.25
_WARNINGS = ("image_range", "image_orientation", "segmentation")
# One byte for each kind of warning, in memory that forked loading processes share: each is given once.
_warned = mmap.mmap(-1, len(_WARNINGS))


class UnreadableImage(Exception):
    """An image file that is missing or cannot be decoded; the message names the file and says why."""


class Decoded(NamedTuple):
    """A decoded image file.

    Attributes:
        image: uint8 [3, H, W], stored channels last.
        size: (height, width) of the file, after its EXIF orientation where that is applied.
        orientation: the EXIF orientation, 2 to 8, that the file has and that is not applied; 1 for none.
        doubt: says in words that the numbers of a 16- or 32-bit image don't go with the range of their type, or None.
    """

    image: Tensor
    size: tuple[int, int]
    orientation: int
    doubt: str | None


def decode(path: str | os.PathLike, short_side: int | None = None, apply_exif: bool = False) -> Decoded:
    """Decodes one image file to RGB.

    Args:
        path: JPEG, PNG, BMP, PPM, WebP, TIFF, GIF or JPEG 2000 file.
        short_side: shortest side, in pixels, that the caller is going to resize the image to. A much larger JPEG is
            then decoded at 1/2, 1/4 or 1/8 of its size, which saves most of the time. None decodes at full size.
        apply_exif: turn the image upright as its EXIF orientation says.

    Raises:
        UnreadableImage: the file is missing, special, truncated, too large to decode, or not such an image.
    """
    with open_picture(path) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise UnreadableImage(f"image file {shown(path)} has {width}x{height} pixels, more than {MAX_PIXELS}")
        if short_side is not None:
            picture.draft(None, (_REDUCING_GAP * short_side, _REDUCING_GAP * short_side))
        is_deep = _has_16_bits(picture)
        picture.load()
        orientation = _orientation(picture)
        if apply_exif and orientation != 1:
            picture = picture.transpose(_TURNS[orientation])
            height, width = (width, height) if orientation >= 5 else (height, width)
            orientation = 1
        image, doubt = _to_rgb(picture)
        if is_deep and doubt is None and not picture.mode.startswith(("I", "F")):
            doubt = _doubt_of_16_bits(int(image.max()))
        return Decoded(image, (height, width), orientation, doubt)


def read_image(
    path: str | os.PathLike, short_side: int | None = None, apply_exif: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Decodes one image file as `decode` does; an image of doubtful numbers is told of once.

    Returns:
        The image, uint8 [3, H, W] (stored channels last), and the (height, width) the file says it has.

    Raises:
        UnreadableImage: as `decode`.
    """
    decoded = decode(path, short_side, apply_exif)
    if decoded.doubt:
        warn_once("image_range", f"image file {shown(path)} {decoded.doubt}")
    return decoded.image, decoded.size


@contextlib.contextmanager
def open_picture(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Opens an image file of the formats that are read, as Pillow's image, for a `with` block.

    Raises:
        UnreadableImage: the file is no such image, or decoding it within the block fails.
    """
    try:
        with open_regular(path, "image file") as file, Image.open(file, formats=_FORMATS) as picture:
            yield picture
    except UnreadableImage:
        raise
    except InputError as error:
        raise UnreadableImage(str(error)) from error
    except Image.UnidentifiedImageError as error:
        formats = f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
        raise UnreadableImage(f"image file {shown(path)} cannot be decoded (it is no {formats})") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes, even IndexError
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UnreadableImage(f"image file {shown(path)} cannot be decoded ({reason})") from error


def read_size(path: str | os.PathLike, apply_exif: bool = False) -> tuple[int, int] | None:
    """Reads the (height, width) an image file says it has, without decoding it; None if it can't be read."""
    try:
        with open_picture(path) as picture:
            turned = apply_exif and _orientation(picture) >= 5
            return (picture.width, picture.height) if turned else (picture.height, picture.width)
    except UnreadableImage:  # whoever loads the image says what is wrong with it
        return None


def read_sizes(paths: Iterable[str | os.PathLike], apply_exif: bool = False) -> Tensor:
    """Reads the sizes of many files, int64 [n, 2], (height, width); (1, 1) where `read_size` can't."""
    with ThreadPoolExecutor(_READERS) as pool:
        sizes = pool.map(lambda path: read_size(path, apply_exif), paths)
        return torch.tensor([size or (1, 1) for size in sizes]).view(-1, 2)


def warn_once(kind: str, sentence: str) -> None:
    """Prints the first warning of a kind on standard error; later ones, also of loading processes, are passed over."""
    place = _WARNINGS.index(kind)
    if not _warned[place]:
        _warned[place] = 1
        print(f"warning: {sentence} (python -m tools.check_data lists all such)", file=sys.stderr, flush=True)


def pil_to_rgb_tensor(picture: Image.Image) -> Tensor:
    """Converts a Pillow image of any mode to RGB bytes.

    Grey is repeated, alpha is dropped, palettes and CMYK are resolved. Of 16-bit grey the upper 8 bits are kept, of
    32-bit grey with larger numbers the upper 8 of its 31; floats from 0 to 1 are multiplied by 255.

    Args:
        picture: image of any mode.

    Returns:
        uint8 [3, H, W], a view of channels-last memory (which torchvision resizes fastest).
    """
    return _to_rgb(picture)[0]


def _to_rgb(picture: Image.Image) -> tuple[Tensor, str | None]:
    """Converts as `pil_to_rgb_tensor` does; also returns `Decoded.doubt`."""
    doubt = None
    if picture.mode.startswith(("I", "F")):  # Pillow's own conversion would clip at 255
        grey, doubt = _grey_bytes(np.asarray(picture))
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    else:
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1), doubt


def _grey_bytes(values: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Brings 16- or 32-bit grey, [H, W], to bytes; also says what makes that doubtful."""
    damaged = values.dtype.kind == "f" and not np.isfinite(values).all()
    values = np.nan_to_num(values, posinf=0, neginf=0) if damaged else values
    lowest, highest = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        top = 1 if lowest >= 0 and highest <= 1 else 255
        grey = np.rint(values * 255.0) if top == 1 else values
    else:
        top = 2**16 - 1 if highest < 2**16 else 2**31 - 1
        grey = values.astype(np.int64) >> (8 if top < 2**16 else 23)
    doubt = None
    if damaged:
        doubt = "has pixels that are not finite numbers, read as 0"
    elif lowest < 0 or highest > top:
        doubt = f"has numbers from {lowest:g} to {highest:g}, which are clipped to 0 to {top}"
    elif 0 < highest < _FILLED_SHARE * top:
        doubt = f"has numbers up to {highest:g} in a type that reaches {top}: it is read dark or black"
    return grey.clip(0, 255).astype(np.uint8), doubt


def _has_16_bits(picture: Image.Image) -> bool:
    """Tells whether a file that isn't loaded yet has colours of 16 bits, of which Pillow keeps the upper 8 by itself."""
    for tile in picture.tile:
        raw_mode, *others = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if ";16" in str(raw_mode) or picture.format == "PPM" and others and others[0] > 255:  # PPM: its largest number
            return True
    return False


def _doubt_of_16_bits(highest: int) -> str | None:
    """Says what makes colours of 16 bits doubtful whose upper 8 bits reach `highest`."""
    if highest >= _FILLED_SHARE * 255:
        return None
    return f"has numbers below {(highest + 1) << 8} in a type that reaches {2**16 - 1}: it is read dark or black"


def _orientation(picture: Image.Image) -> int:
    """Returns the EXIF orientation, 1 where there is none."""
    try:
        found = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # as for the decoders: damaged EXIF data says nothing, and the pixels may be well
        return 1
    return found if found in _TURNS else 1
