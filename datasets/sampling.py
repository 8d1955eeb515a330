"""Which samples make which training batch: an order that no number of processes, and no interruption, changes."""
from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

__all__ = ["TrainBatches"]


class TrainBatches(Sampler):
    """Shuffled batches of equal size, shared out among processes; a batch sampler for a `DataLoader`.

    The order of an epoch's samples is a function of (seed, epoch) alone. Global batches of batch_size * world_size
    samples are cut from it, one after the other, and each process takes its share of each; samples at the end that
    don't fill a global batch are left out.

    Args:
        num_samples: size of the data set.
        batch_size: samples that a process takes at once.
        seed: seed of the run.
        rank, world_size: of this process; how many there are.
        groups: int [num_samples], the group of each sample: all samples of a global batch then have the same. A batch
            has its place in the order where its last sample has it.
        checksum: says which images the samples show, see `PretextDataset.samples_checksum`; 0 if that isn't known.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1,
                 groups: Sequence[int] | None = None, *, checksum: int = 0) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.groups = np.zeros(num_samples, np.int64) if groups is None else np.asarray(groups)
        self.checksum = checksum
        self.set_epoch(0)

    @property
    def order(self) -> list[int]:
        """What decides which image comes when in an epoch: the seed, the number of samples, and checksums of the groups and
        of the images."""
        return [self.seed, self.num_samples, zlib.crc32(self.groups.astype(np.int64).tobytes()), self.checksum]

    @property
    def global_batch(self) -> int:
        """Samples that all processes together take at once."""
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int, consumed: Sequence[tuple[int, int]] = ()) -> None:
        """Goes to the start of an epoch, or to where earlier runs left it.

        Args:
            epoch: number of the epoch.
            consumed: of each of these runs, first to last, how many global batches it took and how many samples each had.
                Every sample that is left is then taken once, whatever batches these runs made (but for an incomplete last
                batch).
        """
        order = np.random.default_rng((self.seed % 2**64, epoch)).permutation(self.num_samples)
        for batches, size in consumed:
            left = np.ones(self.num_samples, bool)
            left[self._cut(order, size)[:batches]] = False
            order = order[left[order]]
        self._batches = self._cut(order, self.global_batch)

    def _cut(self, order: np.ndarray, size: int) -> np.ndarray:
        """Cuts samples [n] in their order into batches [k, size], each of one group."""
        group_of = self.groups[order]
        positions = [np.flatnonzero(group_of == group) for group in np.unique(group_of)]
        whole = [part[:len(part) // size * size].reshape(-1, size) for part in positions]
        batches = np.concatenate([np.empty((0, size), np.int64), *whole])
        return order[batches[batches[:, -1].argsort()]]

    def __len__(self) -> int:
        """How many batches each process takes from where `set_epoch` went to the end of the epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Yields this process's batches as lists of `batch_size` indices."""
        for batch in self._batches:
            yield batch[self.rank::self.world_size].tolist()
