"""Helpers of the tests that run the programs as a user does."""
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

from datasets.toy import ToySettings, write_toy

ROOT = Path(__file__).resolve().parents[2]

# Appended to published commands: the same run on a model and images that a CPU gets through in seconds.
SMALL_MODEL = ("--backbone resnet18 --hidden_dim 32 --nheads 2 --dim_feedforward 64 --enc_layers 1 --dec_layers 2 "
               "--num_workers 1").split()
SMALL_PRETRAIN = [*SMALL_MODEL, *"--pretrain_sizes 96 112 --pretrain_max_size 128 --patch_size 32 --batch_size 4".split()]
SMALL_COCO = [*SMALL_MODEL, *"--train_sizes 96 112 --val_size 96 --max_size 128".split()]

LAUNCHERS = ("single", "torchrun", "launch")


def launcher_prefix(launcher: str) -> List[str]:
    """The words before `main.py`; the last two start two processes."""
    if launcher == "single":
        return [sys.executable]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={port}", "--use_env"]


def run(arguments: List[str], launcher: str = "single", check: bool = True, env: Optional[Dict[str, str]] = None,
        timeout: int = 120) -> subprocess.CompletedProcess:
    """Run a program of the project from its root on the CPU; with `check`, show its output if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    done = subprocess.run([*launcher_prefix(launcher), *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_config(name: str, flags: List[str], data_root: Path, processes: int = 1) -> str:
    """Run a recipe from the project's root, without and with the launcher; returns what it printed."""
    launcher = [] if processes == 1 else ["./tools/run_dist_launch.sh", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DATA_ROOT": str(data_root),
                   "PYTHON": sys.executable}
    done = subprocess.run([*launcher, f"./configs/{name}", *map(str, flags)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def write_data_root(root: Path, **world: int) -> Path:
    """Fill a folder with a toy world laid out as the recipes expect it."""
    write_toy(root / "toy", ToySettings(**world))
    (root / "MSCoco").symlink_to(root / "toy" / "coco")
    (root / "pascal").symlink_to(root / "toy")
    (root / "ilsvrc").mkdir()
    (root / "ilsvrc" / "train").symlink_to(root / "toy" / "unlabelled")
    return root
