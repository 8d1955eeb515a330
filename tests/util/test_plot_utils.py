"""Curves hold the numbers of the logs; broken logs are named."""
import builtins
import json
import math
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List

import matplotlib
import pytest
import torch

from util.errors import InputError
from util.plot_utils import plot_logs, plot_precision_recall, read_log, read_precision_recall, run_labels, smooth

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    matplotlib.pyplot.close("all")


def write_log(folder: Path, lines: List[Dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def curves(figure: Any, panel: int) -> Dict[str, List[List[float]]]:
    """Line style -> points of a panel's curves; the empty ones that only make the legend are left out."""
    lines = [line for line in figure.axes[panel].lines if len(line.get_xdata())]
    return {line.get_linestyle(): [list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))]
            for line in lines}


def test_the_call_of_detrs_notebooks(tmp_path: Path) -> None:
    """Default fields, a list of paths; epochs count from one, AP is in percent, no evaluation leaves no point."""
    lines = [{"epoch": 0, "train_class_error": 90.0, "train_loss_bbox_unscaled": 0.3},
             {"epoch": 1, "train_class_error": 80.0, "train_loss_bbox_unscaled": 0.2, "test_class_error": 85.0,
              "test_loss_bbox_unscaled": 0.25, "test_coco_eval_bbox": [0.1, 0.2] + [-1.0] * 10}]
    figure = plot_logs([write_log(tmp_path / "run", lines)])
    assert [axis.get_title() for axis in figure.axes] == ["class_error", "loss_bbox_unscaled", "mAP (%)"]
    assert curves(figure, 0) == {"-": [[1, 2], [90, 80]], "--": [[2], [85]]}
    assert curves(figure, 1) == {"-": [[1, 2], [0.3, 0.2]], "--": [[2], [0.25]]}
    assert curves(figure, 2) == {"-": [[2], [10]]}


def test_masks_and_panoptic_quality(tmp_path: Path) -> None:
    lines = [{"epoch": 0, "train_loss": 1.0}, {"epoch": 1, "test_coco_eval_masks": [0.125, 0.5] + [-1.0] * 10,
                                               "test_PQ_all": {"pq": 0.25, "n": 3}, "test_PQ_th": {"pq": 0.5, "n": 1}}]
    figure = plot_logs([write_log(tmp_path / "run", lines)], ["maskAP", "maskAP50", "PQ", "PQ_th"])
    assert [curves(figure, panel) for panel in range(4)] == [{"-": [[2], [value]]} for value in (12.5, 50, 25, 50)]
    assert figure.axes[2].get_title() == "PQ (%)"


