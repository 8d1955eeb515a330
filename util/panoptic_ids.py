"""Segment ids in a PNG's colours, as COCO's panoptic format has them: id = red + 256 green + 256² blue."""
import numpy as np


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Ids [H, W], 0 to 256³ - 1 -> colours uint8 [H, W, 3]."""
    ids = np.asarray(ids, dtype=np.uint32)
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)


def rgb_to_ids(colours: np.ndarray) -> np.ndarray:
    """Colours uint8 [H, W, 3] -> ids int32 [H, W]."""
    red, green, blue = np.moveaxis(np.asarray(colours, dtype=np.int32), -1, 0)
    return red + (green << 8) + (blue << 16)
