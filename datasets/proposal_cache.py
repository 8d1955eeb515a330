"""The proposals of a folder tree of images on disk, so that they are computed once.

    DIR/manifest.json              what the proposals are, and the number of parts
    DIR/proposals-00042.npz        the entries of all images whose path, relative to the tree, falls into part 42

A part is replaced as a whole, so that it is always readable; part and entry are found by the relative path, so that the
tree may move and images of one name in different folders have entries of their own. An entry knows the size of its
image file in bytes: one whose file has changed since is stale.
"""
from __future__ import annotations

import io
import json
import os
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from datasets.checks import is_count
from datasets.selective_search import SETTINGS
from util.errors import InputError
from util.files import open_regular, read_json, shown

__all__ = ["CachedProposals", "Entry", "ProposalCache"]

_FORMAT = 2  # raised whenever the files would be read wrongly by older code, or older files by this
_IMAGES_PER_PART = 64
_MIN_PARTS = 16  # so that several processes share even a small tree


@dataclass(frozen=True)
class Entry:
    """The cached facts about an image.

    Attributes:
        file_size: bytes of the image file when its regions were proposed.
        regions: uint8 [n, 6], see `datasets.selective_search.find_regions`; n is 0 if the file could not be read.
    """

    file_size: int
    regions: np.ndarray


