"""Files that the programs keep beside their results, broken in every way: one sentence that names the file."""
import os

import pytest

from datasets.proposal_cache import ProposalCache
from tools import output
from tools.convert_airbus import read_ships
from tools.demo import _read_phases
from tools.reproduce.presets import load_preset
from tools.reproduce.running import RECORD, read_record
from util.errors import InputError


@pytest.fixture(params=["pipe", "folder", "no text", "no JSON", "nested", "a number"])
def break_file(request):
    def broken(path):
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "folder":
            path.mkdir()
        else:
            path.write_bytes({"no text": b"\xff\xfe\xfa", "no JSON": b"{", "nested": b"[" * 10 ** 5, "a number": b"3"}[request.param])
        return path

    return broken


def test_each_is_one_sentence(break_file, tmp_path):
    readers = {tmp_path / output.LEDGER: output._read_ledger, tmp_path / "preset.json": lambda path: load_preset(str(path)),
               tmp_path / "ships.csv": lambda path: read_ships(str(path)), tmp_path / "phases.json": _read_phases,
               tmp_path / RECORD: lambda path: read_record(path.parent),
               tmp_path / "manifest.json": lambda path: ProposalCache(path.parent)}
    for path, read in readers.items():
        with pytest.raises(InputError) as told:
            read(break_file(path))
        assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)


def test_byte_order_marks(tmp_path):
    (tmp_path / "ships.csv").write_text("ImageId,EncodedPixels\na.jpg,1 2\n", encoding="utf-16")
    assert read_ships(str(tmp_path / "ships.csv")) == {"a.jpg": [[1, 2]]}
    (tmp_path / "preset.json").write_text('{"base": "small", "pretrain_epochs": 1}', encoding="utf-8-sig")
    assert load_preset(str(tmp_path / "preset.json")).pretrain_epochs == 1


def test_a_pipe_where_written_files_are_noted_is_not_waited_for(tmp_path):
    (tmp_path / "a").write_text("")
    os.mkfifo(tmp_path / output.LEDGER)
    with pytest.raises(OSError):
        output.remember([tmp_path / "a"])
