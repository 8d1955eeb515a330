"""The output directory of a run: whose it is, checkpoints written beside the training, and which one to go on from."""
import contextlib
import fcntl
import os
import re
import socket
import stat
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor

from util.checkpoint import first_sentence, is_whole, load_plain, save_checkpoint
from util.distributed import all_gather, is_main_process, print_main
from util.errors import InputError

LAST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
LOCK, LOCK_WORDS = ".lock", "process "
OWN_NAME = re.compile(r"checkpoint(_previous|_best|\d{4,})?\.pth")
# Under what names files are written at first, see `util.checkpoint.save_checkpoint`.
LEFTOVER = re.compile(rf"({OWN_NAME.pattern}|eval\.pth|latest\.pth|failure_epoch\d+_step\d+_process\d+\.pth)\.\d+\.tmp"
                      r"|log\.txt\.tmp|args\.json\.tmp|train_subset\.json\.tmp")


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
        # Not through a link, and not waiting where it is a pipe: what lies there is written to.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666), "r+b", 0)
        try:
            _take(file, path, output_dir)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise InputError(f"could not write {path} ({error.strerror})") from error
    return file


def _take(file: Any, path: str, output_dir: str) -> None:
    """Lock an open lock file, sweep the folder, and write down whose it is."""
    content = file.read(1000).decode(errors="replace") if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    if content is None or not content.startswith(LOCK_WORDS[:len(content)]):
        raise InputError(f"{path} is not the lock file of a training: move it away, or choose another --output_dir")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(f"--output_dir {output_dir} is in use by another training ({content.strip()}); "
                         "wait for its end or choose another folder") from error
    except OSError as error:  # a file system without locks
        print_main(f"{output_dir} can't be locked ({error.strerror}): a second training there would not be noticed")
    for folder in (output_dir, os.path.join(output_dir, "eval")):  # first: on a full disk they may be what fills it
        _sweep(folder)
    file.truncate(0)
    file.seek(0)
    file.write(f"{LOCK_WORDS}{os.getpid()} on {socket.gethostname()}\n".encode())


def _sweep(folder: str) -> None:
    """Remove what savings that were killed left in a folder, if it is there."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if LEFTOVER.fullmatch(name) and not os.path.isdir(path):
            try:
                os.remove(path)
            except OSError as error:
                raise InputError(f"{path}, which a killed training left, can't be removed ({error.strerror})") from error


def saved_checkpoints(output_dir: str) -> List[str]:
    """Paths of a run's checkpoints in its output directory, those with the names that a training gives them; first the one
    that it goes on from if nothing happened to it.

    Raises:
        InputError: if the folder exists but can't be listed.
    """
    try:
        names = [name for name in os.listdir(output_dir) if OWN_NAME.fullmatch(name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"--output_dir {output_dir} can't be listed ({error.strerror})") from error
    names.sort(key=lambda name: (name != LAST, name != PREVIOUS, name))
    return [os.path.join(output_dir, name) for name in names]


class _Saved(NamedTuple):
    """How far a checkpoint is; `run` tells trainings apart that were started anew in the same folder."""

    path: str
    run: str
    saved_at: float  # seconds, by the clock of then
    place: Tuple[int, int]  # last whole epoch, steps of the next


def newest_checkpoint(output_dir: str) -> str:
    """The most advanced of a run's checkpoints that is whole, or "" if the run has none yet.

    Epochs and steps decide, since clocks may be set back; the clock only says which of several runs was the last. Damaged
    checkpoints are moved out of the way, to NAME.damaged, and those that can't be read just now are left as they are.

    Raises:
        InputError: if there are checkpoints and none of them can be used; all are then left as they are.
    """
    found, damaged, unread = _look_at(saved_checkpoints(output_dir))
    last_of_run: Dict[str, float] = {}
    for one in found:
        last_of_run[one.run] = max(one.saved_at, last_of_run.get(one.run, one.saved_at))
    # The order of equals stays.
    for one in sorted(found, key=lambda one: (last_of_run[one.run], one.run, one.place), reverse=True):
        whole = _is_whole_or_unread(one.path, unread)
        if whole:
            _say_unread(unread)
            for path in damaged:
                _move_away(path)
            return one.path
        if whole is False:
            damaged.append(one.path)
    if not damaged and not unread:
        return ""
    reasons = {**unread, **{path: "damaged" for path in damaged}}
    listed = "; ".join(f"{os.path.basename(path)}: {reason}" for path, reason in reasons.items())
    raise InputError(f"--resume auto: no checkpoint in {output_dir} can be used ({listed}); they were left as they are: mend "
                     "what keeps them from being read, or move them away, or give another --output_dir, to start afresh")


def _look_at(paths: Sequence[str]) -> Tuple[List[_Saved], List[str], Dict[str, str]]:
    """Of checkpoints those that say how far they are, those that are damaged, and why others can't be read."""
    found: List[_Saved] = []
    damaged: List[str] = []
    unread: Dict[str, str] = {}
    for path in paths:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                continue  # a folder, say: no training made it
            found.append(_read_place(path))
        except Exception as error:  # a damaged file can make the unpickler raise anything
            whole = _is_whole_or_unread(path, unread)
            if whole is False:
                damaged.append(path)
            elif whole:  # all bytes are as they were written: memory ran out, say, or another program wrote it
                unread[path] = first_sentence(error)
    return found, damaged, unread


def _is_whole_or_unread(path: str, unread: Dict[str, str]) -> Optional[bool]:
    """`is_whole`; None, with the reason in `unread`, if the file can't be read just now."""
    try:
        return is_whole(path)
    except (OSError, MemoryError) as error:
        unread[path] = getattr(error, "strerror", None) or first_sentence(error)
        return None


def _say_unread(unread: Dict[str, str]) -> None:
    for path, reason in unread.items():
        print_main(f"resume: {path} can't be read now ({reason}) and is left as it is")


def _move_away(path: str) -> None:
    try:
        os.replace(path, path + ".damaged")
    except OSError as error:
        raise InputError(f"{path} is damaged and could not be moved away ({error.strerror})") from error
    print_main(f"resume: {path} is damaged, it is now called {os.path.basename(path)}.damaged")


def _read_place(path: str) -> _Saved:
    """How far a checkpoint is; its tensors aren't read."""
    checkpoint = load_plain(path, mmap=zipfile.is_zipfile(path))
    if not isinstance(checkpoint, dict):
        raise ValueError(f"a checkpoint is a dict, this holds a {type(checkpoint).__name__}")
    step = (checkpoint.get("so_far") or {}).get("step", 0)
    return _Saved(path, str(checkpoint.get("run", "")), float(checkpoint.get("saved_at") or os.path.getmtime(path)),
                  (int(checkpoint.get("epoch", -1)), int(step)))
