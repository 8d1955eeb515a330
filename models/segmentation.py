"""Masks on top of DETR: attention maps of the object queries, refined by a small convolutional head (Carion et al.,
2020, sec. 4.4). Instance and panoptic segmentation use one model; they differ in classes and in post-processing."""
import math
from typing import List, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss as focal_loss

from models.mask_results import PostProcessPanoptic, PostProcessSegm
from util.misc import NestedTensor, at_least_float32, nested_tensor_from_tensor_list

__all__ = ["DETRsegm", "MHAttentionMap", "MaskHeadSmallConv", "PostProcessPanoptic", "PostProcessSegm", "dice_loss",
           "sigmoid_focal_loss"]


class DETRsegm(nn.Module):
    """A detector with a mask for each query; `detr.` precedes the detector's names in the state_dict.

    Args:
        detr: a `DETR` whose backbone returns the maps of all its layers (`return_interm_layers`).
        freeze_detr: train nothing but the mask head (`--frozen_weights`).
        softmax_per_head: normalise the attention maps of each head on its own, as UP-DETR's and DETReg's mask models
            were trained, instead of all heads together, as DETR's were (see `MHAttentionMap`).
        map_channels: channels of the three maps that refine the masks, deepest first; by default those of a ResNet's
            layer3, layer2 and layer1 below its layer4.
        min_score: in evaluation, masks are made only for queries whose best class has at least this probability; the
            other masks are empty. 0 makes all of them, as losses and COCO's measures need.

    Raises:
        ValueError: if the detector's width is too small for the head.
    """

    def __init__(self, detr: nn.Module, freeze_detr: bool = False, *, softmax_per_head: bool = False,
                 map_channels: Optional[Sequence[int]] = None, min_score: float = 0.0) -> None:
        super().__init__()
        self.detr = detr
        if freeze_detr:
            detr.requires_grad_(False)
        hidden_dim, num_heads = detr.transformer.d_model, detr.transformer.nhead
        if map_channels is None:
            map_channels = [detr.backbone.num_channels // 2 ** level for level in (1, 2, 3)]
        self.bbox_attention = MHAttentionMap(hidden_dim, hidden_dim, num_heads, softmax_per_head=softmax_per_head)
        self.mask_head = MaskHeadSmallConv(hidden_dim + num_heads, map_channels, hidden_dim)
        self.min_score = float(min_score)

    def forward(self, samples: NestedTensor):
        """Detect objects and their masks.

        Args:
            samples: as for `DETR`.

        Returns:
            what `DETR` returns, and `pred_masks` [B, N, h, w]: logits over the padded image at the resolution of the
            backbone's layer1 (stride 4).
        """
        if isinstance(samples, (list, Tensor)):
            samples = nested_tensor_from_tensor_list(samples)
        features: List[NestedTensor] = []
        for feature in self.detr.backbone[0](samples).values():
            features.append(feature)
        src, mask = features[-1].decompose()
        # Positions of the deepest map only: those of the finer maps would take much memory and serve nothing.
        position = self.detr.backbone[1](features[-1]).to(src.dtype)
        projected = self.detr.input_proj(src)
        decoded, memory = self.detr.transformer(projected, mask, self.detr.query_embed.weight, position)
        out = self.detr.predictions(decoded)
        wanted: Optional[Tensor] = None
        if not self.training and self.min_score > 0:
            wanted = at_least_float32(out["pred_logits"]).softmax(-1)[:, :, :-1].amax(-1) >= self.min_score
        inputs = [decoded[-1], memory, projected, features[2].tensors, features[1].tensors, features[0].tensors]
        if torch.jit.is_scripting():
            out["pred_masks"] = self._masks(inputs, mask, wanted)
        else:
            out["pred_masks"] = self._masks_without_autocast(inputs, mask, wanted)
        return out

    @torch.jit.unused
    def _masks_without_autocast(self, inputs: List[Tensor], mask: Optional[Tensor], wanted: Optional[Tensor]) -> Tensor:
        device = inputs[0].device.type
        if not torch.is_autocast_enabled(device):  # programs that are exported then hold no such scope
            return self._masks(inputs, mask, wanted)
        with torch.autocast(device, enabled=False):
            full = [tensor.to(self.mask_head.out_lay.weight.dtype) for tensor in inputs]
            return self._masks(full, mask, wanted)

    def _masks(self, inputs: List[Tensor], mask: Optional[Tensor], wanted: Optional[Tensor]) -> Tensor:
        """Last outputs, memory, projected map, three finer maps -> mask logits of all queries, or of the wanted ones."""
        attention = self.bbox_attention(inputs[0], inputs[1], mask)
        if wanted is None:
            masks = self.mask_head(inputs[2], attention, inputs[3:])
            return masks[:, 0].unflatten(0, [attention.shape[0], attention.shape[1]])
        return self._some_masks(inputs[2], attention, inputs[3:], wanted)

    def _some_masks(self, projected: Tensor, attention: Tensor, maps: List[Tensor], wanted: Tensor) -> Tensor:
        """Mask logits [B, N, H, W] of the queries that `wanted` (bool [B, N]) names; the other masks are empty."""
        height, width = maps[-1].shape[-2], maps[-1].shape[-1]
        # A logit that no threshold lets through, yet finite, since masks are interpolated.
        masks = projected.new_full([wanted.shape[0], wanted.shape[1], height, width], -1e4)
        for i in range(wanted.shape[0]):
            queries = wanted[i].nonzero()[:, 0]
            if len(queries) > 0:
                mine = [level[i:i + 1] for level in maps]
                masks[i, queries] = self.mask_head(projected[i:i + 1], attention[i:i + 1, queries], mine)[:, 0]
        return masks


class MHAttentionMap(nn.Module):
    """Where each query looks in the encoder's memory: the weights of a multi-head attention, without its values.

    Args:
        query_dim: width of queries and memory; hidden_dim: width in which they are compared.
        num_heads: number of maps for each query.
        dropout: share of the weights that is dropped in training.
        bias: whether the projections have one.
        softmax_per_head: each map sums to one. By default the maps of a query sum to one together: DETR's published
            mask heads were trained on that. A head trained on one kind of maps gives poor masks with the other.
    """

    def __init__(self, query_dim: int, hidden_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, *,
                 softmax_per_head: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_dim // num_heads
        self.softmax_per_head = softmax_per_head
        self.dropout = nn.Dropout(dropout)
        self.q_linear = nn.Linear(query_dim, hidden_dim, bias)
        self.k_linear = nn.Linear(query_dim, hidden_dim, bias)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.zeros_(linear.bias)

    def forward(self, q: Tensor, k: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Queries q [B, N, d], memory k [B, d, h, w], mask bool [B, h, w], True on padding -> [B, N, heads, h, w], 0..1."""
        height, width = k.shape[-2], k.shape[-1]
        q = self.q_linear(q).unflatten(-1, [self.num_heads, self.head_dim]).transpose(1, 2)
        k = self.k_linear(k.flatten(2).transpose(1, 2)).unflatten(-1, [self.num_heads, self.head_dim])
        scores = ((q * self.head_dim ** -0.5) @ k.permute(0, 2, 3, 1)).transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(mask.flatten(1)[:, None, None, :], float("-inf"))
        if self.softmax_per_head:
            weights = scores.softmax(-1)
        else:
            weights = scores.flatten(2).softmax(-1).unflatten(-1, [self.num_heads, height * width])
        return self.dropout(weights.unflatten(-1, [height, width]))


class MaskHeadSmallConv(nn.Module):
    """Five convolutions from attention maps to mask logits; three finer maps of the backbone join in on the way up.

    Args:
        dim: channels of the first convolution: the projected feature map's and, besides, a query's attention maps.
        fpn_dims: channels of the three finer maps, deepest first.
        context_dim: channels of the projected feature map.
        masks_at_once: how many masks of an image are made at a time outside of training; the head's memory is that of
            so many, however many queries there are.

    Raises:
        ValueError: if `context_dim` is less than 16.
    """

    def __init__(self, dim: int, fpn_dims: Sequence[int], context_dim: int, *, masks_at_once: int = 10) -> None:
        super().__init__()
        if context_dim < 16:
            raise ValueError(f"a mask head needs a width of at least 16 (--hidden_dim), got {context_dim}")
        self.context_dim = context_dim
        self.masks_at_once = masks_at_once
        self.lay1, self.gn1 = _convolution(dim, dim), _norm(dim)
        self.lay2, self.gn2 = _convolution(dim, context_dim // 2), _norm(context_dim // 2)
        self.lay3, self.gn3 = _convolution(context_dim // 2, context_dim // 4), _norm(context_dim // 4)
        self.lay4, self.gn4 = _convolution(context_dim // 4, context_dim // 8), _norm(context_dim // 8)
        self.lay5, self.gn5 = _convolution(context_dim // 8, context_dim // 16), _norm(context_dim // 16)
        self.out_lay = _convolution(context_dim // 16, 1)
        self.adapter1 = _convolution(fpn_dims[0], context_dim // 2, 1)
        self.adapter2 = _convolution(fpn_dims[1], context_dim // 4, 1)
        self.adapter3 = _convolution(fpn_dims[2], context_dim // 8, 1)

    def forward(self, x: Tensor, bbox_mask: Tensor, fpns: List[Tensor]) -> Tensor:
        """Make the masks of all queries.

        Args:
            x: the map that entered the encoder [B, d, h, w].
            bbox_mask: attention maps [B, N, heads, h, w].
            fpns: three finer maps of the backbone [B, Ci, Hi, Wi], deepest first.

        Returns:
            logits [B * N, 1, H3, W3], of the last map's size.
        """
        # The first convolution sees (projected map, attention maps). It is linear and the former is the same for all
        # queries of an image: its share, by far the larger one, is computed once.
        shared = F.conv2d(x, self.lay1.weight[:, :self.context_dim], self.lay1.bias, padding=1)
        fine = [self.adapter1(fpns[0]), self.adapter2(fpns[1]), self.adapter3(fpns[2])]
        if self.training:
            return self._masks(shared, bbox_mask, fine).flatten(0, 1)[:, None]
        parts = bbox_mask.split(self.masks_at_once, dim=1)
        return torch.cat([self._masks(shared, part, fine) for part in parts], dim=1).flatten(0, 1)[:, None]

    def _masks(self, shared: Tensor, attention: Tensor, fine: List[Tensor]) -> Tensor:
        batch = shared.shape[0]
        own = F.conv2d(attention.flatten(0, 1), self.lay1.weight[:, self.context_dim:], None, padding=1)
        x = (own.unflatten(0, [batch, -1]) + shared[:, None]).flatten(0, 1)
        x = F.relu(self.gn1(x), inplace=True)
        x = F.relu(self.gn2(self.lay2(x)), inplace=True)
        x = F.relu(self.gn3(self.lay3(_refine(x, fine[0]))), inplace=True)
        x = F.relu(self.gn4(self.lay4(_refine(x, fine[1]))), inplace=True)
        x = F.relu(self.gn5(self.lay5(_refine(x, fine[2]))), inplace=True)
        return self.out_lay(x).squeeze(1).unflatten(0, [batch, -1])


def _refine(x: Tensor, fine: Tensor) -> Tensor:
    """Maps of all queries [B * N, C, h, w], enlarged, plus their image's finer map [B, C, H, W] -> [B * N, C, H, W]."""
    larger = F.interpolate(x, size=fine.shape[-2:], mode="nearest").unflatten(0, [fine.shape[0], -1])
    return (larger + fine[:, None]).flatten(0, 1)


def _convolution(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    # Eight groups in every published model; a narrower one may not have channels for as many.
    return nn.GroupNorm(math.gcd(8, channels), channels)


def dice_loss(inputs: Tensor, targets: Tensor, num_boxes: Union[float, Tensor]) -> Tensor:
    """1 - Dice coefficient of each of K masks, summed, per object (sec. 4.4).

    Args:
        inputs: logits [K, ...]; targets: 0 or 1 of the same shape; num_boxes: the sum's divisor.

    Returns:
        a scalar.
    """
    inside, targets = inputs.sigmoid().flatten(1), targets.flatten(1)
    overlap, areas = (inside * targets).sum(1), inside.sum(1) + targets.sum(1)
    return (1 - (2 * overlap + 1) / (areas + 1)).sum() / num_boxes


def sigmoid_focal_loss(inputs: Tensor, targets: Tensor, num_boxes: Union[float, Tensor], alpha: float = 0.25,
                       gamma: float = 2) -> Tensor:
    """Focal loss (Lin et al., 2017, eq. 5), mean over the second dimension and summed over the others, per object.

    Args:
        inputs: logits [K, P, ...]; targets: 0 or 1 of the same shape; num_boxes: the sum's divisor.
        alpha: weight of ones, against 1 - alpha for zeros; below 0 for none.
        gamma: power that plays down what is already right.

    Returns:
        a scalar.
    """
    return focal_loss(inputs, targets, alpha=alpha, gamma=gamma).mean(1).sum() / num_boxes
