"""Small helpers of DETR's and Deformable DETR's `util.misc` that only users' programs call; import them from there."""
import builtins
import os
from typing import Any, Iterable, List, Union

import torch
from torch import Tensor

from util.distributed import get_world_size, is_main_process

_print = builtins.print


def save_on_master(*args: Any, **kwargs: Any) -> None:
    """`torch.save`, on the main process only."""
    if is_main_process():
        torch.save(*args, **kwargs)


def setup_for_distributed(is_master: bool) -> None:
    """Make `print` silent on all processes but the main one, unless it is called with `force=True`."""
    def print_on_master(*args: Any, force: bool = False, **kwargs: Any) -> None:
        if is_master or force:
            _print(*args, **kwargs)
    builtins.print = print_on_master


def get_local_size() -> int:
    """Number of processes on this node, as the launcher says, 1 outside a process group."""
    if get_world_size() == 1:
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", get_world_size())))


def get_total_grad_norm(parameters: Union[Tensor, Iterable[Tensor]], norm_type: float = 2) -> Tensor:
    """Norm of all gradients taken as one vector, a scalar tensor; 0 without any."""
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(gradient, norm_type).to(gradients[0].device) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _max_by_axis(the_list: List[List[int]]) -> List[int]:
    """Largest number at each place of lists that are equally long."""
    return [max(numbers) for numbers in zip(*the_list)]
