"""Helpers of the tests that run the programs as a user does."""
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

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
