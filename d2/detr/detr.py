"""The meta-architecture `Detr`: this project's model, loss and post-processing behind Detectron2's interface."""
from typing import Any, Dict, List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from d2.detr.backbone import DetectronBackbone
from d2.samples import relative_boxes
from models.backbone import Joiner
from models.criterion import SetCriterion, weights_for_layers
from models.detr import DETR, PostProcess
from models.matcher import HungarianMatcher
from models.position_encoding import PositionEmbeddingSine
from models.segmentation import DETRsegm, PostProcessSegm
from models.transformer import Transformer
from util.checkpoint import load_checkpoint, load_model_strictly, model_state
from util.misc import nested_tensor_from_tensor_list


@META_ARCH_REGISTRY.register()
class Detr(nn.Module):
    """DETR, with masks if MODEL.MASK_ON; built from `MODEL.DETR`, `MODEL.BACKBONE` and `MODEL.PIXEL_MEAN`, `PIXEL_STD`.

    Its parameters are `detr.` and the names that `models.detr.DETR` (with masks `models.segmentation.DETRsegm`) gives
    them; those of the backbone are Detectron2's. `d2/converter.py` translates.

    Raises:
        InputError: if MODEL.DETR.FROZEN_WEIGHTS can't be read or holds another model.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.with_masks = cfg.MODEL.MASK_ON
        self.detr = build_detr(cfg)
        self.criterion = build_criterion(cfg)
        # A constant is no weight: checkpoints hold nothing but the detector.
        self.criterion.register_buffer("empty_weight", self.criterion.empty_weight, persistent=False)
        self.boxes_of, self.masks_of = PostProcess(), PostProcessSegm()
        for name, values in (("pixel_mean", cfg.MODEL.PIXEL_MEAN), ("pixel_std", cfg.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[Dict[str, Any]]) -> Any:
        """Train on, or detect in, a batch of images.

        Args:
            batched_inputs: of `DetrDatasetMapper` or any mapper like it: `image` [3, H, W] with values 0..255 in the
                channel order of PIXEL_MEAN; in training `instances` with `gt_boxes`, `gt_classes` and, with masks,
                `gt_masks`; else, if results are to be of another size than the image, `height` and `width`.

        Returns:
            in training the weighted losses by name; else for each image {"instances": Instances} with all queries as
            `pred_boxes` (not clipped to the image), `scores`, `pred_classes`, and with masks `pred_masks` bool
            [N, H, W].
        """
        images = [(item["image"].to(self.device).float() - self.pixel_mean) / self.pixel_std for item in batched_inputs]
        outputs = self.detr(nested_tensor_from_tensor_list(images))
        if self.training:
            return self._losses(outputs, [self._target(item["instances"].to(self.device)) for item in batched_inputs])
        return self._results(outputs, batched_inputs, images)

    def _target(self, instances: Instances) -> Dict[str, Tensor]:
        height, width = instances.image_size
        target = {"labels": instances.gt_classes, "boxes": relative_boxes(instances.gt_boxes.tensor, height, width)}
        if self.with_masks:
            # Detectron2's own mapper keeps polygons, and nothing where there are no objects.
            masks = instances.gt_masks if instances.has("gt_masks") else BitMasks(torch.zeros(0, height, width))
            if not isinstance(masks, BitMasks):
                masks = BitMasks.from_polygon_masks(masks, height, width)
            target["masks"] = masks.tensor.to(self.device)
        return target

    def _losses(self, outputs: Dict[str, Any], targets: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        losses = self.criterion(outputs, targets)
        if has_event_storage():
            get_event_storage().put_scalar("class_error", losses["class_error"])
        weights = self.criterion.weight_dict  # Detectron2 sums what it gets, so figures that aren't losses stay out
        return {name: value * weights[name] for name, value in losses.items() if name in weights}

    def _results(self, outputs: Dict[str, Tensor], batched_inputs: Sequence[Dict[str, Any]],
                 images: Sequence[Tensor]) -> List[Dict[str, Instances]]:
        sizes = torch.tensor([image.shape[1:] for image in images], device=self.device)
        wanted = [(item.get("height", image.shape[1]), item.get("width", image.shape[2]))
                  for item, image in zip(batched_inputs, images)]
        wanted_sizes = torch.tensor(wanted, device=self.device)
        results = self.boxes_of(outputs, wanted_sizes)
        if self.with_masks:
            results = self.masks_of(results, outputs, wanted_sizes, sizes)
        return [{"instances": _instances(result, size)} for result, size in zip(results, wanted)]


def _instances(result: Dict[str, Tensor], size: Sequence[int]) -> Instances:
    instances = Instances(tuple(size), pred_boxes=Boxes(result["boxes"]), scores=result["scores"],
                          pred_classes=result["labels"])
    if "masks" in result:
        instances.pred_masks = result["masks"][:, 0]
    return instances


def build_detr(cfg: CfgNode) -> nn.Module:
    """The model of `models.detr` or `models.segmentation` that the config describes, on a backbone of Detectron2's."""
    node = cfg.MODEL.DETR
    position = PositionEmbeddingSine(node.HIDDEN_DIM // 2, normalize=True, from_centre=node.POSITION_FROM_CENTRE)
    backbone = Joiner(DetectronBackbone(cfg), position)
    transformer = Transformer(node.HIDDEN_DIM, node.NHEADS, node.ENC_LAYERS, node.DEC_LAYERS, node.DIM_FEEDFORWARD,
                              node.DROPOUT, normalize_before=node.PRE_NORM, return_intermediate_dec=True)
    detr = DETR(backbone, transformer, node.NUM_CLASSES, node.NUM_OBJECT_QUERIES, node.DEEP_SUPERVISION)
    if not cfg.MODEL.MASK_ON:
        return detr
    if node.FROZEN_WEIGHTS:
        load_frozen(detr, node.FROZEN_WEIGHTS)
    return DETRsegm(detr, bool(node.FROZEN_WEIGHTS), softmax_per_head=node.MASK_SOFTMAX == "per_head",
                    map_channels=backbone[0].finer_channels)


def load_frozen(detr: nn.Module, location: str) -> None:
    """Fill a detector from a Detectron2 checkpoint of a `Detr` without masks."""
    state = model_state(load_checkpoint(location, flag="MODEL.DETR.FROZEN_WEIGHTS"), location)
    load_model_strictly(detr, {"model": {name.removeprefix("detr."): value for name, value in state.items()}}, location)


def build_criterion(cfg: CfgNode) -> SetCriterion:
    """The loss that the config describes; matching costs have the losses' weights."""
    node = cfg.MODEL.DETR
    weights = {"loss_ce": 1.0, "loss_bbox": node.L1_WEIGHT, "loss_giou": node.GIOU_WEIGHT}
    weights = weights_for_layers(weights, node.DEC_LAYERS if node.DEEP_SUPERVISION else 1)
    losses = ["labels", "boxes", "cardinality"]
    if cfg.MODEL.MASK_ON:
        weights.update(loss_mask=node.MASK_WEIGHT, loss_dice=node.DICE_WEIGHT)  # of the last decoder layer only
        losses.append("masks")
    matcher = HungarianMatcher(1.0, node.L1_WEIGHT, node.GIOU_WEIGHT)
    return SetCriterion(node.NUM_CLASSES, matcher, weights, node.NO_OBJECT_WEIGHT, losses)
