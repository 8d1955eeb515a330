"""Finds numbers that went wrong in a training step, and what processes were asked for, without waiting for the device."""
import contextlib
import faulthandler
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor

from util.checkpoint import random_state
from util.distributed import get_world_size, reduce_dict
from util.signals import SignalListener

Bundle = Dict[str, Any]
MOST_OVERFLOWS = 30  # in a row: the loss scale is then down from 65536 to less than 0.0001, it can't be at fault


@dataclass
class _Step:
    """What is kept of a step until its verdict is read."""

    epoch: int
    step: int
    targets: Sequence[Dict[str, Tensor]]
    random_state: Dict[str, Optional[Tensor]]
    losses: Dict[str, Tensor] = field(default_factory=dict)


class StepWatch:
    """Watches the steps of a training.

    The total loss, the gradient's norm and what signals asked for are reduced together with the losses, so that all
    processes read the same, and copied to the host without waiting. They are read in the next step, right after its
    matching, which has waited for the device anyway; or in `settle`, which waits.

    Args:
        device: of the losses.
        listener: says what this process was asked for.
        on_failure: is given what is known of a failure; returns a hint that ends its message.
        timeout: seconds after which a process of several that is still in the same step says where and ends itself, so that
            others don't wait for it; None for no such limit.

    Attributes:
        save, stop: whether any process was asked to save or to stop, as far as it was read.
    """

    def __init__(self, device: torch.device, listener: Optional[SignalListener] = None,
                 on_failure: Optional[Callable[[Bundle], str]] = None, timeout: Optional[float] = None) -> None:
        self.device, self.listener, self.on_failure = device, listener or SignalListener(), on_failure
        self.timeout = timeout if get_world_size() > 1 else None
        self.save = self.stop = False
        self._now: Optional[_Step] = None
        self._sent: Optional[_Step] = None
        on_gpu = device.type == "cuda"
        self._verdict = torch.zeros(4, pin_memory=on_gpu)
        self._on_host = self._verdict.numpy()  # the same memory
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._overflows = torch.zeros((), device=device)  # in a row, up to the last step

    def begin(self, epoch: int, step: int, targets: Sequence[Dict[str, Tensor]]) -> None:
        """A step begins; `targets` are the batch's, on the host."""
        self._now = _Step(epoch, step, targets, random_state())
        if self.timeout:
            faulthandler.dump_traceback_later(self.timeout, exit=True)  # by a thread that needs nothing of the interpreter

    def end(self) -> None:
        """The epoch's steps are over: `settle`, and no more limit of time."""
        if self.timeout:
            faulthandler.cancel_dump_traceback_later()
        self.settle()

    @contextlib.contextmanager
    def matching(self) -> Iterator[None]:
        """Goes around the criterion, which waits for the device at its matching.

        Raises:
            FloatingPointError: if a prediction at the matching, or the step before, isn't finite.
        """
        try:
            yield
        except FloatingPointError as error:
            self.settle()  # what went wrong in the step before shows here, too
            self._fail(self._now, str(error))
        self.settle()

    @torch.no_grad()
    def reduce(self, losses: Dict[str, Tensor], total: Tensor, gradient_norm: Optional[Tensor],
               may_overflow: bool = False) -> Dict[str, Tensor]:
        """Averages of the step's losses over all processes.

        Args:
            losses: this process's, scalar tensors by name; total: their weighted sum, which is returned as `loss`.
            gradient_norm: of an optimizer step; None without one.
            may_overflow: the gradient may be infinite now and then, as a loss scaler for float16 has it. The share of such
                steps is added as `overflow`.
        """
        norm = torch.zeros((), device=self.device) if gradient_norm is None else gradient_norm.float()
        asked = torch.tensor([float(self.listener.save), float(self.listener.stop)]).to(self.device, non_blocking=True)
        reduced = reduce_dict({**losses, "loss": total, "save": asked[0], "stop": asked[1]})
        asked = [reduced.pop("save"), reduced.pop("stop")]
        if may_overflow and gradient_norm is not None:
            reduced["overflow"] = 1 - norm.isfinite().float()
            self._overflows = (self._overflows + 1) * reduced["overflow"]
            norm = torch.where(self._overflows > MOST_OVERFLOWS, norm, torch.zeros_like(norm))
        self._verdict.copy_(torch.stack([reduced["loss"].float(), norm, *asked]), non_blocking=True)
        if self._arrived:
            self._arrived.record(torch.cuda.current_stream(self.device))  # whose device needn't be the current one
        self._now.losses = {name: value.detach() for name, value in losses.items()}
        self._sent = self._now
        return reduced

    def settle(self) -> None:
        """Read the verdict on the last reduced step, if it wasn't read yet.

        Raises:
            FloatingPointError: if its loss or gradient isn't finite; by all processes together.
        """
        if self._sent is None:
            return
        step, self._sent = self._sent, None
        if self._arrived:
            self._arrived.synchronize()
        total, norm, save, stop = self._on_host.tolist()
        self.save, self.stop = self.save or save > 0, self.stop or stop > 0
        if not math.isfinite(total):
            terms = [name for name, value in step.losses.items() if not math.isfinite(value)]
            self._fail(step, "the loss became infinite or NaN" + (f": {', '.join(terms)}" if terms else
                                                                 " in another process"), bool(terms))
        if not math.isfinite(norm):
            self._fail(step, "the gradient became infinite or NaN, that of finite losses")

    def fail_last(self, what: str) -> None:
        """Raise FloatingPointError: something that the last step left isn't finite."""
        self._fail(self._now, what)

    def _fail(self, step: _Step, what: str, mine: bool = True) -> None:
        ids = image_ids(step.targets)
        shown = f", image ids {', '.join(map(str, ids))}" if mine else ""
        message = f"{what} (epoch {step.epoch}, step {step.step}{shown})"
        hint = ""
        if mine and self.on_failure:
            hint = self.on_failure({
                "message": message, "epoch": step.epoch, "step": step.step, "image_ids": ids,
                "losses": {name: float(value) for name, value in step.losses.items()},
                "targets": [small_tensors(target) for target in step.targets], "random_state": step.random_state})
        raise FloatingPointError(message + hint)


def image_ids(targets: Sequence[Dict[str, Any]]) -> List[int]:
    """Image ids of a batch, those that are known."""
    return [int(target["image_id"]) for target in targets if "image_id" in target]


def small_tensors(target: Dict[str, Tensor], most: int = 10_000) -> Dict[str, Tensor]:
    """A target without its masks and patches."""
    return {name: value.cpu() for name, value in target.items() if isinstance(value, Tensor) and value.numel() <= most}
