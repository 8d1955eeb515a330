"""The demo's phases, and the table at its end."""
import argparse
from pathlib import Path

import pytest

from tools.demo import Demo, Figures, table
from util.errors import InputError

SCRATCH = {5: Figures(0.002, 0, 12.34), 10: Figures(0.01, 0.04, 10), 15: Figures(0.02, 0.06, 9)}
UPDETR = {5: Figures(0.003, 0.01, 11), 10: Figures(0.02, 0.06, 9.5)}


def test_two_trainings() -> None:
    """Epochs that both were evaluated after; no ratio to nothing."""
    assert table({"scratch": SCRATCH, "UP-DETR": UPDETR}) == [
        " epoch | scratch AP   AP50   loss | UP-DETR AP   AP50   loss | AP50 ratio",
        "     5 |        0.2    0.0  12.34 |        0.3    1.0  11.00 |          -",
        "    10 |        1.0    4.0  10.00 |        2.0    6.0   9.50 |       1.50"]


def test_three_trainings() -> None:
    assert table({"scratch": SCRATCH, "UP-DETR": UPDETR, "DETReg": {10: Figures(0.03, 0.1, 8)}}) == [
        " epoch | scratch AP   AP50   loss | UP-DETR AP   AP50   loss |  DETReg AP   AP50   loss |"
        " UP-DETR ratio | DETReg ratio",
        "    10 |        1.0    4.0  10.00 |        2.0    6.0   9.50 |        3.0   10.0   8.00 |"
        "          1.50 |         2.50"]


def in_folder(folder: Path) -> Demo:
    return Demo(argparse.Namespace(output_dir=str(folder), detreg=False))


def test_a_finished_phase_is_passed_over(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    commands = ["-c", "print('first')"], ["-c", "print('second')"]
    in_folder(tmp_path).phase("greeting", *commands)
    assert {"first", "second"} < set(capfd.readouterr().out.splitlines())
    in_folder(tmp_path).phase("greeting", *commands)
    assert "greeting: done before" in capfd.readouterr().out


def test_a_folder_with_another_demo_is_refused(tmp_path: Path) -> None:
    in_folder(tmp_path).phase("greeting", ["-c", "print('first')"])
    with pytest.raises(InputError, match=f"{tmp_path} holds a demo whose greeting had other flags"):
        in_folder(tmp_path).phase("greeting", ["-c", "print('second')"])
    (tmp_path / "phases.json").unlink()
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(InputError, match=f"{tmp_path} has other files in it than a demo's"):
        in_folder(tmp_path)


def test_a_phase_that_failed_runs_again(tmp_path: Path) -> None:
    fails_once = ["-c", f"from pathlib import Path; p = Path({str(tmp_path / 'tried')!r}); known = p.exists(); p.touch(); "
                        "raise SystemExit(not known)"]
    with pytest.raises(InputError, match="greeting: a command failed with status 1"):
        in_folder(tmp_path).phase("greeting", fails_once)
    in_folder(tmp_path).phase("greeting", fails_once)
    assert "greeting" in in_folder(tmp_path).finished


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below", "x" * 300):
        with pytest.raises(InputError, match="^--output_dir .* can't be written"):
            Demo(argparse.Namespace(output_dir=str(tmp_path / name), detreg=False))