def test_one_path_needs_no_list(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", [{"epoch": 0, "train_loss": 1.0}])
    os.rename(folder / "log.txt", folder / "other.txt")
    assert curves(plot_logs(folder, ["loss"], log_name="other.txt"), 0) == {"-": [[1], [1]]}


def test_patches_come_with_their_control(tmp_path: Path) -> None:
    lines = [{"epoch": i, "test_patch_iou": 0.2 + 0.1 * i, "test_control_iou": 0.2} for i in range(2)]
    figure = plot_logs([write_log(tmp_path / "run", lines)], ["patch_iou"])
    assert curves(figure, 0) == {"-": [[1, 2], [0.2, pytest.approx(0.3)]], ":": [[1, 2], [0.2, 0.2]]}
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["patch_iou", "control_iou"]


def test_runs_are_told_apart_by_colour_and_name(tmp_path: Path) -> None:
    folders = [write_log(tmp_path / place, [{"epoch": 0, "train_loss": 1.0}]) for place in ("a/run", "b/run", "c")]
    figure = plot_logs(folders, ["loss"])
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len({line.get_color() for line in lines}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a/run", "b/run", "c"]


def test_labels_take_as_many_parents_as_needed() -> None:
    paths = [Path(text) for text in ("/x/a/out", "/y/a/out", "/y/b/out", "/z/single", "/z/single/")]
    assert list(run_labels(paths)) == ["x/a/out", "y/a/out", "b/out", "single"]


def test_smoothing_is_an_exponentially_weighted_average() -> None:
    """Centre of mass 1: weights halve with age: 4; (8 + 4/2) / 1.5; (2 + 8/2 + 4/4) / 1.75; NaN adds nothing."""
    points = [(1, 4.0), (2, 8.0), (3, 2.0), (4, math.nan)]
    assert [value for _, value in smooth(points, 1)] == pytest.approx([4, 20 / 3, 4, 4])
    assert smooth(points[:3], 0) == points[:3]


@pytest.mark.parametrize("text, sentence", [
    ("", "log.txt is empty"), ("\n\n", "log.txt is empty"),
    ('{"epoch": 0}\n{"epoch": 1, "train\n', "log.txt, line 2: not JSON"), ('{"epoch": 0', "line 1: not JSON"),
    ("[1, 2]\n", "line 1: not the figures of an epoch"),
    ('{"train_loss": 1}\n', "line 1: not the figures of an epoch")])
def test_broken_logs_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_log(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}/log.txt"):
        plot_logs([tmp_path])


def test_missing_logs_and_fields_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no runs to plot"):
        plot_logs([])
    with pytest.raises(InputError, match=f"{tmp_path}/none is not the folder of a run"):
        plot_logs([tmp_path / "none"])
    with pytest.raises(InputError, match=f"{tmp_path}/log.txt"):
        plot_logs([tmp_path])
    write_log(tmp_path, [{"epoch": 0, "train_loss": 1.0, "test_coco_eval_bbox": [0.5] + [-1.0] * 11}])
    with pytest.raises(InputError, match="no run has the field 'AP50' in its log.txt; there are loss, mAP, AP$"):
        plot_logs([tmp_path], ["loss", "AP50"])


def test_without_matplotlib_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return original(name, *args, **kwargs)

    write_log(tmp_path, [{"epoch": 0, "train_loss": 1.0}])
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", refuse)
        with pytest.raises(InputError, match="pip install matplotlib"):
            plot_logs([tmp_path], ["loss"])


def test_precision_and_recall_average_over_classes_with_objects(tmp_path: Path) -> None:
    """Class 0 has no objects (-1); the others have precision 1 and 0.5 up to recall 0.5, and 0 beyond."""
    precision = torch.full((10, 101, 3, 4, 3), -1.0, dtype=torch.float64)
    precision[:, :, 1:] = 0
    precision[:, :51, 1], precision[:, :51, 2] = 1.0, 0.5
    scores = torch.where(precision < 0, precision, torch.full_like(precision, 0.9))
    path = tmp_path / "run" / "eval" / "latest.pth"
    path.parent.mkdir(parents=True)
    torch.save({"precision": precision, "recall": precision[:, 0], "scores": scores}, path)
    recall, mean_precision, score = read_precision_recall(path)
    assert recall == pytest.approx([step / 100 for step in range(101)])
    assert mean_precision == pytest.approx([0.75] * 51 + [0.0] * 50) and score == pytest.approx([0.9] * 101)
    figure, axes = plot_precision_recall([path])
    assert curves(figure, 0)["-"][1] == pytest.approx(mean_precision)
    assert curves(figure, 1)["-"][1] == pytest.approx(score)
    torch.save({"model": {}}, path)
    with pytest.raises(InputError, match="latest.pth holds no tables of an evaluation"):
        plot_precision_recall(path)
    torch.save({"precision": -torch.ones_like(precision), "scores": scores}, path)
    with pytest.raises(InputError, match="measured on data without objects"):
        plot_precision_recall(path)


def test_what_notebooks_and_killed_runs_hold(tmp_path: Path) -> None:
    """One field as a string, none, null for a number, a last line that a kill cut off."""
    whole = json.dumps({"epoch": 0, "train_loss": 3.0, "test_coco_eval_bbox": [0.5, None] + [None] * 10}) + "\n"
    (tmp_path / "log.txt").write_text(whole + whole[:20])
    assert curves(plot_logs(tmp_path, "mAP"), 0) == {"-": [[1], [50]]}
    with pytest.raises(InputError, match="no run has the field 'AP50'"):
        plot_logs(tmp_path, "AP50")
    with pytest.raises(InputError, match="no fields to plot"):
        plot_logs(tmp_path, ())
    with pytest.raises(InputError, match="no fields to plot"):
        plot_logs(tmp_path, None)
    with pytest.raises(InputError, match="the smoothing must be at least 0, got nan"):
        plot_logs(tmp_path, "mAP", math.nan)


def test_each_class_has_a_curve(tmp_path: Path) -> None:
    """[AP, AP50] by name; a class without objects has -1 and no point."""
    figures = [{"cat": [0.25, 0.5], "dog": [-1, -1]}, {"cat": [0.5, 0.75], "dog": [0.125, 0.25]}]
    lines = [{"epoch": i, "test_coco_eval_bbox_per_class": figure} for i, figure in enumerate(figures)]
    figure = plot_logs(write_log(tmp_path / "run", lines), ["AP_per_class", "AP50_per_class"])
    assert curves(figure, 0) == {"-": [[1, 2], [25, 50]], "--": [[2], [12.5]]}
    assert curves(figure, 1) == {"-": [[1, 2], [50, 75]], "--": [[2], [25]]}
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["cat", "dog"]


def test_seven_classes_of_two_runs_have_seven_line_styles(tmp_path):
    lines = [{"epoch": i, "test_coco_eval_bbox_per_class": {name: [0.1, 0.2] for name in "abcdefg"}} for i in range(2)]
    figure = plot_logs([write_log(tmp_path / "one", lines), write_log(tmp_path / "two", lines)], "AP_per_class")
    styles = [str(line._unscaled_dash_pattern) for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    assert len(styles) == 14 and len(set(styles)) == 7 and styles[:7] == styles[7:]


def test_names_that_matplotlib_would_read_as_formulas(tmp_path):
    names = ("$x^$", "half \ud800", "a\nb", "dog")
    lines = [{"epoch": 0, "train_loss": 1.5, "test_coco_eval_bbox_per_class": {name: [0.1, 0.2] for name in names}}]
    figure = plot_logs([write_log(tmp_path / "one $x^$", lines), write_log(tmp_path / "two", lines)],
                       ["AP_per_class", "loss"])
    figure.savefig(tmp_path / "curves.png")


def test_numbers_that_are_no_floats(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text('{"epoch": 0, "train_loss": 1' + "0" * 400 + "}\n")
    with pytest.raises(InputError, match="no run has the field 'loss'"):
        plot_logs(tmp_path, "loss")
    log.write_text('{"epoch": 1' + "1" * 5000 + "}\n")
    with pytest.raises(InputError, match="line 1: not JSON"):
        plot_logs(tmp_path, "loss")
