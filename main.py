"""Train and evaluate DETR, Deformable DETR, UP-DETR and DETReg: data set and flags say which. See README.md."""
import argparse
import contextlib
import datetime
import functools
import inspect
import os
import secrets
import sys
import time
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import util.early_signals
import util.openmp  # noqa: F401  (before torch)

if __name__ == "__main__":
    util.early_signals.hold()  # the imports below take seconds

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from datasets import (build_dataset, file_sizes, get_coco_api_from_dataset, num_classes_and_names, objects_per_image,
                      shown_sizes)
from datasets.batching import aspect_groups, equal_size_batches
from datasets.coco_panoptic import is_thing_map
from datasets.regions import STRATEGIES
from datasets.sampling import TrainBatches
from engine import evaluate, evaluate_patches, train_one_epoch
from models import build_model
from models.acceleration import compile_parts, set_precision
from models.detreg import HEADS
from models.from_checkpoint import model_flags
from util import recipes
from util.checkpoint import (load_checkpoint, load_model_strictly, load_pretrained, model_state,
                             num_outputs, save_checkpoint, stored_flags)
from util.distributed import (all_gather, get_rank, get_world_size, init_distributed_mode, is_main_process, print_main,
                              shutdown)
from util.errors import InputError, run_program
from util.host_memory import keep_freed_memory, largest_memory_mb
from util.keeper import Keeper
from util.misc import collate_fn, get_sha
from util.progress import Progress
from util.saving import claimed
from util.schedule import build_scheduler
from util.signals import REACTIONS, SignalListener, shield_worker
from util.summary import evaluation_summary, training_summary
from util.training_state import TrainingState, append_log, find_resume, open_log, plain_args, write_json

