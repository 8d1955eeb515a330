"""Run a plan's cells side by side, each in a folder of its own, and keep what is finished."""
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from tools.output import replace_json
from tools.reproduce.rows import Cell
from util.errors import InputError, Stopped
from util.files import read_json
from util.saving import LAST

ROOT = Path(__file__).resolve().parents[2]
RECORD, OUTPUT = "cell.json", "output.txt"
POLL_S, NOTE_EVERY_S = 0.1, 5.0
PATIENCE_S = 60  # how long a training may take to save itself when it is told to stop


class Attempt:
    """A cell that is running. Its record is written down now and then, so that the time of a killed one counts too."""

    def __init__(self, cell: Cell, folder: Path, record: Dict[str, Any], threads: int) -> None:
        self.cell, self.folder, self.record = cell, folder, record
        self.before, self.start, self.noted = record["seconds"], time.monotonic(), 0.0
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        _end_orphan(folder, record.get("process"))
        with open(folder / OUTPUT, "a", encoding="utf-8") as output:
            self.process = subprocess.Popen([sys.executable, *record["command"]], cwd=ROOT, env=environment, stdout=output,
                                            stderr=output, stdin=subprocess.DEVNULL)
        record["process"] = self.process.pid

    def note(self, finished: bool = False) -> None:
        """Write down how long the cell has taken so far."""
        self.record.update(seconds=self.before + time.monotonic() - self.start, finished=finished)
        replace_json(self.folder / RECORD, self.record)
        self.noted = time.monotonic()


def _end_orphan(folder: Path, process: Optional[int]) -> None:
    """End what a killed reproduction has left running in a cell's folder."""
    end = time.monotonic() + PATIENCE_S
    number = signal.SIGTERM
    while process and str(folder) in _command_of(process):
        os.kill(process, number)
        number = signal.SIGKILL if time.monotonic() > end else number
        time.sleep(1)


def _keep_last_checkpoint(folder: Path) -> None:
    """Of a finished training; a matrix of them would fill disks otherwise."""
    for path in folder.glob("checkpoint*.pth"):
        if path.name != LAST:
            path.unlink()


def _command_of(process: int) -> str:
    """Command line of a process, or "" if there is none of that number."""
    if sys.platform != "linux":
        return subprocess.run(["ps", "-o", "args=", "-p", str(process)], capture_output=True, text=True).stdout
    try:
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def read_record(folder: Path) -> Dict[str, Any]:
    """What is known of a cell: its command, the seconds that it has taken, whether it is finished."""
    path = folder / RECORD
    if not path.exists():
        return {"command": None, "seconds": 0.0, "finished": False}
    try:
        record = read_json(path, "record")
        if not isinstance(record, dict) or not {"command", "seconds", "finished"} <= set(record):
            raise InputError(f"record {path} lacks a command, its seconds or whether it is finished")
        return record
    except InputError as error:
        raise InputError(f"{error}: delete its folder to run that cell anew") from error


class Runner:
    """Runs cells; those that are finished are kept, one that was broken off goes on.

    Args:
        cells: what a cell needs must come before it.
        folder: of all cells.
        jobs: how many run at a time.
        threads: of each.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path, jobs: int, threads: int) -> None:
        self.cells, self.folder, self.jobs, self.threads = list(cells), folder, jobs, threads
        self.records = {cell.name: read_record(folder / cell.name) for cell in self.cells}
        self.failed: Dict[str, str] = {}
        self.running: List[Attempt] = []
        self.heard = 0  # number of the signal that asked for a stop

    @property
    def seconds(self) -> Dict[str, float]:
        """Of the finished cells."""
        return {name: record["seconds"] for name, record in self.records.items() if record["finished"]}

    def run(self) -> None:
        """Run what is left.

        Raises:
            InputError: if cells failed; what doesn't depend on them was run.
            Stopped: at SIGTERM or Ctrl-C, when the running cells have saved what they have.
        """
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._start_what_can() or self.running:
                time.sleep(POLL_S)
                if self.heard:
                    raise Stopped(f"stopped by {signal.Signals(self.heard).name}; the same command goes on from here")
                for attempt in list(self.running):
                    self._look_at(attempt)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._end()
        if self.failed:
            first = next(iter(self.failed))
            raise InputError(f"{len(self.failed)} of {len(self.cells)} cells failed, {len(self.cells) - len(self.seconds)} are "
                             f"not finished; the first to fail was {first}: {self.failed[first]}")

    def _hear(self, number: int, frame: Any) -> None:
        self.heard = number

    def _start_what_can(self) -> bool:
        """Start cells on free places; returns whether one was started."""
        started = False
        for cell in self.cells:
            if len(self.running) >= self.jobs:
                break
            done = self.seconds
            busy = {attempt.cell.name for attempt in self.running} | self.failed.keys() | done.keys()
            if cell.name not in busy and all(need in done for need in cell.needs):
                record = self.records[cell.name]
                record["command"] = record["command"] or cell.command(done)
                folder = self.folder / cell.name
                folder.mkdir(parents=True, exist_ok=True)
                self.running.append(Attempt(cell, folder, record, self.threads))
                self.running[-1].note()
                started = True
        return started

    def _look_at(self, attempt: Attempt) -> None:
        code = attempt.process.poll()
        if code is None:
            if time.monotonic() - attempt.noted > NOTE_EVERY_S:
                attempt.note()
            return
        self.running.remove(attempt)
        attempt.note(finished=code == 0)
        name = attempt.cell.name
        if code == 0:
            _keep_last_checkpoint(attempt.folder)
            done = f"[{len(self.seconds)}/{len(self.cells)}]"
            print(f"{done} {name}: {attempt.record['seconds']:.0f} s{self._left()}", flush=True)
            return
        lines = (attempt.folder / OUTPUT).read_text(errors="replace").strip().splitlines()
        self.failed[name] = f"{lines[-1] if lines else 'no output'} (status {code}, see {attempt.folder / OUTPUT})"
        print(f"{name} failed: {self.failed[name]}", flush=True)

    def _left(self) -> str:
        """An estimate from the seconds that cells of each kind have taken; cells of no known kind take the average."""
        done = self.seconds
        of_kind = defaultdict(list)
        for cell in self.cells:
            if cell.name in done:
                of_kind[cell.kind].append(done[cell.name])
        average = statistics.mean(done.values())
        left = 0.0
        for cell in self.cells:
            if cell.name not in done:
                expected = statistics.median(of_kind[cell.kind]) if cell.kind in of_kind else average
                left += max(0.0, expected - self.records[cell.name]["seconds"])
        return f"; about {left / self.jobs / 60:.0f} min left" if left else ""

    def _end(self) -> None:
        """Tell the running cells to stop, and wait until they have saved what they have."""
        for attempt in self.running:
            attempt.process.terminate()
        for attempt in self.running:
            try:
                attempt.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                attempt.process.kill()
                attempt.process.wait()
            attempt.note(finished=attempt.process.returncode == 0)
        self.running.clear()
