"""Rerun the papers' comparisons on a made-up world: `python -m tools.reproduce --preset small --output_dir DIR`.

Each run is a command of main.py; together they are what the tables 1, 3 and 4 and the figures 1, 4, 5 and 6 of UP-DETR and
DETReg's comparison on few labels show, in small. A reproduction that was stopped or killed goes on with the same command;
finished runs are kept. In the end DIR has results.json, pictures, and a page about them, reproduction.md.
"""
import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import torch

from tools.benchmark.machine import describe_machine
from tools.output import refuse_others, remember
from tools.reproduce.claims import CLAIMS, QUESTIONS, as_data, examine
from tools.reproduce.page import write_page
from tools.reproduce.pictures import LOSSES, draw_curves, draw_pretext_loss, held_out_patches
from tools.reproduce.presets import PRESETS, Preset, load_preset
from tools.reproduce.results import Figures, collect, write_results
from tools.reproduce.rows import CHOOSE, REPORT, ROWS, WORLD, Plan
from tools.reproduce.running import ROOT, Runner
from util.errors import InputError, run_program
from util.files import read_json
from util.parallel import available_cpus
from util.ranges import TOOL_RANGES, check_ranges

SETTINGS, RESULTS = "settings.json", "results.json"
GPU_JOBS = 4  # trainings that share a GPU, as small as these are
SHOWN_IMAGES = 2  # held-out images on which patches are looked for
SHOWN_ROWS = ("updetr", "updetr_within_group")


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.reproduce", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small",
                        help=f"how large: {', '.join(PRESETS)}, or a JSON file that changes one of them (small)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="train everything with the seeds 1 … N (3)")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW",
                        help=f"some of {', '.join(ROWS)} (all)")
    parser.add_argument("--half", choices=(REPORT, CHOOSE), default=REPORT,
                        help="half of the validation images to evaluate on: the one that reports, or the one by which "
                             "settings may be chosen (report)")
    parser.add_argument("--output_dir", default="outputs/reproduce", help="folder of it all (outputs/reproduce)")
    parser.add_argument("--page", help="Markdown file for the page; pictures go beside it (reproduction.md in --output_dir)")
    parser.add_argument("--report", action="store_true", help="run nothing, write about what is finished")
    parser.add_argument("--tried", nargs="+", default=[], metavar="DIR",
                        help="folders of other reproductions that the page tells of too, made to see why a sign does not hold")
    parser.add_argument("--jobs", type=int, help=f"runs side by side (one for each CPU, on a GPU {GPU_JOBS})")
    parser.add_argument("--device", default="", help="of the trainings (cuda if there is one, else cpu)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run what is left of the reproduction, then draw and write."""
    check_ranges(args, TOOL_RANGES)
    preset, folder = load_preset(args.preset), Path(args.output_dir).absolute()
    page = Path(args.page or folder / "reproduction.md")
    tried = [_read_results(other) for other in args.tried]
    _keep_settings(folder, {**dataclasses.asdict(preset), "half": args.half, "device": args.device})
    refuse_others("--page", _written(page, folder))
    rows = [row for row in ROWS if row in args.rows]
    plan = Plan(preset, str(folder), rows, range(1, args.seeds + 1), args.half, args.device)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    jobs = args.jobs or (GPU_JOBS if device.type == "cuda" else available_cpus())
    threads = max(1, available_cpus() // jobs)
    runner = Runner(plan.cells(), folder, jobs, threads)
    print(f"{jobs} cells at a time with {threads} threads each, in {folder}; "
          f"{len(runner.seconds)} of {len(runner.cells)} cells were finished before")
    if not args.report:
        runner.run()
    if not any(name.startswith("seed") for name in runner.seconds):
        raise InputError(f"--report: no training is finished in {folder}")
    annotations = json.loads(Path(plan.path(WORLD, f"toy/coco/annotations/{args.half}.json")).read_text())
    results: Dict[str, Any] = {
        "command": "python -m tools.reproduce" + (f" --preset {args.preset}" if args.preset in PRESETS else ""),
        "preset": dataclasses.asdict(preset), "seeds": list(plan.seeds), "half": args.half, "jobs": jobs, "threads": threads,
        "reporting_images": len(annotations["images"]), "machine": describe_machine(device),
        "cells": collect(runner.cells, runner.records, folder)}
    figures = Figures(results)
    results["findings"] = as_data(examine(figures, [*CLAIMS, *QUESTIONS]))
    write_results(folder / RESULTS, results)
    pictures = _draw(figures, preset, plan, annotations, page)
    page.write_text(write_page(results, pictures, tried), encoding="utf-8")
    remember(path for path in _written(page, folder) if path.exists())
    print(f"{folder / RESULTS}\n{page}")


def _read_results(folder: str) -> Dict[str, Any]:
    path = Path(folder) / RESULTS
    try:
        return read_json(path, "results")
    except InputError as error:
        raise InputError(f"--tried {folder}: {error}") from error


def _keep_settings(folder: Path, settings: Dict[str, Any]) -> None:
    """Note what a folder's results depend on; refuse to mix them with others."""
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    if path.exists():
        known = read_json(path, "settings")
        if not isinstance(known, dict):
            raise InputError(f"{path} is damaged, it holds no settings: choose another --output_dir, or delete it")
        changed = [name for name, value in settings.items() if known.get(name) != value]
        if changed:
            raise InputError(f"--output_dir {folder} has results with another {', '.join(changed)}: choose another folder, or "
                             "delete it")
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--output_dir {folder} has other files in it than a reproduction's: choose an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _written(page: Path, folder: Path) -> List[Path]:
    """Files that the program writes outside of cells."""
    return [page, folder / RESULTS, _beside(page, "curves.png"), _beside(page, "pretext.png"),
            *(_beside(page, f"{row}-{number}.jpg") for row in SHOWN_ROWS for number in range(1, SHOWN_IMAGES + 1))]


def _beside(page: Path, name: str) -> Path:
    return page.with_name(f"{page.stem}-{name}")


def _draw(figures: Figures, preset: Preset, plan: Plan, annotations: Dict[str, Any], page: Path) -> Dict[str, List[str]]:
    """Draw what there is to be drawn; returns the pictures' names."""
    drawn: Dict[str, List[str]] = {}
    page.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(figures, list(preset.schedules), _beside(page, "curves.png"))
    drawn["curves"] = [_beside(page, "curves.png").name]
    if any(row in figures.rows() for row in LOSSES):
        draw_pretext_loss(figures, _beside(page, "pretext.png"))
        drawn["pretext"] = [_beside(page, "pretext.png").name]
    shown = held_out_patches(annotations, SHOWN_IMAGES)
    for row in (row for row in SHOWN_ROWS if f"seed1/{row}/pretrain" in figures.cells):
        for number, (name, boxes) in enumerate(shown.items(), 1):
            picture = plan.path("pictures", f"{row}-{number}.jpg")
            command = ["-m", "tools.find_patch", "--checkpoint", plan.path(f"seed1/{row}/pretrain", "checkpoint.pth"),
                       plan.path(WORLD, f"toy/coco/val2017/{name}"), "--output", picture]
            done = subprocess.run([sys.executable, *command, *(word for box in boxes for word in ("--box", box))], cwd=ROOT,
                                  capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise InputError(f"{picture} could not be drawn: {reason}")
            beside = _beside(page, Path(picture).name)
            shutil.copyfile(picture, beside)
            drawn.setdefault(f"patches {row}", []).append(beside.name)
    return drawn


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
