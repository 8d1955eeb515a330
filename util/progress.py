"""What follows a training beside its console lines: an estimate of its time, and TensorBoard."""
import argparse
import contextlib
import datetime
import os
import time
from typing import Any, Dict, Iterator, Optional, Tuple

from util.distributed import is_main_process, print_main
from util.errors import InputError
from util.metric_logger import MetricLogger
from util.plot_utils import COCO_FIELDS

ESTIMATE_AFTER = 20  # steps


class Progress:
    """Follows a training from `first_epoch` on. Every process has one; only the main process's says anything.

    With `--tensorboard`, scalars go to `tensorboard/` in the output directory: `step/*` over a process's steps since
    epoch 0, `epoch/*` over the epochs. A resumed run goes on where its first epoch belongs; what an earlier run wrote from
    there on TensorBoard then hides.

    Args:
        args: `tensorboard`, `output_dir` and `epochs` are read.
        steps: batches that a process takes in an epoch.
        first_step: steps of the first epoch that an earlier run has taken.

    Raises:
        InputError: if `--tensorboard` is given and its package isn't installed; here and later, if nothing can be written.
    """

    def __init__(self, args: argparse.Namespace, first_epoch: int, steps: int, first_step: int = 0) -> None:
        self.first_epoch, self.epochs, self.steps = first_epoch, args.epochs, steps
        self.estimated = False
        self.started: Optional[Tuple[int, float]] = None  # step and time of the first line
        self.folder = os.path.join(args.output_dir, "tensorboard")
        with self._writing():
            self.writer = _writer(self.folder, first_epoch * steps + first_step) if args.tensorboard else None

    def line(self, epoch: int, step: int, logger: MetricLogger) -> None:
        """Called where a console line of the training is printed: after step 0, 10, 20, … and the last of an epoch."""
        if epoch == self.first_epoch:
            self._estimate(step)
        if self.writer:
            with self._writing():
                for name, meter in logger.meters.items():
                    if not name.endswith("_unscaled"):
                        self.writer.add_scalar(f"step/{name}", meter.avg, epoch * self.steps + step)
                self.writer.flush()  # a run may end at any moment

    def epoch(self, epoch: int, figures: Dict[str, Any]) -> None:
        """Called after each epoch with the figures of its line in log.txt."""
        if self.writer:
            with self._writing():
                for name, value in _scalars(figures):
                    self.writer.add_scalar(f"epoch/{name}", value, epoch)
                self.writer.flush()

    def close(self) -> None:
        """Called at the end."""
        if self.writer:
            with self._writing():
                self.writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"--tensorboard: could not write {self.folder} ({error.strerror or error})") from error

    def _estimate(self, step: int) -> None:
        # From the end of the first step: what that one takes longer, to set up, isn't repeated.
        if self.started is None:
            self.started = step, time.perf_counter()
        elif not self.estimated and step - self.started[0] >= ESTIMATE_AFTER:
            self.estimated = True
            seconds = (time.perf_counter() - self.started[1]) / (step - self.started[0]) * self.steps
            epoch, total = (datetime.timedelta(seconds=round(number)) for number in (
                seconds, seconds * (self.epochs - self.first_epoch)))
            print_main(f"estimated time: {epoch} per epoch, {total} to the end of epoch {self.epochs - 1}, evaluations "
                       "not counted")


def _writer(folder: str, first_step: int) -> Any:
    """TensorBoard's writer on the main process, None on the others."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(f"--tensorboard needs the package tensorboard, which can't be imported ({error}): "
                         "pip install -r requirements/tensorboard.txt") from error
    if not is_main_process():
        return None
    return SummaryWriter(folder, purge_step=first_step)


def _scalars(figures: Dict[str, Any]) -> Iterator[Tuple[str, float]]:
    """The numbers in a line of log.txt by name; those of COCO's evaluation are called `test_bbox_AP` and so on."""
    for name, value in figures.items():
        if name.endswith("_per_class"):
            kind = name.removeprefix("test_coco_eval_").removesuffix("_per_class")
            yield from ((f"test_{kind}_AP_per_class/{label}", numbers[0]) for label, numbers in value.items())
        elif name.startswith("test_coco_eval_"):
            kind = name.removeprefix("test_coco_eval_")
            yield from ((f"test_{kind}_{field}", value[i]) for field, i in COCO_FIELDS.items() if field != "mAP")
        elif isinstance(value, dict):
            yield from ((f"{name}_{part}", number) for part, number in value.items())
        elif isinstance(value, (int, float)) and name not in ("epoch", "n_parameters"):
            yield name, value
