"""What the machine is, how fast it multiplies matrices, and how much memory a piece of work takes."""
import datetime
import platform
import resource
from pathlib import Path
from typing import Any, Dict

import torch
import torchvision

from util.parallel import available_cpus

MATRIX_SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


def describe_machine(device: torch.device) -> Dict[str, Any]:
    """Processor, device, threads, versions and date."""
    return {"cpu": _cpu_name(), "cpus": available_cpus(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version(),
            "system": platform.system(), "date": datetime.date.today().isoformat()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def matrix_product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second that torch reaches in products of large square matrices of this type, with
    the threads that it is set to: the best of some sizes, as a product and as a 1x1 convolution, which torch may hand to
    another library."""
    from torch.utils.benchmark import Timer  # slow to import, and says where it finds no GPU
    best = 0.0
    for side in MATRIX_SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        pixels = a.view(1, side, 1, side).permute(0, 3, 1, 2)  # a map of side pixels with side channels, channels last
        for statement in ("torch.mm(a, b)", "torch.conv2d(pixels, kernel)"):
            timer = Timer(statement, globals={"torch": torch, "a": a, "b": b, "pixels": pixels, "kernel": b[..., None, None]},
                          num_threads=torch.get_num_threads())
            best = max(best, 2 * side ** 3 / timer.blocked_autorange(min_run_time=0.2).median)
    return best


class PeakMemory:
    """A context; its `mb` is then the most memory held in it, and `before_mb` what was held at its start.

    On a GPU that is what tensors take; on the host it is all the memory of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mb = self.before_mb = 0.0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _forget_peak()
        self.before_mb = held_mb(self.device)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.mb = torch.cuda.max_memory_allocated(self.device) / 2 ** 20
        else:
            self.mb = _status_mb("VmHWM")


def held_mb(device: torch.device) -> float:
    """Memory held now, see `PeakMemory`."""
    return torch.cuda.memory_allocated(device) / 2 ** 20 if device.type == "cuda" else _status_mb("VmRSS")


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed there: the peak is then that since the process started


def _status_mb(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
    return next(int(line.split()[1]) / 2 ** 10 for line in lines if line.startswith(field + ":"))
