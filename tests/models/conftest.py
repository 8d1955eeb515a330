"""Finding operations that would make the host wait for a GPU, without a GPU."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts operations whose result's shape or value the host must know, which makes it wait for a device."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])
        if name in self.WAITING or by_mask:
            self.waited.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def host_reads() -> HostReads:
    """A context; its `waited` then names the operations in it that would have waited."""
    return HostReads()
