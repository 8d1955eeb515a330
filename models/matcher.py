"""Bipartite matching between predictions and targets (Carion et al., 2020, sec. 3.1, eq. 1)."""
import argparse
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from models.classification import Classification, FocalClassification, SoftmaxClassification
from util import recipes
from util.box_ops import aligned_generalized_iou, box_cxcywh_to_xyxy
from util.misc import at_least_float32


class NonFinitePredictionError(FloatingPointError):
    """The model predicted NaN or infinity; the message names the images."""


@dataclass
class Matching:
    """Matched pairs of all decoder layers; each tensor is int64 [L, K], with the same K pairs per layer.

    image: position in the batch; query: position among the queries; target: position in the concatenated targets.
    """

    image: Tensor
    query: Tensor
    target: Tensor


class HungarianMatcher(nn.Module):
    """Finds, for every image and decoder layer, the one-to-one assignment of targets to queries of least cost.

    The cost of a pair is cost_class * (cost of the target's class, see `models.classification`) + cost_bbox * L1 distance of
    the boxes (cxcywh) + cost_giou * (-generalised IoU).

    Args:
        cost_class, cost_bbox, cost_giou: weights; at least one is positive, else ValueError.
        queries_per_target: if given, target j of an image may only be matched to queries j*k … j*k + k - 1, the ones to
            which UP-DETR adds patch j (an option of ours, `--match_within_group`).
        classification: how queries say their class; softmax if not given.
    """

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1,
                 queries_per_target: Optional[int] = None, classification: Optional[Classification] = None) -> None:
        super().__init__()
        if not any((cost_class, cost_bbox, cost_giou)):
            raise ValueError("the matching costs cost_class, cost_bbox and cost_giou are all zero")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.queries_per_target = queries_per_target
        self.classification = classification or SoftmaxClassification()

    def forward(self, outputs: Dict[str, Tensor], targets: Sequence[Dict[str, Tensor]]) -> List[Tuple[Tensor, Tensor]]:
        """Match one layer: outputs `pred_logits` [B, N, C], `pred_boxes` [B, N, 4] with a sequence of B targets.

        Returns:
            for each image a pair of int64 CPU tensors (query, target) of equal length min(N, n), sorted by query.
        """
        cost = self.costs(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets).cpu()
        sizes = [len(target["labels"]) for target in targets]
        return [(query[0], target[0]) for query, target in self._assign(cost, sizes, targets)]

    @torch.no_grad()
    def match_layers(self, logits: Tensor, boxes: Tensor, targets: Sequence[Dict[str, Tensor]]) -> Matching:
        """Match all decoder layers; see `match_groups`."""
        return self.match_groups([(logits, boxes, targets)])[0]

    @torch.no_grad()
    def match_groups(self, groups: Sequence[Tuple[Tensor, Tensor, Sequence[Dict[str, Tensor]]]]) -> List[Matching]:
        """Match groups of layers, each with one cost computation, and all with one copy to the host.

        Args:
            groups: triples of logits [L, B, N, C], boxes cxcywh [L, B, N, 4] and a sequence of B targets; groups may differ
                in L, N and their targets' labels.

        Raises:
            NonFinitePredictionError: if a prediction that takes part isn't finite.
        """
        costs = [self.costs(*group) for group in groups]
        host = torch.cat([cost.flatten() for cost in costs]).cpu()  # the step's one wait for the device
        parts = host.split([cost.numel() for cost in costs])
        return [self._matching(part.view(cost.shape), targets, cost.device)
                for part, cost, (_, _, targets) in zip(parts, costs, groups)]

    def _matching(self, cost: Tensor, targets: Sequence[Dict[str, Tensor]], device: torch.device) -> Matching:
        """Solve the problems of one group, whose costs [L, T, N] are on the host."""
        sizes = [len(target["labels"]) for target in targets]
        pairs = self._assign(cost, sizes, targets)
        offsets = np.cumsum([0] + sizes[:-1])
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)], dim=1)
        query = torch.cat([query for query, _ in pairs], dim=1)
        target = torch.cat([target + int(offset) for offset, (_, target) in zip(offsets, pairs)], dim=1)
        image, query, target = torch.stack([image, query, target]).to(device, non_blocking=True)
        return Matching(image, query, target)

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes: Tensor, targets: Sequence[Dict[str, Tensor]]) -> Tensor:
        """Cost of every target with every query of its own image, [L, T, N]; T counts the batch's targets.

        In float32, or float64 for such predictions.
        """
        sizes = torch.tensor([len(target["labels"]) for target in targets])
        labels, target_boxes = all_labels(targets), all_boxes(targets)
        image = torch.repeat_interleave(torch.arange(len(targets)), sizes).to(labels.device, non_blocking=True)
        predicted = at_least_float32(boxes)[:, image]
        expected = target_boxes.to(predicted.dtype)[None, :, None]
        cost = self.cost_class * self.classification.matching_cost(at_least_float32(logits), image, labels)
        cost = cost + self.cost_bbox * (predicted - expected).abs().sum(-1)
        giou = aligned_generalized_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(expected))
        return cost - self.cost_giou * giou

    def _assign(self, cost: Tensor, sizes: List[int], targets: Sequence[Dict[str, Any]]) -> List[Tuple[Tensor, Tensor]]:
        """Solve every (layer, image) problem on the host; per image a pair (query, target) of int64 [L, k]."""
        host = cost.numpy()
        blocks = np.split(host, np.cumsum(sizes)[:-1], axis=1)
        if not np.isfinite(host).all():
            bad = [str(_image_id(target)) for block, target in zip(blocks, targets) if not np.isfinite(block).all()]
            raise NonFinitePredictionError("the model predicts NaN or infinite classes or boxes for image id "
                                           + ", ".join(bad))
        return [self._assign_image(block) for block in blocks]

    def _assign_image(self, block: np.ndarray) -> Tuple[Tensor, Tensor]:
        num_layers, num_targets, num_queries = block.shape
        if self.queries_per_target is not None:
            group = np.arange(num_queries) // self.queries_per_target
            block = np.where(group[None, :] == np.arange(num_targets)[:, None], block, np.inf)
        rows = min(num_targets, num_queries)
        query, target = np.empty((num_layers, rows), np.int64), np.empty((num_layers, rows), np.int64)
        for layer, cost in enumerate(block):
            matched_target, matched_query = linear_sum_assignment(cost)
            order = matched_query.argsort()
            query[layer], target[layer] = matched_query[order], matched_target[order]
        return torch.from_numpy(query), torch.from_numpy(target)


