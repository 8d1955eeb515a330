"""Batches of images of different sizes, and small helpers; also the one place from which users import util's names."""
import contextlib
import subprocess
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from util.distributed import (all_gather, barrier, get_local_rank, get_rank, get_world_size, init_distributed_mode,
                              is_dist_avail_and_initialized, is_main_process, print_main, reduce_dict)
from util.errors import InputError
from util.metric_logger import MetricLogger, SmoothedValue
from util.published import _max_by_axis, get_local_size, get_total_grad_norm, save_on_master, setup_for_distributed

__all__ = ["InputError", "MetricLogger", "NestedTensor", "SmoothedValue", "_max_by_axis", "accuracy", "all_gather",
           "at_least_float32", "barrier", "collate_fn", "get_local_rank", "get_local_size", "get_rank", "get_sha",
           "get_total_grad_norm", "get_world_size", "init_distributed_mode", "interpolate", "inverse_sigmoid",
           "is_dist_avail_and_initialized", "is_main_process", "nested_tensor_from_tensor_list", "print_main",
           "reduce_dict", "save_on_master", "setup_for_distributed"]


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half-precision numbers to float32; float32 and float64 stay as they are."""
    return x.float() if x.element_size() < 4 else x


class NestedTensor(object):
    """Images of different sizes in one tensor, padded with zeros on the right and below.

    tensors: float [B, C, H, W]; mask: bool [B, H, W], True where there is padding (None if unknown).
    """

    def __init__(self, tensors: Tensor, mask: Optional[Tensor]) -> None:
        self.tensors = tensors
        self.mask = mask

    def to(self, device: torch.device, non_blocking: bool = False) -> "NestedTensor":
        mask = self.mask
        if mask is not None:
            mask = mask.to(device, non_blocking=non_blocking)
        return NestedTensor(self.tensors.to(device, non_blocking=non_blocking), mask)

    @torch.jit.unused
    def pin_memory(self) -> "NestedTensor":
        return NestedTensor(self.tensors.pin_memory(), None if self.mask is None else self.mask.pin_memory())

    @torch.jit.unused
    def record_stream(self, stream: Any) -> None:
        """Tell the memory's owner that `stream` uses the tensors, as `torch.Tensor.record_stream` does."""
        self.tensors.record_stream(stream)
        if self.mask is not None:
            self.mask.record_stream(stream)

    def decompose(self) -> Tuple[Tensor, Optional[Tensor]]:
        return self.tensors, self.mask

    def __repr__(self) -> str:
        return f"NestedTensor of shape {self.tensors.shape}"


def nested_tensor_from_tensor_list(tensor_list: List[Tensor]) -> NestedTensor:
    """Pad images [C, Hi, Wi] (a list, or one tensor [B, C, H, W]) to their largest height and width.

    Raises:
        ValueError: if an element isn't three-dimensional or the images differ in channels.
    """
    if tensor_list[0].dim() != 3:
        raise ValueError(f"expected images of shape [channels, height, width], got {list(tensor_list[0].shape)}")
    channels = tensor_list[0].shape[0]
    height, width = 0, 0
    for image in tensor_list:
        if image.shape[0] != channels:
            raise ValueError("images of one batch differ in their number of channels")
        height = max(height, image.shape[1])
        width = max(width, image.shape[2])
    first = tensor_list[0]
    if first.stride(0) == 1:  # channels last, as images come from files and as convolutions like them
        batch = torch.zeros([len(tensor_list), height, width, channels], dtype=first.dtype, device=first.device)
        batch = batch.permute(0, 3, 1, 2)
    else:
        batch = torch.zeros([len(tensor_list), channels, height, width], dtype=first.dtype, device=first.device)
    mask = torch.ones([len(tensor_list), height, width], dtype=torch.bool, device=first.device)
    for i, image in enumerate(tensor_list):
        batch[i, :, : image.shape[1], : image.shape[2]].copy_(image)
        mask[i, : image.shape[1], : image.shape[2]] = False
    return NestedTensor(batch, mask)


def collate_fn(batch: Sequence[Tuple[Any, ...]]) -> Tuple[Any, ...]:
    """Make a batch of samples (image, …, target): a NestedTensor, what lies between stacked, and the tuple of targets.

    Detection samples (image, target) give (NestedTensor, targets); pretext samples (image, patches, target) give
    (NestedTensor, patches [B, M, 3, P, P], targets).
    """
    images, *between, targets = zip(*batch)
    return (nested_tensor_from_tensor_list(list(images)), *[torch.stack(items) for items in between], targets)


def interpolate(input: Tensor, size: Optional[List[int]] = None, scale_factor: Optional[float] = None,
                mode: str = "nearest", align_corners: Optional[bool] = None) -> Tensor:
    """`torch.nn.functional.interpolate`, kept under the name that users of DETR import."""
    return F.interpolate(input, size, scale_factor, mode, align_corners)


@torch.no_grad()
def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> List[Tensor]:
    """Share (0..100) of rows whose true class is among the k best, for each k.

    Args:
        output: scores [N, C]; target: int64 [N]. With N = 0 every share is 0.
    """
    if target.numel() == 0:
        return [torch.zeros([], device=output.device) for _ in topk]
    best = output.topk(max(topk), dim=1).indices
    hits = best == target[:, None]
    return [100.0 * hits[:, :k].any(dim=1).float().mean() for k in topk]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of values in 0..1, which are first moved at least `eps` away from both ends."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def get_sha() -> str:
    """Say which version of this repository runs: commit, uncommitted changes, branch; "N/A" where git doesn't know."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
                              timeout=30).stdout.strip()
    sha, status, branch = "N/A", "clean", "N/A"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        sha = git("rev-parse", "HEAD")
        status = "has uncommited changes" if git("diff-index", "HEAD") else "clean"
        branch = git("rev-parse", "--abbrev-ref", "HEAD")
    return f"sha: {sha}, status: {status}, branch: {branch}"
