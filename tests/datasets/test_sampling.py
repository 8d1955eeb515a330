"""Laws of the training batches: nothing twice, nothing lost, whatever processes and interruptions there were."""
import numpy as np
import pytest
from torch.utils.data import DataLoader

from datasets.sampling import TrainBatches


def take(num_samples, batch_size, world_size, epoch, consumed=(), batches=None, groups=None, seed=3):
    """Global batches that all processes together take, as lists in order."""
    ranks = [TrainBatches(num_samples, batch_size, seed, rank, world_size, groups) for rank in range(world_size)]
    for rank in ranks:
        rank.set_epoch(epoch, consumed)
    assert len({len(rank) for rank in ranks}) == 1
    shares = list(zip(*ranks))[:batches]
    assert all(len(share) == batch_size for batch in shares for share in batch)
    # Interleaved, as they were shared out: the global batch in its order.
    return [np.array(batch).T.ravel().tolist() for batch in shares]


def flat(batches):
    return [sample for batch in batches for sample in batch]


def test_every_sample_once_but_for_an_incomplete_last_batch():
    assert sorted(flat(take(24, 4, 1, 0))) == list(range(24))
    seen = flat(take(26, 4, 2, 0))
    assert len(seen) == len(set(seen)) == 24 and set(seen) <= set(range(26))
    assert take(7, 4, 2, 0) == []


def test_the_order_is_of_seed_and_epoch_alone():
    assert flat(take(24, 4, 1, 5)) == flat(take(24, 2, 2, 5)) == flat(take(24, 3, 1, 5))
    assert take(24, 4, 1, 5) != take(24, 4, 1, 6) and take(24, 4, 1, 5) != take(24, 4, 1, 5, seed=4)
    # Not as with seed + epoch, where one seed's second epoch is the next one's first.
    assert take(24, 4, 1, 1, seed=3) != take(24, 4, 1, 0, seed=4)
    assert sorted(flat(take(24, 4, 1, 5, seed=-1))) == list(range(24))


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_goes_on_where_it_was_left(grouped):
    groups = np.arange(120) % 2 if grouped else None
    whole = take(120, 3, 2, 1, groups=groups)
    for batches in (0, 1, 7, len(whole)):
        assert take(120, 3, 2, 1, [(batches, 6)], groups=groups) == whole[batches:]


@pytest.mark.parametrize("grouped", [False, True])
def test_other_processes_and_batches_take_each_remaining_sample_once(grouped):
    groups = np.arange(240) % 3 if grouped else None
    first = take(240, 4, 2, 2, batches=5, groups=groups)
    second = take(240, 2, 3, 2, [(5, 8)], batches=4, groups=groups)
    third = take(240, 1, 1, 2, [(5, 8), (4, 6)], groups=groups)
    assert sorted(flat(first + second + third)) == list(range(240))
    if not grouped:
        assert flat(first + second + third) == flat(take(240, 1, 1, 2))


def test_batches_of_one_group():
    groups = [0] * 13 + [1] * 7 + [2] * 2
    batches = take(22, 2, 2, 0, groups=groups)
    assert len(batches) == 13 // 4 + 7 // 4
    assert all(len({groups[sample] for sample in batch}) == 1 for batch in batches)
    order = flat(take(22, 1, 1, 0))
    places = [[order.index(sample) for sample in batch] for batch in batches]
    assert all(place == sorted(place) for place in places)
    assert [place[-1] for place in places] == sorted(place[-1] for place in places)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_as_a_loaders_batch_sampler(num_workers):
    batches = TrainBatches(10, 3)
    loader = DataLoader(range(10), batch_sampler=batches, num_workers=num_workers)
    batches.set_epoch(4, [(1, 3)])
    assert len(loader) == 2 and [batch.tolist() for batch in loader] == take(10, 3, 1, 4, seed=0)[1:]
