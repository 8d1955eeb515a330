"""Masks and panoptic maps laid over an image."""
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from tools.drawing import Colour, distinct_colour

OPACITY = 0.5
EDGE = 0.9  # opacity of a mask's outermost pixels


class ColouredMask(NamedTuple):
    """What to lay over: a mask, bool [H, W], and its colour."""

    mask: Tensor
    colour: Colour


def lay_over(image: Tensor, masks: Sequence[ColouredMask]) -> Tensor:
    """Tint an image, uint8 [3, H, W], where the masks are, the most important first; returns a new one."""
    tinted = image.float()
    for item in reversed(masks):
        opacity = OPACITY * item.mask.float() + (EDGE - OPACITY) * edge(item.mask).float()
        colour = torch.tensor(item.colour, dtype=torch.float32)[:, None, None]
        tinted = tinted + opacity * (colour - tinted)
    return tinted.round().clamp(0, 255).to(torch.uint8)


def edge(mask: Tensor) -> Tensor:
    """Pixels of a mask, bool [H, W], that have a neighbour (of eight) outside of it or lie at the image's border."""
    others = F.pad(~mask[None, None], (1, 1, 1, 1), value=True).float()
    return mask & (F.max_pool2d(others, 3, stride=1)[0, 0] > 0)


def innermost_point(mask: Tensor) -> Tuple[float, float]:
    """(x, y) of the pixel of a mask, bool [H, W] with at least one pixel, that is farthest from all others."""
    distance = distance_transform_edt(np.pad(mask.numpy(), 1))[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return float(x), float(y)


def colours_of_segments(isthing: Sequence[bool], categories: Sequence[int]) -> List[Colour]:
    """Colours for the segments of one map: each thing has its own, stuff a pale one of its category, the same in every
    map."""
    colours, things = [], 0
    for thing, category in zip(isthing, categories):
        if thing:
            colours.append(distinct_colour(things))
            things += 1
        else:
            colours.append(tuple(round(0.5 * part + 110) for part in distinct_colour(category)))
    return colours
