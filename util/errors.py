"""The exception for mistakes that a user can mend, and how programs report it."""
import contextlib
import io
import multiprocessing
import os
import re
import sys
import time
import traceback
from types import ModuleType
from typing import Callable, Optional

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again
# What torch says when a data-loading process is gone, at whatever line of the main process that comes to light.
WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: [\w ]+|exited unexpectedly)")


class InputError(ValueError):
    """Something the user gave (a flag, a file, an annotation) is wrong; the message is one sentence that names it."""

    @property
    def sentence(self) -> str:
        """The message alone, also when a data-loading worker has wrapped it in its traceback."""
        return str(self).rsplit("InputError: ", 1)[-1].strip().replace("\n", " ")


class Stopped(Exception):
    """The run was asked to stop and has done so in good order; the message says where it goes on."""


def run_program(program: Callable[[], None]) -> None:
    """Run a command line program: mistakes in its input end in one line and exit status 2, numbers that go wrong in one line
    and status 3, a data-loading process that died (of memory, as a rule) in one line and status 4, a stop that was asked for
    in one line and status 75, of all processes together; anything else is a fault of ours and keeps its traceback (status 1).

    Output reaches a file or a pipe line by line, as it does a terminal, so that a log can be followed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        program()
        return
    except InputError as error:
        line, status = f"error: {error.sentence}", 2
    except FloatingPointError as error:
        line, status = f"error: {error}", 3
    except Stopped as stop:
        line, status = str(stop), STOPPED
    except Exception as error:
        try:
            line, status = _of_dead_worker(error), 4
        except RuntimeError as news:  # torch raises that a loading process died at whatever line is at its turn
            line, status = _of_dead_worker(news), 4
        if not line and not _has_company():
            raise
        if not line:
            line, status = traceback.format_exc().rstrip(), 1
    if line:
        print(line, file=sys.stderr, flush=True)
    group = _process_group()
    if status == STOPPED and group:  # launchers end all processes once one has left: not before all have spoken
        with contextlib.suppress(RuntimeError):  # one that is gone already needn't be waited for
            group.barrier()
    if _has_company():
        # Leaving in the usual way waits for loading processes, and for collectives that others won't take part in: a
        # process that failed could stay, and all others with it.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _of_dead_worker(error: Exception) -> str:
    """The sentence for an error that a dead data-loading process is the reason of; "" for others."""
    died = WORKER_DIED.search(f"{error.__cause__} {error}")  # the cause, if there is one, knows the signal
    if not died and isinstance(error, (OSError, EOFError)):  # what it had sent could not be read any more
        died = WORKER_DIED.search(_news_of_workers())
    if not died:
        return ""
    return (f"error: data-loading process {died[1]} is gone ({died[2].removeprefix('is ')}), most often since memory, or "
            "shared memory in /dev/shm, ran out: fewer --num_workers or a smaller --batch_size need less")


def _news_of_workers() -> str:
    """What torch says of loading processes that died, perhaps a moment later than their connections; "" if all is well."""
    try:
        for _ in range(20):
            sys.modules["torch"]._C._error_if_any_worker_fails()
            time.sleep(0.05)
    except (KeyError, RuntimeError) as error:
        return str(error)
    return ""


def _process_group() -> Optional[ModuleType]:
    """`torch.distributed` if this process belongs to a group; programs without torch don't import it for this."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


def _has_company() -> bool:
    """Whether this process has loading processes or belongs to a process group."""
    return _process_group() is not None or bool(multiprocessing.active_children())
