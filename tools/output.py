"""Files that the programs write: folders made, names checked, others' files left alone, mistakes told in one sentence."""
import contextlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence

from util.errors import InputError
from util.files import read_text, replace_file

PICTURES = (".png", ".jpg", ".webp")
# Beside what the programs wrote: a line [name, size, time of change] for each time that they wrote a file.
LEDGER = ".written_by_tools"


@contextlib.contextmanager
def writing(flag: str, path: str) -> Iterator[None]:
    """Around code that writes where a flag says: the system's refusals (no permission, no space) become InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag} {path} can't be written ({error})") from error


def refuse_others(flag: str, paths: Iterable[Path]) -> None:
    """Check that none of the files that are going to be written exists, unless the programs wrote it (see `remember`).

    Raises:
        InputError: one does, or was changed since.
    """
    ledgers: Dict[Path, Dict[str, List[int]]] = {}
    for path in paths:
        if os.path.lexists(path):  # unlike pathlib's, it takes names that no file can have
            if path.parent not in ledgers:
                ledgers[path.parent] = _read_ledger(path.parent / LEDGER)
            if ledgers[path.parent].get(path.name) != _version(path):
                raise InputError(f"{flag}: {path} exists and wasn't written by this program: choose another name, or "
                                 "delete it")


def remember(paths: Iterable[Path]) -> None:
    """Note in a hidden file beside them that files were written by a program of this project, which may replace them."""
    for path in paths:
        with open(path.parent / LEDGER, "a", encoding="utf-8", opener=_without_waiting) as file:
            file.write(json.dumps([path.name, *_version(path)]) + "\n")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)  # a pipe's other end would be waited for


def _version(path: Path) -> List[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_ledger(path: Path) -> Dict[str, List[int]]:
    if not os.path.lexists(path):
        return {}
    try:
        lines = [json.loads(line) for line in read_text(path, "list of written files").splitlines()]
        return {name: version for name, *version in lines}
    except InputError as error:
        raise InputError(f"{error}: delete it, and the files beside it that may be replaced") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} can't be read ({error}): delete it, and the files beside it that may be replaced") from error


def require_ending(path: str, formats: Sequence[str], flag: str) -> None:
    """Check that a file name ends in one of the formats (".png", …).

    Raises:
        InputError: if not.
    """
    if Path(path).suffix.lower() not in formats:
        raise InputError(f"{flag} {path}: the name must end in one of {', '.join(formats)}")


def write_json_lines(path: Path, entries: Sequence[Dict[str, Any]]) -> None:
    """Write a JSON list with a line for each entry, UTF-8; what isn't text in file names becomes JSON's escapes."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    write_whole(path, f"[\n{lines}\n]\n")


def replace_json(path: Path, content: Any) -> None:
    """Write JSON; at any moment the file is the old or the new one."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text so that the file is whole or, if it wasn't there, absent; halves of characters become JSON's escapes."""
    replace_file(path, text.encode("utf-8", "backslashreplace"))