# Flags that go on from a checkpoint where its training is continued; those of a model that --pretrain leaves behind; and
# those that an evaluation may change.
CONTINUED = ("lr", "lr_backbone", "lr_linear_proj_mult", "weight_decay", "lr_drop", "lr_drop_epochs", "start_epoch")
WHOLE_ALONE = ("two_stage", "masks", "mask_softmax", "feature_recon", "query_shuffle", "no_attention_mask")
OPEN_IN_EVALUATION = ("dilation", "position_embedding_scale", "position_from_centre", "mask_softmax", "num_queries")
MOST_CLASSES_SHOWN = 20  # on the console; log.txt has all
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def get_args_parser() -> argparse.ArgumentParser:
    """All flags. A default of None is filled in by `util.recipes`, which knows what each training's published program used."""
    parser = argparse.ArgumentParser("DETR, UP-DETR and DETReg", add_help=False, allow_abbrev=False)

    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, help="1e-4; Deformable DETR: 2e-4")
    group.add_argument("--lr_backbone", type=float,
                       help="0 freezes the backbone (1e-5; Deformable DETR: 2e-5; UP-DETR's pre-training: as --lr; "
                            "DETReg's: 0)")
    group.add_argument("--lr_backbone_names", nargs="+", type=str,
                       help="parameters whose names contain one of these learn at --lr_backbone")
    group.add_argument("--lr_linear_proj_names", nargs="+", type=str,
                       help="Deformable DETR: parameters that learn at --lr times --lr_linear_proj_mult "
                            "(reference_points sampling_offsets)")
    group.add_argument("--lr_linear_proj_mult", type=float, help="0.1")
    group.add_argument("--batch_size", type=int, help="images per process (2; DETReg pre-training: 4)")
    group.add_argument("--weight_decay", type=float, help="1e-4")
    group.add_argument("--epochs", type=int, help="300; Deformable DETR: 50; pre-training: 60")
    group.add_argument("--lr_drop", type=int,
                       help="epochs after which all rates fall to a tenth (200; Deformable DETR and pre-training: 40)")
    group.add_argument("--lr_drop_epochs", type=int, nargs="+", metavar="EPOCH",
                       help="numbers of epochs after which they do so, instead of --lr_drop")
    group.add_argument("--sgd", action="store_true", help="SGD with momentum 0.9 instead of AdamW")
    group.add_argument("--clip_max_norm", default=0.1, type=float, help="gradient norm to clip to; none is where it is 0 or less")
    group.add_argument("--accumulate_steps", default=1, type=int, help="batches per optimizer step")
    group.add_argument("--amp", choices=sorted(AMP_TYPES), help="mixed precision; matching and losses stay in float32")
    group.add_argument("--tf32", action="store_true", help="on a GPU, compute float32 products in TF32")
    group.add_argument("--compile", action="store_true", help="compile the transformer, and on a GPU the backbone")
    group.add_argument("--no_fuse", action="store_true",
                       help="run convolution, frozen batch norm and ReLU one by one, 3x3 convolutions directly")

    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=tuple(recipes.MODELS), help="detr (DETReg pre-training: deformable_detr)")
    group.add_argument("--backbone", help="a ResNet of torchvision's: resnet18 … resnet152, resnext50_32x4d, wide_resnet50_2, … (resnet50)")
    group.add_argument("--backbone_last_layer", choices=("layer3", "layer4"),
                       help="(layer4) layer3 cuts the ResNet there: stride 16, for small images")
    group.add_argument("--load_backbone", help="supervised, swav, none, a file or a URL (supervised; pre-training: swav)")
    group.add_argument("--dilation", action="store_true", default=None, help="dilate layer4 instead of striding it (DC5)")
    group.add_argument("--position_embedding", choices=("sine", "learned"), help="(sine)")
    group.add_argument("--position_embedding_scale", type=float, help="range of sine's positions (2π)")
    group.add_argument("--position_from_centre", action="store_true", default=None,
                       help="DETR: sine's positions count to a pixel's centre, as in DETReg's DETR (as in the checkpoint "
                            "that the run starts from)")
    group.add_argument("--enc_layers", type=int, help="6")
    group.add_argument("--dec_layers", type=int, help="6")
    group.add_argument("--dim_feedforward", type=int, help="2048; Deformable DETR: 1024")
    group.add_argument("--hidden_dim", type=int, help="256")
    group.add_argument("--dropout", default=0.1, type=float)
    group.add_argument("--nheads", type=int, help="8")
    group.add_argument("--num_queries", type=int, help="100; Deformable DETR: 300")
    group.add_argument("--pre_norm", action="store_true", default=None)
    group.add_argument("--num_classes", type=int, help="highest label + 1 (read from the annotations)")

    group = parser.add_argument_group("Deformable DETR")
    group.add_argument("--with_box_refine", action="store_true", default=None,
                       help="each decoder layer moves the boxes of the one before it")
    group.add_argument("--two_stage", action="store_true", default=None, help="make the queries of the encoder's proposals")
    group.add_argument("--num_feature_levels", type=int, help="feature maps, the finest of stride 8 (4); 1: the deepest alone")
    group.add_argument("--enc_n_points", type=int, help="points that a head of the encoder samples in each map (4)")
    group.add_argument("--dec_n_points", type=int, help="points that a head of the decoder samples in each map (4)")

    group = parser.add_argument_group("UP-DETR pre-training")
    group.add_argument("--num_patches", type=int, help="patches to find in an image (10); divides --num_queries")
    group.add_argument("--feature_recon", action="store_true", default=None, help="also reconstruct the patches' features")
    group.add_argument("--query_shuffle", action="store_true", default=None, help="shuffle the query embeddings")
    group.add_argument("--fre_cnn", action="store_true", default=None, help="freeze the backbone")
    group.add_argument("--no_attention_mask", action="store_true", default=None,
                       help="let the queries of different patches see each other (the paper's ablation)")
    group.add_argument("--match_within_group", action="store_true", default=None,
                       help="a patch may only be matched to the queries it was added to (beyond the paper)")
    group.add_argument("--patch_size", type=int, help="side in pixels to which patches are resized (128)")
    group.add_argument("--min_patch", type=int, help="least side of a patch, in pixels of the image file (8)")
    group.add_argument("--max_patch", type=int, help="largest side of a patch (the image's side less --min_patch)")
    group.add_argument("--pretrain_sizes", type=int, nargs="+", help="short sides to choose from (320 … 480, step 16)")
    group.add_argument("--pretrain_max_size", type=int, help="largest long side (600)")

    group = parser.add_argument_group("DETReg pre-training")
    group.add_argument("--strategy", choices=STRATEGIES,
                       help="which of an image's proposals are to be found: the best, any, or any but good ones more "
                            "often (topk)")
    group.add_argument("--max_prop", type=int, help="most regions to find in an image (30)")
    group.add_argument("--cache_path", help="--imagenet_path's proposals by tools.cache_proposals (made on the spot)")
    group.add_argument("--object_embedding_loss", action="store_true", default=None,
                       help="also predict embeddings of what is in the regions")
    group.add_argument("--obj_embedding_head", choices=HEADS,
                       help="embeddings: a ResNet's pooled intermediate map, or SwAV's projection head (intermediate)")
    group.add_argument("--object_embedding_coef", type=float, help="weight of their loss (1)")
    group.add_argument("--load_embedding",
                       help="weights of the frozen ResNet that makes them: swav, supervised, none, a file or a URL (as "
                            "--load_backbone); of a ResNet-50 for swav, else of a --backbone")

    group = parser.add_argument_group("loss and matching")
    group.add_argument("--no_aux_loss", dest="aux_loss", action="store_false", help="no losses of earlier decoder layers")
    group.add_argument("--set_cost_class", type=float, help="1; Deformable DETR: 2")
    group.add_argument("--set_cost_bbox", default=5, type=float)
    group.add_argument("--set_cost_giou", default=2, type=float)
    group.add_argument("--cls_loss_coef", type=float, help="1; Deformable DETR: 2")
    group.add_argument("--bbox_loss_coef", default=5, type=float)
    group.add_argument("--giou_loss_coef", default=2, type=float)
    group.add_argument("--eos_coef", type=float, help="weight of the no-object class (0.1; pre-training: patches / queries)")
    group.add_argument("--focal_alpha", type=float, help="Deformable DETR: weight of a query's own class (0.25)")

    group = parser.add_argument_group("masks")
    group.add_argument("--masks", action="store_true", default=None, help="also predict a mask for each object")
    group.add_argument("--frozen_weights",
                       help="checkpoint (file or URL) of the detector on which to train a mask head alone")
    group.add_argument("--mask_loss_coef", type=float, help="weight of the masks' focal loss (1)")
    group.add_argument("--dice_loss_coef", type=float, help="weight of the masks' Dice loss (1)")
    group.add_argument("--mask_softmax", choices=("joint", "per_head"),
                       help="attention maps of a query sum to one over all heads together, as in DETR's mask models, "
                            "or for each head, as in UP-DETR's and DETReg's (joint)")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_file", choices=(*recipes.DATASETS, *recipes.DATASET_NAMES),
                       help="by default what the given path says")
    group.add_argument("--dataset", choices=tuple(recipes.LAYOUT),
                       help="DETReg's names of what to train on, in folders of --data_root; instead of --dataset_file "
                            "and a path")
    group.add_argument("--data_root", help="folder with ilsvrc/, ilsvrc100/, MSCoco/, pascal/VOCdevkit/ (data)")
    group.add_argument("--coco_path", help="folder with train2017/, val2017/ and annotations/")
    group.add_argument("--coco_panoptic_path",
                       help="folder with panoptic_train2017/, panoptic_val2017/ and annotations/")
    for part, words in (("train", "training"), ("val", "validation")):
        group.add_argument(f"--{part}_images", help=f"folder of the {words} images ({part}2017 in --coco_path)")
        group.add_argument(f"--{part}_annotations", help=f"COCO-format JSON of the {words} images, relative to "
                           f"--coco_path (annotations/instances_{part}2017.json; panoptic: --coco_panoptic_path)")
    group.add_argument("--voc_path", help="the VOCdevkit folder, with VOC2007/ and VOC2012/")
    group.add_argument("--imagenet_path", help="folder tree of images to pre-train on")
    group.add_argument("--class_list",
                       help="text file that names the folders (classes) of --imagenet_path to use, as ImageNet100's")
    group.add_argument("--imagenet_val_path", help="folder tree of held-out images to evaluate a pre-training on")
    group.add_argument("--held_out_share", type=float, help="share of --imagenet_path's images to hold out for that (0)")
    group.add_argument("--remove_difficult", action="store_true", default=None, help="VOC: don't train on difficult objects")
    group.add_argument("--filter_pct", type=float, help="train on this share of the images: 0.1 is a tenth (-1: all)")
    group.add_argument("--filter_num", type=float, help="train on so many of the images (-1: all)")
    group.add_argument("--filter_file", help="train on the images and boxes of this file: train_subset.json of an "
                       "--output_dir, or a JSON list of image ids")
    group.add_argument("--filter_seed", type=int, help="decides which images or boxes are taken (--seed)")
    group.add_argument("--shots", type=int, metavar="K", help="train on K boxes or images of each class")
    group.add_argument("--shots_of", choices=("boxes", "images"), help="what --shots counts (boxes)")
    group.add_argument("--class_split", help='JSON file {"novel": [class names]}, such as datasets/splits/coco.json; '
                       'other classes are "base" unless it names these too')
    group.add_argument("--class_part", choices=("base", "novel"), help="part of --class_split to train and evaluate on")
    group.add_argument("--train_sizes", type=int, nargs="+", help="short sides to choose from (480 … 800, step 32)")
    group.add_argument("--crop_resize", type=int, nargs="+", help="short sides before the random crop (400 500 600)")
    group.add_argument("--crop_size", type=int, nargs=2, help="smallest and largest side of that crop (384 600)")
    group.add_argument("--val_size", type=int, help="short side in evaluation (800)")
    group.add_argument("--max_size", type=int, help="largest long side (1333)")
    group.add_argument("--group_by_aspect", action="store_true", default=None,
                       help="train on batches of portraits, of square images or of landscapes alone: less is padded")
    group.add_argument("--apply_exif", action="store_true", default=None,
                       help="turn images as their EXIF orientation says; boxes are then those of the images as shown")
    group.add_argument("--num_workers", type=int, help="loading processes (2; pre-training: 16; at most one per CPU)")

    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="", help="folder for checkpoints and log.txt; empty writes nothing")
    group.add_argument("--device", help="cuda if there is one, else cpu")
    group.add_argument("--seed", default=42, type=int)
    group.add_argument("--random_seed", action="store_true", help="draw the seed")
    group.add_argument("--resume", default="", help="checkpoint (file or URL) to continue or evaluate; auto: --output_dir's")
    group.add_argument("--pretrain", default="", help="checkpoint (file or URL) whose weights to start from")
    group.add_argument("--reset_embedding_layer", default=1, type=int, choices=(0, 1),
                       help="0: with --pretrain, keep the class heads of a DETReg pre-training where they fit (1)")
    group.add_argument("--start_epoch", type=int, help="first epoch to train (0; with --resume the one after the checkpoint's)")
    group.add_argument("--eval", action="store_true", help="evaluate only")
    group.add_argument("--overfit", type=int, metavar="N",
                       help="prove a set-up: train and evaluate on the first N training images, without augmentation")
    group.add_argument("--eval_every", default=1, type=int, help="epochs between evaluations")
    group.add_argument("--save_every", default=1, type=int, help="epochs between checkpoints; the last epoch has one")
    group.add_argument("--save_every_steps", type=int, metavar="N", help="also save in mid-epoch, every N steps")
    group.add_argument("--tensorboard", action="store_true", help="also write losses and results for TensorBoard")
    group.add_argument("--world_size", default=1, type=int, help="number of processes; set by the launcher")
    group.add_argument("--dist_timeout", default=1800, type=int,
                       help="seconds after which processes give up that wait for another one, or for a batch of their loading "
                            "processes")
    group.add_argument("--dist_url", default="env://", help="how the processes find each other")
    group.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    return parser


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, or SGD, over groups with rates of their own: the rest, the backbone and, of Deformable DETR, where it looks."""
    groups: List[Dict[str, Any]] = [{"params": []}, {"params": [], "lr": args.lr_backbone}]
    keywords = [args.lr_backbone_names]
    if args.lr_linear_proj_names:
        groups.append({"params": [], "lr": args.lr * args.lr_linear_proj_mult})
        keywords.append(args.lr_linear_proj_names)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matching = [i for i, words in enumerate(keywords, 1) if any(word in name for word in words)]
            groups[matching[0] if matching else 0]["params"].append(parameter)
    if args.sgd:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9,
                                                           weight_decay=args.weight_decay, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    optimizer.given_flags = [_given_options(args, names) for names in (
        ("lr",), ("lr_backbone",), ("lr_linear_proj_mult", "lr"))][:len(groups)]
    return optimizer


def _given_options(args: argparse.Namespace, rates: Tuple[str, ...]) -> Dict[str, str]:
    """The options of an optimizer's group that flags were given for, which count more than a checkpoint's: as given."""
    given = getattr(args, "given", {})
    options = {"lr": [f"--{name} {given[name]:g}" for name in rates if name in given],
               "weight_decay": [f"--weight_decay {given['weight_decay']:g}"] if "weight_decay" in given else []}
    return {option: flags[0] for option, flags in options.items() if flags}


def build_train_loader(dataset: Any, args: argparse.Namespace) -> DataLoader:
    """Shuffled batches of equal size, shared out among processes; an incomplete last batch is left out."""
    groups = aspect_groups(file_sizes(dataset)) if args.group_by_aspect else None
    batches = TrainBatches(len(dataset), args.batch_size, args.seed, get_rank(), get_world_size(), groups,
                           checksum=dataset.samples_checksum() if hasattr(dataset, "samples_checksum") else 0)
    if not len(batches):
        raise InputError(f"--batch_size {args.batch_size} is more than the {len(dataset) // get_world_size()} training images "
                         "of each process")
    return _loader(dataset, batches, args)


def build_val_loader(dataset: Any, args: argparse.Namespace) -> DataLoader:
    """Every image once, with others of its size only: nothing is padded, and no result depends on `--batch_size` or on the
    number of processes, to which the batches go in turn."""
    batches = equal_size_batches(shown_sizes(dataset), len(dataset), args.batch_size)
    return _loader(dataset, batches[get_rank()::get_world_size()], args)


def _loader(dataset: Any, batches: Any, args: argparse.Namespace) -> DataLoader:
    # Its own generator: the loader then takes nothing from the one that dropout uses.
    # Workers live on between epochs; the data sets keep their epoch where these see it. They are forked where they can
    # be, whatever Python's default: they then share the data set's memory, and end when this process is killed.
    context = ("fork" if sys.platform == "linux" else "spawn") if args.num_workers else None
    # A loading process that stands still, at a network disk say, would be waited for without end.
    timeout = args.dist_timeout if args.num_workers else 0
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate_fn, num_workers=args.num_workers,
                      persistent_workers=args.num_workers > 0, pin_memory=torch.device(args.device).type == "cuda",
                      generator=torch.Generator().manual_seed(args.seed), worker_init_fn=shield_worker,
                      multiprocessing_context=context, timeout=timeout)


class Evaluation:
    """What is evaluated and how: detections on annotated images, or patches on held-out images."""

    def __init__(self, args: argparse.Namespace, criterion: nn.Module, postprocessors: Dict[str, nn.Module]) -> None:
        self.args, self.criterion, self.postprocessors = args, criterion, postprocessors
        self.dataset = build_dataset("val", args)
        self.loader = build_val_loader(self.dataset, args)
        self.device = torch.device(args.device)

    def run(self, model: nn.Module, loader: Optional[Iterable] = None) -> Tuple[Dict[str, Any], float]:
        """Evaluate on `self.loader`, or one made of it; returns the figures and the one by which models are compared."""
        loader = self.loader if loader is None else loader
        if self.args.dataset_file == "imagenet":
            stats = evaluate_patches(model, loader, self.device)
            return stats, stats["patch_iou"] - stats["control_iou"]
        stats, evaluator = evaluate(model, self.criterion, self.postprocessors, loader,
                                    get_coco_api_from_dataset(self.dataset), self.device, self.args.output_dir,
                                    amp_dtype=AMP_TYPES.get(self.args.amp))
        for iou_type in evaluator.iou_types:
            _print_per_class(evaluator.per_class(iou_type), iou_type)
        if self.args.eval and self.args.output_dir and is_main_process():
            save_checkpoint(plain_tables(evaluator.coco_eval["bbox"].eval), os.path.join(self.args.output_dir, "eval.pth"))
        if "PQ_all" in stats:
            return stats, stats["PQ_all"]["pq"]
        return stats, stats["coco_eval_masks" if self.args.masks else "coco_eval_bbox"][0]


def _print_per_class(results: Dict[str, Any], iou_type: str) -> None:
    """Print the AP and AP50 of boxes or masks in percent of the first classes; "-" for a class without objects."""
    shown = dict(list(results.items())[:MOST_CLASSES_SHOWN])
    width = max(map(len, shown), default=0)
    for name, figures in shown.items():
        ap, ap50 = (f"{100 * figure:5.1f}" if figure >= 0 else "    -" for figure in figures)
        print_main(f"{name:{width}}  {iou_type} AP {ap}  AP50 {ap50}")
    if len(results) > len(shown):
        print_main(f"… and {len(results) - len(shown)} more classes")


def plain_tables(tables: Dict[str, Any]) -> Dict[str, Any]:
    """COCO's tables of an evaluation with tensors and plain types alone, for a file: `params`, `counts`, `date`,
    `precision`, `recall`, `scores`."""
    def plain(value: Any) -> Any:
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    parameters = {name: plain(value) for name, value in vars(tables["params"]).items()}
    parameters.update({name: [int(item) for item in parameters[name]] for name in ("imgIds", "catIds")})
    return {"params": parameters, **{name: plain(tables[name]) for name in ("counts", "date", "precision", "recall", "scores")}}


def train(state: TrainingState, model: nn.Module, criterion: nn.Module, evaluation: Optional[Evaluation],
          args: argparse.Namespace, listener: SignalListener, last_step: Optional[Tuple[int, int]] = None) -> None:
    """The epochs from where `state` stands to the last; `model` is `state.model` or its DistributedDataParallel wrapper.
    Signals that `listener` hears are answered after a step; one after `last_step` (epoch, step) is not taken."""
    dataset = build_dataset("train", args)
    dataset.recall_unreadable(state.unreadable)
    state.list_unreadable = lambda: dataset.unreadable
    loader = build_train_loader(dataset, args)
    n_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print_main(training_summary(args, state.model, state.optimizer, state.class_names, len(dataset),
                                objects_per_image(dataset), len(loader)))
    progress = Progress(args, state.epoch, len(loader), state.so_far.step)
    keeper = Keeper(state, args, loader.batch_sampler, listener, last_step)
    if args.output_dir and is_main_process():
        open_log(args.output_dir, state.epoch)
    listener.end_if_stopped()
    print_main("Start training")
    start = time.perf_counter()
    for epoch in range(state.epoch, args.epochs):
        began = keeper.start_epoch(epoch)
        dataset.set_epoch(epoch)
        train_stats = train_one_epoch(model, criterion, loader, state.optimizer, torch.device(args.device), epoch,
                                      args.clip_max_norm, accumulate_steps=args.accumulate_steps,
                                      amp_dtype=AMP_TYPES.get(args.amp), scaler=state.scaler,
                                      on_line=functools.partial(progress.line, epoch), first_step=began.step,
                                      meters=began.meters, watch=keeper.watch, on_step=keeper.after_step)
        test_stats: Dict[str, Any] = {}
        files = []
        if evaluation and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
            test_stats, figure = evaluation.run(state.model, keeper.until_stopped(evaluation.loader))
            if state.best is None or figure > state.best:
                state.best = figure
                files.append("checkpoint_best.pth")
        state.lr_scheduler.step()  # after the evaluation: one that is broken off belongs to the epoch that is continued
        if epoch + 1 in state.lr_scheduler.drop_epochs or (epoch + 1) % keep_every(args) == 0:
            files.append(f"checkpoint{epoch:04}.pth")
        line = {**{f"train_{name}": value for name, value in train_stats.items()},
                **{f"test_{name}": value for name, value in test_stats.items()}, **_unreadable(dataset),
                "epoch": epoch, "n_parameters": n_parameters}
        progress.epoch(epoch, line)
        # A run may be stopped at any moment. One that goes on from a checkpoint drops log lines that came after it, and
        # redoes their epochs; so checkpoints come last.
        if args.output_dir and is_main_process():
            append_log(args.output_dir, line)
        keeper.end_epoch(files)
    progress.close()
    seconds = int(time.perf_counter() - start)
    print_main(f"Training time {datetime.timedelta(seconds=seconds)}, largest memory {largest_memory_mb():.0f} MB")


def keep_every(args: argparse.Namespace) -> int:
    """After how many epochs the published program of a training keeps a checkpoint for good."""
    if args.dataset_file == "imagenet":
        return 20
    return 5 if args.model == "deformable_detr" or args.dataset_file == "regions" else 100


def _unreadable(dataset: Any) -> Dict[str, int]:
    """How many images of a data set could not be read so far by any process, for the log."""
    unreadable = dataset.gather_unreadable()
    if unreadable:
        print_main(f"{len(unreadable)} unreadable images were replaced so far: {', '.join(unreadable[:5])}"
                   + (", …" if len(unreadable) > 5 else ""))
    return {"unreadable_images": len(unreadable)}


def read_start(args: argparse.Namespace) -> Dict[str, Any]:
    """Read what the run starts from: a checkpoint to continue or evaluate, else a detector to put masks on, else
    another model's weights, else nothing."""
    if args.eval and not args.resume:
        raise InputError("--eval needs a model to evaluate: --resume FILE_OR_URL")
    for flag in ("resume", "frozen_weights", "pretrain"):
        if getattr(args, flag):
            return load_checkpoint(getattr(args, flag), flag=f"--{flag}")
    return {}


