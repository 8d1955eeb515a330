"""3×3 convolutions with a quarter of the multiplications, on CPUs: Winograd's minimal filtering F(4×4, 3×3).

A tile of 4×4 results depends on 6×6 inputs. Seen as products of polynomials, which are known by their values at six points
in each direction, it takes 36 multiplications for each pair of channels instead of 144 (Lavin and Gray, arXiv:1509.09308).
What remains are products of matrices, one for each of the 36 points; going to the points and back is a product with a
constant matrix.

Rounding errors of float32 are two to three times those of a direct convolution, about 1e-6 of the result's spread. Points
0, ±1, 1/2, -2 lose less than the usual 0, ±1, ±2: they keep powers small and their inverses too (Barabasz et al.,
arXiv:1803.10986).
"""
import math
from typing import Iterator, List, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Geometry = Tuple[List[int], List[int], List[int], int]  # of a convolution: stride, padding, dilation, groups

TILE = 4  # results along a side
WINDOW = TILE + 2  # inputs along a side, and points
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)  # and infinity
AT_ONE = POINTS.index(1.0) * (WINDOW + 1)  # the point (1, 1) among the 36: a constant there is one in every result
FEWEST_CHANNELS = 128  # below, going to the points and back costs what the multiplications save
FEWEST_TILES = 4  # in an image; below, reading 36 numbers for 9 weights does
FEWEST_TRAINED_TILES = 50  # in a batch
MOST_WASTE = 1.6  # computed results per wanted one: tiles stick out of maps whose sides are no multiples of four
AT_ONCE = 96  # tiles, for each thread: what they become should stay in the cache, and weights be read seldom


def _matrices() -> Tuple[Tensor, Tensor, Tensor]:
    """For inputs [36, 36], weights [36, 9] and results [16, 36]: Cook and Toom's matrices, in both directions at once."""
    others = [[q for q in POINTS if q != p] for p in POINTS]
    inputs = np.zeros((WINDOW, WINDOW))
    for row, roots in enumerate(others):
        inputs[row, :-1] = np.poly(roots)[::-1]
    inputs[-1] = np.poly(POINTS)[::-1]
    infinity = np.eye(WINDOW)[-1:]
    spread = np.array([[np.prod(np.subtract(p, roots))] for p, roots in zip(POINTS, others)])
    weights = np.concatenate([np.vander(POINTS, 3, increasing=True) / spread, infinity[:, -3:]])
    results = np.concatenate([np.vander(POINTS, TILE, increasing=True), infinity[:, -TILE:]]).T
    return tuple(torch.tensor(np.kron(m, m), dtype=torch.float32) for m in (inputs, weights, results))


_INPUTS, _WEIGHTS, _RESULTS = _matrices()


