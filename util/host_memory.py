"""Memory of the host: how much of it was used, and keeping what was freed for the next step."""
import ctypes
import os
import resource

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers of these settings, see mallopt(3)
_NEVER = 2 ** 30


def keep_freed_memory() -> None:
    """Keep freed tensors' memory for later ones of this process, instead of returning each to the system.

    Memory fresh from the system is cleared page by page, each time: for the large tensors of a step on a CPU that takes
    longer than some of its convolutions. Only glibc can be told; `MALLOC_…` variables that are set are left as they are.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _NEVER)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def largest_memory_mb() -> float:
    """Most memory this process has held: on the GPU if it used one, else in the host."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
