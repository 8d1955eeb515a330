"""Made-up photographs on disk, in the layouts of the data sets: what reading and augmenting them costs depends on their
size and on how well JPEG packs them, not on what they show."""
import json
import os
from pathlib import Path
from typing import Any, Dict, Sequence
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from tools.benchmark.workloads import OBJECTS

DISTINCT = 16
SHAPES = ((4, 60.0), (16, 40.0), (64, 25.0))  # cells along a side, contrast
NOISE = 3.0  # standard deviation
FIRST_ID = 1
NUM_CATEGORIES = 80


def write_photographs(root: Path, count: int, size: Sequence[int]) -> None:
    """Write images of one size as `coco/`, `VOCdevkit/` and `unlabelled/`, with objects where labels belong.

    Validation images are the training images.

    Args:
        count: how many; there are no more than `DISTINCT` different ones.
        size: height and width in pixels.
    """
    rng = np.random.default_rng(0)
    folders = [root / "unlabelled", root / "coco/train2017", root / "coco/val2017", root / "VOCdevkit/VOC2007/JPEGImages"]
    for folder in folders:
        folder.mkdir(parents=True)
    for index in range(count):
        first = folders[0] / f"{index + FIRST_ID:012d}.jpg"
        if index < DISTINCT:
            Image.fromarray(_photograph(rng, *size)).save(first, quality=92)
        else:
            os.link(folders[0] / f"{index % DISTINCT + FIRST_ID:012d}.jpg", first)
        for folder in folders[1:]:
            os.link(first, folder / first.name)
    content = coco_content(count, size, rng)
    (root / "coco/annotations").mkdir()
    for part in ("train", "val"):
        (root / f"coco/annotations/instances_{part}2017.json").write_text(json.dumps(content))
    _write_voc(root / "VOCdevkit/VOC2007", content)


def _photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth shapes with texture and some noise, uint8 [H, W, 3]; as JPEG about as large as a photograph of that size."""
    picture = np.full((height, width, 3), 128.0)
    for cells, contrast in SHAPES:
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
        picture += contrast * (np.asarray(smooth) / 127.5 - 1)
    picture += rng.normal(0, NOISE, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)


def coco_content(count: int, size: Sequence[int], rng: np.random.Generator) -> Dict[str, Any]:
    """COCO's annotations of so many images with `OBJECTS` objects each, boxes and outlines."""
    height, width = size
    images = [{"id": i + FIRST_ID, "file_name": f"{i + FIRST_ID:012d}.jpg", "height": height, "width": width}
              for i in range(count)]
    annotations = []
    for image in images:
        sides = np.exp(rng.uniform(np.log(0.03), np.log(0.8), (OBJECTS, 2)))
        corners = rng.uniform(0, 1, (OBJECTS, 2)) * (1 - sides)
        for (x, y), (w, h) in zip(corners * (width, height), sides * (width, height)):
            x, y, w, h = (round(float(number), 2) for number in (x, y, w, h))
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "bbox": [x, y, w, h], "iscrowd": 0,
                                "category_id": int(rng.integers(1, NUM_CATEGORIES + 1)), "area": w * h,
                                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, NUM_CATEGORIES + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_voc(folder: Path, content: Dict[str, Any]) -> None:
    (folder / "Annotations").mkdir()
    (folder / "ImageSets/Main").mkdir(parents=True)
    roots = {image["id"]: ElementTree.Element("annotation") for image in content["images"]}
    for annotation in content["annotations"]:
        element = ElementTree.SubElement(roots[annotation["image_id"]], "object")
        ElementTree.SubElement(element, "name").text = f"class{annotation['category_id'] % 20}"
        ElementTree.SubElement(element, "difficult").text = "0"
        box = ElementTree.SubElement(element, "bndbox")
        x, y, width, height = annotation["bbox"]
        for tag, number in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + width), ("ymax", y + height)):
            ElementTree.SubElement(box, tag).text = str(int(number))
    names = [f"{image_id:012d}" for image_id in roots]
    for name, root in zip(names, roots.values()):
        (folder / f"Annotations/{name}.xml").write_bytes(ElementTree.tostring(root))
    for part in ("trainval", "test"):
        (folder / f"ImageSets/Main/{part}.txt").write_text("\n".join(names) + "\n")
