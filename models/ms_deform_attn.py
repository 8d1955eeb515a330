"""Multi-scale deformable attention (Zhu et al., 2021, sec. 4.1, eq. 3): each query looks at a few points of every map.

The maps lie one behind another in one sequence of tokens. A value between pixels is interpolated from the four around
it, so a head's output is a weighted sum of 4 · levels · points rows of the values, for all levels at once, which is
what `embedding_bag` computes without ever forming the rows it sums.
"""
import math
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.misc import at_least_float32


class Levels(NamedTuple):
    """Where L feature maps lie in the sequence that their tokens form, row by row and one map after another.

    shapes: height and width of each; sizes: float32 [L, 2], width and height; starts: int64 [L], place of the first token.
    """

    shapes: List[Tuple[int, int]]
    sizes: Tensor
    starts: Tensor


def make_levels(shapes: List[Tuple[int, int]], device: torch.device) -> Levels:
    """`Levels` of maps of the given heights and widths."""
    starts = [0]
    for height, width in shapes[:-1]:
        starts.append(starts[-1] + height * width)
    sizes = torch.tensor([[width, height] for height, width in shapes], dtype=torch.float32)
    return Levels(shapes, sizes.to(device, non_blocking=True), torch.tensor(starts).to(device, non_blocking=True))


