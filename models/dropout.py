"""Dropout that is cheap on a CPU, where torch draws one slow random number for each element."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEPS = 2 ** 16  # the share of dropped elements is a multiple of 1 / _STEPS


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability p and scale the rest, so that the expected value stays.

    On a CPU four elements share a 64-bit random number of torch's generator. p is then rounded to 16 bits, and the scale
    is that of the rounded p.

    Args:
        x: of any shape.
        p: 0..1.
        training: False returns x.
    """
    if torch.jit.is_scripting():
        return F.dropout(x, p, training)
    dropped = round(p * _STEPS)
    if not training or not 0 < dropped < _STEPS or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return x * _noise(x, dropped)


@torch.jit.unused
def _noise(x: Tensor, dropped: int) -> Tensor:
    """Of x's shape and type, 0 with probability dropped / _STEPS, else the inverse of the probability left."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-2 ** 63, None).view(torch.int16)
    # The lowest 16-bit numbers mean "dropped". Clamping is several times faster than comparing and converting bools.
    lowest_kept = dropped - _STEPS // 2
    kept = bits[: x.numel()].clamp_(lowest_kept - 1, lowest_kept).sub_(lowest_kept - 1)
    return kept.to(x.dtype).mul_(_STEPS / (_STEPS - dropped)).view(x.shape)
