"""What a training run carries from epoch to epoch, how it is saved and how it goes on."""
import argparse
import contextlib
import json
import os
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from torch import nn

from util.checkpoint import (VOC_OUTPUTS, counts_voc_from_zero, first_sentence, is_class_head, is_deformable,
                             load_model_strictly, random_state, set_random_state, stored_flags, voc_labels_from_one)
from util.distributed import all_gather, get_rank, get_world_size, is_main_process, print_main
from util.errors import InputError
from util.files import open_regular, replace_file
from util.metric_logger import merge_states
from util.recipes import BOOKKEEPING
from util.resumable import odd_part
from util.saving import Saver, newest_checkpoint, on_main
from util.schedule import DropAfterEpochs

PLAIN = (str, int, float, bool, type(None))


@dataclass
class EpochSoFar:
    """How far an epoch that was begun has come.

    Attributes:
        step: batches that were taken.
        consumed: the same as pairs (global batches, samples in each), of runs that made batches of different sizes.
        order: what decides the order of the epoch's samples, which must be the same where it is continued.
        meters: state of this process's `MetricLogger`.
    """

    step: int = 0
    consumed: List[List[int]] = field(default_factory=list)
    order: List[int] = field(default_factory=list)
    meters: Dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainingState:
    """Everything that an exact continuation needs; `epoch` is the one to train next, or to go on with from `so_far`.

    `unreadable` has the names of images that could not be read before the checkpoint from which the run goes on, and
    `list_unreadable` tells those of this process up to now.

    `source` says which checkpoint, and which epoch and step of it, the run could go on from now; "" if none. `run` tells the
    checkpoints of this run from others' in the same folder: one that `--resume auto` continues keeps it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: DropAfterEpochs
    scaler: "torch.amp.GradScaler"
    class_names: Dict[int, str] = field(default_factory=dict)
    epoch: int = 0
    best: Optional[float] = None
    is_thing_map: Dict[int, bool] = field(default_factory=dict)
    so_far: EpochSoFar = field(default_factory=EpochSoFar)
    source: Dict[str, Any] = field(default_factory=dict)
    saver: Saver = field(default_factory=Saver)
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    unreadable: List[str] = field(default_factory=list)
    list_unreadable: Optional[Callable[[], List[str]]] = None

    def save(self, args: argparse.Namespace, epoch: int, file_names: list, wait: bool = True) -> None:
        """Write the state under each name in `args.output_dir`: after `epoch`, and `so_far` in the next. All processes must
        call it; without `wait` they don't wait for the disk."""
        unreadable = self.list_unreadable() if self.list_unreadable else self.unreadable
        of_ranks = all_gather((random_state(), self.so_far.meters, unreadable))
        path = os.path.join(args.output_dir, file_names[-1])
        self.source = {"checkpoint": path, "epoch": epoch, "step": self.so_far.step}
        if not is_main_process():
            return
        random_states, meters, unreadable_of_ranks = zip(*of_ranks)
        checkpoint = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(), "scaler": self.scaler.state_dict(), "epoch": epoch,
            "args": plain_args(args),
            "random_states": list(random_states), "best": self.best, "class_names": self.class_names,
            "is_thing_map": self.is_thing_map, "so_far": {**vars(self.so_far), "meters": list(meters)},
            "saved_at": time.time(), "run": self.run,
            "unreadable": sorted({name for names in unreadable_of_ranks for name in names}),
        }
        self.saver.save(checkpoint, [os.path.join(args.output_dir, name) for name in file_names])
        if wait:
            self.saver.wait()

    def resume(self, checkpoint: Dict[str, Any], location: str) -> None:
        """Continue where a checkpoint stopped; official weight files, which hold a model alone, start at epoch 0.

        The rates drop after the epochs that the flags name from now on, even if the checkpoint was trained with others.
        Rates and weight decay that were given as flags (`main.build_optimizer` notes which) count more than the
        checkpoint's, and so does an epoch to start at that is not the one which the checkpoint's training began with.

        Raises:
            InputError: if the checkpoint doesn't fit the model or the optimizer.
        """
        load_model_strictly(self.model, checkpoint, location)
        if not {"optimizer", "lr_scheduler", "epoch"} <= set(checkpoint):
            print_main(f"resume: {location} holds weights only; training starts at epoch {self.epoch}")
            return
        self._require_same_optimizer(checkpoint, location)
        odd = odd_part(checkpoint, self.optimizer)
        if odd:
            raise InputError(f"--resume {location}: its {odd} isn't what a training saves; only its weights may be of use "
                             f"(--pretrain {location})")
        given = [dict(group) for group in self.optimizer.param_groups]
        for group in checkpoint["optimizer"]["param_groups"]:  # how a step is computed is no matter of the checkpoint's
            group.update({name: self.optimizer.defaults[name] for name in ("fused", "foreach")})
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise InputError(f"--resume {location}: its optimizer state doesn't fit the flags ({error}); "
                             "does --lr_backbone or --frozen_weights freeze other layers now?") from error
        if counts_voc_from_zero(checkpoint):
            self._shift_moments()
        lay_out_like_parameters(self.optimizer)
        self.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        self._keep_given_rates(given)
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        start, self.epoch = self.epoch, checkpoint["epoch"] + 1
        self.best = checkpoint.get("best")
        self.unreadable = list(checkpoint.get("unreadable", []))
        states = checkpoint.get("random_states", [])
        if get_rank() < len(states):
            try:
                set_random_state(states[get_rank()])
            except RuntimeError as error:
                raise InputError(f"--resume {location}: its 'random_states' can't be used ({first_sentence(error)})") from error
        if checkpoint.get("so_far"):
            self.so_far = EpochSoFar(**{**checkpoint["so_far"], "meters": _meters_of(checkpoint["so_far"]["meters"])})
        if start != (stored_flags(checkpoint).get("start_epoch") or 0):
            print_main(f"resume: --start_epoch {start} counts more than the checkpoint's epoch {self.epoch}")
            self.epoch, self.so_far = start, EpochSoFar()
            self.lr_scheduler.set_epoch(start)
        self.source = {"checkpoint": location, "epoch": checkpoint["epoch"], "step": self.so_far.step}
        place = f" after step {self.so_far.step - 1}" if self.so_far.step else ""
        print_main(f"resume: {location}, continuing with epoch {self.epoch}{place}")


    def _shift_moments(self) -> None:
        """Let the moments of the class heads follow their weights, whose labels now count from 1 (`model_state`)."""
        outputs = VOC_OUTPUTS if is_deformable(self.model.state_dict()) else VOC_OUTPUTS + 1
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {}) if is_class_head(name) and len(parameter) == outputs else {}
            for key, value in moments.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    moments[key] = voc_labels_from_one(value)

    def _require_same_optimizer(self, checkpoint: Dict[str, Any], location: str) -> None:
        now = "betas" not in self.optimizer.param_groups[0]
        stored = checkpoint["optimizer"]
        groups = stored.get("param_groups") if isinstance(stored, dict) else None
        if isinstance(groups, list) and groups and isinstance(groups[0], dict) and ("betas" not in groups[0]) != now:
            was, flag = ("AdamW", "without --sgd") if now else ("SGD", "with --sgd")
            raise InputError(f"--resume {location} was trained by {was}, whose state another optimizer can't use: go on "
                             f"{flag}, or start a new training from its weights by --pretrain")

    def _keep_given_rates(self, before: List[Dict[str, Any]]) -> None:
        """Put back the rates and weight decays that were given as flags, fallen as far as the checkpoint's, and tell of
        those that differ from the checkpoint's; `before` has the optimizer's groups before the loading."""
        lines = []
        for flags, own, group in zip(getattr(self.optimizer, "given_flags", []), before, self.optimizer.param_groups):
            if "weight_decay" in flags and group["weight_decay"] != own["weight_decay"]:
                lines.append(f"{flags['weight_decay']} counts more than the checkpoint's {group['weight_decay']:g}")
                group["weight_decay"] = own["weight_decay"]
            begun = group.get("initial_lr", group["lr"])
            if "lr" in flags and begun != own["initial_lr"]:
                lines.append(f"{flags['lr']} counts more than the checkpoint's {begun:g}")
                group["lr"] = own["initial_lr"] * (group["lr"] / begun if begun else 1.0)
                group["initial_lr"] = own["initial_lr"]
        self.lr_scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        if lines:
            print_main("resume: " + "; ".join(dict.fromkeys(lines)))


def lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give each of the optimizer's moments its parameter's memory layout: fused steps pair the two by their place in memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_strided(parameter.size(), parameter.stride(), dtype=value.dtype,
                                                  device=value.device).copy_(value)


def _meters_of(states: List[Dict[str, Any]]) -> Dict[str, Any]:
    """This process's share of all processes' meters: its own, or all or none of them if there are more or fewer now."""
    if len(states) == get_world_size():
        return states[get_rank()]
    return merge_states(states) if is_main_process() else {}


def plain_args(args: argparse.Namespace) -> Dict[str, Any]:
    """Flags as plain types, for a file."""
    return {name: _plain(value) for name, value in vars(args).items() if name not in BOOKKEEPING}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, PLAIN) else str(value)


def find_resume(args: argparse.Namespace) -> str:
    """The checkpoint that `--resume` means; "auto" is the output directory's newest whole one, or none when there is none
    yet. Every process must call this."""
    if args.resume != "auto":
        return args.resume
    if not args.output_dir:
        raise InputError("--resume auto needs --output_dir, where it looks for checkpoint.pth")
    path = on_main(lambda: newest_checkpoint(args.output_dir))
    if not path:
        print_main(f"resume: no checkpoint in {args.output_dir} yet, starting fresh")
    return path


def open_log(output_dir: str, first_epoch: int) -> None:
    """Make log.txt ready for `first_epoch`: lines of that epoch and later ones, of a run that is now redone, go."""
    path = os.path.join(output_dir, "log.txt")
    with _writing(path):
        os.makedirs(output_dir, exist_ok=True)
        if not os.path.lexists(path):
            return
        with open_regular(path, "log") as file:
            kept = [line.rstrip(b"\n") + b"\n" for line in file if _epoch_of(line) < first_epoch]
        replace_file(path, b"".join(kept))


def _epoch_of(line: bytes) -> float:
    """The epoch of a line of log.txt; infinity for one that a crash cut off, or that a damaged disk changed."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return float("inf")
    return epoch if isinstance(epoch, (int, float)) and epoch >= 0 else float("inf")


def append_log(output_dir: str, stats: Dict[str, Any]) -> None:
    """Add one epoch's line to log.txt."""
    path = os.path.join(output_dir, "log.txt")
    with _writing(path), open(path, "a") as file:
        file.write(json.dumps(stats) + "\n")
        file.flush()
        os.fsync(file.fileno())  # before the checkpoint that follows this epoch


def write_json(path: str, content: Any) -> None:
    """Write a file anew, by way of another name."""
    with _writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        replace_file(path, json.dumps(content, indent=1, sort_keys=True).encode())


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"could not write {path} ({error.strerror})") from error
