"""What the runs of a reproduction found: read from their logs, gathered over seeds."""
import json
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from tools.reproduce.rows import ROWS, Cell
from util.plot_utils import read_log

METRICS = ("AP", "AP50", "AP75")  # in percent; the first three of COCO's twelve numbers


def collect(cells: List[Cell], records: Mapping[str, Dict[str, Any]], folder: Path) -> Dict[str, Any]:
    """Figures of each finished cell, by name: `seconds`, `command` with DIR for the reproduction's folder, and, of a training,
    `curve` (epochs finished, AP, AP50, AP75), `loss` (one for each epoch) and `pretext` (IoU of found patches, of the
    control)."""
    found = {}
    for cell in cells:
        record = records[cell.name]
        if not record["finished"]:
            continue
        command = [word.replace(str(folder), "DIR") for word in record["command"]]
        figures: Dict[str, Any] = {"seconds": round(record["seconds"], 1), "command": command}
        if cell.name.startswith("seed"):
            lines = read_log(folder / cell.name)
            figures["epochs"] = len(lines)
            figures["loss"] = [line["train_loss"] for line in lines]
            figures["curve"] = [[line["epoch"] + 1, *(100 * value for value in line["test_coco_eval_bbox"][:3])]
                                for line in lines if "test_coco_eval_bbox" in line]
            if "test_patch_iou" in lines[-1]:
                figures["pretext"] = [lines[-1]["test_patch_iou"], lines[-1]["test_control_iou"]]
        found[cell.name] = figures
    return found


class Figures:
    """Figures of the runs by seed, row and run.

    Args:
        results: what results.json holds.
    """

    def __init__(self, results: Dict[str, Any]) -> None:
        self.cells, self.seeds = results["cells"], results["seeds"]

    def of(self, seed: int, row: str, run: str, figure: str) -> Optional[float]:
        """One figure of one training, or None if there is no such training.

        Args:
            run: "pretrain", a schedule, "labels_10", …, or a schedule with "_as_long_as_ROW".
            figure: one of `METRICS` in the end, "seconds", "epochs", "pretext", "control" or "loss" (of the last epoch).
        """
        cell = self.cells.get(f"seed{seed}/{row}/{run}")
        if cell is None:
            return None
        if figure in METRICS:
            return cell["curve"][-1][1 + METRICS.index(figure)]
        if figure in ("pretext", "control"):
            return cell["pretext"][figure == "control"] if "pretext" in cell else None
        return cell["loss"][-1] if figure == "loss" else cell[figure]

    def over_seeds(self, row: str, run: str, figure: str) -> List[float]:
        """A figure of every seed that has it."""
        values = (self.of(seed, row, run, figure) for seed in self.seeds)
        return [value for value in values if value is not None]

    def curve(self, row: str, run: str, metric: str) -> List[Tuple[int, List[float]]]:
        """(epochs finished, the metric of every seed) along a training."""
        curves = [self.cells[name]["curve"] for seed in self.seeds if (name := f"seed{seed}/{row}/{run}") in self.cells]
        place = 1 + METRICS.index(metric)
        return [(points[0][0], [point[place] for point in points]) for points in zip(*curves)]

    def losses(self, row: str) -> List[List[float]]:
        """Training loss of every seed, for each epoch of a row's pre-training."""
        cells = (self.cells.get(f"seed{seed}/{row}/pretrain") for seed in self.seeds)
        return [list(values) for values in zip(*(cell["loss"] for cell in cells if cell))]

    def rows(self) -> List[str]:
        """Those of `ROWS` that have any training."""
        known = {name.split("/")[1] for name in self.cells}
        return [row for row in ROWS if row in known]


def mean_and_range(values: List[float], digits: int = 1) -> str:
    """ "4.2 (3.9 … 4.6)", or "4.2" of a single value, or "–" of none."""
    if not values:
        return "–"
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def write_results(path: Path, results: Dict[str, Any]) -> None:
    """As JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
