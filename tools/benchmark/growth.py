"""How time and memory grow with the work: each point is measured in a process of its own, whose memory is then known."""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import torch

from tools.benchmark.data_start import write_annotations
from util.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("median_ms", "quartiles_ms", "images_per_s", "repeats")


class Axis(NamedTuple):
    """A measure of work: its title, the part that is measured, values by default, and what sets one: the benchmark's
    flags and main.py's."""

    title: str
    part: str
    values: Sequence[int]
    flags: Callable[[int], List[str]]
    main_flags: Callable[[int], List[str]] = lambda value: []


AXES = {
    "image_size": Axis("short side, pixels (4:3)", "detr_finetune", (320, 480, 640, 800),
                       lambda value: ["--finetune_size", str(value), str(4 * value // 3)]),
    "batch": Axis("images of a step", "detr_finetune", (1, 2, 4), lambda value: ["--train_batch", str(value)]),
    "queries": Axis("queries", "detr_finetune", (100, 300, 900), lambda value: [],
                    lambda value: ["--num_queries", str(value)]),
    "patches": Axis("patches of an image", "updetr_pretrain", (1, 5, 10, 20), lambda value: [],
                    lambda value: ["--num_patches", str(value)]),
    "processes": Axis("processes", "scaling", (1, 2), lambda value: ["--processes", str(value)]),
    "data": Axis("annotated images", "", (1000, 10000, 118000), lambda value: []),
}


def measure_growth(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """`points`, one for each value of an axis, with figures by name."""
    axis = AXES[name]
    points = []
    for value in args.values or axis.values:
        figures = data_figures(value) if name == "data" else part_figures(axis, value, args)
        points.append({"value": value, **figures})
    return {"title": axis.title, "part": axis.part or "start of a COCO data set", "points": points}


def part_figures(axis: Axis, value: int, args: argparse.Namespace) -> Dict[str, Any]:
    """Measure a part with one flag changed."""
    common = ["--seconds", args.seconds, "--device", args.device, "--threads", torch.get_num_threads(),
              "--train_batch", args.train_batch]
    for size in ("pretrain_size", "finetune_size"):
        common += [f"--{size}", *getattr(args, size)]
    common += ["--amp", args.amp] if args.amp else []
    common += [f"--{flag}" for flag in ("compile", "tf32") if getattr(args, flag)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        run(["tools.benchmark", "--parts", axis.part, *common, "--output", output, *axis.flags(value), "--",
             *args.main_flags, *axis.main_flags(value)])
        part = json.loads(output.read_text())["parts"][axis.part]
    if axis.part == "scaling":
        return {key: part["processes"][str(value)][key] for key in FIGURES}
    return {**{key: part["ours"][key] for key in FIGURES}, "peak_memory_mb": part["peak_memory_mb"],
            "components_ms": part["components_ms"]}


def data_figures(images: int) -> Dict[str, Any]:
    """Make an annotation file of so many images and let processes start on it: for boxes alone, and with masks."""
    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder) / "annotations.json"
        write_annotations(annotations, images)
        found: Dict[str, Any] = {"annotation_file_mb": annotations.stat().st_size / 1e6}
        for name, flags in (("boxes", []), ("masks", ["--masks"])):
            printed = run(["tools.benchmark.data_start", folder, annotations, *flags])
            found.update({f"{key}_{name}": value for key, value in json.loads(printed.splitlines()[-1]).items()})
    return found


def run(words: Sequence[Any]) -> str:
    """Run a module; returns what it printed.

    Raises:
        InputError: if it fails, with its last words.
    """
    done = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise InputError(f"--growth: {last.removeprefix('error: ')}")
    return done.stdout
