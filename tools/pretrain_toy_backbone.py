"""Backbone weights for the toy world: `python -m tools.pretrain_toy_backbone --output FILE`.

A stand-in for ImageNet weights, and no more than that: a torchvision ResNet learns, from random weights and with
labels, to tell the seven classes of single toy objects, and the thirteen photographs without an object, in about a
minute on two cores. It sees no object and no background pixel of the toy data set. The weights are for small detectors
on toy data, through `--load_backbone FILE`.
"""
import argparse
import functools
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import box_iou, roi_align

from datasets.toy import map_in_processes
from datasets.toy_scene import (CLASSES, PHOTOGRAPHS, ToySettings, image_rng, render_background, render_scene,
                                render_single_object)
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from models.backbone import LAYERS, SUPERVISED_URLS
from tools.output import refuse_others, remember, writing
from util.checkpoint import save_checkpoint
from util.errors import InputError, run_program
from util.host_memory import keep_freed_memory
from util.ranges import TOOL_RANGES, check_ranges, count

CANVAS = 64  # pixels of a drawn image
CROPS = (46, 64)  # pixels of the random part of it that a training step sees …
SIZES = (32, 40, 48, 64)  # … resized to these in turn, since a detector meets objects of all sizes
TEST_SIZE = 48
HELD_OUT = 1200
BACKGROUND_EVERY = 4  # every fourth image is a background without object
NUM_CLASSES = len(CLASSES) + len(PHOTOGRAPHS)


def draw(index: int, seed: int) -> Tuple[np.ndarray, int]:
    """Image `index` uint8 [CANVAS, CANVAS, 3] and its class: an object's, or, after those, a photograph's."""
    rng = image_rng(seed, "classifier", index)
    if index % BACKGROUND_EVERY == 0:
        image, photograph = render_background(rng, CANVAS)
        return image, len(CLASSES) + photograph
    image, class_index, _ = render_single_object(rng, CANVAS)
    return image, class_index


def draw_chunk(indices: range, seed: int) -> List[Tuple[np.ndarray, int]]:
    """What a worker draws at a time."""
    return [draw(index, seed) for index in indices]


def draw_all(count: int, seed: int) -> Tuple[Tensor, Tensor]:
    """Draw images 0 … count - 1 on all cores: uint8 [count, 3, CANVAS, CANVAS], and their labels int64 [count]."""
    chunks = [range(start, min(start + 200, count)) for start in range(0, count, 200)]
    drawn = sum(map_in_processes(functools.partial(draw_chunk, seed=seed), chunks, num_workers=None), [])
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
    return images.contiguous(), torch.tensor([label for _, label in drawn])