def initial_weights(state: TrainingState, checkpoint: Dict[str, Any], args: argparse.Namespace) -> None:
    """Put what `read_start` returned into the model, and into the training where it is continued."""
    if args.resume and args.eval:
        load_model_strictly(state.model, checkpoint, args.resume)
    elif args.resume:
        state.resume(checkpoint, args.resume)
    elif args.frozen_weights:
        load_model_strictly(state.model.detr, checkpoint, f"--frozen_weights {args.frozen_weights}")
    elif args.pretrain:
        load_pretrained(state.model, checkpoint, args.pretrain,
                        reset_classes=bool(args.reset_embedding_layer) and args.dataset_file != "regions")


def agree_on_seed(args: argparse.Namespace, checkpoint: Dict[str, Any]) -> None:
    """With `--random_seed`, draw `args.seed`, the same for all processes, or take that of the training that is continued."""
    if args.random_seed:
        drawn = all_gather(secrets.randbelow(2**31))[0]
        args.seed = stored_flags(checkpoint).get("seed", drawn) if args.resume else drawn


def follow_checkpoint(args: argparse.Namespace, checkpoint: Dict[str, Any]) -> None:
    """Take what flags leave open from the checkpoint that the run starts from: the model's shape, and where a training
    is continued its rates and their schedule.

    Raises:
        InputError: if a flag contradicts the model that `--resume` names.
    """
    flag = next((name for name in ("resume", "frozen_weights", "pretrain") if getattr(args, name)), None)
    if flag is None:
        return
    where = f"--{flag} {getattr(args, flag)}"
    told = model_flags(checkpoint, where, args.given.get("nheads"))
    told.pop("num_classes", None)  # the annotations tell it
    for name in WHOLE_ALONE if flag != "resume" else ():
        told.pop(name, None)
    stored = stored_flags(checkpoint)
    if flag == "resume":
        _refuse_contradictions(args, told, stored, where)
        if not args.eval:
            told.update({name: stored[name] for name in CONTINUED if stored.get(name) is not None})
            if "lr_drop" in args.given or told.get("lr_drop_epochs") and "lr_drop_epochs" not in args.given:
                told.pop("lr_drop_epochs" if "lr_drop" in args.given else "lr_drop", None)
            if "lr_drop_epochs" in args.given:
                told.pop("lr_drop", None)
    recipes.follow(args, told)
    if told.get("position_from_centre") and args.position_from_centre and "position_from_centre" not in args.given:
        print_main(f"positions count to a pixel's centre, as in {getattr(args, flag)}")


