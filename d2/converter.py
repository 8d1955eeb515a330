"""Turn a checkpoint of DETR or UP-DETR, official or trained by `main.py`, into one that Detectron2 loads.

    python d2/converter.py --source_model FILE_OR_URL --output_model FILE [--annotations JSON]

Three things change. All names get the prefix `detr.`. The backbone's tensors get Detectron2's names. And the classifier
loses the rows of ids that no category has, since Detectron2 counts classes without gaps (COCO: 91 rows become 80).
"""
import argparse
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, instead of this folder

import util.openmp  # noqa: F401  (before torch)

import torch
from torch import Tensor

from d2.defaults import DETR
from datasets.coco import class_names, read_ground_truth
from tools.loading import architecture
from tools.output import refuse_others, remember
from util.checkpoint import (EMBEDDING_HEAD, counts_from_centre, describe_kind, detector_of, load_checkpoint,
                             model_state, save_checkpoint, stored_flags)
from util.errors import InputError, run_program

# COCO's detection task never used ten of the ids 1 … 90.
COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
COCO_LABELS = (91, 250)  # outputs of the official box and panoptic models, without no-object
PRETEXT_HEADS = ("patch2query.", "feature_align.", "class_embed.")  # what UP-DETR's pre-training alone has a use for
BLOCK_NAMES = {"bn1": "conv1.norm", "bn2": "conv2.norm", "bn3": "conv3.norm", "downsample.0": "shortcut",
               "downsample.1": "shortcut.norm"}
CONFIGS = {False: "d2/configs/detr_256_6_6_torchvision.yaml", True: "d2/configs/detr_segm_256_6_6_torchvision.yaml"}
OPTION_OF = {"num_queries": "NUM_OBJECT_QUERIES", "hidden_dim": "HIDDEN_DIM", "dim_feedforward": "DIM_FEEDFORWARD",
             "enc_layers": "ENC_LAYERS", "dec_layers": "DEC_LAYERS", "pre_norm": "PRE_NORM", "nheads": "NHEADS"}

# Groups of the 3×3 convolutions and channels of each in res2; 1 and 64 in ordinary networks.
GROUPS = {"resnext50_32x4d": (32, 4), "resnext101_32x8d": (32, 8), "resnext101_64x4d": (64, 4),
          "wide_resnet50_2": (1, 128), "wide_resnet101_2": (1, 128)}


def backbone_name(name: str) -> str:
    """torchvision's name of a ResNet tensor -> Detectron2's: `layer1.0.bn2.weight` -> `res2.0.conv2.norm.weight`."""
    if not name.startswith("layer"):
        return "stem." + name.replace("bn1.", "conv1.norm.")
    layer, block, rest = name.split(".", 2)
    module, parameter = rest.rsplit(".", 1)
    return f"res{int(layer.removeprefix('layer')) + 1}.{block}.{BLOCK_NAMES.get(module, module)}.{parameter}"


def detector_name(name: str) -> str:
    """Name of a tensor of `models.detr.DETR` on torchvision's ResNet -> its name on Detectron2's."""
    prefix = "backbone.0.body."
    return f"{prefix}net.{backbone_name(name.removeprefix(prefix))}" if name.startswith(prefix) else name


def convert(state: Dict[str, Tensor], category_ids: Optional[Sequence[int]],
            with_masks: bool = False) -> Dict[str, Tensor]:
    """The state_dict of `d2.detr.Detr` that belongs to one of DETR, of DETR with masks, or of an UP-DETR pre-training.

    Args:
        state: tensors by name.
        category_ids: category id of each Detectron2 class in turn, ascending; a pre-training has no use for it.
        with_masks: make a detector without masks fit a model with MODEL.MASK_ON (its mask head then starts afresh).

    Returns:
        tensors by name; of a pre-training without `class_embed`, which a fine-tuning starts afresh.

    Raises:
        InputError: if the state isn't of such a model, or has no output for a category id.
    """
    detector = detector_of(state)
    if "query_embed.weight" not in detector or "input_proj.weight" not in detector:
        raise InputError(f"--source_model holds {describe_kind(state)}; DETR, with or without masks, and UP-DETR can "
                         "be converted")
    if any(name.startswith("backbone.1.") for name in detector):
        raise InputError("--source_model has learned position encodings; the Detectron2 wrapper knows sines only")
    if EMBEDDING_HEAD in state:
        raise InputError(f"--source_model holds {describe_kind(state)}: fine-tune it first with main.py --pretrain")
    pretext = "patch2query.weight" in state
    converted = {}
    for name, value in state.items():
        within_masks, name = name.startswith("detr."), name.removeprefix("detr.")
        if pretext and name.startswith(PRETEXT_HEADS):
            continue
        if name.startswith("class_embed."):
            value = class_rows(value, category_ids)
        converted["detr." + ("detr." if within_masks or with_masks else "") + detector_name(name)] = value
    return converted


def class_rows(value: Tensor, category_ids: Sequence[int]) -> Tensor:
    """Take the rows of the category ids, then that of no-object, from a classifier's weight or bias [C + 1, …]."""
    outputs = len(value) - 1
    missing = [number for number in category_ids if number >= outputs]
    if missing:
        raise InputError(f"category id {missing[0]} has no output in --source_model, which has {outputs} classes")
    return value[torch.tensor([*category_ids, outputs])].clone()


