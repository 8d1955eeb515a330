"""Transforms of users, written for `transform(image, target)`, among those that take a random source as well."""
from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

__all__ = ["TwoArguments", "adapt", "draw_globally_from", "wants_pillow"]


class TwoArguments:
    """Calls `transform(image, target)`; what it draws from the global random states depends on `rng` alone, if given."""

    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, image, target, rng: np.random.Generator | None = None):
        with draw_globally_from(rng):
            return self.transform(image, target)

    def __repr__(self) -> str:
        return repr(self.transform)


def adapt(transform: Callable) -> Callable:
    """Makes `(image, target, rng)` callable: returns the transform itself if it is, else wraps it in `TwoArguments`."""
    return transform if _takes_source(transform) else TwoArguments(transform)


def wants_pillow(transform: object) -> bool:
    """Tells whether a transform, or one inside it, is a user's of two arguments, which expects a Pillow image."""
    inside = (*getattr(transform, "transforms", ()), getattr(transform, "first", None), getattr(transform, "second", None))
    return isinstance(transform, TwoArguments) or any(wants_pillow(part) for part in inside if part is not None)


def _takes_source(transform: Callable) -> bool:
    function = transform.forward if isinstance(transform, nn.Module) else transform
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # built-in functions have none
        return False
    named = [parameter for parameter in parameters
             if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    return len(named) > 2 and (named[2].name == "rng" or named[2].default is named[2].empty)


@contextlib.contextmanager
def draw_globally_from(rng: np.random.Generator | None) -> Iterator[None]:
    """Seeds the global states of Python, numpy and torch from `rng` and puts them back; with None leaves them as they are."""
    if rng is None:
        yield
        return
    seed = int(rng.integers(2**32))
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.random.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
