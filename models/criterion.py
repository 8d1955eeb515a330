"""The training loss: match predictions with targets, then compare each pair (Carion et al., 2020, sec. 3.1, eq. 2).

The losses of all decoder layers are computed together, on tensors whose first dimension is the layer. A
matcher or a subclass that knows one layer only, as in the published programs, is called layer by layer instead.
"""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classification import Classification, SoftmaxClassification
from models.matcher import HungarianMatcher, Matching, all_boxes, all_labels
from models.segmentation import dice_loss, sigmoid_focal_loss
from util.box_ops import aligned_generalized_iou, box_cxcywh_to_xyxy
from util.distributed import get_world_size, reduce_sum
from util.misc import accuracy, at_least_float32

LAST_LAYER_LOSSES = ("masks", "object_embedding")  # of which the earlier layers predict nothing
DECODER_LOSSES = LAST_LAYER_LOSSES + ("feature",)  # of which a two-stage detector's proposals have nothing
# What a subclass may replace, each for one decoder layer.
LAYER_METHODS = ("get_loss", "loss_labels", "loss_boxes", "loss_cardinality", "loss_masks", "loss_feature",
                 "loss_object_embedding", "_get_src_permutation_idx", "_get_tgt_permutation_idx")
Indices = Sequence[Tuple[Tensor, Tensor]]  # for each image the matched queries and the targets that they find


def layer_names(name: str, num_layers: int) -> List[str]:
    """Names under which a figure of each decoder layer is reported: `name_0`, `name_1`, …, and `name` for the last."""
    return [f"{name}_{i}" for i in range(num_layers - 1)] + [name]


def weights_for_layers(weights: Dict[str, float], num_layers: int) -> Dict[str, float]:
    """The same loss weights for every decoder layer: {name: w} -> {name: w, name_0: w, …}."""
    return {layer: weight for name, weight in weights.items() for layer in reversed(layer_names(name, num_layers))}


