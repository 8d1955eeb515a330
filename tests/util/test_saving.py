"""Checkpoints written beside a training: the last two are kept, and what goes wrong is told in time."""
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


def test_the_newest_is_the_latest_saved_not_the_latest_copied(tmp_path, capsys):
    assert newest_checkpoint(str(tmp_path)) == ""
    names = ["checkpoint.pth", "checkpoint_previous.pth", "checkpoint_best.pth", "checkpoint0099.pth"]
    for name, saved_at in zip(names, (30.0, 20.0, 30.0, 10.0)):
        save_checkpoint({"saved_at": saved_at}, str(tmp_path / name))
    found = []
    for _ in range(5):
        path = newest_checkpoint(str(tmp_path))
        found.append(os.path.basename(path))
        if path:
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) - 10)
    assert found == ["checkpoint.pth", "checkpoint_best.pth", "checkpoint_previous.pth", "checkpoint0099.pth", ""]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"resume: {tmp_path}/checkpoint.pth is damaged, it is now called checkpoint.pth.damaged"
    assert len(said) == 4 and len(list(tmp_path.glob("*.damaged"))) == 4


def test_a_newer_numbered_checkpoint_wins(tmp_path):
    save_checkpoint({"saved_at": 1.0}, str(tmp_path / "checkpoint.pth"))
    save_checkpoint({"saved_at": 2.0}, str(tmp_path / "checkpoint0099.pth"))
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint0099.pth")


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


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^could not write .*/file/.lock \((File exists|Not a directory)\)$"):
        with claimed(str(tmp_path / "file")):
            pass