def suits(x: Tensor, weight: Tensor, geometry: Geometry, trained: bool = False) -> bool:
    """Say if this is faster than a direct convolution.

    Args:
        x: [B, C, H, W]; weight: [K, C, h, w].
        trained: the weight goes to the points at every step. If not, it is decided image by image: a batch's size changes
            no result.
    """
    height, width = x.shape[2:]
    tiles = -(-height // TILE) * -(-width // TILE)
    if trained and x.shape[0] * tiles < FEWEST_TRAINED_TILES:
        return False
    exact = x.dtype == torch.float32 and _full_precision()
    return (x.device.type == "cpu" and exact and weight.shape[2:] == (3, 3)
            and geometry == ([1, 1], [1, 1], [1, 1], 1) and min(weight.shape[:2]) >= FEWEST_CHANNELS
            and tiles >= FEWEST_TILES and tiles * TILE ** 2 <= MOST_WASTE * height * width)


def _full_precision() -> bool:
    """Say if nothing allows products of float32 numbers in fewer bits, by torch's older switches or its newer ones."""
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return False
    except RuntimeError:  # which torch raises where the newer switches are used
        pass
    mkldnn = torch.backends.mkldnn
    switches = (torch.backends, mkldnn, getattr(mkldnn, "matmul", None), getattr(mkldnn, "conv", None))
    return all(getattr(switch, "fp32_precision", "none") in ("none", "ieee") for switch in switches)


def at_points(weight: Tensor) -> Tensor:
    """Weights [K, C, 3, 3] -> their values at the points [36, C, K]. Used often, they are best made contiguous."""
    return torch.mm(_WEIGHTS, weight.permute(2, 3, 0, 1).reshape(9, -1)).view(-1, *weight.shape[:2]).transpose(1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, residual: Optional[Tensor] = None, relu: bool = False
             ) -> Tensor:
    """The convolution of x [B, C, H, W], padded by one, plus bias [K] and residual [B, K, H, W], with a ReLU if wanted.

    Args:
        weight: [36, C, K], of `at_points`.
    """
    batch, _, height, width = x.shape
    outputs = weight.shape[2]
    windows = _windows(x, WINDOW)
    out = x.new_empty(batch, height, width, outputs)
    added = None if residual is None else residual.permute(0, 2, 3, 1)
    for images, rows, scratch in _pieces(x, max(weight.shape[1:])):
        values = _transformed(_INPUTS, windows[:, :, images, rows], *scratch)
        values = torch.bmm(values, weight, out=_part(scratch[0], *values.shape[:2], outputs))
        if bias is not None:
            values[AT_ONE] += bias
        values = values.flatten(1)
        tiles = torch.mm(_RESULTS, values, out=_part(scratch[1], TILE ** 2, values.shape[1]))
        tiles = tiles.view(TILE, TILE, *windows[0, 0, images, rows].shape[:3], outputs)
        piece = out[images, rows.start * TILE:rows.stop * TILE]
        found = tiles.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)[:, : piece.shape[1], :width]
        if added is not None:
            found += added[images, rows.start * TILE:rows.stop * TILE]
        torch.clamp_min(found, 0, out=piece) if relu else piece.copy_(found)
    return out.permute(0, 3, 1, 2)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a convolution's input [B, C, H, W] from that of its result [B, K, H, W]; weight: [K, C, 3, 3]."""
    return convolve(grad, at_points(weight.flip(2, 3).transpose(0, 1)))


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a convolution's weight [K, C, 3, 3] from that of its result [B, K, H, W], and its input [B, C, H, W]."""
    outputs, inputs = grad.shape[1], x.shape[1]
    windows, tiles = _windows(x, WINDOW), _windows(grad, TILE)
    total = grad.new_zeros(WINDOW ** 2, outputs, inputs)
    for images, rows, (gathered, first, second) in _pieces(x, max(outputs, inputs), scratches=3):
        grads = _transformed(_RESULTS.t(), tiles[:, :, images, rows], gathered, first)
        values = _transformed(_INPUTS, windows[:, :, images, rows], gathered, second)
        torch.baddbmm(total, grads.transpose(1, 2), values, out=total)
    return torch.mm(_WEIGHTS.t(), total.flatten(1)).view(3, 3, outputs, inputs).permute(2, 3, 0, 1)


def _windows(x: Tensor, size: int) -> Tensor:
    """Views of x [B, C, H, W] for each tile, with zeros outside of x: [size, size, B, rows, columns, C].

    Args:
        size: `TILE`, or `WINDOW` for what a tile's results depend on.
    """
    before = (size - TILE) // 2
    after = [-side % TILE + before for side in x.shape[2:]]
    padded = F.pad(x, (before, after[1], before, after[0])).permute(0, 2, 3, 1)
    return padded.unfold(1, size, TILE).unfold(2, size, TILE).permute(4, 5, 0, 1, 2, 3)


def _transformed(matrix: Tensor, windows: Tensor, gathered: Tensor, out: Tensor) -> Tensor:
    """[n, n, B, rows, columns, C] -> [points, B * rows * columns, C], in `out`; `gathered` is overwritten, too."""
    rows = _part(gathered, *windows.shape).copy_(windows).view(matrix.shape[1], -1)
    return torch.mm(matrix, rows, out=_part(out, matrix.shape[0], rows.shape[1])).unflatten(1, (-1, windows.shape[-1]))


def _part(scratch: Tensor, *shape: int) -> Tensor:
    return scratch[: math.prod(shape)].view(shape)


def _pieces(x: Tensor, channels: int, scratches: int = 2) -> Iterator[Tuple[slice, slice, List[Tensor]]]:
    """What to take at once of maps [B, ·, H, W]: images and rows of tiles, which are several images or a part of one.

    With them come scratches, always the same memory, for so many channels at each point of these tiles.
    """
    batch, _, height, width = x.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    room = max(1, AT_ONCE * torch.get_num_threads() // columns)  # rows of tiles
    step, images = min(room, rows), min(max(1, room // rows), batch)
    memory = [x.new_empty(WINDOW ** 2 * images * step * columns * channels) for _ in range(scratches)]
    for first in range(0, batch, images):
        for row in range(0, rows, step):
            yield slice(first, first + images), slice(row, row + step), memory
