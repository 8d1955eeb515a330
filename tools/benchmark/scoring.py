"""Matching and losses, and the evaluation of detections, on made-up outputs."""
import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch

from tools.benchmark.counting import HostReads
from tools.benchmark.peers import HUGGING_FACE, contest
from tools.benchmark.photographs import NUM_CATEGORIES, write_photographs
from tools.benchmark.workloads import OBJECTS, SEED, make_target, model_flags, parse_main_flags

LOSSES = {"losses_16": 16, "losses_64": 64}  # images
DETECTIONS = 100  # of an image
FRAME = (480, 640)


def measure_losses(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Forward time of DETR's matching and losses for all decoder layers."""
    images = LOSSES[name]
    spec, options = losses_spec(images, args)
    ours, result = contest("losses", spec, args, images, {HUGGING_FACE: {"options": vars(options)}})
    reads = HostReads()
    with reads:
        ours.loss()
    return {"title": f"matching and losses of {images} images, {options.dec_layers} layers, {options.num_queries} queries",
            "images": images, **result, "host_reads": dict(reads.reads), "operators": reads.operators}


def losses_spec(images: int, args: argparse.Namespace) -> Tuple[Dict[str, Any], argparse.Namespace]:
    """What `contender.Losses` needs, with made-up outputs of so many images, and main.py's flags."""
    words = model_flags("--dataset_file coco", args)
    options = parse_main_flags(words)
    generator = torch.Generator().manual_seed(SEED)
    layers = [{"pred_logits": torch.randn(images, options.num_queries, 92, generator=generator).requires_grad_(),
               "pred_boxes": torch.rand(images, options.num_queries, 4, generator=generator).requires_grad_()}
              for _ in range(options.dec_layers)]
    targets = [make_target(i, OBJECTS, FRAME, generator, 90) for i in range(images)]
    data = {"outputs": {**layers[-1], "aux_outputs": layers[:-1]}, "targets": targets}
    return {"flags": words, "data": data, "seed": SEED}, options


def measure_evaluation(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """COCO's twelve numbers of `DETECTIONS` detections in each of `args.eval_images` images."""
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), args.eval_images, FRAME)
        words = model_flags(f"--dataset_file coco --coco_path {folder}/coco --num_classes 91", args)
        parse_main_flags(words)
        content = json.loads(Path(folder, "coco/annotations/instances_val2017.json").read_text())
        spec = {"flags": words, "data": make_detections(content), "seed": SEED}
        result = contest("evaluation", spec, args, args.eval_images)[1]
    return {"title": f"evaluation of {args.eval_images} images, {DETECTIONS} detections each", "images": args.eval_images,
            **result}


def make_detections(content: Dict[str, Any]) -> Dict[int, Dict[str, torch.Tensor]]:
    """Of COCO annotations: detections by image id. All lie near objects; about half of them have the object's class."""
    generator = torch.Generator().manual_seed(SEED)
    found = {}
    objects: Dict[int, List[Any]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append((annotation["bbox"], annotation["category_id"]))
    for image_id, mine in objects.items():
        chosen = torch.randint(len(mine), (DETECTIONS,), generator=generator).tolist()
        boxes = torch.tensor([mine[i][0] for i in chosen])
        boxes[:, :2] += boxes[:, 2:] * 0.2 * torch.randn(DETECTIONS, 2, generator=generator)
        boxes[:, 2:] *= (0.2 * torch.randn(DETECTIONS, 2, generator=generator)).exp()
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([mine[i][1] for i in chosen])
        wrong = torch.rand(DETECTIONS, generator=generator) < 0.5
        labels[wrong] = torch.randint(1, NUM_CATEGORIES + 1, (int(wrong.sum()),), generator=generator)
        found[image_id] = {"scores": torch.rand(DETECTIONS, generator=generator), "labels": labels, "boxes": boxes}
    return found
