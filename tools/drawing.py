"""Boxes with labels on an image, and colours told apart."""
from __future__ import annotations

import colorsys
import functools
import math
import os
from typing import Any, List, NamedTuple, Sequence, Tuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.plot_utils import pyplot

Colour = Tuple[int, int, int]
Rectangle = Tuple[float, float, float, float]

# Images are enlarged to at least, and reduced to at most, so many pixels on their long side.
SMALLEST_SIDE, LARGEST_SIDE = 640, 1600
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
DASH, GAP = 9, 6

# From Sasha Trubetskoy's list of simple, distinct colours.
PALETTE = ((230, 25, 75), (0, 130, 200), (255, 225, 25), (60, 180, 75), (245, 130, 48), (145, 30, 180), (70, 240, 240),
           (240, 50, 230), (210, 245, 60), (0, 128, 128), (250, 190, 212), (170, 110, 40), (220, 190, 255), (128, 0, 0),
           (170, 255, 195), (128, 128, 0), (255, 215, 180), (0, 0, 128), (255, 250, 200))


class LabelledBox(NamedTuple):
    """What to draw: a box (left, top, right, bottom) in pixels of the image, its colour and, unless empty, a text.

    Without a frame there is the text alone, beside the box.
    """

    box: Rectangle
    colour: Colour
    text: str = ""
    dashed: bool = False
    framed: bool = True


def distinct_colour(number: int) -> Colour:
    """Colour number 0, 1, 2, …, as bytes. After the palette, hues advance by the golden section, which spreads them."""
    if number < len(PALETTE):
        return PALETTE[number]
    hue = number * (math.sqrt(5) - 1) / 2 % 1
    saturation, value = ((0.85, 1.0), (1.0, 0.7), (0.5, 1.0))[number % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever reads better on the background (by its luma)."""
    red, green, blue = background
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else WHITE


def to_picture(image: Tensor) -> Image.Image:
    """Bytes [3, H, W] -> a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def draw_boxes(image: Tensor, boxes: Sequence[LabelledBox], line_width: int | None = None) -> Image.Image:
    """Draw boxes and their labels on an image.

    Args:
        image: uint8 [3, H, W].
        boxes: what to draw, the most important first; boxes may reach over the image's edges.
        line_width: of frames, in pixels of the picture; by default as the picture's size asks for.

    Returns:
        the picture, scaled so that its long side has between `SMALLEST_SIDE` and `LARGEST_SIDE` pixels (small images by
        a whole factor). No label is cut off at an edge unless it is longer than the picture is wide.
    """
    picture = to_picture(image)
    long_side = max(picture.size)
    scale = min(math.ceil(SMALLEST_SIDE / long_side) if long_side < SMALLEST_SIDE else 1.0, LARGEST_SIDE / long_side)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS) if size != picture.size else picture
    draw = ImageDraw.Draw(picture)
    scaled = [_inside(tuple(scale * side for side in item.box), size) for item in boxes]
    for item, rectangle in reversed(list(zip(boxes, scaled))):
        if item.framed:
            _draw_frame(draw, rectangle, item, width=line_width or max(3, round(max(size) / 280)))
    text_size = min(max(round(max(size) / 44), 14), 28)
    taken: List[Rectangle] = []
    for item, rectangle in zip(boxes, scaled):
        if item.text:
            taken.append(_draw_label(draw, rectangle, item, font(text_size), size, taken))
    return picture


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Join pictures of one height, each below its title."""
    height, gap = 40, 12
    joined = Image.new("RGB", (sum(picture.width + gap for picture in pictures) - gap, height + pictures[0].height), WHITE)
    draw, left = ImageDraw.Draw(joined), 0
    for picture, title in zip(pictures, titles):
        joined.paste(picture, (left, height))
        draw.text((left + 6, 6), title, font=font(22), fill=BLACK)
        left += picture.width + gap
    return joined


def _inside(box: Rectangle, size: Tuple[int, int]) -> Rectangle:
    """The box cut to the picture, so that its frame is seen where it reaches over an edge."""
    width, height = size
    left, top, right, bottom = box
    left, right = min(max(left, 0), width - 1), min(max(right, 0), width - 1)
    top, bottom = min(max(top, 0), height - 1), min(max(bottom, 0), height - 1)
    return left, top, max(left, right), max(top, bottom)


def _draw_frame(draw: ImageDraw.ImageDraw, box: Rectangle, item: LabelledBox, width: int) -> None:
    left, top, right, bottom = box
    if item.dashed:
        for start, end in (((left, top), (right, top)), ((left, bottom), (right, bottom)),
                           ((left, top), (left, bottom)), ((right, top), (right, bottom))):
            _draw_dashes(draw, start, end, item.colour, width)
        return
    # A thin dark rim keeps a frame visible on a background of its own colour.
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=BLACK, width=width + 2)
    draw.rectangle(box, outline=item.colour, width=width)


def _draw_dashes(draw: ImageDraw.ImageDraw, start: Tuple[float, float], end: Tuple[float, float], colour: Colour,
                 width: int) -> None:
    length = math.dist(start, end)
    draw.line((*start, *end), fill=BLACK, width=1)
    for begin in range(0, math.ceil(length), DASH + GAP):
        shares = (begin / length, min(begin + DASH, length) / length)
        ends = [tuple(a + (b - a) * share for a, b in zip(start, end)) for share in shares]
        draw.line((*ends[0], *ends[1]), fill=BLACK, width=width + 2)
        draw.line((*ends[0], *ends[1]), fill=colour, width=width)


def _draw_label(draw: ImageDraw.ImageDraw, box: Rectangle, item: LabelledBox, letters: Any,
                size: Tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Write the text on a plate where it covers other labels least; returns the plate's place."""
    pad = 3
    ascent, descent = letters.getmetrics()
    plate = (draw.textlength(item.text, font=letters) + 2 * pad, ascent + descent + 2)
    left, top, right, bottom = box
    corners = [(x, y) for y in (top - plate[1], top, bottom, bottom - plate[1]) for x in (left, right - plate[0])]
    places = [_shifted_inside(corner, plate, size) for corner in corners]
    place = min(places, key=lambda candidate: sum(_overlap(candidate, other) for other in taken))
    draw.rectangle(place, fill=item.colour, outline=BLACK)
    draw.text((place[0] + pad, place[1] + 1), item.text, font=letters, fill=text_colour(item.colour))
    return place


def _shifted_inside(corner: Tuple[float, float], plate: Tuple[float, float], size: Tuple[int, int]) -> Rectangle:
    left, top = (max(0, min(start, limit - 1 - length)) for start, length, limit in zip(corner, plate, size))
    return left, top, left + plate[0], top + plate[1]


def _overlap(one: Rectangle, other: Rectangle) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


@functools.lru_cache(maxsize=None)
def font(size: int) -> Any:
    """The font that matplotlib ships, `size` pixels high; Pillow's own has no letters with accents.

    Raises:
        InputError: if matplotlib is not installed.
    """
    pyplot()
    import matplotlib

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
