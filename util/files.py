"""Reading files that the user names: regular files only, text with or without a byte order mark."""
from __future__ import annotations

import codecs
import contextlib
import json
import os
import stat
from typing import BinaryIO

from util.errors import InputError

__all__ = ["folder_fault", "open_regular", "read_json", "read_text", "replace_file", "shown"]

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # PowerShell's
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def open_regular(path: str | os.PathLike, what: str = "file") -> BinaryIO:
    """Open a regular file to read its bytes; links are followed.

    Args:
        path: the file.
        what: what messages call it.

    Raises:
        InputError: it is missing, unreadable, or not a regular file (a pipe would be waited for without end). The
            `OSError`, if there was one, is its cause.
    """
    try:
        _check_regular(os.stat(path), path, what)  # opening a device may already do something
        # Where the file was exchanged since: a pipe is opened without waiting for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{what} {shown(path)} does not exist") from error
    except (OSError, ValueError) as error:  # the latter: a name with a null byte
        raise InputError(f"{what} {shown(path)} can't be read ({_reason(error)})") from error
    try:
        _check_regular(os.fstat(descriptor), path, what)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: str | os.PathLike, what: str = "file") -> str:
    """Read a text file in UTF-8, or in UTF-16 if its byte order mark says so; the mark isn't part of the text.

    Raises:
        InputError: as `open_regular`; or the bytes aren't such text.
    """
    try:
        with open_regular(path, what) as file:
            data = file.read()
        return data.decode("utf-16" if data.startswith(_UTF16_MARKS) else "utf-8-sig")
    except OSError as error:
        raise InputError(f"{what} {shown(path)} can't be read ({_reason(error)})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {shown(path)} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(path: str | os.PathLike, what: str = "file") -> object:
    """Read a JSON file, with or without a byte order mark.

    Raises:
        InputError: as `read_text`; or it isn't JSON.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} {shown(path)} is not valid JSON ({error})") from error


def shown(name: object) -> str:
    """Return a path or a name as a message shows it: as it is, or quoted and escaped where it couldn't be printed."""
    text = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)
    return text if text and text.isprintable() else repr(text)


def replace_file(path: str | os.PathLike, content: bytes) -> None:
    """Write a file anew, by way of another name, on which nothing else may lie."""
    temporary = os.fspath(path) + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def folder_fault(path: str | os.PathLike) -> str:
    """Say what is wrong with a path that isn't a folder: "does not exist", or what it is instead."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"can't be read ({_reason(error)})"
    return f"is {next((kind for is_kind, kind in _KINDS if is_kind(mode)), 'a file')}, not a folder"


def _check_regular(status: os.stat_result, path: str | os.PathLike, what: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "something else")
        raise InputError(f"{what} {shown(path)} is {kind}, not a regular file")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
