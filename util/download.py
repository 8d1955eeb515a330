"""Downloads into torch.hub's cache: a file is whole or absent, belongs to one URL, and is fetched once per machine."""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import urlparse

import torch

from util.distributed import print_main
from util.files import read_text, shown

__all__ = ["fetch", "forget"]

HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,64})\.")
# A server that sends less than this within such a time has stalled, though each byte may come in time.
STALL_S, LEAST_BYTES = 30.0, 2**16
LOCK_WAIT_S = 1800.0  # for another process that downloads the same; then this one does so, too
_CHUNK = 2**20


def fetch(url: str) -> str:
    """Return the cached file of an http(s) URL, downloaded if need be.

    A hash in its name (`detr-r50-e632da11.pth`) is checked each time, and the file lies where torch.hub keeps it. Many
    other files are called `checkpoint.pth`: these lie in a folder for their URL. One that was put into the cache by hand is
    used, and said.

    Raises:
        OSError, ValueError, http.client.HTTPException: it can't be had.
    """
    name = os.path.basename(urlparse(url).path)
    if name in ("", ".", ".."):
        raise ValueError("the address names no file")
    found = HASH_IN_NAME.search(name)
    digest = found[1] if found else ""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    if not digest:
        if _is_by_hand(os.path.join(folder, name), url):
            return os.path.join(folder, name)
        folder = os.path.join(folder, key)
    path = os.path.join(folder, name)
    if _is_good(path, digest):
        return path
    os.makedirs(folder, exist_ok=True)
    with _alone(os.path.join(folder, f".{key}.lock")):
        if not _is_good(path, digest):  # else another process has just fetched it
            if os.path.exists(path):
                print_main(f"{shown(path)} isn't the file of {shown(url)}: its SHA-256 doesn't begin with {digest}")
            print(f"downloading {shown(url)} to {shown(path)}", flush=True)
            _download(url, path, digest)
    return path


def forget(path: str) -> None:
    """Remove a file that `fetch` returned and that is of no use, so that it is fetched anew; one put there by hand stays."""
    if os.path.dirname(path) != os.path.join(torch.hub.get_dir(), "checkpoints"):
        os.remove(path)


def _is_by_hand(path: str, url: str) -> bool:
    """Whether a file lies where earlier versions, and users, put this URL's: a note beside it may say that it's another's."""
    if not os.path.isfile(path):
        return False
    if os.path.lexists(path + ".url"):
        return read_text(path + ".url", "note").strip() == url
    print_main(f"{shown(path)}, put there by hand, is used for {shown(url)}")
    return True


def _is_good(path: str, digest: str) -> bool:
    if not os.path.isfile(path):
        return False
    if not digest:
        return True
    with open(path, "rb") as file:
        found = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest().startswith(digest)


@contextlib.contextmanager
def _alone(lock: str) -> Iterator[None]:
    """Wait while another process is in the block, on file systems that have locks."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        end = time.monotonic() + LOCK_WAIT_S
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:
                break  # no locks here: each process downloads under a name of its own
        yield
    finally:
        os.close(descriptor)


def _download(url: str, path: str, digest: str) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            _transfer(url, file, digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _transfer(url: str, file: BinaryIO, digest: str) -> None:
    """Write what a URL has into a file. A thread reads, so that nothing a server does, or doesn't do, is waited for."""
    found, received, over, errors = hashlib.sha256(), [0], threading.Event(), []

    def read() -> None:
        try:
            with urllib.request.urlopen(url, timeout=STALL_S) as response:
                length = response.headers.get("Content-Length")
                while not over.is_set() and (chunk := response.read1(_CHUNK)):
                    if over.is_set():
                        return
                    file.write(chunk)
                    found.update(chunk)
                    received[0] += len(chunk)
            if length is not None and received[0] != int(length):
                raise OSError(f"the connection ended after {received[0]} of {length} bytes")
        except Exception as error:  # raised by who waits
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    before = 0
    try:
        while thread.is_alive():
            thread.join(STALL_S)
            if thread.is_alive() and received[0] - before < LEAST_BYTES:
                raise TimeoutError(f"timed out: {received[0] - before} bytes came within {STALL_S:g} seconds")
            before = received[0]
    finally:
        over.set()
    if errors:
        raise errors[0]
    if not found.hexdigest().startswith(digest):
        raise ValueError(f'invalid hash value (expected "{digest}", got "{found.hexdigest()}")')
