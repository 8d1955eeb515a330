"""A mistake of the user ends a program in one line; a fault of ours keeps its traceback."""
import errno
import io
import os
import select
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from util import errors
from util.distributed import print_main
from util.errors import InputError, run_program


def fail(error):
    raise error


@pytest.mark.parametrize("error, status, line", [
    (InputError("--lr is negative"), 2, "error: --lr is negative\n"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "xx"), 2, "error: 'xx' can't be used (File name too long)\n"),
    (PermissionError(errno.EACCES, "Permission denied", b"a\xff"), 2, "error: 'a\\udcff' can't be used (Permission denied)\n"),
    (FloatingPointError("the loss became NaN"), 3, "error: the loss became NaN\n")])
def test_one_line_and_a_status(error, status, line, capsys):
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: fail(error))
    assert caught.value.code == status and capsys.readouterr().err == line


def test_other_errors_pass():
    with pytest.raises(ValueError, match="ours"):
        run_program(lambda: fail(ValueError("ours")))
    with pytest.raises(FileNotFoundError):
        run_program(lambda: fail(FileNotFoundError(errno.ENOENT, "No such file", "xx")))
    run_program(lambda: None)


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise InputError("image 3.jpg is broken")


def test_the_sentence_comes_out_of_a_loading_worker():
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1)
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    assert "Traceback" in str(caught.value), "torch wraps it"
    assert caught.value.sentence == "image 3.jpg is broken"


@pytest.mark.parametrize("how, reason", [("os.kill(os.getpid(), 9)", "killed by signal: Killed"),
                                         ("os._exit(1)", "exited unexpectedly")])
def test_a_dead_loading_worker_is_one_line(root, how, reason):
    """As the system's out-of-memory killer does, or a library that ends the process."""
    script = textwrap.dedent(f"""
        import os, torch
        from util.errors import run_program

        class Dying(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                {how}

        run_program(lambda: list(torch.utils.data.DataLoader(Dying(), num_workers=2)))
    """)
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert result.returncode == 4
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: data-loading process ") and f"is gone ({reason})" in lines[0]


class Slow(Broken):
    def __getitem__(self, index):
        time.sleep(2)


def test_a_loading_worker_that_stands_still_is_one_line():
    loader = torch.utils.data.DataLoader(Slow(), num_workers=1, timeout=0.2)
    with pytest.raises(RuntimeError) as caught:
        next(iter(loader))
    line, status = errors._outcome(caught.value)
    assert status == 4 and line.startswith("error: the loading processes sent no batch for 0.2 seconds: ")


def test_as_a_program(root):
    script = ("from util.checkpoint import load_checkpoint; from util.errors import run_program; "
              "run_program(lambda: load_checkpoint('nowhere.pth'))")
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: --resume nowhere.pth: no such file\n")


def test_output_reaches_a_pipe_line_by_line(root):
    """A line is there while the program still runs, also one that was printed without flushing."""
    script = "import time; from util.errors import run_program; run_program(lambda: (print('first'), time.sleep(60)))"
    program = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert select.select([program.stdout], [], [], 30)[0], "nothing came"
        assert program.stdout.readline() == "first\n" and program.poll() is None
    finally:
        program.kill()
        program.communicate()


def test_a_worker_that_dies_while_it_is_read_from_is_one_line_too(root):
    """What it was sending can't be read any more: torch then says only that a connection was reset."""
    script = textwrap.dedent("""
        import multiprocessing, os, signal, time, torch
        from util.errors import run_program

        def program():
            batches = iter(torch.utils.data.DataLoader(torch.zeros(100, 1), num_workers=1))
            next(batches)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the news doesn't come in time
            os.kill(multiprocessing.active_children()[0].pid, 9)
            time.sleep(0.3)
            raise ConnectionResetError(104, "Connection reset by peer")

        run_program(program)
    """)
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert result.returncode == 4 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.startswith("error: data-loading process ") and "killed by signal: Killed" in result.stderr


@pytest.mark.parametrize("encoding, written", [("cp1252", rb"\u732b"), ("utf-8", "猫".encode())])
def test_characters_that_the_output_lacks_are_escaped(encoding, written, monkeypatch):
    """A class named in Chinese, and a file name that isn't UTF-8: for our programs and for callers of our functions."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    run_program(lambda: print("猫 caf\udce9.jpg"))
    assert sys.stdout.buffer.getvalue() == written + b" caf\\udce9.jpg\n"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    print_main("猫")
    assert sys.stdout.buffer.getvalue() == written + b"\n"


@pytest.mark.parametrize("program", ["print('line')", "sys.stdout.write('half a line')",
                                     "print('line', file=sys.stderr)"])
def test_a_reader_that_has_left_ends_a_program_quietly(root, program):
    read, write = os.pipe()
    os.close(read)
    script = f"import sys; from util.errors import run_program; run_program(lambda: {program})"
    streams = {"stderr": write, "stdout": subprocess.PIPE} if "stderr" in program else \
        {"stdout": write, "stderr": subprocess.PIPE}
    done = subprocess.run([sys.executable, "-c", script], cwd=root, **streams)
    os.close(write)
    assert done.returncode == 141 and not (done.stdout or done.stderr).strip()


def test_output_that_cannot_be_written_is_told(root):
    script = "from util.errors import run_program; run_program(lambda: print('line'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], cwd=root, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the output can't be written (")
    assert done.stderr.count("\n") == 1


def test_waiting_threads_sleep_unless_the_user_says_otherwise(root):
    """Every program sets the policy before torch is there to read it; what is set already stays."""
    programs = ["main", "run_with_submitit", "d2.converter", "datasets.toy", "tools.predict"]
    script = textwrap.dedent("""
        import os, sys
        class Watch:
            def find_spec(self, name, *_):
                if name == "torch":
                    print(os.environ.get("OMP_WAIT_POLICY"))
                    os._exit(0)
        sys.meta_path.insert(0, Watch())
        __import__(sys.argv[1])
        print("no torch")
    """)
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for program in programs:
        for given, kept in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
            done = subprocess.run([sys.executable, "-c", script, program], cwd=root, env={**inherited, **given},
                                  capture_output=True, text=True)
            assert done.stdout.strip() == kept, (program, done.stdout, done.stderr)