def find_category_ids(checkpoint: Dict[str, Any], state: Dict[str, Tensor], annotations: Optional[str]) -> List[int]:
    """Find the category ids of the classes: the annotations', else those in the checkpoint, else COCO's.

    Raises:
        InputError: if none of these tells.
    """
    if annotations:
        return sorted(class_names(read_ground_truth(annotations)))
    if checkpoint.get("class_names"):
        return sorted(checkpoint["class_names"])
    outputs = len(detector_of(state)["class_embed.weight"]) - 1
    if outputs in COCO_LABELS:
        return COCO_IDS
    raise InputError(f"--source_model doesn't say which categories its {outputs} outputs stand for: pass --annotations "
                     "JSON, a COCO-format file with the same categories")


def config_options(checkpoint: Dict[str, Any], state: Dict[str, Tensor], num_classes: Optional[int],
                   with_masks: bool = False) -> List[str]:
    """The options in which a config for this model differs from those in `configs/`: name, value, name, value …"""
    stored = stored_flags(checkpoint)
    told = {"nheads": stored.get("nheads", DETR["NHEADS"]), **architecture(state, "--source_model")}
    options = {f"MODEL.DETR.{option}": told[flag] for flag, option in OPTION_OF.items() if told[flag] != DETR[option]}
    if num_classes not in (None, DETR["NUM_CLASSES"]):
        options["MODEL.DETR.NUM_CLASSES"] = num_classes
    if counts_from_centre(checkpoint):
        options["MODEL.DETR.POSITION_FROM_CENTRE"] = True
    if stored.get("mask_softmax") == "per_head":
        options["MODEL.DETR.MASK_SOFTMAX"] = "per_head"
    if told["backbone"] != "resnet50":
        options["MODEL.RESNETS.DEPTH"] = re.search(r"\d+", told["backbone"])[0]
    if told["backbone"] in GROUPS:
        options["MODEL.RESNETS.NUM_GROUPS"], options["MODEL.RESNETS.WIDTH_PER_GROUP"] = GROUPS[told["backbone"]]
    if told["backbone"] in ("resnet18", "resnet34"):
        options["MODEL.RESNETS.RES2_OUT_CHANNELS"] = 64
    if stored.get("dilation"):
        options["MODEL.RESNETS.RES5_DILATION"] = 2
    if told["backbone_last_layer"] == "layer3":
        options["MODEL.RESNETS.OUT_FEATURES"] = json.dumps(["res2", "res3", "res4"] if with_masks else ["res4"])
    return [str(word) for option in options.items() for word in option]


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    description = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("python d2/converter.py", description=description, allow_abbrev=False)
    parser.add_argument("--source_model", required=True, metavar="FILE_OR_URL", help="checkpoint of DETR or UP-DETR")
    parser.add_argument("--output_model", required=True, metavar="FILE", help="checkpoint to write")
    parser.add_argument("--annotations", metavar="JSON", help="COCO-format file that lists the categories (by default "
                        "those that the checkpoint names, else COCO's)")
    parser.add_argument("--masks", action="store_true",
                        help="make a checkpoint without masks fit a model with MODEL.MASK_ON")
    return parser


def main(args: argparse.Namespace) -> None:
    """Read, convert, write, and say what a config needs.

    Raises:
        InputError: see `convert`, `find_category_ids` and `util.checkpoint.load_checkpoint`.
    """
    refuse_others("--output_model", [Path(args.output_model)])
    checkpoint = load_checkpoint(args.source_model, flag="--source_model")
    state = model_state(checkpoint, args.source_model)
    if stored_flags(checkpoint).get("position_embedding_scale") not in (None, 2 * math.pi):
        raise InputError("--source_model has a --position_embedding_scale of its own, which the Detectron2 wrapper "
                         "doesn't know")
    kind, category_ids = describe_kind(state), None
    if "patch2query.weight" not in state and "class_embed.weight" in detector_of(state):
        category_ids = find_category_ids(checkpoint, state, args.annotations)
    converted = convert(state, category_ids, args.masks)
    save_checkpoint({"model": converted}, args.output_model)
    remember([Path(args.output_model)])
    classes = f"; {len(category_ids)} classes with category ids {_ranges(category_ids)}" if category_ids else \
        "; the classifier is left out, a fine-tuning starts it afresh"
    print(f"{args.source_model}: {kind}{classes}")
    with_masks = args.masks or detector_of(state) is not state
    options = config_options(checkpoint, state, len(category_ids) if category_ids else None, with_masks)
    print(f"wrote {args.output_model}, {len(converted)} tensors; arguments for train_net.py: " + shlex.join(
        ["--config-file", CONFIGS[with_masks], "MODEL.WEIGHTS", args.output_model, *options]))


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 5 -> "1-3, 5"."""
    starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    ends = [*[i - 1 for i in starts[1:]], len(numbers) - 1]
    return ", ".join(str(numbers[i]) if i == j else f"{numbers[i]}-{numbers[j]}" for i, j in zip(starts, ends))


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
