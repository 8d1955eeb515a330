"""UP-DETR's pre-training in several processes of this machine."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict

import torch

import main as program
from tools.benchmark.contender import Training
from tools.benchmark.rounds import Rounds
from tools.benchmark.workloads import SEED, WORKLOADS, make_batch, model_flags, parse_main_flags
from util.distributed import init_distributed_mode, is_main_process, shutdown
from util.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def measure_scaling(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """By number of processes: `Rounds`' figures for all images of a step, and `efficiency`, images per second and process
    in relation to those of the first number. The threads are shared out among the processes."""
    workload = WORKLOADS["updetr_pretrain"]
    words = model_flags(workload.flags, args)
    parse_main_flags(words)
    processes: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in args.processes:
            spec = {"flags": words, "seed": SEED, "weights": None, "batch_size": args.train_batch, "size": args.pretrain_size,
                    "threads": max(1, torch.get_num_threads() // number), "output": f"{folder}/{number}.json"}
            processes[str(number)] = {**launch(spec, number, folder), "threads": spec["threads"]}
    first, *_ = args.processes
    each = processes[str(first)]["images_per_s"] / first
    for number, figures in processes.items():
        figures["efficiency"] = figures["images_per_s"] / int(number) / each
    return {"title": f"{workload.title} in several processes", "images": args.train_batch, "size": args.pretrain_size,
            "processes": processes}


def launch(spec: Dict[str, Any], number: int, folder: str) -> Dict[str, Any]:
    """Run so many processes of this file; returns the first one's figures."""
    path = Path(folder) / "spec.json"
    path.write_text(json.dumps(spec))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}",
                           "-m", "tools.benchmark.scaling", str(path)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(spec["threads"])})
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line] or [f"status {done.returncode}"]
        raise InputError(f"--processes {number} failed: {errors[0].strip()}")
    return json.loads(Path(spec["output"]).read_text())


def main(path: str) -> None:
    """One of the processes."""
    spec = json.loads(Path(path).read_text())
    torch.set_num_threads(spec["threads"])
    options = parse_main_flags(spec["flags"])
    init_distributed_mode(options)
    batch = make_batch(options.dataset_file, options, spec["batch_size"], spec["size"])
    training = Training({**spec, "data": batch})
    training.model = program.distributed_model(training.model, options)
    rounds = Rounds(0, training.device)  # without a time to fill, all processes make the same number of steps
    training.run(rounds)
    if is_main_process():
        figures = rounds.results(spec["batch_size"] * options.world_size)["ours"]
        Path(spec["output"]).write_text(json.dumps(figures))
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
