"""The two ways in which `tools.predict` shows what a model finds: objects one by one, or a map of all pixels."""
import io
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_codec
from torch import Tensor

from tools.drawing import Colour, LabelledBox, distinct_colour, draw_boxes
from tools.mask_drawing import ColouredMask, colours_of_segments, innermost_point, lay_over
from util.panoptic_ids import rgb_to_ids


class Style(NamedTuple):
    """How pictures are drawn: with names and scores or without, the width of frames (None: as the picture's size asks
    for), and whether objects with masks are coloured by class, as those without are."""

    labels: bool = True
    line_width: Optional[int] = None
    by_class: bool = False


class ObjectView:
    """Objects found in images: their entries in the JSON file, and pictures with boxes and masks, if there are any."""

    json_name, counted = "detections.json", "objects"

    def __init__(self, names: Dict[int, str], style: Style) -> None:
        self.names, self.style = names, style

    def files(self, picture: Path, output_dir: str) -> List[Path]:
        """The files that are written for an image."""
        return [picture]

    def entries(self, path: Path, found: Dict[str, Tensor], picture: Path, output_dir: str) -> List[Dict[str, Any]]:
        """Entries of the image at `path`, as `tools.predict` describes them."""
        entries = []
        masks = encode_masks(found["masks"]) if "masks" in found else [{}] * len(found["scores"])
        columns = (found[name].tolist() for name in ("scores", "labels", "boxes"))
        for score, label, (left, top, right, bottom), mask in zip(*columns, masks):
            box = [round(number, 3) for number in (left, top, right - left, bottom - top)]
            entries.append({"file_name": str(path), "category_id": label, "category_name": name_of(label, self.names),
                            "bbox": box, "score": round(score, 5), **mask})
        return entries

    def counts(self, entries: Sequence[Dict[str, Any]]) -> Counter:
        """How many objects of each class there are."""
        return Counter(entry["category_name"] for entry in entries)

    def draw(self, image: Tensor, found: Dict[str, Tensor], entries: Sequence[Dict[str, Any]]) -> Image.Image:
        """Return the picture of one image. With masks each object has a colour of its own, else each class."""
        own = "masks" in found and not self.style.by_class
        colours = [distinct_colour(number if own else entry["category_id"]) for number, entry in enumerate(entries)]
        if "masks" in found:
            image = lay_over(image, [ColouredMask(mask[0], colour) for mask, colour in zip(found["masks"], colours)])
        return draw_entries(image, entries, colours, self.style)


class PanopticView:
    """Panoptic maps: their entries in the JSON file, PNGs of ids, and pictures with the segments laid over."""

    json_name, counted = "panoptic.json", "segments"

    def __init__(self, names: Dict[int, str], style: Style) -> None:
        self.names, self.style = names, style

    def files(self, picture: Path, output_dir: str) -> List[Path]:
        """The files that are written for an image: its picture and its PNG of ids."""
        return [picture, output_dir / Path("panoptic") / picture.relative_to(output_dir).with_suffix(".png")]

    def entries(self, path: Path, found: Dict[str, Any], picture: Path, output_dir: str) -> List[Dict[str, Any]]:
        """The entry of the image at `path`, as `tools.predict` describes it; its PNG of ids is written."""
        png = self.files(picture, output_dir)[1]
        png.parent.mkdir(parents=True, exist_ok=True)
        png.write_bytes(found["png_string"])
        segments = [{**segment, "category_name": name_of(segment["category_id"], self.names)}
                    for segment in found["segments_info"]]
        return [{"file_name": str(path), "png_file_name": png.relative_to(output_dir).as_posix(), "segments_info": segments}]

    def counts(self, entries: Sequence[Dict[str, Any]]) -> Counter:
        """How many segments of each class there are."""
        return Counter(segment["category_name"] for entry in entries for segment in entry["segments_info"])

    def draw(self, image: Tensor, found: Dict[str, Any], entries: Sequence[Dict[str, Any]]) -> Image.Image:
        """Return the picture of one image; each segment's name stands where it is widest."""
        with Image.open(io.BytesIO(found["png_string"])) as picture:
            ids = torch.from_numpy(rgb_to_ids(np.asarray(picture)))
        segments = entries[0]["segments_info"]
        masks = [ids == segment["id"] for segment in segments]
        colours = colours_of_segments([segment["isthing"] for segment in segments],
                                      [segment["category_id"] for segment in segments])
        points = [innermost_point(mask) for mask in masks]
        labels = [LabelledBox((x, y, x, y), colour, segment["category_name"], framed=False)
                  for (x, y), colour, segment in zip(points, colours, segments)] if self.style.labels else []
        return draw_boxes(lay_over(image, [ColouredMask(*pair) for pair in zip(masks, colours)]), labels)


def encode_masks(masks: Tensor) -> List[Dict[str, Any]]:
    """Masks, bool [N, 1, H, W], as the segmentation of a JSON entry: COCO's compressed run lengths."""
    encoded = mask_codec.encode(np.asfortranarray(masks[:, 0].permute(1, 2, 0).numpy().astype(np.uint8)))
    return [{"segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")}} for code in encoded]


def name_of(label: int, names: Dict[int, str]) -> str:
    """The class's name, or its number where there is none."""
    return names.get(label, f"class {label}")


def draw_entries(image: Tensor, entries: Sequence[Dict[str, Any]], colours: Sequence[Colour], style: Style) -> Image.Image:
    """Return the picture of one image, uint8 [3, H, W], with objects: detections, or true ones, which have no score."""
    boxes = []
    for entry, colour in zip(entries, colours):
        left, top, width, height = entry["bbox"]
        text = entry["category_name"] + (f" {entry['score']:.2f}" if "score" in entry else "")
        boxes.append(LabelledBox((left, top, left + width, top + height), colour, text if style.labels else ""))
    return draw_boxes(image, boxes, style.line_width)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92, subsampling=0)
