"""Ranges of numeric flags: one table for main.py, and the check that every program shares."""
import math
import numbers
from typing import Any, Mapping, NamedTuple

from util.errors import InputError

LARGEST_COUNT = 2 ** 31 - 1
LARGEST_SEED = 2 ** 32 - 1  # numpy's generators take no larger one


class Range(NamedTuple):
    """Numbers that a flag may have: from `low` (itself too, unless `above`) to `high` (itself too, unless `below`)."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False

    def fault(self, value: Any) -> str:
        """Say what is wrong with a value, "must be …"; "" if nothing is."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return "must be a whole number" if self.whole else "must be a number"
        if not math.isfinite(value):
            return "must be a finite number"
        if value < self.low or self.above and value == self.low:
            return f"must be {'more than' if self.above else 'at least'} {self.low}"
        if value > self.high or self.below and value == self.high:
            return f"must be {'less than' if self.below else 'at most'} {self.high}"
        return ""


def count(least: int = 1, most: int = LARGEST_COUNT) -> Range:
    """Whole numbers from `least` to `most`."""
    return Range(least, most, whole=True)


NOT_NEGATIVE, SHARE, SEED = Range(0), Range(0, 1), count(0, LARGEST_SEED)

# Every numeric flag of main.py. Upper ends are far beyond what is of use: above them sizes overflow, or memory ends.
RANGES: Mapping[str, Range] = {
    **{name: NOT_NEGATIVE for name in (
        "lr", "lr_backbone", "lr_linear_proj_mult", "weight_decay", "set_cost_class", "set_cost_bbox", "set_cost_giou",
        "cls_loss_coef", "bbox_loss_coef", "giou_loss_coef", "eos_coef", "mask_loss_coef", "dice_loss_coef",
        "object_embedding_coef")},
    **{name: count() for name in (
        "batch_size", "accumulate_steps", "lr_drop", "lr_drop_epochs", "eval_every", "save_every", "save_every_steps",
        "overfit", "shots", "max_prop", "num_patches", "world_size")},
    **{name: count(0) for name in ("epochs", "start_epoch")},
    **{name: count(1, 2 ** 16) for name in (
        "hidden_dim", "nheads", "patch_size", "min_patch", "max_patch", "pretrain_sizes", "pretrain_max_size",
        "train_sizes", "crop_resize", "crop_size", "val_size", "max_size")},
    "clip_max_norm": Range(),
    "dropout": SHARE,
    "focal_alpha": SHARE,
    "position_embedding_scale": Range(0, above=True),
    "enc_layers": count(0, 1000), "dec_layers": count(1, 1000),
    "dim_feedforward": count(1, 2 ** 20), "num_queries": count(1, 2 ** 20), "num_classes": count(1, 2 ** 20),
    "num_feature_levels": count(1, 16), "enc_n_points": count(1, 1000), "dec_n_points": count(1, 1000),
    "held_out_share": Range(0, 1, below=True),
    "filter_pct": Range(-1), "filter_num": Range(-1),
    "filter_seed": SEED, "seed": SEED,
    "reset_embedding_layer": count(0, 1),
    "num_workers": count(0, 4096),
    "dist_timeout": count(1, 10 ** 8),
    "local_rank": count(-1),  # -1: a launcher's word for no other processes
}

# The same for the other programs, which share many of main.py's names.
TOOL_RANGES: Mapping[str, Range] = {
    **RANGES,
    **{name: count() for name in (
        "max_detections", "decoder_layer", "encoder_layer", "num_boxes", "examples", "faults", "seeds", "opset", "values",
        "train_batch", "inference_batch", "eval_images", "num_unlabelled", "num_labelled", "num_val", "pretrain_epochs",
        "nodes", "timeout", "mem_gb")},
    **{name: count(1, 2 ** 16) for name in (
        "size", "pretrain_size", "finetune_size", "inference_size", "photo_size")},
    **{name: count(1, 4096) for name in ("jobs", "processes", "threads", "tasks_per_node", "cpus_per_task")},
    **{name: count(2) for name in ("steps", "num_images")},
    "ngpus": count(0, 4096), "max_timeouts": count(0),
    "random": count(0, 10000),
    "line_width": count(1, 1600),  # as many pixels as drawn pictures have
    "threshold": SHARE,
    "val_share": Range(0, 1, above=True, below=True),
    "ewm_col": NOT_NEGATIVE,
    "seconds": Range(0, 10 ** 5),
}


def check_ranges(args: Any, ranges: Mapping[str, Range] = RANGES) -> None:
    """Raise InputError for the first flag, an attribute of `args`, with a value, or an item of a list, out of its range.

    None is not given.
    """
    for name, allowed in ranges.items():
        value = getattr(args, name, None)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            fault = allowed.fault(item) if item is not None else ""
            if fault:
                raise InputError(f"--{name} {item!r} {fault}")
