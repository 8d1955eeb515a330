"""Long lists in one block of bytes: millions of Python objects would be copied, page by page, into every worker."""
from __future__ import annotations

import marshal
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

__all__ = ["Packed", "checksum", "pack_paths", "pack_records"]

Item = TypeVar("Item")


class Packed(Sequence[Item]):
    """A list that cannot be changed.

    Args:
        items: what it holds.
        encode: turns one into bytes.
        decode: turns these back; what it returns is new each time.
    """

    def __init__(self, items: Iterable[Item], encode: Callable[[Item], bytes], decode: Callable[[bytes], Item]) -> None:
        block, ends = bytearray(), [0]
        for item in items:
            block += encode(item)
            ends.append(len(block))
        self._block, self._ends, self._decode = bytes(block), np.array(ends), decode

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not an index of {len(self)} items")
        return self._decode(self._block[self._ends[index]:self._ends[index + 1]])


def checksum(items: Iterable[Any]) -> int:
    """Return a checksum of strings, numbers or tuples of these, and of their order."""
    total = 0
    for item in items:
        total = zlib.crc32(repr(item).encode("utf-8", "backslashreplace") + b"\n", total)
    return total


def pack_paths(paths: Iterable[str]) -> Packed[str]:
    """Packs paths, whatever bytes they are on disk."""
    return Packed(paths, os.fsencode, _decode_path)


def pack_records(records: Iterable[dict[str, Any]]) -> Packed[dict[str, Any]]:
    """Packs what JSON files hold."""
    return Packed(records, marshal.dumps, marshal.loads)


def _decode_path(path: bytes) -> str:
    return os.fsdecode(path)  # which can't itself be sent to a process