def build_classifier(name: str, last_layer: str) -> nn.Module:
    """A torchvision ResNet with random weights, cut after `last_layer`, with a linear classifier of `NUM_CLASSES`."""
    resnet = getattr(torchvision.models, name)(weights=None, num_classes=NUM_CLASSES)
    if last_layer == "layer3":
        resnet.layer4 = nn.Identity()
        resnet.fc = nn.Linear(resnet.fc.in_features // 2, NUM_CLASSES)
    return resnet


def feature_map(resnet: nn.Module, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] -> the deepest map [B, C, h, w]."""
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
    return resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))


def normalise(images: Tensor) -> Tensor:
    """uint8 images [B, 3, H, W] -> float32 with ImageNet's mean and deviation, as the detector's input has."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def resize(images: Tensor, size: int) -> Tensor:
    """Float images [B, 3, H, W] -> [B, 3, size, size], antialiased as the detector's input is."""
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def training_batch(images: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Cut, resize, flip and turn drawn images: uint8 [B, 3, CANVAS, CANVAS] -> float32 [B, 3, size, size]."""
    crop = int(torch.randint(CROPS[0], CROPS[1] + 1, (), generator=generator))
    x, y = torch.randint(0, CANVAS - crop + 1, (2,), generator=generator).tolist()
    flip, turn = (torch.rand(2, generator=generator) < 0.5).tolist()
    size = SIZES[step % len(SIZES)]
    batch = resize(normalise(images[:, :, y:y + crop, x:x + crop]), size)
    if flip:
        batch = batch.flip(3)
    if turn:
        batch = batch.transpose(2, 3)
    return batch.contiguous(memory_format=torch.channels_last)


def train(resnet: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Plain cross-entropy training with AdamW and one cycle of the learning rate, on the device of `images`."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(resnet.parameters(), args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.2)
    resnet.train()
    start, total, since = time.perf_counter(), torch.zeros((), device=images.device), 0
    for step in range(args.steps):
        chosen = torch.randint(len(images), (args.batch_size,), generator=generator).to(images.device)
        loss = F.cross_entropy(resnet(training_batch(images[chosen], step, generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total, since = total + loss.detach(), since + 1
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{args.steps}  loss {total.item() / since:.3f}  {seconds:.0f} s", flush=True)
            total, since = torch.zeros_like(total), 0


@torch.no_grad()
def measure(resnet: nn.Module, images: Tensor, labels: Tensor) -> Dict[str, float]:
    """Held-out accuracy of the classifier, and the mean cosine similarity between pooled features of different images.

    Features that share a large mean (similarity near 1) would make a poor target of feature reconstruction.

    Args: images uint8 [N, 3, CANVAS, CANVAS] and labels int64 [N], both kinds of class among them.
    """
    resnet.eval()
    small = resize(normalise(images), TEST_SIZE)
    features = torch.cat([feature_map(resnet, batch).mean((2, 3)) for batch in small.split(200)])
    correct = resnet.fc(features).argmax(1) == labels
    is_object = labels < len(CLASSES)
    unit = F.normalize(features, dim=1)

    def similarity(rows: Tensor) -> float:
        return ((rows.sum(0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1))).item()

    return {"object accuracy": correct[is_object].float().mean().item(),
            "background accuracy": correct[~is_object].float().mean().item(),
            "cosine similarity of objects": similarity(unit[is_object]), "cosine similarity of all": similarity(unit)}


@torch.no_grad()
def measure_places(resnet: nn.Module, device: torch.device, scenes: int = 100, patches: int = 6) -> Tuple[float, float]:
    """How well a patch's features find its place in the image, which is what the patch pretext will ask for.

    A random patch (16 to 96 px of an image of 128, resized to 48) is compared with boxes of its own size on a grid by
    the cosine similarity of pooled features. Returns the mean IoU of the most similar box with the patch's box, and the
    mean IoU of all boxes, which is chance.
    """
    resnet.eval()
    rng = np.random.default_rng(0)
    found: List[float] = []
    chance: List[float] = []
    for index in range(scenes):
        scene = render_scene(ToySettings(seed=1), "unlabelled", index).image
        image = normalise(torch.from_numpy(scene).to(device).permute(2, 0, 1)[None])
        height, width = image.shape[2:]
        features = feature_map(resnet, image)
        for _ in range(patches):
            w, h = (int(rng.integers(16, min(97, side - 1))) for side in (width, height))
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            patch = resize(image[:, :, y:y + h, x:x + w], 48)
            left, top = torch.meshgrid(torch.linspace(0, width - w, 9), torch.linspace(0, height - h, 9), indexing="ij")
            boxes = torch.stack([left, top, left + w, top + h], dim=-1).view(-1, 4).to(device)
            stride = width / features.shape[3]
            pooled = roi_align(features, [boxes], output_size=3, spatial_scale=1 / stride, aligned=True).mean((2, 3))
            scores = F.cosine_similarity(pooled, feature_map(resnet, patch).mean((2, 3)))
            truth = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32, device=device)
            iou = box_iou(boxes, truth)[:, 0]
            found.append(iou[scores.argmax()].item())
            chance.append(iou.mean().item())
    return float(np.mean(found)), float(np.mean(chance))


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.pretrain_toy_backbone", description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", required=True, help="checkpoint to write")
    parser.add_argument("--backbone", default="resnet18", choices=list(SUPERVISED_URLS))
    parser.add_argument("--backbone_last_layer", default="layer3", choices=LAYERS[2:], help="where the network ends")
    parser.add_argument("--steps", default=800, type=int)
    parser.add_argument("--batch_size", default=32, type=int)
    parser.add_argument("--lr", default=2e-3, type=float, help="highest learning rate of the cycle")
    parser.add_argument("--num_images", default=9000, type=int, help="drawn for training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", default=0, type=int)
    return parser


def main(args: argparse.Namespace) -> Optional[Dict[str, float]]:
    """Draw, train, measure, save; returns the measurements, which are also printed and kept in the file.

    Raises:
        InputError: for values out of range, or if the file can't be written.
    """
    check_ranges(args, {**TOOL_RANGES, "batch_size": count(2)})
    if Path(args.output).is_dir():
        raise InputError(f"--output {args.output} is a folder; name a file")
    refuse_others("--output", [Path(args.output)])
    with writing("--output", args.output):  # before a minute is spent
        Path(args.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    device = torch.device(args.device)
    start = time.perf_counter()
    images, labels = (part.to(device) for part in draw_all(args.num_images + HELD_OUT, args.seed))
    print(f"drew {len(images)} images of {len(CLASSES)} objects and {len(PHOTOGRAPHS)} backgrounds "
          f"in {time.perf_counter() - start:.0f} s", flush=True)
    torch.manual_seed(args.seed)
    resnet = build_classifier(args.backbone, args.backbone_last_layer).to(device)
    train(resnet, images[:args.num_images], labels[:args.num_images], args)
    results = measure(resnet, images[args.num_images:], labels[args.num_images:])
    results["patch IoU"], results["patch IoU by chance"] = measure_places(resnet, device)
    print(", ".join(f"{name} {value:.3f}" for name, value in results.items()))
    state = {name: value.cpu().contiguous() for name, value in resnet.state_dict().items()
             if not name.startswith("fc.")}
    save_checkpoint({"model": state, "args": vars(args), "results": results}, args.output)
    remember([Path(args.output)])
    seconds = time.perf_counter() - start
    print(f"wrote {args.output} in {seconds:.0f} s: {args.backbone} up to {args.backbone_last_layer}")
    return results


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
