"""What a failed training left may be damaged: that is one sentence. Replaying itself: tests/e2e/test_interruptions.py."""
import copy

import pytest
import torch

import main
from tools import replay
from util.errors import InputError

GIVEN = vars(main.get_args_parser().parse_args(["--device", "cpu", "--coco_path", "/nowhere"]))
BUNDLE = {"message": "m", "epoch": 1, "step": 2, "image_ids": [1], "losses": {"a": 1.0}, "args": {"epochs": 3}, "given": GIVEN,
          "source": {}, "world_size": 1}


def run(folder, bundle):
    torch.save(bundle, folder / "b.pth")
    replay.replay(replay.get_args_parser().parse_args([str(folder / "b.pth")]))


@pytest.mark.parametrize("name", BUNDLE)
def test_odd_parts(tmp_path, name):
    for value in (None, torch.zeros(3), [{}], {"a": [1]}):
        with pytest.raises(InputError, match=r"isn't a file that a failed training left|has the flag a \[1\], which main.py"):
            run(tmp_path, {**BUNDLE, name: value})


def test_flags_that_no_parser_made(tmp_path):
    for name, value in (("dataset", "x"), ("lr", "1"), ("train_sizes", 8), ("eval", 1), ("world_size", None), ("epochs", True)):
        bundle = copy.deepcopy(BUNDLE)
        bundle["given"][name] = value
        with pytest.raises(InputError, match=f"has the flag {name} {value!r}, which main.py doesn't take"):
            run(tmp_path, bundle)
    with pytest.raises(InputError, match="^--coco_path /nowhere does not exist"):
        run(tmp_path, BUNDLE)
