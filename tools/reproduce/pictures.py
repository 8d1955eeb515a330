"""Pictures of a reproduction: learning curves, the pretext's loss, and patches that pre-trained models look for."""
import statistics
from pathlib import Path
from typing import Any, Dict, List, Sequence

from tools.demo import boxes_by_image
from tools.reproduce.results import Figures
from tools.reproduce.rows import ROWS
from util.plot_utils import pyplot

PANEL_INCHES = (5.0, 3.6)
# Rows whose learning curves are drawn, by panel.
CURVES = {"DETR": ("scratch", "updetr_1patch", "updetr", "updetr_within_group", "detreg"),
          "Deformable DETR": ("deformable_scratch", "deformable_detreg")}
LOSSES = ("updetr", "updetr_no_attention_mask")


def draw_curves(figures: Figures, schedules: Sequence[str], path: Path) -> None:
    """AP50 over the epochs of each schedule, mean and range over seeds (UP-DETR, figures 1 and 4)."""
    drawn = {model: [row for row in rows if row in figures.rows()] for model, rows in CURVES.items()}
    panels = [(model, rows, schedule) for model, rows in drawn.items() if rows for schedule in schedules]
    figure, axes = _panels(len(panels), min(len(schedules), len(panels)))
    for axis, (model, rows, schedule) in zip(axes, panels):
        for row in rows:
            points = figures.curve(row, schedule, "AP50")
            _band(axis, [epoch for epoch, _ in points], [values for _, values in points], ROWS[row].title)
        axis.set(title=f"{model}, {schedule} schedule", xlabel="epochs", ylabel="AP50")
    _finish(figure, axes, path)


def draw_pretext_loss(figures: Figures, path: Path) -> None:
    """The pre-training's loss with and without attention mask (UP-DETR, figure 6)."""
    figure, axes = _panels(1, 1)
    for row in LOSSES:
        losses = figures.losses(row)
        if losses:
            _band(axes[0], list(range(1, len(losses) + 1)), losses, ROWS[row].title)
    axes[0].set(title="pretext", xlabel="epochs", ylabel="training loss")
    _finish(figure, axes, path)


def held_out_patches(annotations: Dict[str, Any], count: int) -> Dict[str, List[str]]:
    """By file name of held-out images, the boxes "x,y,w,h" of their objects: the images whose objects are most."""
    boxes = boxes_by_image(annotations)
    fullest = sorted(annotations["images"], key=lambda image: (-len(boxes[image["id"]]), image["id"]))[:count]
    return {image["file_name"]: [",".join(map(str, box)) for box in boxes[image["id"]]] for image in fullest}


def _panels(count: int, columns: int) -> Any:
    plt = pyplot()
    plt.switch_backend("agg")
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows))
    return figure, list(axes.flat)


def _band(axis: Any, places: List[float], values: List[List[float]], label: str) -> None:
    line, = axis.plot(places, [statistics.mean(some) for some in values], marker=".", label=label)
    axis.fill_between(places, [min(some) for some in values], [max(some) for some in values], alpha=0.15,
                      color=line.get_color(), linewidth=0)


def _finish(figure: Any, axes: List[Any], path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=90)
    pyplot().close(figure)