def sample_and_sum(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Interpolate values at points of every map and sum them up, weighted. Outside its map every value is zero.

    Args:
        value: [B, S, heads, D], a row for each token.
        locations: [B, Q, heads, L, P, 2], x and y; 0 and 1 are the outer edges of a map's first and last pixel.
        weights: [B, Q, heads, L, P].

    Returns:
        [B, Q, heads * D] in float32, or float64 for such values: lower precision is widened first.
    """
    value, locations, weights = at_least_float32(value), at_least_float32(locations), at_least_float32(weights)
    if not torch.jit.is_scripting():
        if _is_exporting():
            return _sample_map_by_map(value, levels, locations, weights)
        return _Sampling.apply(value, levels, locations, weights)
    indices, row_weights = _rows(value, levels, locations, weights)
    return _sum_of_rows(value, indices, row_weights)


def _is_exporting() -> bool:
    """Whether the model is being traced into a program, by torch.export or for ONNX."""
    by_torch_export = getattr(torch.compiler, "is_exporting", None)  # of later versions of torch
    return torch.onnx.is_in_onnx_export() or (by_torch_export is not None and by_torch_export())


class _Corners(NamedTuple):
    """Of each point [B, Q, heads, L * P] the pixel left above it (whole numbers), the shares by which its left and right
    column and its upper and lower row enter, and whether these lie in the map (1 or 0)."""

    x: Tensor
    y: Tensor
    left: Tensor
    right: Tensor
    upper: Tensor
    lower: Tensor
    left_inside: Tensor
    right_inside: Tensor
    upper_inside: Tensor
    lower_inside: Tensor


def _corners(levels: Levels, locations: Tensor) -> _Corners:
    width, height = _per_point(levels.sizes.to(locations.dtype), locations.shape[4])
    position_x = locations[..., 0].flatten(3) * width - 0.5
    position_y = locations[..., 1].flatten(3) * height - 0.5
    x, y = position_x.floor(), position_y.floor()
    right, lower = position_x - x, position_y - y
    left_inside, right_inside = _inside(x, width), _inside(x + 1, width)
    upper_inside, lower_inside = _inside(y, height), _inside(y + 1, height)
    return _Corners(x, y, (1 - right) * left_inside, right * right_inside, (1 - lower) * upper_inside,
                    lower * lower_inside, left_inside, right_inside, upper_inside, lower_inside)


def _per_point(per_level: Tensor, num_points: int) -> Tuple[Tensor, Tensor]:
    """[L, 2] -> two of [L * P]."""
    repeated = per_level.repeat_interleave(num_points, dim=0)
    return repeated[:, 0], repeated[:, 1]


def _inside(position: Tensor, size: Tensor) -> Tensor:
    return ((position >= 0) & (position < size)).to(position.dtype)


def _row_indices(value: Tensor, levels: Levels, corners: _Corners, num_points: int) -> Tensor:
    """Rows of `value.view(B * S * heads, D)` that each query's head sums up, integer [B * Q * heads, 4 * L * P]."""
    batch, num_tokens, heads = value.shape[:3]
    num_rows = batch * num_tokens * heads
    # What is summed is mostly read from the indices: 32 bits take half the time where they suffice.
    kind = torch.int32 if max(num_rows, 4 * corners.x.numel()) < 2 ** 31 else torch.int64
    width = levels.sizes[:, 0].repeat_interleave(num_points)
    image = torch.arange(batch, device=value.device, dtype=kind) * (num_tokens * heads)
    head = torch.arange(heads, device=value.device, dtype=kind)
    start = levels.starts.to(kind).repeat_interleave(num_points) * heads
    farthest = 2.0 ** 24  # float32 tells whole numbers apart up to here
    first = (corners.y * width + corners.x).clamp(-farthest, farthest).to(kind) * heads
    first = first + (image[:, None, None, None] + head[:, None] + start)
    step = width.to(kind) * heads
    steps = torch.stack([torch.zeros_like(step), torch.full_like(step, heads), step, step + heads])
    # A row outside its map enters with weight zero, so that any row will do for it.
    return (first[:, :, :, None] + steps).flatten(3).flatten(0, 2).clamp_(0, num_rows - 1)


def _row_weights(corners: _Corners, weights: Tensor) -> Tensor:
    """With what weight each of those rows enters, [B * Q * heads, 4 * L * P]."""
    weights = weights.flatten(3)
    upper, lower = weights * corners.upper, weights * corners.lower
    return torch.stack([upper * corners.left, upper * corners.right, lower * corners.left, lower * corners.right],
                       dim=3).flatten(3).flatten(0, 2)


def _rows(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tuple[Tensor, Tensor]:
    corners = _corners(levels, locations)
    return _row_indices(value, levels, corners, locations.shape[4]), _row_weights(corners, weights)


def _sum_of_rows(value: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, width = value.shape
    out = F.embedding_bag(indices, value.reshape(-1, width), mode="sum", per_sample_weights=weights)
    return out.view(batch, -1, heads * width)


class _Sampling(torch.autograd.Function):
    """`sample_and_sum` that keeps only its inputs for the backward pass, which finds the rows and their weights again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
        ctx.levels = levels
        ctx.save_for_backward(value, locations, weights)
        return _sum_of_rows(value, *_rows(value, levels, locations, weights))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None, Tensor, Tensor]:
        value, locations, weights = ctx.saved_tensors
        corners = _corners(ctx.levels, locations)
        indices = _row_indices(value, ctx.levels, corners, locations.shape[4])
        with torch.enable_grad():
            value = value.detach().requires_grad_()
            row_weights = _row_weights(corners, weights).requires_grad_()
            summed = _sum_of_rows(value, indices, row_weights)
        value_gradient, row_gradient = torch.autograd.grad(summed, (value, row_weights), gradient)
        return value_gradient, None, *_point_gradients(ctx.levels, corners, weights, row_gradient, locations)


def _point_gradients(levels: Levels, corners: _Corners, weights: Tensor, row_gradient: Tensor,
                     locations: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of locations and weights from those of the rows' weights, by the product rule."""
    c, flat = corners, weights.flatten(3)
    left_up, right_up, left_low, right_low = row_gradient.view(*flat.shape[:3], 4, -1).unbind(3)
    upper, lower = left_up * c.left + right_up * c.right, left_low * c.left + right_low * c.right
    left, right = left_up * c.upper + left_low * c.lower, right_up * c.upper + right_low * c.lower
    width, height = _per_point(levels.sizes.to(locations.dtype), locations.shape[4])
    x_gradient = (right * c.right_inside - left * c.left_inside) * flat * width
    y_gradient = (lower * c.lower_inside - upper * c.upper_inside) * flat * height
    weight_gradient = upper * c.upper + lower * c.lower
    return torch.stack([x_gradient, y_gradient], dim=-1).view_as(locations), weight_gradient.view_as(weights)


def _sample_map_by_map(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """The same through `grid_sample`, for which ONNX has an operator."""
    batch, num_tokens, heads, width = value.shape
    num_queries = locations.shape[1]
    value = value.permute(0, 2, 3, 1).reshape(batch * heads, width, num_tokens)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    weights = weights.transpose(1, 2).flatten(0, 1)
    out = value.new_zeros(1)
    start = 0
    for level, (map_height, map_width) in enumerate(levels.shapes):
        feature_map = value[:, :, start:start + map_height * map_width].unflatten(2, (map_height, map_width))
        sampled = F.grid_sample(feature_map, grids[:, :, level], align_corners=False)
        out = out + (sampled * weights[:, None, :, level]).sum(-1)
        start += map_height * map_width
    return out.view(batch, heads * width, num_queries).transpose(1, 2)


class MSDeformAttn(nn.Module):
    """Deformable attention of queries to several feature maps.

    Args:
        d_model: width; n_levels: number of maps; n_heads: attention heads; n_points: points per head and map.

    Raises:
        ValueError: if n_heads doesn't divide d_model.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"{n_heads} heads don't divide the width {d_model}")
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from equal weights and from points on the edges of growing squares, each head in its own direction."""
        for projection in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=1)
        direction = direction / direction.abs().amax(1, keepdim=True)
        distance = torch.arange(1, self.n_points + 1)
        offsets = (direction[:, None, None] * distance[:, None]).expand(-1, self.n_levels, -1, -1)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, levels: Levels,
                padding: Optional[Tensor] = None) -> Tensor:
        """Attend from queries to memory.

        Args:
            query: [B, Q, d].
            reference: where each query looks from in each map, [B, Q, L, 2] as x and y in 0..1, or [B, Q, L, 4] as boxes
                cxcywh. Around a point offsets count pixels of the map, in a box a share 1 / (2 n_points) of its sides.
            memory: [B, S, d], the tokens of all maps.
            padding: bool [B, S], True where a token is padding.

        Returns:
            [B, Q, d].
        """
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[:, :, None], 0.0)
        shape = [self.n_heads, self.n_levels, self.n_points]
        offsets = at_least_float32(self.sampling_offsets(query)).unflatten(2, shape + [2])
        weights = self.attention_weights(query).unflatten(2, [self.n_heads, -1]).softmax(-1).unflatten(3, shape[1:])
        if reference.shape[-1] == 2:
            scale = 1 / levels.sizes[:, None].to(offsets.dtype)
        else:
            scale = reference[:, :, None, :, None, 2:] * (0.5 / self.n_points)
        locations = reference[:, :, None, :, None, :2] + offsets * scale
        out = sample_and_sum(value.unflatten(2, [self.n_heads, -1]), levels, locations, weights)
        return self.output_proj(out.to(self.output_proj.weight.dtype))
