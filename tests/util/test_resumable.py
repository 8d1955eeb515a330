"""A checkpoint whose parts aren't what a training saves is one sentence, whatever they are."""
import argparse
import copy

import numpy as np
import pytest
import torch
from torch import nn

from util.checkpoint import load_checkpoint
from util.errors import InputError
from util.schedule import DropAfterEpochs
from util.training_state import EpochSoFar, TrainingState

SO_FAR = {"step": 1, "consumed": [[1, 2]], "order": [1, 4, 0, 0], "meters": {"loss": {"total": 1.0, "count": 1, "window": [1.0]}}}


def make_state():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return TrainingState(model, optimizer, DropAfterEpochs(optimizer, [5]), torch.amp.GradScaler("cpu", enabled=False))


@pytest.fixture
def saved(tmp_path):
    state = make_state()
    state.model(torch.randn(5, 3)).sum().backward()
    state.optimizer.step()
    state.so_far = EpochSoFar(**SO_FAR)
    state.save(argparse.Namespace(output_dir=str(tmp_path)), 3, ["checkpoint.pth"])
    return load_checkpoint(str(tmp_path / "checkpoint.pth"))


def replaced(checkpoint, path, value):
    changed = copy.deepcopy(checkpoint)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return changed


ODD = ["x", [1], {"a": 1}, torch.zeros(7), float("nan"), ("a", "b")]
PLACES = [("epoch",), ("optimizer",), ("optimizer", "state"), ("optimizer", "state", 0), ("optimizer", "state", 0, "exp_avg"),
          ("optimizer", "param_groups"), ("optimizer", "param_groups", 0), ("optimizer", "param_groups", 0, "lr"),
          ("optimizer", "param_groups", 0, "betas"), ("optimizer", "param_groups", 0, "amsgrad"), ("lr_scheduler",),
          ("lr_scheduler", "last_epoch"), ("best",), ("random_states", 0), ("random_states", 0, "cpu"), ("so_far",),
          ("so_far", "step"), ("so_far", "consumed", 0), ("so_far", "order"), ("so_far", "meters", 0, "loss"),
          ("so_far", "meters", 0, "loss", "window")]


@pytest.mark.parametrize("path", PLACES, ids=lambda path: "/".join(map(str, path)))
def test_an_odd_part_is_named(saved, path):
    refused = 0
    for value in ODD:
        try:
            make_state().resume(replaced(saved, path, value), "a.pth")
        except InputError as error:
            assert str(error).startswith("--resume a.pth") and (path[0] in str(error) or "by SGD" in str(error))
            refused += 1
    assert refused >= len(ODD) - 1, "one of them may be right"


def test_random_bytes_are_no_random_state(saved):
    for state in (torch.zeros(3, dtype=torch.uint8), torch.full_like(torch.get_rng_state(), 255)):
        with pytest.raises(InputError, match="^--resume a.pth: its 'random_states' can't be used"):
            make_state().resume(replaced(saved, ("random_states", 0, "cpu"), state), "a.pth")


def test_what_others_save_passes(saved):
    """Numbers of numpy, and no more than the published programs have."""
    saved = replaced(replaced(saved, ("optimizer", "param_groups", 0, "lr"), np.float64(0.1)), ("epoch",), np.int64(3))
    for name in ("random_states", "so_far", "best", "unreadable", "scaler"):
        del saved[name]
    state = make_state()
    state.resume(saved, "a.pth")
    assert state.epoch == 4
