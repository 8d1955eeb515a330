"""Files that the programs write: folders made, names checked, mistakes told in one sentence."""
import contextlib
import json
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence

from util.errors import InputError

PICTURES = (".png", ".jpg", ".webp")

@contextlib.contextmanager
def writing(flag: str, path: str) -> Iterator[None]:
    """Around code that writes where a flag says: the system's refusals (no permission, no space) become InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag} {path} can't be written ({error})") from error


def require_ending(path: str, formats: Sequence[str], flag: str) -> None:
    """Check that a file name ends in one of the formats (".png", …).

    Raises:
        InputError: if not.
    """
    if Path(path).suffix.lower() not in formats:
        raise InputError(f"{flag} {path}: the name must end in one of {', '.join(formats)}")


def write_json_lines(path: Path, entries: Sequence[Dict[str, Any]]) -> None:
    """Write a JSON list with a line for each entry, UTF-8."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