class ProposalCache:
    """A cache that exists.

    Args:
        folder: the cache's folder.

    Raises:
        InputError: there is no cache there, or one of other proposals.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        if not os.path.lexists(self.folder / "manifest.json"):
            raise InputError(f"--cache_path {shown(folder)} holds no proposals: it has no manifest.json (make them with "
                             "python -m tools.cache_proposals)")
        manifest = read_json(self.folder / "manifest.json", "manifest of the proposal cache")
        wanted = {"format": _FORMAT, "proposals": SETTINGS}
        if not isinstance(manifest, dict) or {name: manifest.get(name) for name in wanted} != wanted:
            raise InputError(f"--cache_path {folder} holds other proposals than these "
                             f"({_difference(manifest, wanted)}): give another folder, or delete this one, and "
                             "make them with python -m tools.cache_proposals")
        self.num_parts = manifest.get("num_parts")
        if not is_count(self.num_parts) or not self.num_parts:
            raise InputError(f"{self.folder / 'manifest.json'} is damaged: its num_parts is {self.num_parts}, not a "
                             "number of parts; give another folder, or delete this one")

    @classmethod
    def create(cls, folder: str | os.PathLike, num_images: int) -> "ProposalCache":
        """Opens the cache in a folder, after making it if there is none.

        Args:
            folder: the cache's folder.
            num_images: how many images are going to be there, roughly.

        Raises:
            InputError: there is one of other proposals; or there are other files, or nothing can be written there.
        """
        folder = Path(folder)
        if not os.path.exists(folder / "manifest.json"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # A run that begins at the same time may be writing there.
                if any(not path.name.startswith(".") and path.name != "manifest.json" for path in folder.iterdir()):
                    raise InputError(f"--cache_path {folder} has files in it, but no proposals: give an empty or a new "
                                     "folder")
                manifest = {"format": _FORMAT, "proposals": SETTINGS,
                            "num_parts": max(_MIN_PARTS, -(-num_images // _IMAGES_PER_PART))}
                _replace(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
            except OSError as error:
                raise InputError(f"--cache_path {folder} can't be written ({error})") from error
        return cls(folder)

    def parts_of(self, paths: Iterable[str]) -> dict[int, list[int]]:
        """Sorts images into the parts of the cache.

        Args:
            paths: paths relative to the tree, "/" between folders.

        Returns:
            By number of the part, ascending, the positions of its images in `paths`.
        """
        parts: dict[int, list[int]] = {}
        for position, path in enumerate(paths):
            parts.setdefault(zlib.crc32(os.fsencode(path)) % self.num_parts, []).append(position)
        return dict(sorted(parts.items()))

    def read(self, part: int) -> dict[str, Entry]:
        """Reads the entries of a part by path; there are none in a part that was never written.

        Raises:
            InputError: the file is damaged.
        """
        path = self._path(part)
        if not os.path.lexists(path):
            return {}
        file = open_regular(path, "proposal cache")
        try:
            with file, np.load(file, allow_pickle=False) as content:
                names = content["names"].tobytes().split(b"\0")[:-1]
                sizes, ends, regions = content["file_sizes"].tolist(), content["ends"].tolist(), content["regions"]
            _require_whole(len(names), sizes, ends, regions)
        except Exception as error:  # damaged bytes can make numpy and zipfile raise nearly anything
            raise InputError(f"{path} of the proposal cache is damaged ({error}): delete it, then run "
                             "python -m tools.cache_proposals again") from error
        return {os.fsdecode(name): Entry(size, regions[start:end])
                for name, size, start, end in zip(names, sizes, [0, *ends], ends)}

    def write(self, part: int, entries: dict[str, Entry]) -> None:
        """Writes all entries of a part: readers find the old part or the new one, never half of it."""
        names = b"".join(os.fsencode(name) + b"\0" for name in entries)
        counts = [len(entry.regions) for entry in entries.values()]
        content = io.BytesIO()
        np.savez(content, names=np.frombuffer(names, dtype=np.uint8), ends=np.cumsum(counts, dtype=np.int64),
                 file_sizes=np.array([entry.file_size for entry in entries.values()], dtype=np.int64),
                 regions=np.concatenate([entry.regions for entry in entries.values()]).astype(np.uint8))
        _replace(self._path(part), content.getvalue())

    def _path(self, part: int) -> Path:
        return self.folder / f"proposals-{part:05}.npz"


class CachedProposals:
    """The cached proposals of a data set's images, in memory, packed so that worker processes share them.

    Args:
        folder: the cache's folder.
        root: top folder of the images.
        files: their paths relative to it.

    Raises:
        InputError: there is no cache, it is one of other proposals, or some of the images are not in it.
    """

    def __init__(self, folder: str | os.PathLike, root: str | os.PathLike, files: Sequence[str]) -> None:
        self.folder = folder
        cache = ProposalCache(folder)
        regions = [np.zeros((0, 6), dtype=np.uint8)] * len(files)
        self._file_sizes = np.full(len(files), -1, dtype=np.int64)
        for part, positions in cache.parts_of(files).items():
            entries = cache.read(part)
            for position in positions:
                entry = entries.get(files[position])
                if entry is not None:
                    regions[position] = entry.regions.copy()  # not a view, which would keep the whole part
                    self._file_sizes[position] = entry.file_size
        missing = np.flatnonzero(self._file_sizes < 0)
        if len(missing):
            raise InputError(f"--cache_path {folder} lacks {len(missing)} of the {len(files)} images of {root}, the "
                             f"first is {files[missing[0]]}: run python -m tools.cache_proposals --imagenet_path "
                             f"{root} --cache_path {folder}")
        self._ends = np.cumsum([0, *map(len, regions)])
        self._regions = np.concatenate(regions)

    def __call__(self, index: int, path: Path, image: Tensor) -> np.ndarray:
        """Returns the regions of an image, uint8 [n, 6], see `datasets.selective_search.find_regions`.

        Args:
            index: its position in `files`.
            path: its file, which must exist.
            image: its bytes, which are not needed.

        Raises:
            InputError: the file has changed since its regions were proposed.
        """
        if path.stat().st_size != self._file_sizes[index]:
            raise InputError(f"--cache_path {self.folder} is stale: {path} has changed since its regions were "
                             "proposed; run python -m tools.cache_proposals again")
        return self._regions[self._ends[index]:self._ends[index + 1]]


def _require_whole(count: int, sizes: list, ends: list, regions: np.ndarray) -> None:
    """Raises ValueError if the arrays of a part of so many entries don't go together."""
    is_whole = len(sizes) == len(ends) == count and [0, *ends] == sorted([0, *ends]) and len(regions) == max([0, *ends])
    if not is_whole or regions.dtype != np.uint8 or regions.shape[1:] != (6,):
        raise ValueError("its arrays don't go together")


def _difference(manifest: object, wanted: dict) -> str:
    """Says in a few words where a manifest differs."""
    def flat(content: object) -> dict:
        content = content if isinstance(content, dict) else {}
        proposals = content.get("proposals")
        return {"format": content.get("format"), **(proposals if isinstance(proposals, dict) else {})}

    there, here = flat(manifest), flat(wanted)
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return ", ".join(f"{name} {there.get(name)} instead of {here.get(name)}" for name in names)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file as a whole or not at all."""
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
