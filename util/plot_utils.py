"""Pictures of trainings: learning curves out of log.txt files, precision and recall out of evaluations."""
import json
import math
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from util.checkpoint import load_checkpoint
from util.errors import InputError
from util.files import read_text

PathLike = Union[str, os.PathLike]
Point = Tuple[float, float]
Line = Dict[str, Any]

# COCO's twelve numbers by position.
COCO_FIELDS = {"mAP": 0, "AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5,
               "AR1": 6, "AR10": 7, "AR100": 8, "ARs": 9, "ARm": 10, "ARl": 11}
# Fields drawn in percent: the entry of a log's line, and the figure's place in it. Those of masks begin with "mask".
PERCENT_FIELDS: Dict[str, Tuple[str, Union[int, str]]] = {
    **{name: ("test_coco_eval_bbox", position) for name, position in COCO_FIELDS.items()},
    **{f"mask{name}": ("test_coco_eval_masks", position) for name, position in COCO_FIELDS.items()},
    "PQ": ("test_PQ_all", "pq"), "PQ_th": ("test_PQ_th", "pq"), "PQ_st": ("test_PQ_st", "pq"),
}
# Fields with a curve for each class: the entry {name: [AP, AP50]} of a log's line, and the figure's place.
PER_CLASS_FIELDS = {
    "AP_per_class": ("test_coco_eval_bbox_per_class", 0), "AP50_per_class": ("test_coco_eval_bbox_per_class", 1),
    "maskAP_per_class": ("test_coco_eval_masks_per_class", 0),
    "maskAP50_per_class": ("test_coco_eval_masks_per_class", 1),
}
# matplotlib's names, then (offset, lengths of dashes and gaps).
CLASS_STYLES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)), (0, (6, 1, 2, 1, 2, 1)))
# Fields that are drawn together with another one, for comparison.
COMPARED_WITH = {"patch_iou": "control_iou", "patch_iou50": "control_iou50"}
# Up to so many points a curve has its points marked, so that a lone one can be seen.
MARKED_POINTS = 40
PANEL_INCHES = (4.6, 3.4)
PANELS_PER_ROW = 4
LEGEND_ROW_INCHES = 0.24
LEGEND_ROWS = 10


class Curve(NamedTuple):
    """One series of figures: what it is ("train", "test", …), its line style, its points (epochs finished, value)."""

    name: str
    style: Union[str, Tuple]
    points: List[Point]


def pyplot() -> Any:
    """`matplotlib.pyplot`, imported when it is first needed.

    Raises:
        InputError: if matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise InputError(f"pictures need matplotlib, which can't be imported ({error}): "
                         "pip install matplotlib") from error
    return matplotlib.pyplot


def plot_logs(logs: Union[PathLike, Sequence[PathLike]],
              fields: Union[str, Sequence[str]] = ("class_error", "loss_bbox_unscaled", "mAP"), ewm_col: float = 0,
              log_name: str = "log.txt") -> Any:
    """Draw learning curves of one or several runs over the epochs finished: a panel for each field, a colour for each
    run.

    Args:
        logs: folders of runs, or one of them.
        fields: what to draw, or one such name: a name in log.txt without its `train_` or `test_` (both are drawn), or one of
            `PERCENT_FIELDS`, of which "mAP" and "AP" (of masks "maskAP") are the average over IoU 0.5 … 0.95.
            "patch_iou" comes with its control. "AP_per_class" and "AP50_per_class" have a curve for each class.
        ewm_col: centre of mass c of an exponentially weighted average, with weights (c / (1 + c)) ** age; 0 for none.
        log_name: name of the log in each folder.

    Returns:
        the matplotlib Figure. It belongs to pyplot, so that a notebook shows it by itself.

    Raises:
        InputError: if a log is missing, empty or broken, there are no fields, no run has one of them, or `ewm_col` is
            negative or not finite.
    """
    folders = [Path(log) for log in ([logs] if isinstance(logs, (str, os.PathLike)) else logs)]
    if not folders:
        raise InputError("no runs to plot")
    fields = [fields] if isinstance(fields, str) else list(fields or ())
    if not fields:
        raise InputError("no fields to plot")
    if not 0 <= ewm_col < math.inf:
        raise InputError(f"the smoothing must be at least 0, got {ewm_col}")
    runs = {label: read_log(folder, log_name) for label, folder in run_labels(folders).items()}
    for field in fields:
        if not any(field_curves(lines, field) for lines in runs.values()):
            raise InputError(f"no run has the field {field!r} in its {log_name}; "
                             f"there are {', '.join(known_fields(runs)) or 'none'}")
    figure, axes = _panels(len(fields))
    for axis, field in zip(axes, fields):
        _draw_field(axis, runs, field, ewm_col)
    _name_runs(figure, axes[0], list(runs))
    return figure


def read_log(folder: PathLike, log_name: str = "log.txt") -> List[Line]:
    """The lines of a run's log, one dict an epoch. A last line that was cut off, by a kill as a rule, is left out.

    Raises:
        InputError: if the folder or the log is missing, empty, or has another line that is not a JSON object with an
            epoch.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not the folder of a run")
    path = os.path.join(folder, log_name)
    whole = read_text(path)
    texts = [text for text in whole.split("\n") if text.strip()]
    if not texts:
        raise InputError(f"{path} is empty: no epoch has been finished yet")
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a plain ValueError
            if number == len(texts) > 1 and not whole.endswith("\n"):
                break
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(line, dict) or not _is_number(line.get("epoch")) or not math.isfinite(line["epoch"]):
            raise InputError(f"{path}, line {number}: not the figures of an epoch (a JSON object with 'epoch')")
        lines.append(line)
    return lines


