"""Checkpoints written beside a training: the last two are kept, and what goes wrong is told in time."""
import errno
import os
import threading
import time

import pytest
import torch

from util import saving
from util.checkpoint import is_whole, load_checkpoint, save_checkpoint
from util.errors import InputError
from util.saving import Saver, claimed, host_copy, newest_checkpoint, saved_checkpoints, write_all


def epoch_of(path):
    return load_checkpoint(str(path))["epoch"]


def test_the_checkpoint_before_the_last_is_kept(tmp_path):
    last = str(tmp_path / "checkpoint.pth")
    for epoch in range(3):
        write_all({"epoch": epoch}, [str(tmp_path / f"checkpoint000{epoch}.pth"), last])
    assert epoch_of(last) == 2 and epoch_of(tmp_path / "checkpoint_previous.pth") == 1
    assert [os.path.basename(path) for path in saved_checkpoints(str(tmp_path))] == [
        "checkpoint.pth", "checkpoint_previous.pth", "checkpoint0000.pth", "checkpoint0001.pth", "checkpoint0002.pth"]
    assert not list(tmp_path.glob("*.tmp"))


def test_where_a_file_cannot_have_two_names(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in range(3):
        write_all({"epoch": epoch}, [str(tmp_path / "checkpoint.pth")])
    assert epoch_of(tmp_path / "checkpoint.pth") == 2 and epoch_of(tmp_path / "checkpoint_previous.pth") == 1


def test_a_changed_bit_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint({"x": torch.zeros(1000)}, str(path))
    assert is_whole(str(path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not is_whole(str(path))
    for other in (b"", b"PK", bytes(content[:500])):
        path.write_bytes(other)
        assert not is_whole(str(path))
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    assert is_whole(str(path)), "as old torch wrote it"


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 10)


def save(folder, **checkpoints):
    """Save checkpoints with the given contents as checkpoint.pth ("last") and checkpoint_NAME.pth."""
    for name, content in checkpoints.items():
        suffix = "" if name == "last" else name if name.isdigit() else f"_{name}"
        save_checkpoint(content, str(folder / f"checkpoint{suffix}.pth"))


def newest(folder):
    return os.path.basename(newest_checkpoint(str(folder)))


def test_damaged_checkpoints_are_moved_away_once_a_whole_one_is_found(tmp_path, capsys):
    assert newest(tmp_path) == ""
    save(tmp_path, last={"epoch": 3}, previous={"epoch": 2}, best={"epoch": 3}, **{"0001": {"epoch": 1}})
    found = []
    for _ in range(4):
        found.append(newest(tmp_path))
        cut(tmp_path / found[-1])
    assert found == ["checkpoint.pth", "checkpoint_best.pth", "checkpoint_previous.pth", "checkpoint0001.pth"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"resume: {tmp_path}/checkpoint.pth is damaged, it is now called checkpoint.pth.damaged"
    assert len(said) == 3 and len(list(tmp_path.glob("*.damaged"))) == 3
    for _ in range(2):  # a run isn't begun anew over what is left of one
        with pytest.raises(InputError, match=r"no checkpoint in .* can be used \(checkpoint0001.pth: damaged\)"):
            newest(tmp_path)


@pytest.mark.parametrize("saved_at", [1.0, 9.0])
def test_the_most_advanced_comes_first_whatever_the_clock_said(tmp_path, saved_at):
    def at(epoch, step=0, time=5.0):
        return {"epoch": epoch, "so_far": {"step": step}, "saved_at": time}
    save(tmp_path, last=at(3, time=saved_at), previous=at(2, 30), best=at(2))
    assert newest(tmp_path) == "checkpoint.pth"
    save(tmp_path, last=at(2, 20, time=saved_at))
    assert newest(tmp_path) == "checkpoint_previous.pth"
    save(tmp_path, **{"0009": at(9, time=saved_at)})
    os.utime(tmp_path / "checkpoint0009.pth", (1, 1))
    assert newest(tmp_path) == "checkpoint0009.pth"


def test_a_run_that_began_anew_in_a_folder_comes_before_the_old_one(tmp_path):
    save(tmp_path, last={"epoch": 0, "saved_at": 9.0, "run": "b"}, previous={"epoch": 50, "saved_at": 8.0, "run": "a"})
    assert newest(tmp_path) == "checkpoint.pth"


def test_a_checkpoint_that_cannot_be_read_now_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    save(tmp_path, last={"epoch": 3}, previous={"epoch": 2})
    names, unreadable, real = sorted(os.listdir(tmp_path)), ["checkpoint.pth"], open

    def refuse(path, *args, **kwargs):
        if os.path.basename(str(path)) in unreadable:
            raise OSError(errno.EIO, "Input/output error", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    assert newest(tmp_path) == "checkpoint_previous.pth"
    assert capsys.readouterr().out == f"resume: {tmp_path}/checkpoint.pth can't be read now (Input/output error) and is left " \
                                      "as it is\n"
    unreadable.append("checkpoint_previous.pth")
    with pytest.raises(InputError, match=r"\(checkpoint.pth: Input/output error; checkpoint_previous.pth: Input/output error\)"):
        newest(tmp_path)
    assert sorted(os.listdir(tmp_path)) == names
    unreadable.clear()
    assert newest(tmp_path) == "checkpoint.pth"


def test_memory_that_runs_out_damages_nothing(tmp_path, monkeypatch):
    save(tmp_path, last={"epoch": 3})

    def fail(*_, **__):
        raise RuntimeError("unable to mmap 100 bytes from file <checkpoint.pth>: Cannot allocate memory (12)")

    monkeypatch.setattr(saving, "load_plain", fail)
    with pytest.raises(InputError, match="checkpoint.pth: unable to mmap 100 bytes"):
        newest(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_files_with_other_names_are_left_alone(tmp_path):
    save(tmp_path, mine={"epoch": 9})
    (tmp_path / "checkpoint0001.pth").mkdir()
    (tmp_path / "checkpoint_notes.pth").write_text("not a checkpoint")
    (tmp_path / "checkpoint.pth.bak").write_text("not a checkpoint")
    names = sorted(os.listdir(tmp_path))
    assert newest(tmp_path) == "" and sorted(os.listdir(tmp_path)) == names
    save(tmp_path, last={"epoch": 0})
    assert newest(tmp_path) == "checkpoint.pth"
    (tmp_path / "checkpoint.pth").unlink()
    (tmp_path / "checkpoint.pth").symlink_to(tmp_path / "on_a_disk_that_is_gone.pth")
    with pytest.raises(InputError, match=r"\(checkpoint.pth: No such file or directory\)"):
        newest(tmp_path)


def test_a_kill_between_two_names_leaves_nothing_behind(tmp_path):
    path, previous = str(tmp_path / "checkpoint.pth"), str(tmp_path / "checkpoint_previous.pth")
    write_all({"epoch": 0}, [path])
    os.link(path, previous)  # … and killed here
    write_all({"epoch": 1}, [path])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", "checkpoint_previous.pth"]
    assert (epoch_of(path), epoch_of(previous)) == (1, 0)


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    """What is written is the state at the call; the next saving waits for this one."""
    release, real = threading.Event(), saving.save_checkpoint

    def slow(*args):
        assert release.wait(20)
        real(*args)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    saver, weight = Saver(), torch.zeros(3)
    saver.save({"weight": weight, "epoch": 0}, [str(tmp_path / "checkpoint.pth")])
    weight += 1  # a training step
    saver.check()
    assert not (tmp_path / "checkpoint.pth").exists()
    second = threading.Thread(target=saver.save, args=({"weight": weight, "epoch": 1}, [str(tmp_path / "checkpoint.pth")]))
    second.start()
    time.sleep(0.05)
    assert second.is_alive(), "waits"
    release.set()
    second.join()
    saver.wait()
    assert load_checkpoint(str(tmp_path / "checkpoint_previous.pth"))["weight"].tolist() == [0, 0, 0]
    assert load_checkpoint(str(tmp_path / "checkpoint.pth"))["weight"].tolist() == [1, 1, 1]


def test_what_goes_wrong_beside_the_training_is_raised_in_it(tmp_path):
    (tmp_path / "file").write_text("")
    saver = Saver()
    saver.save({"epoch": 0}, [str(tmp_path / "file" / "checkpoint.pth")])
    with pytest.raises(InputError, match="^could not write the checkpoint .*/file/checkpoint.pth"):
        while True:
            saver.check()
            time.sleep(0.01)
    saver.wait()  # told once


def test_a_full_disk_names_the_last_good_file(tmp_path):
    """Under a limit on the size of files, which fails writing as a full disk does."""
    import resource
    import signal
    path = tmp_path / "checkpoint.pth"
    write_all({"epoch": 0}, [str(path)])
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=rf"^could not write the checkpoint {path} \(.*File too large.*\); "
                                             rf"the earlier {path} is intact$"):
            write_all({"epoch": 1, "x": torch.zeros(100_000)}, [str(path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert epoch_of(path) == 0 and not list(tmp_path.glob("*.tmp"))


def test_host_copies_keep_the_structure():
    original = {"a": [torch.ones(2), 3, None], "b": {"c": (torch.zeros(1), "d")}}
    copy = host_copy(original)
    original["a"][0].zero_()
    assert copy["a"][0].tolist() == [1, 1] and copy["a"][1:] == [3, None]
    assert copy["b"]["c"][1] == "d" and copy["b"]["c"][0].tolist() == [0]
    tied = torch.ones(2)
    copy = host_copy({"a": tied, "b": tied, "part": tied[:1]})
    assert copy["a"] is copy["b"] and copy["part"].tolist() == [1]


def test_a_lock_file_that_is_no_training_s_is_left_alone(tmp_path):
    other = tmp_path / "precious"
    other.write_text("precious")
    for make in (lambda lock: lock.write_text("precious"), lambda lock: os.link(other, lock), lambda lock: lock.symlink_to(other),
                 os.mkfifo, lambda lock: lock.mkdir()):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        make(folder / ".lock")
        with pytest.raises(InputError, match=r"/\.lock (is not the lock file of a training|\()"), claimed(str(folder)):
            pass
    assert other.read_text() == "precious"


def test_a_full_disk_at_the_start_is_one_sentence(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.socket, "gethostname", fail)  # called as the lock file is written
    with pytest.raises(InputError, match=r"^could not write .*/.lock \(No space left on device\)$"), claimed(str(tmp_path)):
        pass


def test_only_what_savings_left_is_swept(tmp_path):
    (tmp_path / "eval").mkdir()
    left = ["checkpoint.pth.17.tmp", "checkpoint_previous.pth.17.tmp", "checkpoint0003.pth.9.tmp", "eval.pth.2.tmp",
            "eval/latest.pth.8.tmp", "failure_epoch0_step1_process0.pth.4.tmp", "log.txt.tmp", "args.json.tmp"]
    others = ["mine.pth.backup.tmp", "mine.pth.17.tmp", "checkpoint.pth.old.tmp", "notes.tmp", "eval/mine.pth.3.tmp"]
    for name in left + others:
        (tmp_path / name).write_bytes(b"half")
    with claimed(str(tmp_path)):
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tmp")) == sorted(others)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^could not write .*/file/.lock \((File exists|Not a directory)\)$"):
        with claimed(str(tmp_path / "file")):
            pass
