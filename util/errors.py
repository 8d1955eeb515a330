"""The exception for mistakes that a user can mend, and how programs report it."""
import contextlib
import errno
import io
import multiprocessing
import os
import re
import sys
import time
import traceback
from types import ModuleType
from typing import Any, Callable, Optional, Tuple

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again
WRITE_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO)
# What a file system may answer to any use of a file that the user named, however right the use is.
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ESTALE, errno.EMFILE,
            errno.ENFILE, *WRITE_ERRORS)
READER_LEFT = 141  # what shells report of a program that SIGPIPE ended
# What torch says when no loading process has sent a batch for the time that a loader allows.
STANDS_STILL = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
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
    """Run a command line program: mistakes in its input, and files that the system refuses, end in one line and exit
    status 2, numbers that go wrong in one line and status 3, a data-loading process that died (of memory, as a rule) or stands still in one line and status 4, a stop that was asked for
    in one line and status 75, of all processes together; when the reader of its output has left (`| head`), it ends without
    a word and with status 141; anything else is a fault of ours and keeps its traceback (status 1).

    Output reaches a file or a pipe line by line, as it does a terminal, so that a log can be followed; characters that its
    encoding lacks are written as escapes. Flags are read within the program too: --help is output like any other.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    accept_all_characters(sys.stdout)
    accept_all_characters(sys.stderr)
    ended: Optional[BaseException] = None
    try:
        program()
    except (Exception, SystemExit) as error:
        ended = error
    doubtful = isinstance(ended, OSError) and ended.errno in WRITE_ERRORS and ended.filename is None  # a `print` may have met it
    refusal = _refusal(sys.stdout, doubtful) or (_refusal(sys.stderr, doubtful) if doubtful else None)
    if refusal:
        line, status = refusal
    elif ended is None:
        return
    elif isinstance(ended, SystemExit):
        raise ended
    else:
        line, status = _outcome(ended)
    with contextlib.suppress(OSError):  # the status still tells it
        if line:
            print(line, file=sys.stderr, flush=True)
    _refusal(sys.stderr, doubtful=False)
    if status == STOPPED and _process_group():  # launchers end all processes once one has left: not before all have spoken
        from util.distributed import barrier  # which imports this module
        with contextlib.suppress(RuntimeError):  # one that is gone already needn't be waited for
            barrier()
    if _has_company():
        # Leaving in the usual way waits for loading processes, and for collectives that others won't take part in: a
        # process that failed could stay, and all others with it.
        for child in multiprocessing.active_children():
            child.kill()  # a stopped one would stay, and not see that this process ends
        os._exit(status)
    sys.exit(status)


def accept_all_characters(stream: Any) -> None:
    """Let a text stream write as escapes (`\\u732b`) what its encoding lacks and what isn't text, as in some file names."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def _outcome(error: Exception) -> Tuple[str, int]:
    """The line and the exit status for an error; faults of ours are raised, where no other process would wait."""
    if isinstance(error, InputError):
        return f"error: {error.sentence}", 2
    if isinstance(error, FloatingPointError):
        return f"error: {error}", 3
    if isinstance(error, Stopped):
        return str(error), STOPPED
    if isinstance(error, OSError) and error.errno in REFUSALS and error.filename is not None:
        return f"error: {os.fsdecode(error.filename)!r} can't be used ({error.strerror})", 2
    try:
        line = _of_dead_worker(error)
    except RuntimeError as news:  # torch raises that a loading process died at whatever line is at its turn
        line = _of_dead_worker(news)
    still = STANDS_STILL.search(str(error)) if isinstance(error, RuntimeError) else None
    if still:
        line = (f"error: the loading processes sent no batch for {still[1]} seconds: does the disk of the images answer? "
                "Where they are only slow, a larger --dist_timeout waits longer, and --num_workers 0 loads without them")
    if line:
        return line, 4
    if not _has_company():
        raise error
    return "".join(traceback.format_exception(error)).rstrip(), 1


def _refusal(stream: Any, doubtful: bool) -> Optional[Tuple[str, int]]:
    """The line and the exit status if a stream doesn't take what is written to it; it is silenced then. A doubtful one is
    tried with an empty line."""
    try:
        if stream is not None:
            print(end="\n" if doubtful else "", file=stream, flush=True)
        return None
    except BrokenPipeError:
        refusal = "", READER_LEFT
    except OSError as error:
        refusal = f"error: the output can't be written ({error})", 2
    with contextlib.suppress(OSError):  # Python would try once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return refusal


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
