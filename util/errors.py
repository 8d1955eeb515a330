"""The exception for mistakes that a user can mend, and how programs report it."""
import io
import multiprocessing
import os
import sys
import traceback
from typing import Callable

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again


class InputError(ValueError):
    """Something the user gave (a flag, a file, an annotation) is wrong; the message is one sentence that names it."""

    @property
    def sentence(self) -> str:
        """The message alone, also when a data-loading worker has wrapped it in its traceback."""
        return str(self).rsplit("InputError: ", 1)[-1].strip()


class Stopped(Exception):
    """The run was asked to stop and has done so in good order; the message says where it goes on."""


def run_program(program: Callable[[], None]) -> None:
    """Run a command line program: mistakes in its input end in one line and exit status 2, numbers that go wrong in one line
    and status 3, a stop that was asked for in one line and status 75; anything else is a fault of ours and keeps its
    traceback (status 1).

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
    except Exception:
        if not _has_company():
            raise
        line, status = traceback.format_exc().rstrip(), 1
    if line:
        print(line, file=sys.stderr, flush=True)
    if _has_company():
        # Leaving in the usual way waits for loading processes, and for collectives that others won't take part in: a
        # process that failed could stay, and all others with it.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _has_company() -> bool:
    """Whether this process has loading processes or belongs to a process group."""
    distributed = sys.modules.get("torch.distributed")
    grouped = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return grouped or bool(multiprocessing.active_children())
