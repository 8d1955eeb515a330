"""Ten steps of each training in float64, from made-up weights and images: what `test_golden_losses.py` keeps.

`python -m tests.models.golden > tests/data/golden_losses.json` writes the kept losses anew. Every change of a number
there is a change of what is learned, and needs a reason.
"""
import argparse
import contextlib
import io
import json
import math
from typing import Any, Dict, List

import numpy as np
import torch
from torch import Tensor, nn

from engine import train_one_epoch
from main import build_optimizer, get_args_parser
from models import build_model
from util import recipes
from util.misc import nested_tensor_from_tensor_list

STEPS = 10
SMALL = ("--device cpu --backbone resnet18 --load_backbone none --hidden_dim 32 --nheads 4 --enc_layers 2 --dec_layers 2 "
         "--dim_feedforward 48 --dropout 0 --num_queries 12")
COCO = "--dataset_file coco --num_classes 6"
DEFORMABLE = f"--model deformable_detr {COCO}"
REGIONS = "--dataset_file regions --object_embedding_loss --load_embedding none"
KINDS = {
    "detr": COCO,
    "detr, pre-norm, learned positions": f"{COCO} --pre_norm --position_embedding learned",
    "detr, SGD, no auxiliary losses": f"{COCO} --sgd --no_aux_loss",
    "detr, masks": f"{COCO} --masks",
    "detr, masks on a frozen detector": f"{COCO} --masks --frozen_weights detector.pth",
    "detr, panoptic": "--dataset_file coco_panoptic --num_classes 9 --masks",
    "updetr": "--dataset_file imagenet --num_patches 3 --feature_recon --query_shuffle",
    "updetr, frozen backbone": "--dataset_file imagenet --num_patches 3 --fre_cnn --feature_recon",
    "deformable_detr": DEFORMABLE,
    "deformable_detr, refined": f"{DEFORMABLE} --with_box_refine",
    "deformable_detr, two stages": f"{DEFORMABLE} --with_box_refine --two_stage",
    "detreg, deformable_detr": f"{REGIONS} --model deformable_detr --with_box_refine",
    "detreg, detr": f"{REGIONS} --model detr",
}


def arguments(kind: str) -> argparse.Namespace:
    """The resolved flags of a kind of training."""
    return recipes.resolve(get_args_parser().parse_args(f"{SMALL} {KINDS[kind]}".split()))


def fill(module: nn.Module, random: np.random.Generator) -> None:
    """Draw the weights of all layers from `random`; vectors, most of them constants at first, stay."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                spread = 1 / math.sqrt(parameter[0].numel())
                parameter.copy_(torch.from_numpy(random.normal(0, spread, list(parameter.shape))))


def batches(args: argparse.Namespace, random: np.random.Generator) -> List[Any]:
    """Two images of unlike sizes a step, the second without objects at times."""
    made = []
    for step in range(STEPS):
        images = [torch.from_numpy(random.normal(size=(3, *size))) for size in ((40, 64), (64, 48))]
        counts = (3, 3) if args.dataset_file == "imagenet" else (1 + step % 3, step % 2)
        targets = [_target(args, image, count, random) for image, count in zip(images, counts)]
        inputs = [nested_tensor_from_tensor_list(images)]
        if args.dataset_file == "imagenet":
            inputs.append(torch.from_numpy(random.normal(size=(2, 3, 3, 32, 32))))
        made.append((*inputs, targets))
    return made


def _target(args: argparse.Namespace, image: Tensor, count: int, random: np.random.Generator) -> Dict[str, Tensor]:
    classes = args.num_classes or 2  # regions and patches are of class 1
    target = {"image_id": torch.tensor(count), "labels": torch.from_numpy(random.integers(1, classes, count)),
              "boxes": torch.from_numpy(random.uniform(0.2, 0.4, (count, 4)))}
    if args.masks:
        target["masks"] = torch.from_numpy(random.random((count, *image.shape[1:])) > 0.7)
    if args.dataset_file == "regions":
        target["patches"] = torch.from_numpy(random.normal(size=(count, 3, 32, 32)))
    return target


class Recorder(nn.Module):
    """A criterion that keeps what it returned."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion
        self.weight_dict = criterion.weight_dict
        self.steps: List[Dict[str, float]] = []

    def forward(self, outputs: Any, targets: Any) -> Dict[str, Tensor]:
        losses = self.criterion(outputs, targets)
        self.steps.append({name: losses[name].item() for name in sorted(losses)})
        return losses


def losses_of(kind: str) -> List[Dict[str, float]]:
    """Each step's losses, by name, of the engine's own loop."""
    args, random = arguments(kind), np.random.default_rng(0)
    torch.manual_seed(0)
    model, criterion, _ = build_model(args)
    model, criterion = model.double(), criterion.double()
    fill(model, random)
    if criterion.embedder is not None:
        criterion.embedder.network.double()
        fill(criterion.embedder.network, random)
    recorder = Recorder(criterion)
    torch.manual_seed(1)
    with contextlib.redirect_stdout(io.StringIO()):
        train_one_epoch(model, recorder, batches(args, random), build_optimizer(model, args), torch.device("cpu"), 0,
                        args.clip_max_norm)
    return recorder.steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({kind: losses_of(kind) for kind in KINDS}, indent=0))
