"""Measure how fast training, inference, data, losses and evaluation are on this machine: `python -m tools.benchmark`.

What comes after `--` are main.py's flags: `python -m tools.benchmark --parts detr_finetune -- --enc_layers 3`.
"""
import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

import torch

from tools.benchmark import report
from tools.benchmark.data import LOADERS, SAMPLES, measure_loader, measure_samples
from tools.benchmark.growth import AXES, measure_growth
from tools.benchmark.machine import describe_machine, matrix_product_peak
from tools.benchmark.padding import measure_padding
from tools.benchmark.peers import OTHERS
from tools.benchmark.scaling import measure_scaling
from tools.benchmark.scoring import LOSSES, measure_evaluation, measure_losses
from tools.benchmark.steps import measure_step, peak_type
from tools.benchmark.workloads import WORKLOADS
from tools.output import refuse_others, remember, require_ending, writing
from util.errors import InputError, run_program
from util.ranges import TOOL_RANGES, check_ranges

GROUPS = {"training": [name for name, workload in WORKLOADS.items() if workload.training],
          "inference": [name for name, workload in WORKLOADS.items() if not workload.training],
          "samples": list(SAMPLES), "losses": list(LOSSES), "evaluation": ["evaluation"], "loaders": list(LOADERS),
          "padding": ["padding"], "scaling": ["scaling"]}
# Of those that aren't models: what measures them.
MEASURES = {"samples": measure_samples, "losses": measure_losses, "evaluation": measure_evaluation,
            "loaders": measure_loader, "padding": measure_padding, "scaling": measure_scaling}
LEAST_SIDE = 96  # pixels; Deformable DETR's coarsest map can't be normalised below
PARTS = [name for names in GROUPS.values() for name in names]


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.benchmark", description=__doc__, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", metavar="PART",
                        help=f"what to measure: {', '.join(PARTS)}, or groups of these: {', '.join(GROUPS)} (all, but "
                             "none with --growth)")
    parser.add_argument("--growth", nargs="+", default=[], choices=tuple(AXES), metavar="AXIS",
                        help=f"how time and memory grow with: {', '.join(AXES)}")
    parser.add_argument("--values", nargs="+", type=int, metavar="N",
                        help="points to measure on the one axis of --growth ("
                             + "; ".join(f"{name} {' '.join(map(str, axis.values))}" for name, axis in AXES.items())
                             + ")")
    parser.add_argument("--seconds", type=float, default=5, help="how long to repeat each part, at least (5)")
    parser.add_argument("--against", nargs="+", default=[], metavar="OTHER",
                        help="measure others in turn with this checkout: hf for Hugging Face's models, torchvision for "
                             "samples made with Pillow and torchvision's first transforms, or folders of checkouts, of "
                             "this project or of another that is built by main.get_args_parser() and "
                             "models.build_model()")
    parser.add_argument("--train_batch", type=int, default=2, help="images of a training step (2)")
    parser.add_argument("--inference_batch", type=int, default=1, help="images of an inference (1)")
    for name, size in (("pretrain", (400, 532)), ("finetune", (640, 800)), ("inference", (800, 1066))):
        parser.add_argument(f"--{name}_size", type=int, nargs=2, default=list(size), metavar=("H", "W"),
                            help=f"pixels of their images ({size[0]} {size[1]})")
    parser.add_argument("--photo_size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"),
                        help="pixels of the JPEG files of samples and loaders (480 640)")
    parser.add_argument("--eval_images", type=int, default=500, help="images to evaluate (500)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N",
                        help="numbers of processes for scaling (1 2)")
    parser.add_argument("--threads", type=int, help="threads of torch's operators (as torch decides)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cuda if there is one, else cpu")
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="as main.py's")
    parser.add_argument("--compile", action="store_true", help="as main.py's")
    parser.add_argument("--tf32", action="store_true", help="as main.py's")
    parser.add_argument("--output", help="JSON file for all figures")
    parser.add_argument("--plot", help="picture of them")
    parser.add_argument("main_flags", nargs="*", metavar="-- FLAGS", help="flags of main.py for all models")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise InputError for what can't be measured."""
    check_ranges(args, TOOL_RANGES)
    if args.values and len(args.growth) != 1:
        raise InputError("--values needs --growth with one axis")
    if args.parts is None:
        args.parts = [] if args.growth else list(GROUPS)
    unknown = [part for part in args.parts if part not in PARTS and part not in GROUPS]
    if unknown:
        raise InputError(f"--parts {unknown[0]} is not one of {', '.join([*GROUPS, *PARTS])}")
    for name in ("pretrain_size", "finetune_size", "inference_size", "photo_size"):
        height, width = getattr(args, name)
        if min(height, width) < LEAST_SIDE:
            raise InputError(f"--{name} {height} {width}: each side must be at least {LEAST_SIDE}")
    for other in args.against:
        if other not in OTHERS and not (Path(other) / "main.py").is_file():
            raise InputError(f"--against {other} is neither {' nor '.join(OTHERS)} nor a folder with a main.py")
    for flag, ending in (("output", ".json"), ("plot", ".png")):
        if getattr(args, flag):
            require_ending(getattr(args, flag), (ending,), f"--{flag}")


def chosen_parts(args: argparse.Namespace) -> List[str]:
    """The parts to measure, each once, in the order given."""
    return list(dict.fromkeys(part for name in args.parts for part in GROUPS.get(name, [name])))


def measure(name: str, args: argparse.Namespace, peak: float) -> Dict[str, Any]:
    """All figures of a part."""
    if name in WORKLOADS:
        return measure_step(name, args, peak)
    return next(MEASURES[group](name, args) for group, names in GROUPS.items() if name in names)


def main(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    check(args)
    written = [Path(name) for name in (args.output, args.plot) if name]
    refuse_others("--output, --plot", written)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result: Dict[str, Any] = {"machine": describe_machine(device), "settings": vars(args), "parts": {}}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    peak = matrix_product_peak(device, peak_type(args))
    result["machine"]["matrix_product_gflops_per_s"] = {args.amp or "fp32": peak / 1e9}
    print("  ".join(f"{key}: {value}" for key, value in result["machine"].items()))
    for name in chosen_parts(args):
        result["parts"][name] = measure(name, args, peak)
        print("\n".join(report.lines_of(name, result["parts"][name])))
    for name in args.growth:
        result.setdefault("growth", {})[name] = measure_growth(name, args)
        print("\n".join(report.growth_lines(name, result["growth"][name])))
    if args.output:
        with writing("--output", args.output):
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
        print(args.output)
    if args.plot:
        report.plot(result, args.plot)
        print(args.plot)
    remember(written)


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
