"""DETR: a backbone, a transformer and two heads that predict a set of boxes (Carion et al., 2020, sec. 3)."""
import argparse
from typing import Dict, List, Tuple

import torch
from torch import Tensor, nn

from models.criterion import SetCriterion
from models.heads import MLP, HeadLinear
from util.box_ops import box_cxcywh_to_xyxy
from util.misc import NestedTensor, at_least_float32, nested_tensor_from_tensor_list

__all__ = ["DETR", "MLP", "PostProcess", "SetCriterion", "build"]


class DETR(nn.Module):
    """The detector.

    Args:
        backbone: a `Joiner`; transformer: a `Transformer`.
        num_classes: highest label + 1; the no-object class comes after it.
        num_queries: how many objects can be found in one image.
        aux_loss: also return the predictions of the earlier decoder layers, as `aux_outputs`.
    """

    def __init__(self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int,
                 aux_loss: bool = False) -> None:
        super().__init__()
        # The order of the layers decides what weights each draws, and the order of the names in a checkpoint.
        width = transformer.d_model
        self.transformer, self.num_queries, self.aux_loss = transformer, num_queries, aux_loss
        self.class_embed = HeadLinear(width, num_classes + 1)  # one more for no object
        self.bbox_embed = MLP(width, width, 4, num_layers=3)
        self.query_embed = nn.Embedding(num_queries, width)
        self.input_proj = nn.Conv2d(backbone.num_channels, width, 1)
        self.backbone = backbone

    def forward(self, samples: NestedTensor):
        """Predict the objects of a batch.

        Args:
            samples: a NestedTensor, one tensor [B, 3, H, W], or a list of tensors [3, Hi, Wi]; normalised RGB.

        Returns:
            dict with `pred_logits` [B, N, num_classes + 1] and `pred_boxes` [B, N, 4], cxcywh in 0..1 of the padded image's
            valid part; with `aux_loss` also `aux_outputs`, a list of the same two for each earlier decoder layer.
        """
        if isinstance(samples, (list, Tensor)):
            samples = nested_tensor_from_tensor_list(samples)
        decoded = self.decode(samples)
        return self.predictions(decoded)

    def decode(self, samples: NestedTensor) -> Tensor:
        """Images -> decoder outputs [L, B, N, d]."""
        features, positions = self.backbone(samples)
        src, mask = features[-1].decompose()
        return self.transformer(self.input_proj(src), mask, self.query_embed.weight, positions[-1])[0]

    def predictions(self, decoded: Tensor):
        """Apply the heads to decoder outputs [L, B, N, d]; returns the dict that `forward` describes."""
        if not self.aux_loss:
            decoded = decoded[-1:]
        logits = self.class_embed(decoded)
        boxes = self.bbox_embed(decoded).sigmoid()
        out = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if not torch.jit.is_scripting():  # where a dict of tensors can't hold a list
            if self.aux_loss:
                out["aux_outputs"] = self._set_aux_loss(logits, boxes)
        return out

    def _set_aux_loss(self, logits: Tensor, boxes: Tensor):
        return [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits[:-1], boxes[:-1])]


class PostProcess(nn.Module):
    """Turn DETR's outputs into detections in COCO's terms."""

    @torch.no_grad()
    def forward(self, outputs: Dict[str, Tensor], target_sizes: Tensor) -> List[Dict[str, Tensor]]:
        """Best real class of every query, boxes in pixels.

        Args:
            outputs: `pred_logits` [B, N, C + 1], `pred_boxes` [B, N, 4].
            target_sizes: int64 [B, 2], (height, width) of each image to which boxes are scaled: the original's when evaluating.

        Returns:
            for each image a dict of `scores` [N] in 0..1, `labels` int64 [N], `boxes` [N, 4] as xyxy pixels.

        Raises:
            ValueError: if target_sizes isn't [B, 2].
        """
        logits, boxes = outputs["pred_logits"], at_least_float32(outputs["pred_boxes"])
        if target_sizes.shape != (len(logits), 2):
            raise ValueError(f"target_sizes must be [{len(logits)}, 2], got {list(target_sizes.shape)}")
        scores, labels = at_least_float32(logits).softmax(-1)[..., :-1].max(-1)
        height, width = target_sizes.unbind(1)
        scale = torch.stack([width, height, width, height], dim=1).to(boxes.dtype)
        boxes = box_cxcywh_to_xyxy(boxes) * scale[:, None, :]
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes)]


def build(args: argparse.Namespace) -> Tuple[nn.Module, nn.Module, Dict[str, nn.Module]]:
    """What `models.build_model` returns, under its published name."""
    from models import build_model  # which imports this module
    return build_model(args)
