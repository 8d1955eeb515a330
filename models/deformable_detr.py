"""Deformable DETR: sigmoid classification over a deformable transformer on several feature maps (Zhu et al., 2021)."""
import copy
import math
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import criterion
from models.classification import FocalClassification, SoftmaxClassification
from models.deformable_transformer import Encoded, move_boxes
from models.detr import build
from models.heads import MLP, HeadLinear
from models.matcher import HungarianMatcher
from util.box_ops import box_cxcywh_to_xyxy
from util.misc import NestedTensor, at_least_float32, nested_tensor_from_tensor_list

__all__ = ["DeformableDETR", "MLP", "PostProcess", "PostProcessFocal", "SetCriterion", "build"]

NORM_GROUPS = 32  # of the group norm behind the projection of each feature map
PRIOR = 0.01  # probability that each class starts with
SMALL = -2.0  # logit that a box's sides start with where no proposal gives them any


class DeformableDETR(nn.Module):
    """The detector.

    Args:
        backbone: a `Joiner` that returns its deepest maps, as many as there are levels or fewer; convolutions of stride 2
            make the other levels.
        transformer: a `DeformableTransformer`.
        num_classes: highest label + 1; there is no class for "no object".
        num_queries: how many objects can be found in one image.
        num_feature_levels: number of feature maps of the transformer.
        aux_loss: also return the predictions of the earlier decoder layers, as `aux_outputs`.
        with_box_refine: each decoder layer moves the boxes of the one before it (iterative bounding box refinement, A.4).
        two_stage: the queries are made of the encoder's best proposals (A.4), as the transformer must have been told, too.
    """

    two_stage: torch.jit.Final[bool]

    def __init__(self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int,
                 num_feature_levels: int, aux_loss: bool = True, with_box_refine: bool = False,
                 two_stage: bool = False) -> None:
        super().__init__()
        self.num_queries, self.aux_loss, self.two_stage = num_queries, aux_loss, two_stage
        self.num_proposals: int = transformer.two_stage_num_proposals or num_queries
        self.transformer = transformer
        hidden_dim = transformer.d_model
        num_layers = len(transformer.decoder.layers)
        num_heads = num_layers + 1 if two_stage else num_layers  # the last one makes the proposals
        self.class_embed = _heads(_class_head(hidden_dim, num_classes), num_heads, with_box_refine)
        self.bbox_embed = _heads(_box_head(hidden_dim), num_heads, with_box_refine)
        if not two_stage:
            self.query_embed = nn.Embedding(num_queries, 2 * hidden_dim)
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], SMALL)
        self.input_proj = _projections(backbone.map_channels, num_feature_levels, hidden_dim)
        self.backbone = backbone
        # The published weights hold the heads under the decoder's name as well.
        if with_box_refine:
            transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            transformer.decoder.class_embed = self.class_embed

    def forward(self, samples: NestedTensor):
        """Predict the objects of a batch.

        Args:
            samples: a NestedTensor, one tensor [B, 3, H, W], or a list of tensors [3, Hi, Wi]; normalised RGB.

        Returns:
            dict with `pred_logits` [B, N, num_classes], whose sigmoid is each class's probability, and `pred_boxes`
            [B, N, 4], cxcywh in 0..1 of the padded image's valid part; with `aux_loss` also `aux_outputs`, a list of the same
            two for each earlier decoder layer. In the two-stage variant also `enc_outputs`, the same two for every token of
            the encoder's S; there, class 0 stands for any object. N is `num_queries`, or S if that is less.
        """
        if isinstance(samples, (list, Tensor)):
            samples = nested_tensor_from_tensor_list(samples)
        maps, masks, positions = self.feature_maps(samples)
        encoded = self.transformer.encode(maps, masks, positions)
        if not self.two_stage:
            decoded, references = self.decode_learned_queries(encoded)
            return self.predictions(decoded, references)
        logits, box_logits = self.proposals(encoded)
        decoded, references = self.decode_proposals(encoded, logits, box_logits)
        out = self.predictions(decoded, references)
        if not torch.jit.is_scripting():
            out["enc_outputs"] = {"pred_logits": logits, "pred_boxes": box_logits.sigmoid()}
        return out

    def feature_maps(self, samples: NestedTensor) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """Images -> the transformer's maps [B, d, h, w], finest first, their masks [B, h, w] and position encodings."""
        features, positions = self.backbone(samples)
        padding = samples.mask
        assert padding is not None
        maps: List[Tensor] = []
        masks: List[Tensor] = []
        for i, project in enumerate(self.input_proj):
            if i < len(features):
                maps.append(project(features[i].tensors))
            else:
                maps.append(project(features[-1].tensors if i == len(features) else maps[-1]))
            masks.append(F.interpolate(padding[None].float(), size=maps[-1].shape[-2:])[0].to(torch.bool))
            if i >= len(features):
                positions.append(self.backbone[1](NestedTensor(maps[-1], masks[-1])).to(maps[-1].dtype))
        return maps, masks, positions

    def decode_learned_queries(self, encoded: Encoded) -> Tuple[Tensor, List[Tensor]]:
        """Decoder outputs [L, B, N, d] of the learned queries, and the reference points of each layer."""
        query_pos, tgt = self.query_embed.weight.expand(encoded.memory.shape[0], -1, -1).chunk(2, dim=-1)
        reference = self.transformer.reference_points(query_pos).sigmoid()
        return self.transformer.decode(encoded, tgt, query_pos, reference)

    def proposals(self, encoded: Encoded) -> Tuple[Tensor, Tensor]:
        """The first stage: of each token the class logits [B, S, num_classes] and the logits of a box [B, S, 4]."""
        features, anchors = self.transformer.propose(encoded)
        return self.class_embed[-1](features), self.bbox_embed[-1](features) + anchors

    def decode_proposals(self, encoded: Encoded, logits: Tensor, box_logits: Tensor) -> Tuple[Tensor, List[Tensor]]:
        """Decoder outputs [L, B, N, d] of queries made of the best proposals, and the reference boxes of each layer."""
        best = logits[..., 0].topk(min(self.num_proposals, logits.shape[1]), dim=1).indices
        box_logits = box_logits.gather(1, best[:, :, None].expand(-1, -1, 4)).detach()
        tgt, query_pos = self.transformer.queries_at(box_logits)
        return self.transformer.decode(encoded, tgt, query_pos, box_logits.sigmoid())

    def predictions(self, decoded: Tensor, references: List[Tensor]):
        """Apply the heads to decoder outputs [L, B, N, d]; returns what `forward` says of the decoder."""
        first = 0 if self.aux_loss else len(decoded) - 1
        logits: List[Tensor] = []
        boxes: List[Tensor] = []
        for i, (class_head, box_head) in enumerate(zip(self.class_embed, self.bbox_embed)):
            if first <= i < len(decoded):
                logits.append(class_head(decoded[i]))
                boxes.append(move_boxes(references[i], box_head(decoded[i])))
        out = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if not torch.jit.is_scripting():  # where a dict of tensors can't hold a list
            if self.aux_loss:
                out["aux_outputs"] = self._set_aux_loss(logits, boxes)
        return out

    def _set_aux_loss(self, logits: List[Tensor], boxes: List[Tensor]):
        return [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits[:-1], boxes[:-1])]


