"""What one step is made of: time of its parts, operations, reads by the host, kernels."""
import contextlib
import time
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry
from torch.utils._python_dispatch import TorchDispatchMode

from tools.benchmark.rounds import synchronize

# Operators whose result's shape or value the host must know, and methods that hand values to the host.
BY_VALUE = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
TO_HOST = {"cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__", "__array__"}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class HostReads(TorchFunctionMode):
    """A context that counts, by name in `reads`, where Python asks for tensors' values: on a GPU it would wait there.

    It works on any device. On a CPU all tensors lie on the host, so the count takes every tensor for one of the device's
    but those that `cpu()` or `to("cpu")` returned, and what is made of these: `cost.cpu().numpy()` is one read, not two.
    What optimizers read is left out: their counters of steps lie on the host on every device. It also counts `operators`,
    the calls of torch's operators, each of which is one or more kernels on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter = Counter()
        self.operators = 0
        self._on_host: Dict[int, Tensor] = {}  # by id; holding them keeps the ids from being given to others
        self._inside = self._paused = False
        self._calls = _OperatorCalls(self)

    def __enter__(self) -> "HostReads":
        self._calls.__enter__()
        self._hooks = [register_optimizer_step_pre_hook(self._pause), register_optimizer_step_post_hook(self._go_on)]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._calls.__exit__(*exception)
        self._on_host.clear()
        for hook in self._hooks:
            hook.remove()

    def _pause(self, *_: Any) -> None:
        self._paused = True

    def _go_on(self, *_: Any) -> None:
        self._paused = False

    def read(self, name: str) -> None:
        if not self._inside and not self._paused:
            self.reads[name] += 1

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        known = any(id(tensor) in self._on_host for tensor in _tensors(args))
        reads = name in TO_HOST or (name == "to" and "cpu" in args[1:])
        if reads and not known:
            self.read(name)
        outermost = not self._inside
        self._inside = self._inside or reads or known
        try:
            result = function(*args, **kwargs)
        finally:
            if outermost:
                self._inside = False
        if (reads or known) and not (name == "to" and not reads):  # `to(device)` takes a tensor back there
            for tensor in _tensors([result]):
                self._on_host[id(tensor)] = tensor
        return result


class Flops(TorchDispatchMode):
    """A context that adds up floating point operations of products, convolutions and attention in `total`, forward and
    backward, by the formulas of `torch.utils.flop_counter`, and of oneDNN's fused convolutions, which these don't cover.
    `FlopCounterMode` also follows modules, and thereby fails in a model that trains but runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        elif function.namespace == "mkldnn" and function.overloadpacket.__name__.endswith(("pointwise", "pointwise_")):
            weight = args[2] if "binary" in function._overloadname else args[1]  # a convolution's or a linear layer's
            self.total += 2 * result.numel() * weight.shape[1:].numel()
        return result


class _OperatorCalls(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.reads.operators += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
        if name in BY_VALUE or by_mask:
            self.reads.read(name)
        return function(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class Stopwatch:
    """Shares out the time of a step among its parts; time of a part within another counts for the inner one alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: List[Counter] = []
        self._open: List[str] = []
        self._last = 0.0

    def step(self) -> None:
        """From here on a new step."""
        self._mark()
        self.steps.append(Counter())
        self._open = ["other"]

    def enter(self, part: str) -> None:
        self._mark()
        self._open.append(part)

    def leave(self) -> None:
        self._mark()
        self._open.pop()

    def swap(self, part: str) -> None:
        """What follows belongs to this part, until the next `swap` or step."""
        self._mark()
        self._open = [part]

    def _mark(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.steps[-1][self._open[-1]] += now - self._last
        self._last = now

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Count what a method of an object takes; nothing if the object has no such method."""
        original = getattr(owner, method, None)
        if original is None:
            return

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return original(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, method, watched)


@contextlib.contextmanager
def cuda_events() -> Iterator[Dict[str, int]]:
    """Count, with the profiler, kernels and calls that wait for the GPU in the block; the dict is filled at its end."""
    counts: Dict[str, int] = {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        yield counts
    events = profiler.events()
    counts["kernels"] = sum(event.device_type == torch.autograd.DeviceType.CUDA
                            and not event.name.startswith(("Memcpy", "Memset")) for event in events)
    counts["waits"] = sum(event.name in WAITS for event in events)