def run_labels(folders: Sequence[Path]) -> Dict[str, Path]:
    """Name runs by their folders, with the parents that it takes to tell them apart; one given twice counts once."""
    given = {Path(os.path.abspath(folder)): folder for folder in folders}
    labels = {}
    for path, folder in given.items():
        depth = 1
        while any(other != path and other.parts[-depth:] == path.parts[-depth:] for other in given):
            depth += 1
        labels["/".join(path.parts[-depth:])] = folder
    return labels


def known_fields(runs: Dict[str, List[Line]]) -> List[str]:
    """All fields that `plot_logs` could draw for these runs."""
    names = {name: None for lines in runs.values() for line in lines for name in line}
    fields = {name.split("_", 1)[1]: None for name in names if name.startswith(("train_", "test_"))}
    fields.update(dict.fromkeys([*PERCENT_FIELDS, *PER_CLASS_FIELDS]))
    return [field for field in fields if any(field_curves(lines, field) for lines in runs.values())]


def field_curves(lines: List[Line], field: str) -> List[Curve]:
    """The curves of a field that a run has: training and test, or the one of an evaluation's figure."""
    if field in PERCENT_FIELDS:
        curves = [Curve("test", "-", _percent_points(lines, *PERCENT_FIELDS[field]))]
    elif field in PER_CLASS_FIELDS:
        entry, place = PER_CLASS_FIELDS[field]
        names = {name: None for line in lines if isinstance(line.get(entry), dict) for name in line[entry]}
        curves = [Curve(name, CLASS_STYLES[number % len(CLASS_STYLES)], _class_points(lines, entry, name, place))
                  for number, name in enumerate(names)]
    elif field in COMPARED_WITH:
        other = COMPARED_WITH[field]
        curves = [Curve(field, "-", _points(lines, f"test_{field}")),
                  Curve(other, ":", _points(lines, f"test_{other}"))]
    else:
        curves = [Curve("train", "-", _points(lines, f"train_{field}")),
                  Curve("test", "--", _points(lines, f"test_{field}"))]
    return [curve for curve in curves if curve.points]


def _points(lines: List[Line], name: str) -> List[Point]:
    return [(line["epoch"] + 1, line[name]) for line in lines if _is_number(line.get(name))]


def _percent_points(lines: List[Line], entry: str, place: Union[int, str]) -> List[Point]:
    points = []
    for line in lines:
        figures = line.get(entry)
        figures = dict(enumerate(figures)) if isinstance(figures, list) else figures
        value = figures.get(place) if isinstance(figures, dict) else None
        # pycocotools writes -1 where nothing could be measured, as for a size that no object has.
        if _is_number(value) and value >= 0:
            points.append((line["epoch"] + 1, 100 * value))
    return points


def _class_points(lines: List[Line], entry: str, name: str, place: int) -> List[Point]:
    """Points of one class, of which the log has [AP, AP50] under its name."""
    return _percent_points([{"epoch": line["epoch"], name: line[entry].get(name)} for line in lines
                            if isinstance(line.get(entry), dict)], name, place)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63  # larger ones may be no float


def smooth(points: List[Point], centre_of_mass: float) -> List[Point]:
    """Exponentially weighted average of the values so far, weights (c / (1 + c)) ** age; c = 0 changes nothing."""
    keep = centre_of_mass / (1 + centre_of_mass)
    total, weight, smoothed = 0.0, 0.0, []
    for epoch, value in points:
        if math.isfinite(value):
            total, weight = total * keep + value, weight * keep + 1
        smoothed.append((epoch, total / weight if weight else math.nan))
    return smoothed