def all_labels(targets: Sequence[Dict[str, Tensor]]) -> Tensor:
    """Labels of a batch, int64 [T], of any whole type: torch would take bytes for a mask. Those of an image without objects
    may be of any type, as `torch.tensor([])` is."""
    labels = [target["labels"] for target in targets]
    return torch.cat([part if len(part) and part.is_floating_point() else part.to(torch.int64) for part in labels])


def all_boxes(targets: Sequence[Dict[str, Tensor]]) -> Tensor:
    """Boxes of a batch, [T, 4]; those of an image without objects may be `torch.tensor([])`."""
    return torch.cat([target["boxes"].reshape(-1, 4) for target in targets])


def _image_id(target: Dict[str, Any]) -> Any:
    image_id = target.get("image_id", "unknown")
    return image_id.tolist()[0] if isinstance(image_id, Tensor) and image_id.dim() else image_id


def build_matcher(args: argparse.Namespace) -> HungarianMatcher:
    """The matcher that the flags describe."""
    args = recipes.settled(args)
    within_group = args.dataset_file == "imagenet" and args.match_within_group
    return HungarianMatcher(
        args.set_cost_class, args.set_cost_bbox, args.set_cost_giou,
        args.num_queries // args.num_patches if within_group else None,
        FocalClassification(args.focal_alpha) if args.model == "deformable_detr" else SoftmaxClassification())
