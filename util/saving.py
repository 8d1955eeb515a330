"""The output directory of a run: whose it is, checkpoints written beside the training, and which one to go on from."""
import contextlib
import fcntl
import glob
import os
import socket
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor

from util.checkpoint import is_whole, save_checkpoint
from util.distributed import all_gather, is_main_process, print_main
from util.errors import InputError

LAST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
LOCK = ".lock"


class Saver:
    """Writes checkpoints in a thread, one at a time, while the training goes on.

    What goes wrong in the thread is raised by the next `check`, `wait` or `save`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._writing: Optional[Future] = None

    def save(self, checkpoint: Dict[str, Any], paths: Sequence[str]) -> None:
        """Copy a checkpoint's tensors to the host and begin to write it under each name; an earlier one's writing is
        waited for first, so that no more than one copy is held."""
        self.wait()
        self._writing = self._thread.submit(write_all, host_copy(checkpoint), list(paths))

    def check(self) -> None:
        """Raise what went wrong, without waiting."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            InputError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()


def write_all(checkpoint: Dict[str, Any], paths: Sequence[str]) -> None:
    """Write a checkpoint under each name; what was `LAST` stays as `PREVIOUS`."""
    for path in paths:
        folder, name = os.path.split(path)
        save_checkpoint(checkpoint, path, os.path.join(folder, PREVIOUS) if name == LAST else "")


def host_copy(value: Any, copies: Optional[Dict[Any, Tensor]] = None) -> Any:
    """A copy of nested containers whose tensors are on the host and share no memory with the given ones. A tensor that
    comes twice, as tied weights do, does so in the copy."""
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return type(value)((name, host_copy(item, copies)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(host_copy(item, copies) for item in value)
    return value


def on_main(function: Callable[[], Any]) -> Any:
    """What a function returns on the main process, or the InputError that it raises there, on all of them."""
    result, sentence = None, ""
    if is_main_process():
        try:
            result = function()
        except InputError as error:
            sentence = error.sentence
    result, sentence = all_gather((result, sentence))[0]
    if sentence:
        raise InputError(sentence)
    return result


@contextlib.contextmanager
def claimed(output_dir: str) -> Iterator[None]:
    """Hold a run's output directory, made if need be and rid of what killed savings left; every process must enter.

    The lock is the process's: it ends with it, however that ends, and loading processes don't inherit it.

    Raises:
        InputError: if a live run holds it, or nothing can be written there.
    """
    held: List[Any] = []
    on_main(lambda: held.append(_lock(output_dir)))
    try:
        yield
    finally:
        for file in held:
            file.close()


def _lock(output_dir: str) -> Any:
    path = os.path.join(output_dir, LOCK)
    try:
        os.makedirs(output_dir, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise InputError(f"could not write {path} ({error.strerror})") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise InputError(f"--output_dir {output_dir} is in use by another training ({file.read().strip()}); "
                         "wait for its end or choose another folder") from error
    except OSError as error:  # a file system without locks
        print_main(f"{output_dir} can't be locked ({error.strerror}): a second training there would not be noticed")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    for pattern in ("*.pth.*.tmp", "log.txt.tmp", "eval/*.pth.*.tmp"):
        for leftover in glob.glob(os.path.join(glob.escape(output_dir), pattern)):
            os.remove(leftover)
    return file


def saved_checkpoints(output_dir: str) -> List[str]:
    """A run's checkpoints in its output directory; first the one that it goes on from if nothing happened to it."""
    found = sorted(glob.glob(os.path.join(glob.escape(output_dir), "checkpoint*.pth")))
    return sorted(found, key=lambda path: (os.path.basename(path) != LAST, os.path.basename(path) != PREVIOUS))


def newest_checkpoint(output_dir: str) -> str:
    """The latest saved of a run's checkpoints that is whole, or "" if there is none.

    Damaged ones that would come before it are named and moved out of the way, to NAME.damaged.
    """
    found = {path: _saved_at(path) for path in saved_checkpoints(output_dir)}
    # One that can't be read may have been the latest: it is looked at, and reported, first. The order of equals stays.
    for path in sorted(found, key=lambda path: -(found[path] if found[path] is not None else float("inf"))):
        if found[path] is not None and is_whole(path):
            return path
        try:
            os.replace(path, path + ".damaged")
        except OSError as error:
            raise InputError(f"{path} is damaged and could not be moved away ({error.strerror})") from error
        print_main(f"resume: {path} is damaged, it is now called {os.path.basename(path)}.damaged")
    return ""


def _saved_at(path: str) -> Optional[float]:
    """When a checkpoint was saved, by itself or else by the file system, in seconds; None if it can't be read."""
    try:
        zipped = zipfile.is_zipfile(path)  # only then can it be read without its tensors
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return float(checkpoint.get("saved_at") or os.path.getmtime(path))
    except Exception:  # a damaged file can make the unpickler raise anything
        return None