def _refuse_contradictions(args: argparse.Namespace, told: Dict[str, Any], stored: Dict[str, Any], where: str) -> None:
    """Raise InputError if a flag of the model's shape says otherwise than the model to be continued or evaluated. In an
    evaluation flags that no tensor shows may, and that is said."""
    for name, value in {**told, "nheads": stored.get("nheads") or told.get("nheads")}.items():
        given = args.given.get(name)
        if given is None or value is None or given == value:
            continue
        if args.eval and name in OPEN_IN_EVALUATION:
            print_main(f"--{name} {given} counts more than {value}, with which {where} was trained")
        else:
            raise InputError(f"--{name} {given} contradicts {where}, whose model has {value}")


def describe_classes(args: argparse.Namespace, checkpoint: Dict[str, Any]) -> Tuple[Dict[int, str], Dict[int, bool]]:
    """Set `args.num_classes`; returns the names of the classes and, of panoptic data, which are things.

    Published panoptic models, and detectors trained on panoptic data, have more outputs than the annotations need. With
    masks the number is the model's then, unless `--num_classes` is given.
    """
    if args.dataset_file == "imagenet":
        return {}, {}
    given = args.num_classes
    args.num_classes, class_names = num_classes_and_names(args)
    if args.eval and not args.masks:
        _check_classes(args, checkpoint, given)
    whole = args.resume or args.frozen_weights  # a model, or a detector, that has to fit as it is
    if whole and args.masks and given is None:
        stored = num_outputs(model_state(checkpoint, whole)) - 1
        if stored > args.num_classes:
            print_main(f"{stored} classes as in {whole}; the annotations need {args.num_classes}")
            args.num_classes = stored
            class_names = {**(checkpoint.get("class_names") or {}), **class_names}
    return class_names, is_thing_map(args) if args.dataset_file == "coco_panoptic" else {}


