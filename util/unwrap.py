"""Find a model's tensors in a checkpoint, however training programs have wrapped them."""
from typing import Any, Callable, Dict, List, Mapping

import numpy as np
import torch
from torch import Tensor

# Where programs put a model's tensors, the first that is there; ours, DETR's and torchvision's is "model".
PLACES = ("model", "state_dict", "model_state_dict", "net", "ema_state_dict", "model_ema", "ema", "module",
          "model_state", "state_dict_ema", "network", "weights", "params", "teacher", "student", "checkpoint")
# Of DataParallel, averaged models, torch.compile, FSDP and activation checkpoints: parts of names, in any place.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
OUTER_NAMES = ("model.", "net.", "ema_model.")  # what a Lightning module, or a like one, calls the model inside it


def find_weights(checkpoint: Mapping[str, Any]) -> Dict[str, Tensor]:
    """Return a checkpoint's tensors under the names that the bare model gives them; none if there is no state_dict.

    Takes out of dicts of dicts, strips `module.` and `_orig_mod.` anywhere and a Lightning module's `model.`, drops what
    such modules have beside the model, counters of batches of ordinary batch norms and numbers of averaged models, and
    makes tensors of numpy's arrays.
    """
    state: Any = checkpoint
    for _ in range(len(PLACES)):
        inside = next((state[name] for name in PLACES if isinstance(state.get(name), dict)), None)
        if inside is None:
            break
        state = inside
    state = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype != object else value
             for name, value in state.items()}
    if not state or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        return {}
    state = {".".join(part for part in name.split(".") if part not in WRAPPERS): value for name, value in state.items()}
    for outer in OUTER_NAMES:
        if any(name.startswith(outer) for name in state):
            state = {name.removeprefix(outer): value for name, value in state.items() if name.startswith(outer)}
            break
    return {name: value for name, value in state.items() if name != "n_averaged"}


def numpy_globals() -> List[Any]:
    """List what pickles of numpy's numbers and arrays name, in numpy 1 and 2, for torch's weights-only loader.

    All of it only makes numbers, texts and times. The loader knows classes and functions by their own names.
    """
    types = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDUSMm"}
    makers = [_named(function, module) for function in (_reconstruct, scalar)
              for module in ("numpy.core.multiarray", "numpy._core.multiarray")]
    return [np.dtype, np.ndarray, *types, *makers]


def _named(function: Callable, module: str) -> Callable:
    def maker(*args: Any) -> Any:
        return function(*args)
    maker.__module__, maker.__qualname__, maker.__name__ = module, function.__name__, function.__name__
    return maker


def _reconstruct(kind: type, shape: Any, code: Any) -> np.ndarray:
    """Make the empty array that a pickle then fills."""
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def scalar(dtype: np.dtype, data: bytes) -> np.generic:
    """Make a number of numpy's from its bytes."""
    if dtype.hasobject:
        raise ValueError("a numpy number that holds a Python object")
    return np.frombuffer(data if isinstance(data, bytes) else data.encode("latin1"), dtype)[0]