def _heads(head: nn.Module, count: int, separate: bool) -> nn.ModuleList:
    """A head for each layer: its own, or one that all share under several names."""
    return nn.ModuleList([copy.deepcopy(head) if separate else head for _ in range(count)])


def _class_head(hidden_dim: int, num_classes: int) -> nn.Linear:
    head = HeadLinear(hidden_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def _box_head(hidden_dim: int) -> MLP:
    """A head that at first leaves every reference where it is."""
    head = MLP(hidden_dim, hidden_dim, 4, 3)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


class MapNorm(nn.GroupNorm):
    """Group norm that also takes maps with one value in each group, as one small image has: these become the bias."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)  # torch's module refuses them


def _projections(map_channels: List[int], num_levels: int, hidden_dim: int) -> nn.ModuleList:
    """Of each backbone map to the transformer's width, then from the deepest map on to coarser and coarser ones."""
    layers = [nn.Conv2d(channels, hidden_dim, kernel_size=1) for channels in map_channels]
    while len(layers) < num_levels:
        channels = map_channels[-1] if len(layers) == len(map_channels) else hidden_dim
        layers.append(nn.Conv2d(channels, hidden_dim, kernel_size=3, stride=2, padding=1))
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.ModuleList([nn.Sequential(layer, MapNorm(NORM_GROUPS, hidden_dim)) for layer in layers])


class PostProcessFocal(nn.Module):
    """Turn the outputs of a detector with sigmoid classification into detections in COCO's terms.

    Args:
        num_detections: how many of an image's queries times classes are returned.
    """

    def __init__(self, num_detections: int = 100) -> None:
        super().__init__()
        self.num_detections = num_detections

    @torch.no_grad()
    def forward(self, outputs: Dict[str, Tensor], target_sizes: Tensor) -> List[Dict[str, Tensor]]:
        """The most probable classes of all queries together, boxes in pixels; a query may appear with several classes.

        Args:
            outputs: `pred_logits` [B, N, C], `pred_boxes` [B, N, 4].
            target_sizes: int64 [B, 2], (height, width) of each image to which boxes are scaled: the original's when evaluating.

        Returns:
            for each image a dict of `scores` [K] in 0..1, best first, `labels` int64 [K], `boxes` [K, 4] as xyxy pixels, with
            K = num_detections, or N * C if that is less.

        Raises:
            ValueError: if target_sizes isn't [B, 2].
        """
        logits, boxes = outputs["pred_logits"], at_least_float32(outputs["pred_boxes"])
        if target_sizes.shape != (len(logits), 2):
            raise ValueError(f"target_sizes must be [{len(logits)}, 2], got {list(target_sizes.shape)}")
        num_classes = logits.shape[2]
        probability = at_least_float32(logits).sigmoid().flatten(1)
        scores, index = probability.topk(min(self.num_detections, probability.shape[1]), dim=1)
        query, labels = torch.div(index, num_classes, rounding_mode="floor"), index % num_classes
        height, width = target_sizes.unbind(1)
        scale = torch.stack([width, height, width, height], dim=1).to(boxes.dtype)
        boxes = box_cxcywh_to_xyxy(boxes).gather(1, query[:, :, None].expand(-1, -1, 4)) * scale[:, None, :]
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes)]


PostProcess = PostProcessFocal  # its published name


class SetCriterion(criterion.SetCriterion):
    """The loss with sigmoid classification, by the published arguments.

    Args:
        num_classes, matcher, weight_dict, losses, embedder: as for `models.criterion.SetCriterion`. A
            `HungarianMatcher` that was made for a softmax is set to match by the focal loss.
        focal_alpha: weight of a query's own class, against 1 - focal_alpha for the others.
    """

    def __init__(self, num_classes: int, matcher: Callable[..., criterion.Indices],
                 weight_dict: Dict[str, float], losses: Sequence[str], focal_alpha: float = 0.25, *,
                 embedder: Optional[Callable[[Tensor], Tensor]] = None) -> None:
        focal = FocalClassification(focal_alpha)
        if isinstance(matcher, HungarianMatcher) and isinstance(matcher.classification, SoftmaxClassification):
            matcher.classification = focal
        super().__init__(num_classes, matcher, weight_dict, None, losses, embedder, classification=focal)
