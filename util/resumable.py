"""Check what a training goes on from: a checkpoint may hold anything, and each part is used much later than it is read."""
from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["has", "is_count", "is_dict", "is_epoch", "is_list", "odd_part"]

Test = Callable[[Any], bool]


def is_count(value: Any) -> bool:
    """Tell whole numbers that count something."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= value < 2**53


def is_epoch(value: Any) -> bool:
    """Tell numbers of the last whole epoch: -1 if there is none yet."""
    return is_count(value) or is_number(value) and value == -1


def is_number(value: Any) -> bool:
    """Tell finite numbers."""
    return _is_real(value) and abs(value) < math.inf


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_list(of: Test) -> Test:
    """Make a test for lists (or tuples) whose items pass another."""
    return lambda value: isinstance(value, (list, tuple)) and all(map(of, value))


def is_dict(of: Test) -> Test:
    """Make a test for dicts of names whose values pass another."""
    return lambda value: isinstance(value, dict) and all(isinstance(name, str) and of(item) for name, item in value.items())


def has(**fields: Test) -> Test:
    """Make a test for dicts that have these fields at least, each passing its own test."""
    return lambda value: isinstance(value, dict) and all(name in value and test(value[name]) for name, test in fields.items())


def maybe(test: Test) -> Test:
    """Make a test that None passes, too."""
    return lambda value: value is None or test(value)


def _is_random_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1


def _is_meter(value: Any) -> bool:
    # Totals may be infinite: a training with float16 logs the losses of steps that it passed over.
    return has(total=_is_real, count=is_count, window=is_list(_is_real))(value)


_PARTS: Mapping[str, Test] = {
    "epoch": is_epoch,
    "lr_scheduler": has(last_epoch=is_count),
    "scaler": maybe(is_dict(is_number)),
    "best": maybe(is_number),
    "random_states": is_list(has(cpu=_is_random_state, cuda=maybe(_is_random_state))),
    "so_far": maybe(has(step=is_count, consumed=is_list(lambda pair: is_list(is_count)(pair) and len(pair) == 2 and pair[1] > 0),
                        order=is_list(lambda value: type(value) is int), meters=is_list(is_dict(_is_meter)))),
    "unreadable": is_list(lambda value: isinstance(value, str)),
}


def odd_part(checkpoint: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str:
    """Name the first part of a training's checkpoint that isn't what a training saves; "" if all are.

    Args:
        checkpoint: has `optimizer`, `lr_scheduler` and `epoch`; other parts may be missing, as in published ones.
        optimizer: the one that is to go on from it. A state that doesn't fit its groups is no matter of this check, one
            that doesn't fit its parameters is.
    """
    for name, test in _PARTS.items():
        if name in checkpoint and not test(checkpoint[name]):
            return f"'{name}'"
    so_far = checkpoint.get("so_far")
    if so_far and so_far["step"] and len(so_far["order"]) < 3:
        return "'so_far'"
    return _odd_optimizer(checkpoint["optimizer"], optimizer)


def _odd_optimizer(stored: Any, optimizer: torch.optim.Optimizer) -> str:
    is_state = has(state=lambda value: isinstance(value, dict) and all(map(is_count, value)),
                   param_groups=is_list(has(params=is_list(is_count))))
    if not is_state(stored):
        return "'optimizer'"
    for group, own in zip(stored["param_groups"], optimizer.param_groups):
        for name, value in group.items():
            if name not in ("params", "fused", "foreach") and name in own and not _alike(value, own[name]):
                return f"'optimizer', {name!r} of its groups"
    places = [place for group in stored["param_groups"] for place in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    needed = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else set()
    for place, parameter in zip(places, parameters):
        state = stored["state"].get(place, {})
        if not isinstance(state, dict) or state and not (needed <= set(state) and all(
                _fits(value, parameter) for value in state.values())):
            return f"'optimizer', the state of parameter {place}"
    return ""


def _alike(value: Any, own: Any) -> bool:
    """Whether an option of an optimizer's group has the kind that the optimizer's own has."""
    if type(own) in (int, float):
        return is_number(value)
    if isinstance(own, (list, tuple)):
        return is_list(is_number)(value) and len(value) == len(own)
    return own is None or type(value) is type(own)


def _fits(value: Any, parameter: Tensor) -> bool:
    """Whether a value can be a parameter's: a number, None, or a tensor of its shape."""
    return value is None or is_number(value) or isinstance(value, Tensor) and value.shape in ((), parameter.shape)
