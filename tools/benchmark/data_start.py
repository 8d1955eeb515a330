"""A process that starts on a large COCO-format annotation file and says how long that took and how much memory it needs."""
import json
import sys
import time
from pathlib import Path
from typing import Dict, Iterator

import torch

import main  # noqa: F401  what a run has loaded anyway
from datasets import build_dataset, num_classes_and_names
from tools.benchmark.contender import prepare
from tools.benchmark.machine import PeakMemory, held_mb
from tools.benchmark.workloads import parse_main_flags

BOXES = 7.3  # of an image, as in COCO's train2017: 860 thousand in all
POINTS = 10  # of an outline


def start_data(folder: str, annotations: str, *flags: str) -> Dict[str, float]:
    """Read the classes and build the training data set, as main.py does: seconds, and the memory in MB that this adds."""
    cpu = torch.device("cpu")
    args = parse_main_flags(["--dataset_file", "coco", "--train_images", folder, "--train_annotations", annotations, *flags])
    prepare(args)
    start = time.perf_counter()
    with PeakMemory(cpu) as memory:
        args.num_classes, _ = num_classes_and_names(args)
        dataset = build_dataset("train", args)
    seconds = time.perf_counter() - start
    assert len(dataset)  # which also keeps it in memory until now
    return {"start_s": seconds, "held_mb": held_mb(cpu) - memory.before_mb, "peak_mb": memory.mb - memory.before_mb}


def write_annotations(path: Path, images: int) -> None:
    """Write an instances file with as many boxes for each image as COCO has."""
    with open(path, "w") as file:
        file.writelines(_pieces(images))


def _pieces(images: int) -> Iterator[str]:
    yield '{"categories": [' + ", ".join(f'{{"id": {i}, "name": "class {i}"}}' for i in range(1, 91)) + '], "images": ['
    for i in range(images):
        yield (", " if i else "") + f'{{"id": {i + 1}, "file_name": "{i + 1:012d}.jpg", "height": 480, "width": 640}}'
    yield '], "annotations": ['
    for i in range(int(BOXES * images)):
        x, y, width, height = i % 499 + 0.25, i % 337 + 0.5, i % 97 + 20.75, i % 89 + 30.5
        outline = ", ".join(f"{x + width * k / POINTS:.2f}, {y + height * (k * k % 11) / 11:.2f}" for k in range(POINTS))
        yield ((", " if i else "") + f'{{"id": {i + 1}, "image_id": {i % images + 1}, "category_id": {i % 90 + 1}, '
               f'"iscrowd": 0, "area": {width * height}, "bbox": [{x}, {y}, {width}, {height}], '
               f'"segmentation": [[{outline}]]}}')
    yield "]}"


if __name__ == "__main__":
    print(json.dumps(start_data(*sys.argv[1:])))
