"""One start of a training: its processes, what they print, and how far they come."""
import multiprocessing
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

# Processes are forked off one that has imported everything: each start then takes a fraction of a second.
_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(["main"])
POLL_S = 0.02

STEP = re.compile(r"^Epoch: \[(\d+)\]  \[ *(\d+)/(\d+)\]", re.MULTILINE)
RESUMED = re.compile(r"continuing with epoch (\d+)(?: after step (\d+))?")


class Attempt:
    """A training that is started now.

    Args:
        flags: of main.py.
        num_processes: how many processes train together.
        output: file that gets what they print.
    """

    def __init__(self, flags: Sequence[str], num_processes: int, output: Path) -> None:
        self.output = output
        self.started = time.monotonic()
        port = _free_port()
        self.processes = []
        for rank in range(num_processes):
            environment = {"RANK": str(rank), "WORLD_SIZE": str(num_processes), "LOCAL_RANK": str(rank),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if num_processes > 1 else {}
            process = _START.Process(target=_train, args=(list(flags), environment, str(output)))
            process.start()
            self.processes.append(process)

    @property
    def codes(self) -> List[Optional[int]]:
        """Exit status of each process, None while it runs; a signal's number is negative."""
        return [process.exitcode for process in self.processes]

    @property
    def has_ended(self) -> bool:
        return None not in self.codes

    @property
    def text(self) -> str:
        """What was printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end, or for something else, but no longer than this; returns whether one of them came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.has_ended or until():
                return True
            time.sleep(POLL_S)
        return self.has_ended or until()

    def steps_done(self) -> Optional[int]:
        """Steps since the run's first epoch that were taken when the last line was printed; None before the first."""
        lines = STEP.findall(self.text)
        return steps_of(*map(int, lines[-1])) if lines else None

    def resumed_at(self, steps_per_epoch: int) -> Optional[int]:
        """Steps that were taken when this attempt began; None if it didn't come so far as to say."""
        text = self.text
        found = RESUMED.search(text)
        if found:
            return int(found[1]) * steps_per_epoch + (int(found[2]) + 1 if found[2] else 0)
        return 0 if "starting fresh" in text else None

    def kill(self, sent: int = signal.SIGKILL, ranks: Optional[Sequence[int]] = None) -> None:
        """Send a signal to all processes, or to some."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].exitcode is None:
                os.kill(self.processes[rank].pid, sent)

    def loading_processes(self) -> List[int]:
        """Ids of the processes that load data now."""
        found: List[int] = []
        for process in self.processes:
            try:
                found += map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
            except OSError:
                pass  # it has just ended
        return found


def warm_up() -> None:
    """Have everything imported, which takes some seconds, so that starts can be timed."""
    process = _START.Process(target=steps_of, args=(0, 0, 0))
    process.start()
    process.join()


def steps_of(epoch: int, step: int, steps_per_epoch: int) -> int:
    """Steps taken since the run's first epoch once a step, counted from 0, of an epoch is."""
    return epoch * steps_per_epoch + step + 1


def _train(flags: List[str], environment: Dict[str, str], output: str) -> None:
    """What a process does: `python main.py`, but a line is printed for each step."""
    import torch

    import engine
    import main
    from util.errors import run_program

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # else loading processes would come from another server
    engine.PRINT_FREQ = 1
    run_program(lambda: main.main(main.get_args_parser().parse_args(flags)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
