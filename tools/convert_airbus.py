"""Turn the Airbus Ship Detection Challenge's run lengths into COCO-format annotations for training and validation:

    python -m tools.convert_airbus --csv data/airbus/train_ship_segmentations_v2.csv --images data/airbus/train_v2 \\
        --output_dir data/airbus/annotations

then train on them as on any own data:

    python main.py --train_images data/airbus/train_v2 --val_images data/airbus/train_v2 \\
        --train_annotations data/airbus/annotations/instances_train.json \\
        --val_annotations data/airbus/annotations/instances_val.json

The CSV has a line `ImageId,EncodedPixels` for each ship: pairs of the first pixel, counted from 1 down the columns, and
the number of pixels. Images without ships have one line with nothing after the comma.
"""
import argparse
import csv
import io
import json
import zlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from pycocotools import mask as mask_codec

from datasets.checks import leaves_folder
from datasets.image_io import UnreadableImage, open_picture
from tools.output import refuse_others, remember, write_whole, writing
from util.errors import InputError, run_program
from util.files import read_text, shown
from util.ranges import TOOL_RANGES, check_ranges

SHIP = {"id": 1, "name": "ship"}
COLUMNS = ["ImageId", "EncodedPixels"]


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert_airbus", allow_abbrev=False,
                                     description="Convert the Airbus Ship CSV to COCO JSON with a train/val split.")
    parser.add_argument("--csv", required=True, help="train_ship_segmentations_v2.csv")
    parser.add_argument("--images", required=True, help="folder of the images, train_v2")
    parser.add_argument("--output_dir", required=True, help="folder for instances_train.json and instances_val.json")
    parser.add_argument("--val_share", default=0.2, type=float, help="share of the images to validate on (0.2)")
    parser.add_argument("--keep_empty", action="store_true", help="also use images without ships, the greater part")
    return parser


def read_ships(path: str) -> Dict[str, List[List[int]]]:
    """Read the run lengths of each image's ships.

    Raises:
        InputError: if the file is missing, isn't such a CSV, or has run lengths that aren't pairs of numbers.
    """
    ships: Dict[str, List[List[int]]] = {}
    rows = csv.reader(io.StringIO(read_text(path, "--csv"), newline=""))
    shown_path = shown(path)
    try:
        if next(rows, []) != COLUMNS:
            raise InputError(f"--csv {shown_path} doesn't begin with the line {','.join(COLUMNS)}")
        for row in rows:
            if row and leaves_folder(row[0]):
                raise InputError(f"--csv {shown_path}, line {rows.line_num}: {row[0]!r} leads out of the image folder")
            if row:
                ships.setdefault(row[0], []).extend(_run_lengths(row, f"--csv {shown_path}, line {rows.line_num}"))
    except csv.Error as error:
        raise InputError(f"--csv {shown_path} can't be read ({error})") from error
    if not ships:
        raise InputError(f"--csv {shown_path} lists no images")
    return ships


def _run_lengths(row: List[str], where: str) -> List[List[int]]:
    """The run lengths of a line: a list with one ship's, or an empty list."""
    words = row[1].split() if len(row) == 2 else None
    if words is None or len(words) % 2 or not all(word.isdecimal() for word in words):
        raise InputError(f"{where}: the pixels of {row[0]!r} are not pairs of numbers")
    return [[int(word) for word in words]] if words else []


def to_rle(runs: List[int], height: int, width: int) -> Optional[Dict[str, Any]]:
    """COCO's compressed run lengths of a ship; None if its pixels are not ascending, or not within the image.

    Args:
        runs: first pixel, counted from 1 down the columns, and number of pixels, in turns.
    """
    starts, lengths = np.array(runs[0::2]) - 1, np.array(runs[1::2])
    ends = starts + lengths
    if (lengths < 1).any() or (starts[1:] < ends[:-1]).any() or starts[0] < 0 or ends[-1] > height * width:
        return None
    # COCO's counts alternate between background and object, and begin with background.
    edges = np.stack([starts, ends], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    return mask_codec.frPyObjects({"counts": counts.tolist(), "size": [height, width]}, height, width)


def is_for_validation(name: str, share: float) -> bool:
    """Whether an image is to validate on, decided by its name alone."""
    return zlib.crc32(name.encode()) < share * 2**32


def convert(ships: Dict[str, List[List[int]]], images: str, val_share: float,
            keep_empty: bool) -> Dict[str, Dict[str, Any]]:
    """Make the COCO dicts "train" and "val".

    Raises:
        InputError: if an image is missing or can't be read, or a ship isn't within it.
    """
    parts: Dict[str, Dict[str, Any]] = {part: {"images": [], "annotations": [], "categories": [SHIP]}
                                        for part in ("train", "val")}
    number = 0
    for image_id, (name, found) in enumerate(sorted(ships.items()), start=1):
        if not found and not keep_empty:
            continue
        part = parts["val" if is_for_validation(name, val_share) else "train"]
        height, width = _size_of(Path(images, name))
        part["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for runs in found:
            rle = to_rle(runs, height, width)
            if rle is None:
                raise InputError(f"a ship of {name} has pixels that are not in order, or outside "
                                 f"its {width} x {height}")
            number += 1
            part["annotations"].append({
                "id": number, "image_id": image_id, "category_id": SHIP["id"], "iscrowd": 0,
                "bbox": mask_codec.toBbox(rle).tolist(), "area": int(mask_codec.area(rle)),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")}})
    for part, content in parts.items():
        if not content["annotations"]:
            raise InputError(f"--val_share {val_share} leaves no ships for {part}")
    return parts


def _size_of(path: Path) -> Tuple[int, int]:
    try:
        with open_picture(path) as picture:
            return picture.height, picture.width
    except UnreadableImage as error:
        raise InputError(f"the CSV names an image that can't be used: {error}") from error


def main(args: argparse.Namespace) -> None:
    """Convert, write and say what there is."""
    check_ranges(args, TOOL_RANGES)
    paths = {part: Path(args.output_dir, f"instances_{part}.json") for part in ("train", "val")}
    refuse_others("--output_dir", paths.values())
    parts = convert(read_ships(args.csv), args.images, args.val_share, args.keep_empty)
    with writing("--output_dir", args.output_dir):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        for part, content in parts.items():
            write_whole(paths[part], json.dumps(content, separators=(",", ":")))
            print(f"{paths[part]}: {len(content['images'])} images, {len(content['annotations'])} ships")
        remember(paths.values())


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
