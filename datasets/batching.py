"""Which images go together in a batch, so that little or nothing of it is padding."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["aspect_groups", "equal_size_batches", "padding_share"]

# Width / height between which an image counts as square.
_SQUARE = (0.9, 1.1)


def equal_size_batches(sizes: Tensor | None, count: int, batch_size: int) -> list[list[int]]:
    """Makes batches of images of equal size, which need no padding: an image gives the same alone and in any batch.

    Args:
        sizes: (height, width) of each image, int64 [count, 2]; None, if they aren't known, makes batches of one image.
        count: number of images.
        batch_size: most images of a batch.

    Returns:
        Indices of the images of each batch, each image once; batches in order of their first images.
    """
    if sizes is None:
        return [[index] for index in range(count)]
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, size in enumerate(sizes.tolist()):
        alike[tuple(size)].append(index)
    return sorted(indices[start:start + batch_size] for indices in alike.values()
                  for start in range(0, len(indices), batch_size))


def aspect_groups(sizes: Tensor) -> Tensor:
    """Tells portraits (0), square images (1) and landscapes (2) apart, int64 [n], by their (height, width) [n, 2]."""
    return torch.bucketize(sizes[:, 1] / sizes[:, 0], torch.tensor(_SQUARE))


def padding_share(batches: Iterable[Sequence[tuple[int, int]]]) -> float:
    """Returns the share of the pixels of all batches that is padding, for the (height, width) of their images."""
    shown = padded = 0
    for batch in batches:
        sizes = np.asarray(batch, dtype=np.int64)
        shown += int(sizes.prod(1).sum())
        padded += len(sizes) * int(sizes.max(0).prod())
    return 1 - shown / padded