def _check_classes(args: argparse.Namespace, checkpoint: Dict[str, Any], given: Optional[int]) -> None:
    """Raise InputError, with the number of classes to give, if the model to be evaluated has another one."""
    stored = model_flags(checkpoint, args.resume, args.given.get("nheads")).get("num_classes", args.num_classes)
    if given not in (None, stored):
        raise InputError(f"--num_classes {given} contradicts --resume {args.resume}, whose model has {stored}")
    if args.num_classes != stored:
        raise InputError(f"--resume {args.resume} has a model of {stored} classes but the annotations need "
                         f"{args.num_classes}; to evaluate it as it is, give --num_classes {stored}")


def has_idle_heads(args: argparse.Namespace) -> bool:
    """Whether parts of the model learn nothing: each layer's own heads, where only the last layer's boxes are compared."""
    return bool(args.with_box_refine) and not args.aux_loss


def distributed_model(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model in the wrapper that averages gradients over processes."""
    # Buffers are constants here (frozen batch norms, masks): nothing to broadcast at each step.
    parameters = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # its older name
    return nn.parallel.DistributedDataParallel(model, **{sync: False}, find_unused_parameters=has_idle_heads(args),
                                               device_ids=[args.gpu] if torch.device(args.device).type == "cuda" else None)


def main(args: argparse.Namespace, reactions: Mapping[int, str] = REACTIONS,
         last_step: Optional[Tuple[int, int]] = None) -> None:
    """Run what the flags describe: evaluation, or training with evaluations in between.

    Args:
        reactions: what signals ask a training for, see `util.signals`.
        last_step: epoch and step after which a training ends with `Stopped`.
    """
    recipes.resolve(args)
    recipes.require_data(args)
    with contextlib.ExitStack() as stack:
        listener = None
        if args.eval:
            util.early_signals.release()
        else:
            listener = stack.enter_context(SignalListener(reactions))
        init_distributed_mode(args)
        if listener:
            listener.end_if_stopped()
        if listener and args.output_dir:
            stack.enter_context(claimed(args.output_dir))
        run(args, listener, last_step)
    shutdown()


def run(args: argparse.Namespace, listener: Optional[SignalListener], last_step: Optional[Tuple[int, int]]) -> None:
    """`main`, once the processes have found each other and the output directory is theirs; a training has a listener."""
    goes_on = args.resume == "auto"
    args.resume = find_resume(args)
    checkpoint = read_start(args)
    agree_on_seed(args, checkpoint)
    follow_checkpoint(args, checkpoint)
    class_names, things = describe_classes(args, checkpoint)
    if listener:
        listener.end_if_stopped()  # here and below: after what may take long
    print_main(f"git:\n  {get_sha()}\n")
    print_main(recipes.describe(args))
    if args.output_dir and is_main_process():
        write_json(os.path.join(args.output_dir, "args.json"), plain_args(args))
    if args.overfit:
        print_main(f"overfit: training and evaluation see the first {args.overfit} training images, not augmented")
    device = torch.device(args.device)

    set_precision(args)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    model, criterion, postprocessors = build_model(args, things)
    print_main("number of params:", sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
    optimizer = build_optimizer(model, args)
    state = TrainingState(model, optimizer, build_scheduler(optimizer, args),
                          torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"), class_names, args.start_epoch,
                          is_thing_map=things)
    torch.manual_seed(args.seed + get_rank())  # from here on processes draw their own dropout
    initial_weights(state, checkpoint, args)
    if goes_on and checkpoint:  # else a run begins, whose checkpoints come before those of earlier ones in the folder
        state.run = str(checkpoint.get("run", ""))
    compile_parts(model, args)
    del checkpoint  # a training would keep its memory to the end

    # DETReg's pre-training is not evaluated; it is judged by what comes of it.
    held_out = args.dataset_file not in ("imagenet", "regions") or (
        args.imagenet_val_path or args.held_out_share or args.eval or args.overfit)
    evaluation = Evaluation(args, criterion, postprocessors) if held_out else None
    if not listener:
        print_main(evaluation_summary(args, class_names, len(evaluation.dataset), objects_per_image(evaluation.dataset)))
        evaluation.run(model)
    else:
        listener.end_if_stopped()
        wrapped = distributed_model(model, args) if args.distributed else model
        try:
            train(state, wrapped, criterion, evaluation, args, listener, last_step)
        finally:
            state.saver.wait()  # whatever happened, a checkpoint that was begun is ended


if __name__ == "__main__":
    parser = argparse.ArgumentParser("DETR training and evaluation", parents=[get_args_parser()])
    run_program(lambda: main(parser.parse_args()))
