"""Keeps a training safe between its steps: saves in mid-epoch when that is due or asked for, and stops when asked to."""
import argparse
import os
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import nn

from util.checkpoint import save_checkpoint
from util.distributed import barrier, get_rank, get_world_size, is_main_process, print_main
from util.errors import InputError, Stopped
from util.metric_logger import MetricLogger
from util.saving import LAST
from util.signals import SignalListener, UntilStopped
from util.training_state import EpochSoFar, TrainingState, plain_args
from util.watch import Bundle, StepWatch


class Keeper:
    """What surrounds the steps of a training. All processes call its methods at the same steps.

    Args:
        state: the training's.
        args: `output_dir`, `save_every`, `save_every_steps`, `epochs`, `device` and
            `dist_timeout` are read; all flags go into what is written.
        batches: the loader's `datasets.sampling.TrainBatches`.
        listener: hears signals.
        last_step: epoch and step after which to stop, for `tools.replay`.
    """

    def __init__(self, state: TrainingState, args: argparse.Namespace, batches: Any, listener: SignalListener,
                 last_step: Optional[Tuple[int, int]] = None) -> None:
        self.state, self.args, self.batches, self.listener, self.last_step = state, args, batches, listener, last_step
        self.watch = StepWatch(torch.device(args.device), listener, self._write_bundle, args.dist_timeout)
        self._began = EpochSoFar()
        self._saved_step = 0

    def start_epoch(self, epoch: int) -> EpochSoFar:
        """Let the batches begin where the epoch stands; returns how far it had come.

        Raises:
            InputError: if the state is of mid-epoch and was trained with another seed. Where the images aren't the same,
                since some were deleted say, what is left of the epoch is drawn from those that are there.
        """
        began = self.state.so_far
        if began.step and began.order[0] != self.batches.order[0]:
            raise InputError(f"--resume {self.state.source.get('checkpoint', '')} is of mid-epoch: to go on there --seed must be "
                             f"the one that it was saved with, {began.order[0]}")
        now = self.batches.order
        if began.step and began.order != now[:len(began.order)]:  # older checkpoints say less
            differ = f"{began.order[1]} then, {now[1]} now" if began.order[1] != now[1] else \
                f"{now[1]} then as now, but with other names, ids or sizes"
            print_main(f"resume: the training images are no longer those of the checkpoint ({differ}); "
                       f"some may come twice in what is left of epoch {epoch}, or not at all")
        self.state.epoch, self._began, self._saved_step = epoch, began, began.step
        self.batches.set_epoch(epoch, began.consumed)
        return began

    def after_step(self, steps: int, logger: MetricLogger) -> None:
        """After an optimizer step, `steps` of the epoch are taken: saves if that is due or was asked for.

        Raises:
            Stopped: if a stop was asked for; the state is saved then.
            InputError: if an earlier saving went wrong.
        """
        self.state.saver.check()
        due = self.args.save_every_steps and steps - self._saved_step >= self.args.save_every_steps
        last = steps == self._began.step + len(self.batches)
        if due or last or self.watch.save or self.watch.stop:
            self.watch.settle()
            self._note(steps, logger)
        if due or self.watch.save or self.watch.stop:
            self._save()
        if self.watch.stop:
            self._stop()
        if self.last_step and (self.state.epoch, steps) > self.last_step:
            self.watch.settle()
            self._require_finite()
            raise Stopped(f"epoch {self.last_step[0]}, step {self.last_step[1]} is passed")

    def until_stopped(self, loader: Any) -> UntilStopped:
        """A loader for the evaluation after an epoch's steps: a stop saves the state as these left it."""
        self.state.saver.wait()  # its loading processes are forked next, best beside no thread that may hold a lock

        def stop() -> None:
            self._save()
            self._stop()
        return UntilStopped(loader, self.listener, stop)

    def end_epoch(self, files: List[str]) -> None:
        """After an epoch's steps, evaluation and line in log.txt: saves under `files`, and as the last checkpoint if that
        is due or a stop was asked for.

        Raises:
            Stopped, InputError: see `after_step`.
        """
        state, args = self.state, self.args
        stopping = self.listener.anyone_stops()
        state.epoch, state.so_far = state.epoch + 1, EpochSoFar()
        if state.epoch % args.save_every == 0 or state.epoch == args.epochs or stopping:
            files = [*files, LAST]
        if args.output_dir and files:
            self._require_finite()
            state.save(args, state.epoch - 1, files, wait=state.epoch == args.epochs)
        if stopping and state.epoch < args.epochs:
            self._stop()

    def _note(self, steps: int, logger: MetricLogger) -> None:
        """Write down in the state how far the epoch has come."""
        consumed = [list(part) for part in self._began.consumed]
        taken, size = steps - self._began.step, self.batches.global_batch
        if consumed and consumed[-1][1] == size:
            consumed[-1][0] += taken
        else:
            consumed.append([taken, size])
        self.state.so_far = EpochSoFar(steps, consumed, self.batches.order, logger.state_dict())

    def _save(self) -> None:
        self.listener.save = self.watch.save = False
        self._saved_step = self.state.so_far.step
        if not self.args.output_dir:
            return
        self._require_finite()
        self.state.save(self.args, self.state.epoch - 1, [LAST], wait=False)

    def _require_finite(self) -> None:
        spoilt = first_not_finite(self.state.model)
        if spoilt:
            self.watch.fail_last(f"the weights became infinite or NaN, first {spoilt}")

    def _stop(self) -> None:
        self.state.saver.wait()
        barrier()  # launchers end all processes once one has left: not before the state is saved
        place = f"epoch {self.state.epoch}" + (f" after step {self.state.so_far.step - 1}" if self.state.so_far.step else "")
        saved = f"saved {os.path.join(self.args.output_dir, LAST)}, --resume auto goes on" if self.args.output_dir else \
            "nothing was saved without --output_dir"
        line = f"stopped by {self.listener.heard or 'a signal to another process'} in {place}: {saved}"
        raise Stopped(line if is_main_process() else "")

    def _given_flags(self) -> Dict[str, Any]:
        """Flags as they were before defaults were filled in, with the seed that may have been drawn."""
        given = {**getattr(self.args, "given", vars(self.args)), "seed": self.args.seed, "resume": self.args.resume}
        return plain_args(argparse.Namespace(**given))

    def _write_bundle(self, bundle: Bundle) -> str:
        """Put what is known of a failure beside the checkpoints; returns words on where."""
        if not self.args.output_dir:
            return ""
        path = os.path.join(self.args.output_dir,
                            f"failure_epoch{bundle['epoch']}_step{bundle['step']}_process{get_rank()}.pth")
        try:
            self.state.saver.wait()  # it may hold the checkpoint to replay from
            save_checkpoint({**bundle, "args": plain_args(self.args), "given": self._given_flags(), "source": self.state.source,
                             "world_size": get_world_size()}, path)
        except InputError as error:
            return f"; {error.sentence}"
        return f"; python -m tools.replay {path} makes it happen again"


def first_not_finite(model: nn.Module) -> str:
    """Name of the first parameter or buffer that holds an infinity or NaN, or "". Waits for the device, once if all is
    well."""
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    if not state or torch.stack([value.isfinite().all() for value in state.values()]).all():
        return ""
    return next(name for name, value in state.items() if not value.isfinite().all())
