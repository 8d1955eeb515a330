"""The page about a reproduction, written from its results.json."""
import shlex
from typing import Any, Dict, List, Sequence

from tools.reproduce.claims import CLAIMS, QUESTIONS, Finding, examine
from tools.reproduce.results import METRICS, Figures, mean_and_range
from tools.reproduce.rows import AS_LONG_AS, LOW_LABEL, ROWS

PICTURES = {"curves": "AP50 over the epochs of fine-tuning (mean and range over seeds)",
            "pretext": "loss of UP-DETR's pre-training with and without attention mask (mean and range over seeds)",
            "patches updetr": "patches of held-out images, and where UP-DETR's pre-trained model (M > 1, seed 1) finds them",
            "patches updetr_within_group": "the same after matching within groups"}


def write_page(results: Dict[str, Any], pictures: Dict[str, List[str]], tried: Sequence[Dict[str, Any]] = ()) -> str:
    """The page as Markdown.

    Args:
        results: what results.json holds.
        pictures: files, relative to the page, by name in `PICTURES`.
        tried: results of other reproductions, made to find out why a sign did not hold.
    """
    figures = Figures(results)
    parts = [_head(results), _claims(figures), _rows(results, figures), _labels(results, figures),
             _equal_compute(results, figures), _tried(results, tried), _pictures(pictures), _limits(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _head(results: Dict[str, Any]) -> str:
    machine = results["machine"]
    processor = machine["cpu"] if machine["device"] == "cpu" else f"{machine['device']}, {machine['cpu']}"
    minutes = sum(cell["seconds"] for cell in results["cells"].values()) / 60
    return f"""# The papers' comparisons, in small

This page is written by `{results["command"]}` from the results of its own runs, each a training by `main.py`
on the toy world (`datasets.toy`). Settings are the preset's, the same for every row; the last checkpoint is what is evaluated.
AP in percent on {results["reporting_images"]} validation images by which nothing was chosen.
Means over {len(results["seeds"])} seeds, in brackets the least and the largest.

{len(results["cells"])} runs took {minutes:.0f} minutes, counted one after the other; {results["jobs"]} ran at a time, with
{results["threads"]} thread(s) each: {processor}, {machine["cpus"]} CPUs, torch {machine["torch"].split("+")[0]},
Python {machine["python"]}, {machine["date"]}."""


def _claims(figures: Figures) -> str:
    def row(finding: Finding) -> List[str]:
        claim, digits = finding.claim, 1 if finding.claim.unit == "AP" else 3
        positive = f"{sum(value > 0 for value in finding.values)} of {len(finding.values)} seeds"
        return [claim.text, claim.source or "–", claim.published or "–", f"{finding.mean:+.{digits}f} {claim.unit}",
                ", ".join(f"{value:+.{digits}f}" for value in finding.values),
                finding.verdict + ("" if finding.verdict == "in every seed" else f" ({positive})")]

    head = ["of", "published", "difference here", "of each seed"]
    found, asked = examine(figures, CLAIMS), examine(figures, QUESTIONS)
    verdicts = [finding.verdict for finding in found]
    text = (f"## Claims\n\nOf {len(found)} claims {verdicts.count('in every seed')} have the papers' sign in every seed, "
            f"{verdicts.count('on average')} on average alone, {verdicts.count('no')} not at all.\n"
            "Where no schedule is named it is the short one.\n\n"
            + _table(["claim", *head, "sign holds"], [row(finding) for finding in found]))
    if asked:
        text += ("\n\nWhat no paper claims, after the short schedule unless it says otherwise:\n\n"
                 + _table(["difference", *head, "above zero"], [row(finding) for finding in asked]))
    return text


def _cells(figures: Figures, row: str, run: str, names: Sequence[str], digits: int = 1) -> List[str]:
    return [mean_and_range(figures.over_seeds(row, run, name), digits) for name in names]


def _rows(results: Dict[str, Any], figures: Figures) -> str:
    schedules = results["preset"]["schedules"]
    results_of = [(schedule, metric) for schedule in schedules for metric in METRICS]
    head = ["row", *(f"{schedule}: {metric}" for schedule, metric in results_of), "patches found, IoU", "control",
            "s of pre-training", *(f"s of {schedule}" for schedule in schedules)]
    rows = [[ROWS[row].title,
             *(cell for schedule, metric in results_of for cell in _cells(figures, row, schedule, [metric])),
             *_cells(figures, row, "pretrain", ("pretext", "control"), 3), *_cells(figures, row, "pretrain", ("seconds",), 0),
             *(cell for schedule in schedules for cell in _cells(figures, row, schedule, ("seconds",), 0))]
            for row in figures.rows()]
    epochs = ", ".join(f"{schedule} {count} epochs" for schedule, count in schedules.items())
    return (f"## Equal epochs\n\nFine-tuning on all labels: {epochs}. The control looks for another image's patches.\n\n"
            + _table(head, rows))


def _labels(results: Dict[str, Any], figures: Figures) -> str:
    short = next(iter(results["preset"]["schedules"]))
    runs = {percent: short if percent == 100 else f"labels_{percent}" for percent in results["preset"]["labels"]}
    rows = [[ROWS[row].title, *(cell for run in runs.values() for cell in _cells(figures, row, run, ("AP", "AP50")))]
            for row in LOW_LABEL if row in figures.rows()]
    if len(runs) < 2 or not rows:
        return ""
    head = ["row", *(f"{percent} %: {metric}" for percent in runs for metric in ("AP", "AP50"))]
    return (f"## Few labels\n\nAs many steps as the {short} schedule has, on images chosen anew for each seed "
            "(`--filter_pct`).\n\n" + _table(head, rows))


def _equal_compute(results: Dict[str, Any], figures: Figures) -> str:
    schedule = next(iter(results["preset"]["schedules"]))
    rows = []
    for row, scratch in AS_LONG_AS.items():
        run = f"{schedule}_as_long_as_{row}"
        if figures.over_seeds(scratch, run, "AP"):
            phases = zip(*(figures.over_seeds(row, part, "seconds") for part in ("pretrain", schedule)))
            rows.append([f"{ROWS[row].title}, {schedule}", mean_and_range([sum(seconds) for seconds in phases], 0),
                         *_cells(figures, row, schedule, ("AP", "AP50")),
                         *_cells(figures, scratch, run, ("seconds", "epochs"), 0),
                         *_cells(figures, scratch, run, ("AP", "AP50"))])
    if not rows:
        return ""
    head = ["row", "s of both phases", "AP", "AP50", "scratch as long: s", "epochs", "AP", "AP50"]
    return ("## Equal total compute\n\nA detector from scratch that gets the time of pre-training and fine-tuning together, at "
            f"the seconds that an epoch\nof {schedule} takes, its start included. Selective search's time is not counted; it "
            "is in results.json.\n\n"
            + _table(head, rows))


def _tried(results: Dict[str, Any], others: Sequence[Dict[str, Any]]) -> str:
    """What other settings gave."""
    rows = []
    for other in others:
        schedule, figures = next(iter(other["preset"]["schedules"])), Figures(other)
        changes = [f"{name} {value}" for name, value in _first_schedule(other["preset"]).items()
                   if value != _first_schedule(results["preset"])[name]]
        changed = f"`{'`, `'.join(changes)}`" if changes else "none"
        rows += [[changed, ROWS[row].title, str(len(other["seeds"])), other["half"],
                  *_cells(figures, row, schedule, ("AP", "AP50")), *_cells(figures, row, "pretrain", ("pretext", "control"), 3),
                  *_cells(figures, row, "pretrain", ("seconds",), 0)] for row in figures.rows()]
    if not rows:
        return ""
    head = ["changed in the preset", "row", "seeds", "half", "AP", "AP50", "patches found, IoU", "control",
            "s of pre-training"]
    return ("## What else was tried\n\nTo see why a sign does not hold: other settings, after the short schedule, on the half "
            "of the validation\nimages that the table names.\n\n" + _table(head, rows))


def _first_schedule(preset: Dict[str, Any]) -> Dict[str, Any]:
    """A preset without what matters after its first schedule on all labels alone."""
    short = next(iter(preset["schedules"]))
    return {**preset, "schedules": {short: preset["schedules"][short]}, "labels": None}


def _pictures(pictures: Dict[str, List[str]]) -> str:
    shown = [f"{PICTURES[name]}:\n\n" + "\n\n".join(f"![{PICTURES[name]}]({file})" for file in files)
             for name, files in pictures.items()]
    return "## Pictures\n\n" + "\n\n".join(text[0].upper() + text[1:] for text in shown) if shown else ""


def _limits(results: Dict[str, Any]) -> str:
    preset = results["preset"]
    command = next(cell["command"] for name, cell in results["cells"].items() if name.startswith("seed"))
    return f"""## What is smaller, and what differs

- **World**: drawn shapes on photographs, `{preset["world"]}`,
  in place of ImageNet, COCO and VOC.
- **Backbone**: trained with labels of single drawn objects (`tools.pretrain_toy_backbone {preset["backbone"]}`), in place of
  SwAV without labels; it stays frozen in all trainings but the pre-training of the row that says otherwise.
- **Model**: `{preset["model"]}`;
  DETR `{preset["detr"]}`; Deformable DETR `{preset["deformable"]}`.
- **Pre-training**: UP-DETR {preset["pretrain_epochs"]} epochs with M = {preset["num_patches"]}
  (`{preset["updetr"]}`);
  DETReg {preset["detreg_epochs"]} epochs (`{preset["detreg"]}`).
- **Fine-tuning**: `{preset["finetune"]}`.
- With {len(results["seeds"])} seeds, a difference smaller than the rows' ranges can be chance.

Every run's command and figures are in results.json; the first is, in the reproduction's folder DIR,

```
python {shlex.join(command)}
```"""
