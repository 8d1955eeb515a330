"""When the learning rates fall to a tenth: every `--lr_drop` epochs, or after those of `--lr_drop_epochs`."""
import argparse
import warnings
from typing import Any, Dict, List, Sequence

import torch
from torch.optim.lr_scheduler import LRScheduler


class DropAfterEpochs(LRScheduler):
    """Lets all rates fall to a tenth after each of the given numbers of epochs.

    What it was built with counts more than what a state from `state_dict` says, so that a training may go on with other
    epochs, or from a checkpoint of the original programs, which hold a StepLR's state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, epochs: Sequence[int]) -> None:
        self.drop_epochs = list(epochs)
        super().__init__(optimizer)

    def step(self, *args: Any) -> None:
        """An epoch is over."""
        with warnings.catch_warnings():
            # A run that is continued after an epoch's last step takes no optimizer step in it, of which torch warns.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            super().step(*args)

    def get_lr(self) -> List[float]:
        """The next rate of each of the optimizer's groups."""
        factor = 0.1 if self.last_epoch in self.drop_epochs else 1.0
        return [group["lr"] * factor for group in self.optimizer.param_groups]

    def set_epoch(self, epoch: int) -> None:
        """Go on after another number of epochs, at the rates of that time."""
        self.last_epoch = epoch
        factor = 0.1 ** sum(drop <= epoch for drop in self.drop_epochs)
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = rate * factor

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a state, this one's or a StepLR's, whatever epochs it names."""
        super().load_state_dict({name: state_dict[name] for name in ("last_epoch", "_step_count") if name in state_dict})


def build_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> DropAfterEpochs:
    """The schedule that the flags describe; it takes a step after each epoch."""
    return DropAfterEpochs(optimizer, args.lr_drop_epochs or range(args.lr_drop, args.epochs + 1, args.lr_drop))
