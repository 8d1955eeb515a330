"""Every numeric flag has a range, and values outside it are refused in one sentence."""
import argparse

import pytest

from main import get_args_parser
from util import recipes
from util.errors import InputError
from util.ranges import RANGES


def parse(*flags):
    return get_args_parser().parse_args(["--device", "cpu", *map(str, flags)])


def test_every_numeric_flag_has_a_range_of_its_type():
    numeric = {action.dest: action.type is int for action in get_args_parser()._actions if action.type in (int, float)}
    assert {name: allowed.whole for name, allowed in RANGES.items()} == numeric


@pytest.mark.parametrize("name", [name for name, allowed in RANGES.items() if not allowed.whole])
def test_numbers_must_be_finite(name):
    for value in ("nan", "inf", "-inf"):
        args = argparse.Namespace(**{**vars(parse()), name: float(value)})
        with pytest.raises(InputError, match=f"^--{name} {value} must be a finite number$"):
            recipes.check_ranges(args)


@pytest.mark.parametrize("name, value, words", [
    ("lr", -1.0, "at least 0"), ("dropout", 1.5, "at most 1"), ("position_embedding_scale", 0.0, "more than 0"),
    ("held_out_share", 1.0, "less than 1"), ("seed", -1, "at least 0"), ("num_classes", 2 ** 40, "at most 1048576"),
    ("train_sizes", [64, 0], "at least 1"), ("num_queries", 1.5, "a whole number"), ("lr", "x", "a number")])
def test_values_out_of_range(name, value, words):
    args = argparse.Namespace(**{**vars(parse()), name: value})
    shown = value[1] if isinstance(value, list) else value
    with pytest.raises(InputError, match=f"^--{name} {shown!r} must be {words}$"):
        recipes.check_ranges(args)


@pytest.mark.parametrize("flags, message", [
    (("--crop_size", 60, 50), "--crop_size 60 50 is not a smallest and a largest side"),
    (("--imagenet_path", "x", "--min_patch", 9, "--max_patch", 8), "--max_patch 8 is less than --min_patch 9"),
    (("--start_epoch", 9, "--epochs", 8), "--start_epoch 9 is after the last of --epochs 8"),
    (("--set_cost_class", 0, "--set_cost_bbox", 0, "--set_cost_giou", 0),
     "--set_cost_class, --set_cost_bbox, --set_cost_giou are all 0: nothing would tell .*"),
    (("--hidden_dim", 30, "--nheads", 4, "--position_embedding", "learned"),
     "--hidden_dim 30 must be a multiple of 2 and of --nheads 4")])
def test_numbers_that_do_not_suit_each_other(flags, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        recipes.resolve(parse(*flags))


def test_no_clipping_below_zero():
    assert recipes.resolve(parse("--clip_max_norm", -1)).clip_max_norm == -1