def _panels(count: int) -> Tuple[Any, List[Any]]:
    columns = min(count, PANELS_PER_ROW)
    rows = math.ceil(count / columns)
    figure, axes = pyplot().subplots(rows, columns, squeeze=False, layout="constrained",
                                     figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows))
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _draw_field(axis: Any, runs: Dict[str, List[Line]], field: str, ewm_col: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    named: Dict[str, Line2D] = {}
    by_class = field in PER_CLASS_FIELDS and len(runs) == 1  # the colours aren't needed to tell runs apart
    for number, lines in enumerate(runs.values()):
        for place, curve in enumerate(field_curves(lines, field)):
            colour = run_colour(place if by_class else number)
            named[curve.name] = Line2D([], [], color=colour if by_class else "0.3", linestyle=curve.style)
            epochs, values = zip(*(smooth(curve.points, ewm_col) if ewm_col else curve.points))
            axis.plot(epochs, values, linestyle=curve.style, color=colour, linewidth=1.6, markersize=3.5,
                      marker="o" if len(epochs) <= MARKED_POINTS else "")
    axis.set_title(f"{field} (%)" if field in (*PERCENT_FIELDS, *PER_CLASS_FIELDS) else _plain_text(field))
    epochs = [line["epoch"] + 1 for lines in runs.values() for line in lines]
    margin = max(0.03 * (max(epochs) - min(epochs)), 0.5)
    axis.set(xlabel="epochs finished", xlim=(min(epochs) - margin, max(epochs) + margin))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if len(named) > 1 or by_class:
        axis.legend(list(named.values()), [_plain_text(name) for name in named], frameon=False, fontsize="small",
                    ncols=math.ceil(len(named) / LEGEND_ROWS))


def _plain_text(text: str) -> str:
    """A name as matplotlib is to show it: it takes dollars for mathematics, and can't draw halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def run_colour(number: int) -> Any:
    """Colour of run `number`, counted from 0: matplotlib's ten, then its twenty."""
    colours = pyplot().get_cmap("tab10" if number < 10 else "tab20b").colors
    return colours[number % len(colours)]


def _name_runs(figure: Any, axis: Any, labels: List[str]) -> None:
    handles = [axis.plot([], [], color=run_colour(number), linewidth=3)[0] for number in range(len(labels))]
    width, height = figure.get_size_inches()
    per_row = max(1, int(width * 11 / (max(map(len, labels)) + 6)))  # some eleven letters to the inch
    figure.set_size_inches(width, height + LEGEND_ROW_INCHES * math.ceil(len(labels) / per_row))
    figure.legend(handles, [_plain_text(label) for label in labels], loc="outside lower center",
                  ncols=min(per_row, len(labels)), frameon=False)


def plot_precision_recall(files: Union[PathLike, Sequence[PathLike]], naming_scheme: Optional[str] = None
                          ) -> Tuple[Any, Any]:
    """Draw precision against recall, and the score at which each recall is reached, at IoU 0.5, averaged over classes.

    Args:
        files: `eval/latest.pth` files of runs (what `engine.evaluate` keeps of pycocotools' tables), or one of them.
        naming_scheme: "exp_id" names curves by the folder of the run, "iter" by the file; None by as much of the paths as
            it takes to tell them apart.

    Returns:
        the matplotlib Figure and its two axes.

    Raises:
        InputError: if a file is missing or holds something else, or if it has no class with ground truth; if the naming
            scheme is unknown.
    """
    if naming_scheme not in (None, "exp_id", "iter"):
        raise InputError(f"the naming scheme {naming_scheme!r} is neither 'exp_id' nor 'iter'")
    paths = [Path(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    if not paths:
        raise InputError("no evaluations to plot")
    figure, axes = _panels(2)
    precision_axis, score_axis = axes
    labels = run_labels(paths)
    for number, path in enumerate(labels.values()):
        recall, precision, score = read_precision_recall(path)
        precision_axis.plot(recall, precision, color=run_colour(number))
        score_axis.plot(recall, score, color=run_colour(number))
        precision_axis.fill_between(recall, precision, color=run_colour(number), alpha=0.08, linewidth=0)
    for axis, name in ((precision_axis, "precision"), (score_axis, "score")):
        axis.set(title=f"{name} at IoU 0.5", xlabel="recall", xlim=(0, 1), ylim=(0, 1.05))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    names = {None: list(labels), "iter": [path.stem for path in labels.values()],
             "exp_id": [path.absolute().parent.parent.name for path in labels.values()]}
    _name_runs(figure, precision_axis, names[naming_scheme])
    return figure, axes


def read_precision_recall(path: PathLike) -> Tuple[List[float], List[float], List[float]]:
    """Recall, precision and score [101 values each] at IoU 0.5 over all sizes, averaged over classes that have objects.

    Raises:
        InputError: as `plot_precision_recall`.
    """
    tables = load_checkpoint(str(path), flag="evaluation")
    shapes = {name: tuple(getattr(tables.get(name), "shape", ())) for name in ("precision", "scores")}
    if any(len(shape) != 5 for shape in shapes.values()):
        raise InputError(f"{path} holds no tables of an evaluation ('precision' and 'scores'), as eval/latest.pth does")
    # [IoU thresholds, recalls, classes, sizes, largest numbers of detections]; -1 where a class has no objects.
    precision, score = (tables[name][0, :, :, 0, -1] for name in ("precision", "scores"))
    present = (precision >= 0).all(0)
    if not present.any():
        raise InputError(f"{path} was measured on data without objects")
    recall = [step / (len(precision) - 1) for step in range(len(precision))]
    return recall, precision[:, present].mean(1).tolist(), score[:, present].mean(1).tolist()
