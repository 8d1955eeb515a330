"""A model out of a checkpoint alone: its tensors tell the architecture, the flags stored beside them tell the rest."""
import argparse
from typing import Any, Dict, NamedTuple, Optional

from torch import Tensor, nn

from datasets.pretext import PRETRAIN_MAX_SIZE, PRETRAIN_SIZES
from main import get_args_parser
from models import NUM_CLASSES, build_model, coco_is_thing_map
from models.from_checkpoint import architecture
from util import recipes
from util.checkpoint import (counts_from_centre, describe_kind, detector_of, is_deformable, load_checkpoint,
                             load_model_strictly, model_state, stored_flags)
from util.errors import InputError

DETECTOR, PRETRAINED = "coco", "imagenet"  # the --dataset_file whose models they are

# What tensors don't tell: taken from the flags that the checkpoint holds, else at its default.
STORED_FLAGS = {
    DETECTOR: ("nheads", "dilation", "val_size", "max_size", "position_embedding_scale", "num_queries", "apply_exif"),
    PRETRAINED: ("nheads", "dilation", "position_embedding_scale", "num_patches", "patch_size", "min_patch", "max_patch",
                 "pretrain_sizes", "pretrain_max_size"),
}


class Loaded(NamedTuple):
    """A model in evaluation mode on its device, the flags that describe it, and by class id its name and, of a model
    for panoptic segmentation, whether it is a thing."""

    model: nn.Module
    args: argparse.Namespace
    class_names: Dict[int, str]
    is_thing_map: Dict[int, bool]


def load_model(location: str, kind: str, device: Optional[str] = None, **given: Any) -> Loaded:
    """Build the model that a checkpoint holds.

    Args:
        location: file or URL; one of ours, or an official one, which may hold weights alone.
        kind: `DETECTOR` or `PRETRAINED`, what the caller can show.
        device: "cuda", "cpu", …; by default CUDA if there is one.
        given: flags of `main.py` that count more than the stored ones; None for not given.

    Raises:
        InputError: if it can't be read, holds another kind of model, or doesn't fit the flags.
    """
    checkpoint = load_checkpoint(location, flag="--checkpoint")
    # A DETReg pre-training model is a detector of regions; what it predicts of their contents can't be shown.
    state = {name: value for name, value in model_state(checkpoint, location).items()
             if not name.startswith("feature_embed.")}
    _require_kind(state, kind, location)
    args = get_args_parser().parse_args([])
    args.dataset_file, args.device, args.aux_loss = kind, device, False
    args.resume = location  # the backbone's weights come with it: none are fetched
    stored = stored_flags(checkpoint)
    for name in STORED_FLAGS[kind]:
        if stored.get(name) is not None:
            setattr(args, name, stored[name])
    if kind == DETECTOR and stored.get("dataset_file") == "regions":
        args.val_size = max(stored.get("pretrain_sizes") or PRETRAIN_SIZES)
        args.max_size = stored.get("pretrain_max_size") or PRETRAIN_MAX_SIZE
    given = {name: value for name, value in given.items() if value is not None}
    nheads = given.get("nheads", args.nheads) or recipes.COMMON["nheads"]
    for name, value in {**given, **architecture(state, f"--checkpoint {location}", nheads)}.items():
        if value is not None:
            setattr(args, name, value)
    if args.masks and args.mask_softmax is None:
        args.mask_softmax = stored.get("mask_softmax")
    if args.model == "detr" and args.position_embedding == "sine" and counts_from_centre(checkpoint):
        args.position_from_centre = True
    recipes.resolve(args)
    model = build_model(args)[0]
    load_model_strictly(model, {"model": state}, location)
    is_thing_map = checkpoint.get("is_thing_map") or {}
    if args.masks and args.num_classes == NUM_CLASSES["coco_panoptic"] and not is_thing_map:
        is_thing_map = coco_is_thing_map(args.num_classes)  # the number of classes of the published models alone
    return Loaded(model.eval(), args, checkpoint.get("class_names") or {}, is_thing_map)


def _require_kind(state: Dict[str, Tensor], kind: str, location: str) -> None:
    needed = ("query_embed.weight", "class_embed.weight", "transformer.decoder.norm.weight", "input_proj.weight")
    if is_deformable(state):
        needed = ("class_embed.0.weight", "bbox_embed.0.layers.0.weight", "input_proj.0.0.weight")
    holds = f"--checkpoint {location} holds {describe_kind(state)}"
    if any(name not in detector_of(state) for name in needed):
        raise InputError(f"{holds}; this program shows DETR, Deformable DETR and UP-DETR models")
    pretrained = "patch2query.weight" in state
    if pretrained and kind == DETECTOR:
        raise InputError(f"{holds}, which finds patches and knows no classes: use python -m tools.find_patch, "
                         f"or fine-tune it first with main.py --pretrain {location}")
    if not pretrained and kind == PRETRAINED:
        raise InputError(f"{holds}, which can't be shown patches to find: use python -m tools.predict, "
                         "or give the checkpoint of a pre-training (main.py --imagenet_path)")


def add_checkpoint_flags(parser: argparse.ArgumentParser, checkpoint_help: str,
                         default_device: Optional[str] = None, required: bool = True) -> None:
    """The flags that every program which loads a model has; pass `nheads` and `dilation` on to `load_model`."""
    parser.add_argument("--checkpoint", required=required, metavar="FILE_OR_URL", help=checkpoint_help)
    parser.add_argument("--device", default=default_device, help=f"({default_device or 'cuda if there is one, else cpu'})")
    group = parser.add_argument_group("for checkpoints that hold weights without flags")
    group.add_argument("--nheads", type=int, help="attention heads (8)")
    group.add_argument("--dilation", action="store_true", default=None, help="the backbone is a DC5")
