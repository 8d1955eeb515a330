"""tools.plot_logs chooses what there is to draw and writes one picture."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from commands import run
from PIL import Image

from tools import plot_logs


def write_run(folder: Path, lines: List[Dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def finetuned(tmp_path: Path) -> Path:
    """A fine-tuning's log, evaluated every other epoch."""
    lines: List[Dict[str, Any]] = [{"epoch": i, "train_loss": 9.0 - i} for i in range(6)]
    for line in lines[1::2]:
        line.update(test_loss=line["train_loss"] + 0.5, test_coco_eval_bbox=[line["epoch"] / 20] * 12)
    return write_run(tmp_path / "a" / "finetuned", lines)


@pytest.fixture
def pretraining(tmp_path: Path) -> Path:
    """A pre-training's log."""
    return write_run(tmp_path / "pretraining", [{"epoch": i, "train_loss": 30.0 - i, "test_patch_iou": 0.2 + i / 20,
                                                 "test_control_iou": 0.2} for i in range(4)])


def test_draws_the_fields_that_the_runs_have(finetuned: Path, pretraining: Path, tmp_path: Path,
                                             run_main: Callable) -> None:
    output = tmp_path / "made" / "curves.png"
    assert run_main(plot_logs, [finetuned, "--output", output]) == f"loss, AP, AP50 of finetuned: {output}\n"
    three_panels = Image.open(output).size
    assert run_main(plot_logs, [pretraining, "--output", output]).startswith("loss, patch_iou of pretraining")
    assert run_main(plot_logs, [finetuned, pretraining, "--output", output]).startswith(
        "loss, AP, AP50, patch_iou of finetuned, pretraining")
    four_panels = Image.open(output).size
    assert four_panels[0] / 4 == three_panels[0] / 3 and four_panels[1] == three_panels[1]


def test_fields_and_smoothing_can_be_chosen(finetuned: Path, tmp_path: Path, run_main: Callable) -> None:
    output = tmp_path / "curves.svg"
    printed = run_main(plot_logs, [finetuned, "--fields", "AP75", "--ewm_col", 2, "--output", output])
    assert printed.startswith("AP75 of finetuned")
    assert "<svg" in output.read_text()


def test_wrong_input_is_told_in_a_sentence(finetuned: Path, tmp_path: Path, run_main: Callable) -> None:
    def refused(*words: Any) -> str:
        return run_main(plot_logs, words, status=2)

    assert refused(tmp_path / "none") == f"error: {tmp_path}/none is not the folder of a run\n"
    assert f"{tmp_path}/a/log.txt" in refused(tmp_path / "a")
    assert "no run has the field 'speed' in its log.txt; there are loss, mAP" in refused(finetuned, "--fields", "speed")
    assert "the name must end in one of .png" in refused(finetuned, "--output", tmp_path / "curves.txt")
    assert "--ewm_col -1.0 must be at least 0" in refused(finetuned, "--ewm_col", -1)
    bare = write_run(tmp_path / "bare", [{"epoch": 0, "train_lr": 0.1}])
    assert refused(bare) == ("error: the runs have none of loss, AP, AP50, AP_per_class, maskAP, PQ, patch_iou; "
                             "choose --fields among lr\n")


def test_as_a_program(finetuned: Path) -> None:
    (finetuned / "log.txt").write_text("")
    done = run(["-m", "tools.plot_logs", finetuned], check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {finetuned}/log.txt is empty: no epoch has been finished yet\n"
