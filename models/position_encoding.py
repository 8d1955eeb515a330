"""Position encodings of the backbone's feature maps."""
import argparse
import math
from typing import Optional

import torch
from torch import Tensor, nn

from util import recipes
from util.errors import InputError
from util.misc import NestedTensor


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of row and column over a geometric series of wavelengths (Vaswani et al., 2017, in two dimensions).

    Positions are counted over the image alone, not over its padding. With `normalize` they run from 0 to `scale`.

    Args:
        num_pos_feats: numbers per axis; the encoding has twice as many channels.
        temperature: ratio of the longest wavelength to the shortest.
        normalize: divide by the last position, so that an image of any size spans the same range.
        scale: that range, 2π unless given. Raises ValueError if given without `normalize`.
        from_centre: where normalised, count a pixel's position to its centre (Deformable DETR) instead of its far edge (DETR).
    """

    def __init__(self, num_pos_feats: int = 64, temperature: float = 10000, normalize: bool = False,
                 scale: Optional[float] = None, *, from_centre: bool = False) -> None:
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError(f"scale={scale} has no effect without normalize=True")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale
        self.shift = 0.5 if from_centre else 0.0

    def forward(self, tensor_list: NestedTensor) -> Tensor:
        """Feature map [B, C, h, w] with mask [B, h, w] -> float [B, 2 * num_pos_feats, h, w], rows first."""
        mask = tensor_list.mask
        assert mask is not None
        inside = (~mask).to(torch.float32)
        rows = inside.cumsum(1)
        columns = inside.cumsum(2)
        if self.normalize:
            rows = (rows - self.shift) / (rows[:, -1:, :] + 1e-6) * self.scale
            columns = (columns - self.shift) / (columns[:, :, -1:] + 1e-6) * self.scale
        channel = torch.arange(self.num_pos_feats, dtype=torch.float32, device=mask.device)
        wavelength = self.temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / self.num_pos_feats)
        return torch.cat([self._waves(rows, wavelength), self._waves(columns, wavelength)], dim=3).permute(0, 3, 1, 2)

    def _waves(self, position: Tensor, wavelength: Tensor) -> Tensor:
        phase = position[:, :, :, None] / wavelength
        return torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=4).flatten(3)


class PositionEmbeddingLearned(nn.Module):
    """One learned vector per row and one per column; feature maps up to 50 by 50 (the size of the published tables)."""

    def __init__(self, num_pos_feats: int = 256) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(50, num_pos_feats)
        self.col_embed = nn.Embedding(50, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, tensor_list: NestedTensor) -> Tensor:
        """Feature map [B, C, h, w] -> float [B, 2 * num_pos_feats, h, w], columns first.

        Raises:
            InputError: if the map has more rows or columns than the table (full-size images with `--dilation` do).
        """
        batch, height, width = tensor_list.tensors.shape[0], tensor_list.tensors.shape[-2], tensor_list.tensors.shape[-1]
        table = self.row_embed.weight.shape[0]
        if height > table or width > table:
            raise InputError(f"--position_embedding learned has a table of {table} rows and columns but the feature map is "
                             f"{height} x {width}: use smaller images, no --dilation, or --position_embedding sine")
        columns = self.col_embed.weight[:width].unsqueeze(0).expand(height, -1, -1)
        rows = self.row_embed.weight[:height].unsqueeze(1).expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).permute(2, 0, 1).unsqueeze(0).expand(batch, -1, -1, -1)


def build_position_encoding(args: argparse.Namespace) -> nn.Module:
    """The encoding that `--position_embedding` names, with `--hidden_dim` channels."""
    args = recipes.settled(args)
    if args.position_embedding == "sine":
        return PositionEmbeddingSine(args.hidden_dim // 2, normalize=True, scale=args.position_embedding_scale,
                                     from_centre=args.model == "deformable_detr" or bool(args.position_from_centre))
    return PositionEmbeddingLearned(args.hidden_dim // 2)
