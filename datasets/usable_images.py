"""Images that cannot be shown, though a training must go on: named, counted, replaced by the next, up to a limit."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from datasets.image_io import UnreadableImage
from util.distributed import all_gather
from util.errors import InputError

__all__ = ["UNREADABLE_SHARE", "UsableImages"]

UNREADABLE_SHARE = 0.01
_USABLE, _UNREADABLE, _UNSUITED = 0, 1, 2
_WAS_UNREADABLE = 3  # in the run that this one continues: counts like _UNREADABLE, and is tried again when its turn comes

Shown = TypeVar("Shown")


class UsableImages:
    """Which images of a data set can be shown, as far as that is known.

    It lies in shared memory: workers tell the main process, and each other, what they could not read.

    Args:
        count: number of images.
        place: the folder or file that holds or lists them, for messages.
        name_of: name of the image of an index.
    """

    def __init__(self, count: int, place: str, name_of: Callable[[int], str]) -> None:
        self.place = place
        self.name_of = name_of
        self._state = torch.full((count,), _USABLE, dtype=torch.uint8).share_memory_()

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that this process, its workers or the run it continues could not read so far."""
        return [self.name_of(index) for index in self._unreadable()]

    def recall_unreadable(self, names: Iterable[str]) -> None:
        """Count images that the run which is continued could not read; each is tried again when its turn comes."""
        wanted = set(names)
        for index in range(len(self._state)) if wanted else ():
            if self._state[index] == _USABLE and self.name_of(index) in wanted:
                self._state[index] = _WAS_UNREADABLE

    @property
    def unsuited(self) -> list[str]:
        """Names of the images passed over so far because they are too small, or show nothing."""
        return [self.name_of(index) for index in self._indices(_UNSUITED)]

    def first(self, candidates: Iterable[int], show: Callable[[int], Shown | None]) -> tuple[int, Shown]:
        """Shows the first image that can be shown; those that cannot be read are reported once each on standard error.

        Args:
            candidates: indices, in the order in which they are tried.
            show: called with an index; returns None for an image that does not suit, and raises `UnreadableImage`.

        Returns:
            The index, and what `show` returned for it.

        Raises:
            InputError: none of them is usable; or more than 1 % of all images (and more than one) cannot be read.
        """
        for index in candidates:
            if self._state[index] in (_UNREADABLE, _UNSUITED):
                continue
            try:
                shown = show(index)
            except UnreadableImage as error:
                self._state[index] = _UNREADABLE
                print(f"passed over: {error}", file=sys.stderr, flush=True)
                self._refuse_too_many(f"the latest: {error}")
                continue
            if shown is not None:
                if self._state[index] == _WAS_UNREADABLE:  # mended since
                    self._state[index] = _USABLE
                return index, shown
            self._state[index] = _UNSUITED
        raise InputError(
            f"{self.place} has too few usable images: of {len(self._state)}, {len(self.unreadable)} cannot be read and "
            f"{len(self.unsuited)} are too small or show nothing")

    def gather_unreadable(self) -> list[str]:
        """Returns `unreadable` over all processes, each of which must call this.

        Raises:
            InputError: on all processes, when these are more than 1 % of the images (and more than one).
        """
        for indices in all_gather(self._indices(_UNREADABLE)):
            self._state[indices] = _UNREADABLE
        # One that another process has yet to try again counts for all alike.
        unreadable = sorted({int(index) for indices in all_gather(self._unreadable()) for index in indices})
        names = [self.name_of(index) for index in unreadable]
        if names:
            self._refuse_too_many(f"among them {names[0]}", len(names))
        return names

    def _refuse_too_many(self, example: str, count: int | None = None) -> None:
        count = len(self._unreadable()) if count is None else count
        if count > max(1, UNREADABLE_SHARE * len(self._state)):
            raise InputError(f"{count} of the {len(self._state)} images of {self.place} cannot be read, which is more "
                             f"than {UNREADABLE_SHARE:.0%}; {example}")

    def _unreadable(self) -> Tensor:
        return ((self._state == _UNREADABLE) | (self._state == _WAS_UNREADABLE)).nonzero()[:, 0]

    def _indices(self, state: int) -> Tensor:
        return (self._state == state).nonzero()[:, 0]
