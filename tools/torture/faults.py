"""What can befall a training, and how it may end then."""
import os
import random
import resource
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, FrozenSet

from tools.torture.attempts import Attempt
from util.errors import STOPPED

DISK_MB = 160
BALLAST = "ballast"


@dataclass
class Place:
    """Where a training reads and writes.

    Attributes:
        output: its --output_dir.
        images: the folder of its training images.
        checkpoint_bytes: how large its checkpoints are.
        is_small_disk: whether `output` is a disk of its own, of `DISK_MB`.
    """

    output: Path
    images: Path
    checkpoint_bytes: int
    is_small_disk: bool

    @property
    def newest(self) -> Path:
        return self.output / "checkpoint.pth"


@dataclass(frozen=True)
class Fault:
    """Something to do to a running training.

    Attributes:
        inject: does it; returns False if there was nothing to do it to.
        ends: exit statuses that a process may then have (0: it came to its end nevertheless).
        while_stepping: whether it waits until the attempt has taken a step.
        may_trace: whether a traceback may be printed: that of a process which lost another one, as loading processes do
            when theirs is killed.
        heal: undoes what would hinder the next attempt.
    """

    inject: Callable[[Attempt, Place, random.Random], bool]
    ends: FrozenSet[int]
    while_stepping: bool = False
    may_trace: bool = False
    heal: Callable[[Place], None] = lambda place: None


def _kill(attempt: Attempt, place: Place, rng: random.Random) -> bool:
    attempt.kill()
    return True


def _signal(sent: int) -> Callable[[Attempt, Place, random.Random], bool]:
    def send(attempt: Attempt, place: Place, rng: random.Random) -> bool:
        attempt.kill(sent, [rng.randrange(len(attempt.processes))])
        return True
    return send


def _kill_worker(attempt: Attempt, place: Place, rng: random.Random) -> bool:
    attempt.wait(5, lambda: bool(attempt.loading_processes()))
    workers = attempt.loading_processes()
    if not workers:
        return False
    try:
        os.kill(rng.choice(workers), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _fill_disk(attempt: Attempt, place: Place, rng: random.Random) -> bool:
    room = int(rng.uniform(0, 0.9) * place.checkpoint_bytes)
    if not place.is_small_disk:  # no file of the process may grow beyond this
        room = max(room, 2**18)  # what it prints goes to a file, too
        for process in attempt.processes:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
        return True
    free = os.statvfs(place.output)
    size = free.f_bavail * free.f_frsize - room
    with open(place.output / BALLAST, "wb", buffering=0) as file:
        try:
            while size > 0:
                size -= file.write(bytes(min(size, 2**20)))
        except OSError:
            pass  # the training was faster: the disk is full all the same
    return True


def _free_disk(place: Place) -> None:
    (place.output / BALLAST).unlink(missing_ok=True)


def _spoil(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Attempt, Place, random.Random], bool]:
    def kill_and_spoil(attempt: Attempt, place: Place, rng: random.Random) -> bool:
        attempt.kill()
        attempt.wait(10)
        if place.newest.exists():
            place.newest.write_bytes(change(place.newest.read_bytes(), rng))
        return True
    return kill_and_spoil


def _garbled(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) - 512)
    return content[:start] + rng.randbytes(512) + content[start + 512:]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[:rng.randrange(len(content))]


def _change_image(change: Callable[[Path], None]) -> Callable[[Attempt, Place, random.Random], bool]:
    def change_one(attempt: Attempt, place: Place, rng: random.Random) -> bool:
        change(rng.choice(sorted(place.images.iterdir())))
        return True
    return change_one


KILLED, STOPS, REFUSED, WORKER_GONE = frozenset({-9}), frozenset({STOPPED, 0}), frozenset({2, 0}), frozenset({4, 0})

ON_RUNS: Dict[str, Fault] = {
    "kill -9": Fault(_kill, KILLED, may_trace=True),
    "terminate": Fault(_signal(signal.SIGTERM), STOPS, while_stepping=True),
    "interrupt": Fault(_signal(signal.SIGINT), STOPS, while_stepping=True),
    "fill the disk": Fault(_fill_disk, REFUSED, heal=_free_disk),
    "kill -9, garble the newest checkpoint": Fault(_spoil(_garbled), KILLED, may_trace=True),
    "kill -9, cut the newest checkpoint": Fault(_spoil(_cut), KILLED, may_trace=True),
    "kill -9 a loading process": Fault(_kill_worker, WORKER_GONE, while_stepping=True),
}
ON_TWO_PROCESSES: Dict[str, Fault] = {
    "kill -9 one of two processes": Fault(_signal(signal.SIGKILL), frozenset(range(-64, 256)), may_trace=True),
    "terminate one of two processes": Fault(_signal(signal.SIGTERM), STOPS, while_stepping=True),
    "kill -9 both processes": Fault(_kill, KILLED, may_trace=True),
    "kill -9 a loading process of two": Fault(_kill_worker, frozenset({-15, 0, 1, 4}), while_stepping=True, may_trace=True),
}
ON_IMAGES: Dict[str, Fault] = {
    "delete an image": Fault(_change_image(lambda path: path.unlink()), frozenset({0})),
    "cut an image": Fault(_change_image(lambda path: os.truncate(path, path.stat().st_size // 2)), frozenset({0})),
    "empty an image": Fault(_change_image(lambda path: os.truncate(path, 0)), frozenset({0})),
}


class SmallDisk:
    """A file system of `DISK_MB` in memory, mounted on a folder where that is allowed; gone at the end.

    Attributes:
        folder: where it is, or a usual folder.
        is_mounted: which of the two.
        scratch: a folder beside it, gone at the end, too.
    """

    def __enter__(self) -> "SmallDisk":
        self._temporary = tempfile.TemporaryDirectory(prefix="torture-")
        self.folder, self.scratch = (Path(self._temporary.name, name) for name in ("disk", "scratch"))
        self.folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "torture", str(self.folder)]
        try:
            self.is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            self.is_mounted = False
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_mounted:
            # Lazily: a process that was killed may not have let go of it yet.
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
        self._temporary.cleanup()
