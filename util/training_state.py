"""What a training run carries from epoch to epoch, how it is saved and how it goes on."""
import argparse
import contextlib
import json
import os
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, Optional

import torch
from torch import nn

from util.checkpoint import load_model_strictly, random_state, save_checkpoint, set_random_state
from util.distributed import all_gather, get_rank, is_main_process, print_main
from util.errors import InputError
from util.schedule import DropAfterEpochs

PLAIN = (str, int, float, bool, type(None))


@dataclass
class TrainingState:
    """Everything that an exact continuation needs; `epoch` is the next epoch to train."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: DropAfterEpochs
    scaler: "torch.amp.GradScaler"
    class_names: Dict[int, str] = field(default_factory=dict)
    epoch: int = 0
    best: Optional[float] = None
    is_thing_map: Dict[int, bool] = field(default_factory=dict)

    def save(self, args: argparse.Namespace, epoch: int, file_names: list) -> None:
        """Write the state after `epoch` under each name in `args.output_dir`. All processes must call it."""
        random_states = all_gather(random_state())
        if not is_main_process():
            return
        checkpoint = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(), "scaler": self.scaler.state_dict(), "epoch": epoch,
            "args": {name: _plain(value) for name, value in vars(args).items()},
            "random_states": random_states, "best": self.best, "class_names": self.class_names,
            "is_thing_map": self.is_thing_map,
        }
        for name in file_names:
            save_checkpoint(checkpoint, os.path.join(args.output_dir, name))

    def resume(self, checkpoint: Dict[str, Any], location: str) -> None:
        """Continue where a checkpoint stopped; official weight files, which hold a model alone, start at epoch 0.

        The rates drop after the epochs that the flags name from now on, even if the checkpoint was trained with others.
        """
        load_model_strictly(self.model, checkpoint, location)
        if not {"optimizer", "lr_scheduler", "epoch"} <= set(checkpoint):
            print_main(f"resume: {location} holds weights only; training starts at epoch {self.epoch}")
            return
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise InputError(f"--resume {location}: its optimizer state doesn't fit the flags ({error}); "
                             "does --lr_backbone or --frozen_weights freeze other layers now?") from error
        self.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"] + 1
        self.best = checkpoint.get("best")
        states = checkpoint.get("random_states", [])
        if get_rank() < len(states):
            set_random_state(states[get_rank()])
        print_main(f"resume: {location}, continuing with epoch {self.epoch}")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, PLAIN) else str(value)


def find_resume(args: argparse.Namespace) -> str:
    """The checkpoint that `--resume` means; "auto" is the output directory's, or none when there is none yet."""
    if args.resume != "auto":
        return args.resume
    if not args.output_dir:
        raise InputError("--resume auto needs --output_dir, where it looks for checkpoint.pth")
    path = os.path.join(args.output_dir, "checkpoint.pth")
    if os.path.exists(path):
        return path
    print_main(f"resume: no {path} yet, starting fresh")
    return ""


def open_log(output_dir: str, first_epoch: int) -> None:
    """Make log.txt ready for `first_epoch`: lines of that epoch and later ones, of a run that is now redone, go."""
    path = os.path.join(output_dir, "log.txt")
    with _writing(path):
        os.makedirs(output_dir, exist_ok=True)
        if not os.path.exists(path):
            return
        with open(path) as file:
            kept = [line for line in file if _epoch_of(line) < first_epoch]
        with open(path + ".tmp", "w") as file:
            file.writelines(kept)
        os.replace(path + ".tmp", path)


def _epoch_of(line: str) -> float:
    try:
        return json.loads(line)["epoch"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line cut off by a crash


def append_log(output_dir: str, stats: Dict[str, Any]) -> None:
    """Add one epoch's line to log.txt."""
    path = os.path.join(output_dir, "log.txt")
    with _writing(path), open(path, "a") as file:
        file.write(json.dumps(stats) + "\n")


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"could not write {path} ({error.strerror})") from error
