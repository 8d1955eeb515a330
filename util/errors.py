"""The exception for mistakes that a user can mend, and how programs report it."""
import io
import sys
from typing import Callable


class InputError(ValueError):
    """Something the user gave (a flag, a file, an annotation) is wrong; the message is one sentence that names it."""

    @property
    def sentence(self) -> str:
        """The message alone, also when a data-loading worker has wrapped it in its traceback."""
        return str(self).rsplit("InputError: ", 1)[-1].strip()


def run_program(program: Callable[[], None]) -> None:
    """Run a command line program: mistakes in its input end in one line and exit status 2, numbers that go wrong in one line
    and status 3; anything else is a fault of ours and keeps its traceback.

    Output reaches a file or a pipe line by line, as it does a terminal, so that a log can be followed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        program()
    except InputError as error:
        print(f"error: {error.sentence}", file=sys.stderr, flush=True)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(3)
