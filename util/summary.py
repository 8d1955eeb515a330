"""What a run is about to do, in a few lines at its start: batch, learning rates, weights, data."""
import argparse
from typing import Dict, List, Optional

import torch
from torch import Tensor, nn

from util.distributed import get_world_size


def training_summary(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer,
                     class_names: Dict[int, str], num_images: int, objects: Optional[Tensor], steps: int) -> str:
    """The summary of a training.

    Args:
        args: resolved flags.
        model: the model itself, not its DistributedDataParallel wrapper.
        objects: int64 [num_images], how many objects each training image has; None if nothing is known of them.
        steps: batches that a process takes in an epoch.
    """
    processes = get_world_size()
    factors = [(processes, "processes"), (args.batch_size, "images"), (args.accumulate_steps, "accumulated batches")]
    product = " x ".join(f"{number} {name}" for number, name in factors)
    batch = processes * args.batch_size * args.accumulate_steps
    return "\n".join([f"effective batch size: {batch} ({product}), {steps} steps an epoch",
                      f"learning rates: {_rates(args, model, optimizer)}", f"weights: {_weights(args)}",
                      *_data("training", args, class_names, num_images, objects)])


def evaluation_summary(args: argparse.Namespace, class_names: Dict[int, str], num_images: int,
                       objects: Optional[Tensor]) -> str:
    """The summary of an evaluation alone; see `training_summary`."""
    return "\n".join([f"weights: {_weights(args)}", *_data("evaluation", args, class_names, num_images, objects)])


def _rates(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    projections = vars(args).get("lr_linear_proj_names") or []
    parts = []
    for group in optimizer.param_groups:
        number = sum(parameter.numel() for parameter in group["params"])
        if number:
            rooms = {names[id(parameter)].removeprefix("detr.").split(".")[0] for parameter in group["params"]}
            where = "of the backbone" if rooms == {"backbone"} else "outside the backbone"
            if all(any(word in names[id(parameter)] for word in projections) for parameter in group["params"]):
                where = f"of {' and '.join(projections)}"
            parts.append(f"{group['lr']:g} for {number:,} parameters {where}")
    fixed = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return ", ".join([*parts, f"{fixed:,} parameters are fixed"])


def _weights(args: argparse.Namespace) -> str:
    if args.resume:
        return f"all from {args.resume} (--resume)"
    if vars(args).get("frozen_weights"):
        return f"the detector from {args.frozen_weights} (--frozen_weights), its mask head at random"
    if args.pretrain:
        return f"what fits from {args.pretrain} (--pretrain), the rest at random"
    if args.load_backbone == "none":
        return "all at random"
    return f"backbone from {args.load_backbone} (--load_backbone), the rest at random"


def _data(purpose: str, args: argparse.Namespace, class_names: Dict[int, str], num_images: int,
          objects: Optional[Tensor]) -> List[str]:
    text = f"{purpose} images: {num_images}"
    if class_names:
        text += f", {len(class_names)} classes with labels up to {max(class_names)} (--num_classes {args.num_classes})"
    lines = [text]
    if args.dataset_file == "imagenet":
        lines.append(f"patches in an image: {args.num_patches}, for each {args.num_queries // args.num_patches} queries")
    if args.dataset_file == "regions":
        lines.append(f"regions in an image: {args.max_prop} at most, chosen by --strategy {args.strategy}, from "
                     + (f"--cache_path {args.cache_path}" if args.cache_path else "selective search on the spot"))
        lines.append(f"object embeddings: --obj_embedding_head {args.obj_embedding_head} of --load_embedding "
                     f"{args.load_embedding}, weight {args.object_embedding_coef:g}" if args.object_embedding_loss else
                     "object embeddings: none (--object_embedding_loss predicts them)")
    if objects is None or not len(objects):
        return lines
    most, queries = int(objects.max()), args.num_queries
    average = objects.double().mean()
    lines.append(f"objects in an image: {average:.1f} on average, {most} at most; --num_queries {queries}")
    above = int((objects > queries).sum())
    if above:
        lines.append(f"warning: {above} {purpose} images have more objects than --num_queries {queries}; "
                     f"no more than {queries} of them can be found")
    return lines
