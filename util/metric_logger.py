"""Running averages of training figures and DETR's console lines.

Values may be device tensors: they are kept as they are and copied to the host only when a line is printed, so that logging
never makes a training step wait for the device.
"""
import datetime
import math
import time
from collections import defaultdict, deque
from typing import Any, DefaultDict, Deque, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch

from util import distributed

Number = Union[int, float, torch.Tensor]


class SmoothedValue:
    """A series of numbers with statistics over its last `window_size` values and over all of them.

    `fmt` is a format string that may use median, avg, global_avg, max and value ("median (global average)" without it).
    """

    def __init__(self, window_size: int = 20, fmt: Optional[str] = None) -> None:
        self.window: Deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"
        self._pending: List[Tuple[Number, int, float]] = []

    def update(self, value: Number, n: int = 1, weight: float = 1.0) -> None:
        """Add weight * value, which stands for n samples; a tensor is not read before the next statistic is asked for."""
        self._pending.append((value.detach() if isinstance(value, torch.Tensor) else value, n, weight))

    def _flush(self) -> None:
        _read([self])

    def synchronize_between_processes(self) -> None:
        """Sum totals and counts over all processes, so that `global_avg` is the average over all; the window stays local."""
        self._flush()
        sums = distributed.all_gather((self.total, self.count))
        self.total = sum(total for total, _ in sums)
        self.count = sum(count for _, count in sums)

    def state_dict(self) -> Dict[str, Any]:
        """Everything it has seen, as plain numbers."""
        self._flush()
        return {"total": self.total, "count": self.count, "window": list(self.window)}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from a state of `state_dict`."""
        self.total, self.count = state["total"], state["count"]
        self.window.extend(state["window"])

    @property
    def median(self) -> float:
        self._flush()
        return torch.tensor(list(self.window)).median().item() if self.window else float("nan")

    @property
    def avg(self) -> float:
        self._flush()
        return sum(self.window) / len(self.window) if self.window else float("nan")

    @property
    def global_avg(self) -> float:
        self._flush()
        return self.total / self.count if self.count else float("nan")

    @property
    def max(self) -> float:
        self._flush()
        return max(self.window, default=float("nan"))

    @property
    def value(self) -> float:
        self._flush()
        return self.window[-1] if self.window else float("nan")

    def __str__(self) -> str:
        return self.fmt.format(median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value)


def _read(meters: Iterable[SmoothedValue]) -> None:
    """Bring the pending values of all meters to the host, at once: the device is waited for a single time."""
    tensors: DefaultDict[torch.device, List[torch.Tensor]] = defaultdict(list)
    for meter in meters:
        for value, _, _ in meter._pending:
            if isinstance(value, torch.Tensor):
                tensors[value.device].append(value.float())
    read = {device: iter(torch.stack(values).tolist()) for device, values in tensors.items()}
    for meter in meters:
        for value, n, weight in meter._pending:
            value = weight * (next(read[value.device]) if isinstance(value, torch.Tensor) else value)
            meter.window.append(value)
            meter.total += value * n
            meter.count += n
        meter._pending.clear()


class MetricLogger:
    """A set of named `SmoothedValue` meters and the loop that prints them.

    `logger.update(loss=…)` creates meters as needed; `logger.loss` reads one; `log_every` wraps an iterable.
    """

    def __init__(self, delimiter: str = "\t") -> None:
        self.meters: DefaultDict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def update(self, **values: Number) -> None:
        for name, value in values.items():
            self.meters[name].update(value)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def __getattr__(self, name: str) -> SmoothedValue:
        meters = self.__dict__.get("meters", {})
        if name in meters:
            return meters[name]
        raise AttributeError(f"{type(self).__name__} has neither an attribute nor a meter named {name!r}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Average every meter over all processes, with one collective. A meter may be missing on some of them."""
        _read(self.meters.values())
        sums = distributed.all_gather({name: (meter.total, meter.count) for name, meter in self.meters.items()})
        for name in sorted(set().union(*sums)):
            parts = [part[name] for part in sums if name in part]
            self.meters[name].total = sum(total for total, _ in parts)
            self.meters[name].count = sum(count for _, count in parts)

    def state_dict(self) -> Dict[str, Any]:
        """State of each meter, by name; see `merge_states`."""
        _read(self.meters.values())
        return {name: meter.state_dict() for name, meter in self.meters.items()}

    def load_state_dict(self, states: Dict[str, Any]) -> None:
        """Go on from a state of `state_dict`; meters that it lacks stay as they are."""
        for name, state in states.items():
            self.meters[name].load_state_dict(state)

    def averages(self) -> Dict[str, float]:
        """Average of each meter over everything it has seen."""
        return {name: meter.global_avg for name, meter in self.meters.items()}

    def log_every(self, iterable: Iterable[Any], print_freq: int, header: Optional[str] = None,
                  first: int = 0) -> Iterator[Any]:
        """Yield from an iterable and print a line every `print_freq` items and after the last, on the main process.
        Items are counted from `first`.

        The line holds the header, position, remaining time, all meters, seconds per item (`time`), seconds spent waiting for
        the item (`data`) and, on CUDA, the largest memory in MB (`max mem`).
        """
        count = num_batches(iterable)
        length = first + (math.inf if count is None else count)
        header = f"{header or ''}  "
        iter_time, data_time = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        start = end = time.perf_counter()
        for position, item in enumerate(iterable, first):
            data_time.update(time.perf_counter() - end)
            yield item
            iter_time.update(time.perf_counter() - end)
            at_line = position % print_freq == 0 or position == length - 1
            if at_line:  # on all processes: those that print nothing would keep every tensor until the loop's end
                _read(self.meters.values())
            if at_line and distributed.is_main_process():
                of, remaining = "?", "?"
                if count is not None:
                    of, remaining = str(length), _clock(iter_time.global_avg * (length - 1 - position))
                fields = [f"{header}[{position:{len(of)}d}/{of}]", f"eta: {remaining}", str(self),
                          f"time: {iter_time}", f"data: {data_time}"]
                if torch.cuda.is_available():
                    fields.append(f"max mem: {torch.cuda.max_memory_allocated() / 2 ** 20:.0f}")
                distributed.print_main(self.delimiter.join(field for field in fields if field))
            end = time.perf_counter()
        seconds = time.perf_counter() - start
        distributed.print_main(f"{header}Total time: {_clock(seconds)} ({seconds / max(iter_time.count, 1):.4f} s / it)")


def num_batches(loader: Iterable[Any]) -> Optional[int]:
    """Length of an iterable; None of one that doesn't know it, such as a generator."""
    try:
        return len(loader)
    except TypeError:
        return None


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


def merge_states(states: List[Dict[str, Any]]) -> Dict[str, Any]:
    """One state of meters for those of several processes: sums of what all have seen, and the last values of the first."""
    merged: Dict[str, Any] = {}
    for state in states:
        for name, meter in state.items():
            seen = merged.setdefault(name, {"total": 0.0, "count": 0, "window": meter["window"]})
            seen["total"] += meter["total"]
            seen["count"] += meter["count"]
    return merged
