"""Repeated timing of several contenders in turn (A B A B …), so that what else the machine does hits all alike."""
import statistics
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

import torch

WARM_UP = 2
LEAST_REPEATS = 5
OURS = "this checkout"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Rounds:
    """Iterate over it and do one unit of work for each item: `times[OURS]` then holds the seconds that each took.

    After each of our turns the others have theirs. The first `WARM_UP` rounds are not counted, or just the first one if it
    takes longer than `seconds`; then it goes on until our turns took `seconds` together, and at least `LEAST_REPEATS`
    times.

    Args:
        seconds: see above.
        device: is waited for at the end of each turn.
        others: by name, does one unit of the same work and returns the seconds it took.
    """

    def __init__(self, seconds: float, device: torch.device,
                 others: Optional[Mapping[str, Callable[[], float]]] = None) -> None:
        self.seconds, self.device, self.others = seconds, device, others or {}
        self.times: Dict[str, List[float]] = {name: [] for name in (OURS, *self.others)}

    def __iter__(self) -> Iterator[int]:
        turn, warm_up = 0, WARM_UP
        while len(self.times[OURS]) < LEAST_REPEATS or sum(self.times[OURS]) < self.seconds:
            synchronize(self.device)
            start = time.perf_counter()
            yield turn
            synchronize(self.device)
            took = {OURS: time.perf_counter() - start}
            took.update({name: other() for name, other in self.others.items()})
            if turn == 0 and took[OURS] > self.seconds:
                warm_up = 1
            if turn >= warm_up:
                for name, seconds in took.items():
                    self.times[name].append(seconds)
            turn += 1

    def results(self, per_turn: int) -> Dict[str, Any]:
        """`ours`, and `against` by name with `ratio`, theirs over ours: figures as `spread` gives them.

        Args:
            per_turn: images in one unit of work.
        """
        result = {name: spread(times, per_turn) for name, times in self.times.items()}
        ours = result.pop(OURS)
        for other in result.values():
            other["ratio"] = other["median_ms"] / ours["median_ms"]
        return {"ours": ours, "against": result}


def spread(times: List[float], per_turn: int) -> Dict[str, Any]:
    """Of seconds: median and quartiles in milliseconds, images per second at the median, number of repeats."""
    low, median, high = (1000 * t for t in statistics.quantiles(times, n=4, method="inclusive"))
    return {"median_ms": median, "quartiles_ms": [low, high], "images_per_s": 1000 * per_turn / median,
            "repeats": len(times)}