class SetCriterion(nn.Module):
    """The loss of all detectors, with those of masks, UP-DETR's feature reconstruction and DETReg's embeddings.

    A subclass may add losses and replace any of `LAYER_METHODS`, which see one layer: the loss "size" is what
    its `loss_size` returns, or its `get_loss`. The matcher may be any callable that takes the outputs of one
    layer and the targets and returns a pair of int64 tensors (queries, targets) for each image.

    Args:
        num_classes: highest label + 1; the class index of "no object".
        matcher: assigns targets to queries.
        weight_dict: weight of each reported loss; the total is the weighted sum over the names in it.
        eos_coef: weight of the no-object class in a softmax's loss (other classes: 1); a focal loss has none.
        losses: which of "labels", "boxes", "cardinality", "masks", "feature", "object_embedding" to compute.
        embedder: says what regions' embeddings should be, crops [T, 3, P, P] -> [T, E]; "object_embedding" needs it.
        classification: how queries say their class; the matcher's, or a softmax if it has none.

    Raises:
        ValueError: for a loss of another name, or if the embedder is missing.
    """

    def __init__(self, num_classes: int, matcher: Callable[..., Indices], weight_dict: Dict[str, float],
                 eos_coef: Optional[float], losses: Sequence[str],
                 embedder: Optional[Callable[[Tensor], Tensor]] = None, *,
                 classification: Optional[Classification] = None) -> None:
        super().__init__()
        known = list(self._losses())
        unknown = sorted(name for name in set(losses) - set(known) if not hasattr(self, f"loss_{name}"))
        if unknown and type(self).get_loss is SetCriterion.get_loss:
            raise ValueError(f"unknown losses {', '.join(unknown)}; known are {', '.join(known)}")
        if "object_embedding" in losses and embedder is None:
            raise ValueError("the loss object_embedding needs an embedder")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = list(losses)
        self.embedder = embedder
        if classification is None:
            classification = getattr(matcher, "classification", None) or SoftmaxClassification()
        self.classification = classification
        self.register_buffer("empty_weight", self.classification.class_weights(num_classes, eos_coef))

    def _losses(self) -> Dict[str, Callable[..., Dict[str, Tensor]]]:
        return {"labels": self._class_losses, "boxes": self._box_losses, "cardinality": self._cardinality,
                "masks": self._mask_losses, "feature": self._feature_loss,
                "object_embedding": self._embedding_loss}

    def forward(self, outputs: Dict[str, Any], targets: Sequence[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        """Losses of a batch.

        Args:
            outputs: `pred_logits` [B, N, C + 1] ([B, N, C] without a no-object class), `pred_boxes` [B, N, 4] and what the
                losses need besides; `aux_outputs` may hold the same of the earlier layers, `enc_outputs` logits and boxes of
                a two-stage detector's proposals, for which every object is of class 0.
            targets: for each image `labels` int64 [n], `boxes` cxcywh [n, 4] in 0..1; for the losses that need them
                `masks` bool [n, H, W], `patches` [n, 3, P, P].

        Returns:
            scalar tensors by name; figures of earlier layers end in `_0`, `_1`, …, those of proposals in `_enc`.

        In training the normalisers are those of the whole batch over all processes, divided by the number of processes,
        so that averaged gradients equal those of one process that holds the whole batch.
        """
        if self._knows_one_layer_only():
            return self._layer_by_layer(outputs, targets)
        stacked = _stack_layers(outputs)
        groups = [(stacked["pred_logits"], stacked["pred_boxes"], targets)]
        proposals: Dict[str, Tensor] = {}
        if "enc_outputs" in outputs:
            proposals = _stack_layers(outputs["enc_outputs"])
            objects = _without_classes(targets)
            groups.append((proposals["pred_logits"], proposals["pred_boxes"], objects))
        matchings = self.matcher.match_groups(groups)
        per_layer = self._losses_of(self.losses, stacked, targets, matchings[0])
        losses = {name: values[-1] for name, values in per_layer.items()}
        for name, values in per_layer.items():
            losses.update(zip(layer_names(name, len(values))[:-1], values[:-1]))
        if proposals:
            names = [name for name in self.losses if name not in DECODER_LOSSES]
            of_proposals = self._losses_of(names, proposals, objects, matchings[1])
            of_proposals.pop("class_error", None)  # with one class there are no wrong ones
            losses.update({f"{name}_enc": values[-1] for name, values in of_proposals.items()})
        return losses

    def get_loss(self, loss: str, outputs: Dict[str, Any], targets: Sequence[Dict[str, Tensor]],
                 indices: Indices, num_boxes: Union[float, Tensor], **kwargs: Any) -> Dict[str, Tensor]:
        """The figures of one loss for one layer, by name; `kwargs` go to its method.

        Args:
            loss: a name such as "labels".
            outputs: of one layer, `pred_logits` [B, N, C] and so on.
            targets: as for `forward`.
            indices: for each image the matched queries and their targets, int64 [k] each.
            num_boxes: what sums over pairs are divided by.

        Raises:
            ValueError: for a loss of another name.
        """
        method = getattr(self, f"loss_{loss}", None)
        if method is None:
            raise ValueError(f"unknown loss {loss!r}; known are {', '.join(self._losses())}")
        return method(outputs, targets, indices, num_boxes, **kwargs)

    def loss_labels(self, outputs: Dict[str, Any], targets: Sequence[Dict[str, Tensor]], indices: Indices,
                    num_boxes: Union[float, Tensor], log: bool = True) -> Dict[str, Tensor]:
        """`loss_ce` and, with `log`, `class_error` of one layer; arguments as for `get_loss`."""
        losses = self._loss_of_layer("labels", outputs, targets, indices, num_boxes)
        return losses if log else {"loss_ce": losses["loss_ce"]}

    def loss_boxes(self, outputs: Dict[str, Any], targets: Sequence[Dict[str, Tensor]], indices: Indices,
                   num_boxes: Union[float, Tensor]) -> Dict[str, Tensor]:
        """`loss_bbox` and `loss_giou` of one layer; arguments as for `get_loss`."""
        return self._loss_of_layer("boxes", outputs, targets, indices, num_boxes)

    def loss_cardinality(self, outputs: Dict[str, Any], targets: Sequence[Dict[str, Tensor]],
                         indices: Indices, num_boxes: Union[float, Tensor]) -> Dict[str, Tensor]:
        """`cardinality_error` of one layer; arguments as for `get_loss`."""
        return self._loss_of_layer("cardinality", outputs, targets, indices, num_boxes)

    def loss_masks(self, outputs: Dict[str, Any], targets: Sequence[Dict[str, Tensor]], indices: Indices,
                   num_boxes: Union[float, Tensor]) -> Dict[str, Tensor]:
        """`loss_mask` and `loss_dice`; arguments as for `get_loss`."""
        return self._loss_of_layer("masks", outputs, targets, indices, num_boxes)

    def loss_feature(self, outputs: Dict[str, Any], targets: Sequence[Dict[str, Tensor]], indices: Indices,
                     num_boxes: Union[float, Tensor]) -> Dict[str, Tensor]:
        """`loss_feature` of one layer; arguments as for `get_loss`, `gt_feature` among the outputs."""
        return self._loss_of_layer("feature", outputs, targets, indices, num_boxes)

    def loss_object_embedding(self, outputs: Dict[str, Any], targets: Sequence[Dict[str, Tensor]],
                              indices: Indices, num_boxes: Union[float, Tensor]) -> Dict[str, Tensor]:
        """`loss_object_embedding`; arguments as for `get_loss`."""
        return self._loss_of_layer("object_embedding", outputs, targets, indices, num_boxes)

    def _get_src_permutation_idx(self, indices: Indices) -> Tuple[Tensor, Tensor]:
        """Image and query of each matched pair, int64 [K] each."""
        return _images_and(0, indices)

    def _get_tgt_permutation_idx(self, indices: Indices) -> Tuple[Tensor, Tensor]:
        """Image and target (its place in the image) of each matched pair, int64 [K] each."""
        return _images_and(1, indices)

    def _knows_one_layer_only(self) -> bool:
        """True if the matcher or a loss isn't ours, so that it has to be called for one layer at a time."""
        replaced = any(name in vars(self) or getattr(type(self), name) is not getattr(SetCriterion, name)
                       for name in LAYER_METHODS)
        added = set(self.losses) - set(self._losses())
        return replaced or bool(added) or not _matches_all_layers(self.matcher)

    def _layer_by_layer(self, outputs: Dict[str, Any],
                        targets: Sequence[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        """What `forward` returns, through `get_loss` and one call of the matcher for each layer."""
        num_boxes = self._num_boxes(outputs["pred_logits"].device, targets)
        last = {name: value for name, value in outputs.items() if name not in ("aux_outputs", "enc_outputs")}
        indices = self.matcher(last, targets)
        losses: Dict[str, Tensor] = {}
        for name in self.losses:
            losses.update(self.get_loss(name, outputs, targets, indices, num_boxes))
        shared = {name: outputs[name] for name in ("gt_feature",) if name in outputs}
        others = [(f"_{i}", {**shared, **layer}, targets, LAST_LAYER_LOSSES)
                  for i, layer in enumerate(outputs.get("aux_outputs", []))]
        if "enc_outputs" in outputs:
            others.append(("_enc", outputs["enc_outputs"], _without_classes(targets), DECODER_LOSSES))
        for suffix, layer, layer_targets, left_out in others:
            indices = self.matcher(layer, layer_targets)
            for name in self.losses:
                if name not in left_out:
                    quiet = {"log": False} if name == "labels" else {}
                    figures = self.get_loss(name, layer, layer_targets, indices, num_boxes, **quiet)
                    losses.update({figure + suffix: value for figure, value in figures.items()})
        return losses

    def _loss_of_layer(self, name: str, outputs: Dict[str, Any], targets: Sequence[Dict[str, Tensor]],
                       indices: Indices, num_boxes: Union[float, Tensor]) -> Dict[str, Tensor]:
        """The figures of a loss for one layer by the method that computes all layers'; see `get_loss`."""
        stacked = _stack_layers({key: value for key, value in outputs.items() if key != "aux_outputs"})
        device = next(iter(stacked.values())).device
        image, query = self._get_src_permutation_idx(indices)
        offsets = torch.tensor([0] + [len(target["labels"]) for target in targets[:-1]]).cumsum(0)
        target_image, target = self._get_tgt_permutation_idx(indices)
        target = target + offsets.to(target.device)[target_image]
        matching = Matching(*(part.to(device)[None] for part in (image, query, target)))
        arguments = {"num_boxes": torch.as_tensor(num_boxes, dtype=torch.float32, device=device)}
        if name == "labels":
            classes = self._target_classes(stacked["pred_logits"], targets, matching)
            normaliser = self.classification.normaliser(classes, arguments["num_boxes"], self.empty_weight)
            arguments.update(classes=classes, class_normaliser=self._over_processes(normaliser))
        return {figure: values[0] for figure, values in
                self._losses()[name](stacked, targets, matching, **arguments).items()}

    def _losses_of(self, names: Sequence[str], stacked: Dict[str, Tensor], targets: Sequence[Dict[str, Tensor]],
                   matching: Matching) -> Dict[str, Tensor]:
        """The named losses of stacked layers; each is [L], or [1] where only the last layer has it."""
        classes = self._target_classes(stacked["pred_logits"], targets, matching)
        num_boxes, class_normaliser = self._normalisers(classes, targets)
        per_layer: Dict[str, Tensor] = {}
        for name in names:
            per_layer.update(self._losses()[name](stacked, targets, matching, classes=classes, num_boxes=num_boxes,
                                                  class_normaliser=class_normaliser))
        return per_layer

    def _class_losses(self, stacked: Dict[str, Tensor], targets: Sequence[Dict[str, Tensor]],
                      matching: Matching, *, classes: Tensor, class_normaliser: Tensor,
                      **_: Tensor) -> Dict[str, Tensor]:
        """`loss_ce` [L]: see `models.classification`; `class_error` [1]: % of the last layer's matched queries whose best class
        is wrong (100 without any)."""
        logits = stacked["pred_logits"]
        loss = self.classification.loss(logits, classes, class_normaliser, self.empty_weight)
        image, query = matching.image[-1], matching.query[-1]
        correct = accuracy(logits[-1, image, query].detach(), classes[-1, image, query])[0]
        return {"loss_ce": loss, "class_error": (100 - correct)[None]}

    def _box_losses(self, stacked: Dict[str, Tensor], targets: Sequence[Dict[str, Tensor]],
                    matching: Matching, *, num_boxes: Tensor, **_: Tensor) -> Dict[str, Tensor]:
        """`loss_bbox`, `loss_giou` [L]: L1 distance (cxcywh) and 1 - generalised IoU, summed over pairs, per object."""
        predicted = self._matched(stacked["pred_boxes"], matching)
        expected = all_boxes(targets).to(predicted.dtype)[matching.target]
        distance = (predicted - expected).abs().sum((1, 2))
        giou = aligned_generalized_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(expected))
        return {"loss_bbox": distance / num_boxes, "loss_giou": (1 - giou).sum(1) / num_boxes}

    @torch.no_grad()
    def _cardinality(self, stacked: Dict[str, Tensor], targets: Sequence[Dict[str, Tensor]],
                     matching: Matching, **_: Tensor) -> Dict[str, Tensor]:
        """`cardinality_error` [L]: how far the number of queries that see an object is from the number of objects, on average
        over images. Not a loss: it has no gradient."""
        logits = stacked["pred_logits"]
        found = self.classification.finds_object(logits).sum(2)
        present = torch.tensor([len(target["labels"]) for target in targets]).to(logits.device, non_blocking=True)
        return {"cardinality_error": (found - present).abs().float().mean(1)}

    def _mask_losses(self, stacked: Dict[str, Tensor], targets: Sequence[Dict[str, Tensor]],
                     matching: Matching, *, num_boxes: Tensor, **_: Tensor) -> Dict[str, Tensor]:
        """`loss_mask`, `loss_dice` [1]: focal loss (mean over pixels) and 1 - Dice coefficient, summed over pairs, per
        object (sec. 4.4), of the last layer only. Masks are enlarged to the targets' size; padding is background."""
        predicted = at_least_float32(stacked["pred_masks"][0, matching.image[-1], matching.query[-1]])
        expected = _padded_masks(targets)[matching.target[-1]].to(predicted.dtype).flatten(1)
        size = _padded_size(targets)
        predicted = F.interpolate(predicted[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
        return {"loss_mask": sigmoid_focal_loss(predicted, expected, num_boxes)[None],
                "loss_dice": dice_loss(predicted, expected, num_boxes)[None]}

    def _feature_loss(self, stacked: Dict[str, Tensor], targets: Sequence[Dict[str, Tensor]],
                      matching: Matching, *, num_boxes: Tensor, **_: Tensor) -> Dict[str, Tensor]:
        """`loss_feature` [L]: squared distance of the L2-normalised reconstructed and true patch features, per patch
        (Dai et al., 2021, eq. 4). Patch j of an image is its target j."""
        predicted = F.normalize(self._matched(stacked["pred_feature"], matching), dim=-1)
        expected = F.normalize(stacked["gt_feature"].flatten(0, 1), dim=-1)[matching.target]
        return {"loss_feature": (predicted - expected).square().sum((1, 2)) / num_boxes}

    def _embedding_loss(self, stacked: Dict[str, Tensor], targets: Sequence[Dict[str, Tensor]],
                        matching: Matching, *, num_boxes: Tensor, **_: Tensor) -> Dict[str, Tensor]:
        """`loss_object_embedding` [1]: mean absolute difference of the predicted and true embeddings' numbers, summed
        over the last layer's pairs, per region (Bar et al., 2022, sec. 3.2). Patch j of an image is its target j."""
        predicted = stacked["pred_features"][0, matching.image[-1], matching.query[-1]]
        embeddings = self.embedder(torch.cat([target["patches"] for target in targets]))
        expected = embeddings.to(predicted.dtype)[matching.target[-1]]
        return {"loss_object_embedding": (predicted - expected).abs().mean(1).sum()[None] / num_boxes}

    def _matched(self, values: Tensor, matching: Matching) -> Tensor:
        """Pick the matched queries of [L, B, N, d] -> [L, K, d]."""
        layer = torch.arange(len(values), device=values.device)[:, None]
        return values[layer, matching.image, matching.query]

    def _target_classes(self, logits: Tensor, targets: Sequence[Dict[str, Tensor]], matching: Matching) -> Tensor:
        """Class that each query should predict, int64 [L, B, N]."""
        classes = torch.full(logits.shape[:3], self.num_classes, dtype=torch.int64, device=logits.device)
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        labels = all_labels(targets)
        classes[layer, matching.image, matching.query] = labels[matching.target]
        return classes

    def _normalisers(self, classes: Tensor, targets: Sequence[Dict[str, Tensor]]) -> Sequence[Tensor]:
        """Number of objects (at least 1) and, per layer, that of the class loss; see `forward` for processes."""
        num_boxes = _count(targets, classes.device)
        sums = torch.cat([num_boxes, self.classification.normaliser(classes, num_boxes, self.empty_weight)])
        sums = self._over_processes(sums)
        return sums[0].clamp(min=1), sums[1:]

    def _num_boxes(self, device: torch.device, targets: Sequence[Dict[str, Tensor]]) -> Tensor:
        """Number of objects (at least 1), a scalar; see `forward` for processes."""
        return self._over_processes(_count(targets, device))[0].clamp(min=1)

    def _over_processes(self, sums: Tensor) -> Tensor:
        return reduce_sum(sums) / get_world_size() if self.training else sums


def _matches_all_layers(matcher: Callable[..., Indices]) -> bool:
    """True for our matcher, as long as nobody could tell that its `forward` isn't called."""
    return (isinstance(matcher, HungarianMatcher) and type(matcher).forward is HungarianMatcher.forward
            and type(matcher).__call__ is nn.Module.__call__ and "forward" not in vars(matcher)
            and not matcher._forward_hooks and not matcher._forward_pre_hooks)


def _images_and(place: int, indices: Indices) -> Tuple[Tensor, Tensor]:
    """Image of each pair, and one of its two parts."""
    parts = [torch.as_tensor(pair[place], dtype=torch.int64) for pair in indices]
    return torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)]), torch.cat(parts)


def _count(targets: Sequence[Dict[str, Tensor]], device: torch.device) -> Tensor:
    """Number of objects of a batch, float [1]."""
    count = sum(len(target["labels"]) for target in targets)
    return torch.tensor([float(count)]).to(device, non_blocking=True)


def _without_classes(targets: Sequence[Dict[str, Tensor]]) -> List[Dict[str, Tensor]]:
    """The targets of proposals, for which every object is of class 0."""
    return [{**target, "labels": torch.zeros_like(target["labels"], dtype=torch.int64)} for target in targets]


def _stack_layers(outputs: Dict[str, Any]) -> Dict[str, Tensor]:
    """Outputs of all layers in tensors whose first dimension is the layer."""
    layers = [*outputs.get("aux_outputs", []), outputs]
    stacked = {name: at_least_float32(torch.stack([layer[name] for layer in layers]))
               for name in ("pred_logits", "pred_boxes", "pred_feature") if name in outputs}
    if "gt_feature" in outputs:
        stacked["gt_feature"] = at_least_float32(outputs["gt_feature"])
    if "pred_masks" in outputs:
        stacked["pred_masks"] = outputs["pred_masks"][None]  # of the last layer only
    if "pred_features" in outputs:
        stacked["pred_features"] = at_least_float32(outputs["pred_features"][None])  # of the last layer only
    return stacked


def _padded_size(targets: Sequence[Dict[str, Tensor]]) -> Tuple[int, int]:
    """Height and width of the batch, which images without objects tell as well: their masks are [0, H, W]."""
    return max(target["masks"].shape[1] for target in targets), max(target["masks"].shape[2] for target in targets)


def _padded_masks(targets: Sequence[Dict[str, Tensor]]) -> Tensor:
    """Masks of all objects of the batch, bool [T, H, W], padded like their images."""
    height, width = _padded_size(targets)
    masks = [target["masks"] for target in targets]
    return torch.cat([F.pad(mask, (0, width - mask.shape[2], 0, height - mask.shape[1])) for mask in masks])
