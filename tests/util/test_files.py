"""Reading the user's files: only regular ones, and without a byte order mark."""
import errno
import os
import socket

import pytest

from util import files
from util.errors import InputError
from util.files import folder_fault, open_regular, read_json, read_text, shown


def test_text_is_the_same_with_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text('{"é": 1}\n', encoding=encoding)
        assert read_text(path) == '{"é": 1}\n'
        assert read_json(path) == {"é": 1}


def test_special_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "pipe", tmp_path / "link")
    place = os.getcwd()
    os.chdir(tmp_path)  # a socket's path may only be short
    try:
        socket.socket(socket.AF_UNIX).bind("socket")
    finally:
        os.chdir(place)
    for name, kind in (("pipe", "named pipe"), ("folder", "folder"), ("link", "named pipe"), ("socket", "socket")):
        for read in (open_regular, read_text, read_json):
            with pytest.raises(InputError, match=f"^file {tmp_path / name} is a {kind}, not a regular file"):
                read(tmp_path / name)
    with pytest.raises(InputError, match="/dev/zero is a device"):
        read_text("/dev/zero")


def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(InputError, match=f"--flag {path} does not exist"):
        read_json(path, "--flag")
    path.write_bytes(b"\xff\x00\xff")
    with pytest.raises(InputError, match=f"{path} is not UTF-8 text"):
        read_text(path)
    path.write_text("{")
    with pytest.raises(InputError, match=f"{path} is not valid JSON"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=f"{path} is not valid JSON"):
        read_json(path)
    with pytest.raises(InputError, match="null byte"):
        read_text("a\0b")


def test_names_that_cannot_be_printed_are_escaped():
    assert shown("a folder/é.jpg") == "a folder/é.jpg"
    assert shown(os.fsdecode(b"\xe9.jpg")) == r"'\udce9.jpg'"
    assert shown("two\nlines") == r"'two\nlines'"


def test_what_is_no_folder_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for name, words in (("none", "does not exist"), ("pipe", "is a named pipe, not a folder"),
                        ("file", "is a file, not a folder"), ("file/below", "can't be read (Not a directory)")):
        assert folder_fault(tmp_path / name) == words


def test_a_file_that_cannot_be_written_leaves_the_old_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "args.json"
    files.replace_file(path, b"old")
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space"):
        files.replace_file(path, b"new")
    assert os.listdir(tmp_path) == ["args.json"] and path.read_bytes() == b"old"
