"""Helpers of the tests that run the programs as a user does."""
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch

import forked
from datasets.toy import ToySettings, write_toy
from tools import predict

ROOT = Path(__file__).resolve().parents[2]

# Appended to published commands: the same run on a model and images that a CPU gets through in seconds.
SMALL_MODEL = ("--backbone resnet18 --hidden_dim 32 --nheads 2 --dim_feedforward 64 --enc_layers 1 --dec_layers 2 "
               "--num_workers 1").split()
SMALL_PRETRAIN = [*SMALL_MODEL, *"--pretrain_sizes 96 112 --pretrain_max_size 128 --patch_size 32 --batch_size 4".split()]
SMALL_COCO = [*SMALL_MODEL, *"--train_sizes 96 112 --val_size 96 --max_size 128".split()]

TRAIN = ["main.py", *SMALL_COCO, "--load_backbone", "none", "--epochs", "1"]

LAUNCHERS = ("single", "torchrun", "launch")


def launcher_prefix(launcher: str) -> List[str]:
    """The words before `main.py` that start two processes of it; launcher: "torchrun" or "launch"."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_port()}",
            "--use_env"]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(arguments: List[Any], launcher: str = "single", check: bool = True, env: Optional[Dict[str, str]] = None,
        timeout: int = 120) -> subprocess.CompletedProcess:
    """Run a program of the project from its root on the CPU; with `check`, show its output if it fails.

    Args:
        launcher: one of `LAUNCHERS`, or "pair": two processes as torchrun would start them, but without it, and so sooner.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    words = list(map(str, arguments))
    if launcher == "single":
        done = forked.run(words, str(ROOT), [environment], timeout)
    elif launcher == "pair":
        meet = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        done = forked.run(words, str(ROOT), [{**meet, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"], timeout)
    else:
        done = subprocess.run([*launcher_prefix(launcher), *words], cwd=ROOT, env=environment, text=True,
                              capture_output=True, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def recipe_words(name: str, *flags: Any, data_root: Union[str, Path]) -> List[str]:
    """The words with which a recipe's script starts main.py, when these flags are appended to its own."""
    environment = {**os.environ, "PYTHON": str(ROOT / "tests" / "e2e" / "print_words.sh"), "DATA_ROOT": str(data_root)}
    printed = subprocess.run([f"./configs/{name}", *map(str, flags)], cwd=ROOT, env=environment, text=True,
                             capture_output=True, check=True).stdout
    unbuffered, program, *rest = shlex.split(printed)
    assert unbuffered == "-u" and os.path.samefile(ROOT / program, ROOT / "main.py")
    return rest


def weights(out: Path) -> Dict[str, torch.Tensor]:
    """The weights that a run left in its output folder."""
    return torch.load(out / "checkpoint.pth", weights_only=True)["model"]


def log_lines(out: Path) -> List[dict]:
    """The log of a run, an entry for each epoch."""
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def coco_tables(printed: str) -> List[str]:
    """COCO's lines of an output, twelve to a table."""
    return [line for line in printed.splitlines() if line.startswith(" Average")]


def finds_something(table: List[str]) -> bool:
    """Whether any figure of COCO's lines is above 0."""
    return any(float(line.rpartition("=")[2]) > 0 for line in table)


def write_agreeable_truth(checkpoint: Path, images: Path, annotations: Path, folder: Path) -> Path:
    """Annotate images with every third object that a model finds in them, so that even one hardly trained finds some.

    Returns:
        The file, in `folder`.
    """
    words = ["--checkpoint", checkpoint, images, "--threshold", 0, "--output_dir", folder]
    predict.main(predict.get_args_parser().parse_args(list(map(str, words))))
    found = json.loads((folder / "detections.json").read_text())[::3]
    listed = json.loads(annotations.read_text())["images"]
    ids = {entry["file_name"]: entry["id"] for entry in listed}
    truth = folder / "truth.json"
    truth.write_text(json.dumps({
        "images": listed, "categories": [{"id": label} for label in sorted({entry["category_id"] for entry in found})],
        "annotations": [{"id": number, "image_id": ids[Path(entry["file_name"]).name], "bbox": entry["bbox"],
                         "category_id": entry["category_id"]} for number, entry in enumerate(found, start=1)]}))
    return truth


def write_data_root(root: Path, **world: int) -> Path:
    """Fill a folder with a toy world laid out as the recipes expect it."""
    write_toy(root / "toy", ToySettings(**world))
    (root / "MSCoco").symlink_to(root / "toy" / "coco")
    (root / "pascal").symlink_to(root / "toy")
    (root / "ilsvrc").mkdir()
    (root / "ilsvrc" / "train").symlink_to(root / "toy" / "unlabelled")
    return root
