"""The detectors. `build_model(args)` is the one place where flags become a model with its loss and post-processing."""
import argparse
from typing import Dict, Optional, Tuple

import torch
from torch import nn

from models.backbone import build_backbone
from models.criterion import SetCriterion, weights_for_layers
from models.deformable_detr import DeformableDETR, PostProcessFocal
from models.deformable_transformer import build_deformable_transformer
from models.detreg import DETRegDeformableDETR, DETRegDETR, build_embedder
from models.detr import DETR, PostProcess
from models.matcher import build_matcher
from models.segmentation import DETRsegm, PostProcessPanoptic, PostProcessSegm
from models.transformer import build_transformer
from models.updetr import UPDETR
from util import recipes
from util.errors import InputError

# Highest label + 1 where no annotations have been read; `main.py` reads them.
NUM_CLASSES = {"coco": 91, "coco_panoptic": 250, "voc": 21, "regions": 91}
PUBLISHED_VOC_CLASSES = 20  # of DETR's and UP-DETR's programs, whose flags make the models that they published
LAST_COCO_THING = 90  # COCO's panoptic categories up to this id are things, those above are stuff
PATCH_CLASSES = 2  # UP-DETR's labels: 1 for a patch; 0 is unused, 2 (no object) comes on top


def coco_is_thing_map(num_classes: int) -> Dict[int, bool]:
    """Which of COCO's panoptic classes are things."""
    return {label: label <= LAST_COCO_THING for label in range(num_classes)}


def build_model(args: argparse.Namespace, is_thing_map: Optional[Dict[int, bool]] = None
                ) -> Tuple[nn.Module, nn.Module, Dict[str, nn.Module]]:
    """Build what the flags describe, on `args.device`; flags left open are resolved first (see `util.recipes`).

    A Namespace of a published program's parser, or the flags in a checkpoint, will do too and stay as they are.

    Args:
        args: the flags.
        is_thing_map: for panoptic segmentation, whether each class is a thing or stuff; COCO's if not given.

    Returns:
        the model, its criterion, and the post-processors by kind of result: "bbox", "segm" with masks, and "panoptic".

    Raises:
        InputError: if flags contradict each other.
    """
    voc_classes = PUBLISHED_VOC_CLASSES if recipes.is_published_detr(args) else NUM_CLASSES["voc"]
    args = recipes.settled(args)
    pretraining, deformable = args.dataset_file == "imagenet", args.model == "deformable_detr"
    if pretraining and args.num_queries % args.num_patches:
        raise InputError(f"--num_queries {args.num_queries} is not a multiple of --num_patches {args.num_patches}")
    backbone = build_backbone(args)
    transformer = build_deformable_transformer(args) if deformable else build_transformer(args)
    weights = {"loss_ce": args.cls_loss_coef, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    losses = ["labels", "boxes", "cardinality"]
    embedder = build_embedder(args) if args.object_embedding_loss else None  # DETReg's frozen network
    if pretraining:
        num_classes = PATCH_CLASSES
        model: nn.Module = UPDETR(backbone, transformer, num_classes, args.num_queries, args.aux_loss, args.num_patches,
                                  args.feature_recon, args.query_shuffle, separate_groups=not args.no_attention_mask)
        if args.feature_recon:
            weights["loss_feature"] = 1.0
            losses.append("feature")
    else:
        num_classes = args.num_classes or {**NUM_CLASSES, "voc": voc_classes}[args.dataset_file]
        model = _build_detector(args, backbone, transformer, num_classes, embedder.dim if embedder else None)
    postprocessors = {"bbox": build_postprocess(args)}
    if args.masks:
        model = DETRsegm(model, freeze_detr=bool(args.frozen_weights), softmax_per_head=args.mask_softmax == "per_head",
                         map_channels=backbone[0].finer_channels)
        losses.append("masks")
        # As published, these weights stand under the earlier layers' names too, although those predict no masks.
        weights.update(loss_mask=args.mask_loss_coef, loss_dice=args.dice_loss_coef)
        postprocessors["segm"] = PostProcessSegm()
        if args.dataset_file == "coco_panoptic":
            postprocessors["panoptic"] = PostProcessPanoptic(is_thing_map or coco_is_thing_map(num_classes))
    weight_dict = weights_for_layers(weights, args.dec_layers if args.aux_loss else 1)
    if deformable:
        weight_dict.update({f"{name}_enc": weight for name, weight in weights.items()})  # of proposals, in two stages
    if embedder:
        losses.append("object_embedding")
        weight_dict["loss_object_embedding"] = args.object_embedding_coef  # the last layer alone has it
    criterion = SetCriterion(num_classes, build_matcher(args), weight_dict, args.eos_coef, losses, embedder)
    device = torch.device(args.device)
    return model.to(device), criterion.to(device), postprocessors


def _build_detector(args: argparse.Namespace, backbone: nn.Module, transformer: nn.Module,
                    num_classes: int, embedding_dim: Optional[int]) -> nn.Module:
    """A DETR or Deformable DETR; with an `embedding_dim` it also predicts embeddings, as in DETReg."""
    parts = [backbone, transformer, num_classes, args.num_queries]
    if args.model == "deformable_detr":
        parts += [args.num_feature_levels, args.aux_loss, args.with_box_refine, args.two_stage]
        return DETRegDeformableDETR(*parts, embedding_dim) if embedding_dim else DeformableDETR(*parts)
    parts.append(args.aux_loss)
    return DETRegDETR(*parts, embedding_dim) if embedding_dim else DETR(*parts)


def build_postprocess(args: argparse.Namespace) -> nn.Module:
    """What turns the model's outputs into detections."""
    return PostProcessFocal() if args.model == "deformable_detr" else PostProcess()
