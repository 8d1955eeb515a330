"""Show a pre-trained UP-DETR patches of an image and see where it finds them (UP-DETR, figure 5).

`python -m tools.find_patch --checkpoint PRETRAINED IMAGE --box x,y,w,h [--box …]` writes a picture, with the query
patches on one side and the image with the boxes found (true ones dashed) on the other, and beside it a JSON file: a
list with one entry for each patch,

    {"box": [x, y, w, h], "found": [x, y, w, h], "confidence": 0.93, "iou": 0.61}

with boxes in pixels of the image file (EXIF orientation ignored, as in training), left, top, width, height.
"""
import argparse
import contextlib
import math
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from datasets.image_io import UnreadableImage, read_image
from datasets.patches import cut_patches
from datasets.pretext import PRETRAIN_MAX_SIZE, PRETRAIN_SIZES, RandomPatches, scale_boxes
from datasets.transforms import normalize_image, resize_to, resized_size, sample_rng
from engine import most_confident_boxes
from models import fused
from tools.drawing import LabelledBox, distinct_colour, draw_boxes, font, text_colour, to_picture
from tools.loading import PRETRAINED, Loaded, add_checkpoint_flags, load_model
from tools.output import PICTURES, refuse_others, remember, require_ending, write_json_lines, writing
from util.box_ops import aligned_iou, box_cxcywh_to_xyxy
from util.errors import InputError, run_program
from util.misc import NestedTensor, nested_tensor_from_tensor_list
from util.ranges import TOOL_RANGES, check_ranges

# Of the figure, in pixels: least side of the square that a patch is drawn in, the frame around it, space, headline.
CELL, FRAME, MARGIN, HEADER = 120, 5, 6, 28


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.find_patch", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", metavar="IMAGE", help="image file")
    add_checkpoint_flags(parser, "a pre-trained model, from main.py --imagenet_path")
    parser.add_argument("--box", action="append", default=[], metavar="x,y,w,h",
                        help="a patch to look for, in pixels of the image: left, top, width, height; may be repeated")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="look for N random patches (too)")
    parser.add_argument("--seed", type=int, default=0, help="of the random patches (0)")
    parser.add_argument("--output", default="outputs/find_patch.png",
                        help="picture to write; the JSON file's name ends in .json instead (outputs/find_patch.png)")
    parser.add_argument("--size", type=int,
                        help="short side that the image is resized to (as in the training's evaluation)")
    parser.add_argument("--max_size", type=int, help="largest long side (likewise)")
    parser.add_argument("--num_patches", type=int, help="patches that a checkpoint without flags was trained with (10)")
    parser.add_argument("--patch_size", type=int, help="side that its patches were resized to (128)")
    return parser


def parse_box(text: str, width: int, height: int) -> List[float]:
    """"x,y,w,h" -> left, top, right, bottom in pixels of an image of this size.

    Raises:
        InputError: unless these are four numbers, of a box with area inside the image.
    """
    try:
        left, top, box_width, box_height = map(float, text.split(","))
    except ValueError as error:
        raise InputError(f"--box {text}: write four numbers, x,y,w,h") from error
    if not (box_width > 0 and box_height > 0):
        raise InputError(f"--box {text}: width and height must be more than 0")
    if not (0 <= left and 0 <= top and left + box_width <= width and top + box_height <= height):
        raise InputError(f"--box {text} reaches outside the image, which has {width} x {height} pixels")
    return [left, top, left + box_width, top + box_height]


def choose_boxes(args: argparse.Namespace, loaded: Loaded, source: Tensor) -> Tensor:
    """The boxes given, then the random ones, which are drawn as in the model's training.

    Args:
        source: the image of the file, uint8 [3, H, W].

    Returns:
        float [n, 4], xyxy pixels of the image file.

    Raises:
        InputError: if there are none, one is wrong, or the image is too small for random ones.
    """
    height, width = source.shape[-2:]
    boxes = [torch.tensor([parse_box(text, width, height) for text in args.box]).reshape(-1, 4)]
    if args.random > 0:
        propose = RandomPatches(args.random, loaded.args.min_patch, loaded.args.max_patch)
        drawn = propose(source, sample_rng(args.seed, 0, 0))
        if drawn is None:
            raise InputError(f"{args.image} is too small for random patches of at least {loaded.args.min_patch} pixels")
        boxes.append(drawn.float())
    if not sum(map(len, boxes)):
        raise InputError("which patches? give --box x,y,w,h or --random N")
    return torch.cat(boxes)


def to_whole_pixels(boxes: Tensor, image: Tensor) -> Tensor:
    """Round xyxy boxes [n, 4] inside an image [3, H, W] to int64 ones that hold one pixel at least."""
    limit = torch.tensor([image.shape[2], image.shape[1]])
    low = torch.minimum(boxes[:, :2].round().long(), limit - 1)
    return torch.cat([low, torch.minimum(torch.maximum(boxes[:, 2:].round().long(), low + 1), limit)], dim=1)


@torch.no_grad()
@fused.steps()
def find_patches(loaded: Loaded, image: Tensor, source: Tensor, boxes: Tensor) -> Tuple[Tensor, Tensor]:
    """Where the model finds the patches of an image that lie in boxes, cut from its file as in training.

    The model is shown `num_patches` of them at a time. Groups of queries don't see each other: patches don't compete.

    Args:
        image: uint8 [3, H, W] as the model is to see it; source: likewise, as the file has it.
        boxes: int64 [n, 4], xyxy pixels of `source`, ends exclusive.

    Returns:
        xyxy boxes [n, 4] in 0..1 of the most confident query of each patch, and the confidences [n] in 0..1.
    """
    device = torch.device(loaded.args.device)
    sample = nested_tensor_from_tensor_list(normalize_image(image)[None].to(device))
    found: List[Tensor] = []
    confidences: List[Tensor] = []
    with _same_maps(loaded.model.backbone, sample):
        for shown in boxes.split(loaded.args.num_patches):
            patches = normalize_image(cut_patches(source, shown, loaded.args.patch_size))[None].to(device)
            best, confidence = most_confident_boxes(loaded.model(sample, patches), len(shown))
            found.append(box_cxcywh_to_xyxy(best[0]).cpu())
            confidences.append(confidence[0].cpu())
    return torch.cat(found), torch.cat(confidences)


@contextlib.contextmanager
def _same_maps(backbone: torch.nn.Module, sample: NestedTensor) -> Iterator[None]:
    """Within, the backbone has the maps of one image at hand: they take most of the time, and all patches share them."""
    maps = backbone(sample)
    backbone.forward = lambda _: maps  # of this object alone; patches go through its first part
    try:
        yield
    finally:
        del backbone.forward


def to_entries(boxes: Tensor, found: Tensor, confidences: Tensor) -> List[Dict[str, Any]]:
    """The JSON list (see the module's text) of true and found boxes [n, 4], both xyxy pixels of the image file."""
    ious = aligned_iou(boxes, found)[0]
    return [{"box": _xywh(box), "found": _xywh(place), "confidence": round(confidence.item(), 5),
             "iou": round(iou.item(), 5)}
            for box, place, confidence, iou in zip(boxes, found, confidences, ious)]


def _xywh(box: Tensor) -> List[float]:
    left, top, right, bottom = box.tolist()
    return [round(number, 2) for number in (left, top, right - left, bottom - top)]


def draw(image: Tensor, source: Tensor, boxes: Tensor, entries: Sequence[Dict[str, Any]]) -> Image.Image:
    """Draw the figure: query patches in coloured frames on the left, the image with boxes of these colours on the
    right.

    Args:
        image: uint8 [3, H, W] as the model sees it; source: likewise, as the file has it.
        boxes: int64 [n, 4], those of the patches, xyxy pixels of `source`; entries: from `to_entries`, of these pixels.
    """
    crops = [source[:, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes.tolist()]
    found, true = [], []
    for number, entry in enumerate(entries):
        text = f"{number + 1}: {entry['confidence']:.2f}"
        found.append(LabelledBox(_in_image(entry["found"], source, image), distinct_colour(number), text))
        true.append(LabelledBox(_in_image(entry["box"], source, image), distinct_colour(number), dashed=True))
    picture = draw_boxes(image, found + true)
    columns = math.ceil(len(crops) / max(1, picture.height // CELL))
    rows = math.ceil(len(crops) / columns)
    cell = max(CELL, min(picture.height // rows, 2 * CELL))
    size = (columns * cell + MARGIN + picture.width, HEADER + max(picture.height, rows * cell))
    canvas = Image.new("RGB", size, "white")
    for number, crop in enumerate(crops):
        corner = (number // rows * cell, HEADER + number % rows * cell)
        _paste_patch(canvas, to_picture(crop), number, corner, cell)
    canvas.paste(picture, (columns * cell + MARGIN, HEADER))
    write = ImageDraw.Draw(canvas)
    write.text((MARGIN, 5), "patches", font=font(16), fill="black")
    write.text((columns * cell + MARGIN, 5), "found, with confidence; dashed: true place", font=font(16), fill="black")
    return canvas


def _in_image(box: Sequence[float], source: Tensor, image: Tensor) -> Tuple[float, ...]:
    """x, y, w, h in pixels of the file -> left, top, right, bottom in pixels of the image."""
    left, top, width, height = box
    return tuple(scale_boxes(torch.tensor([left, top, left + width, top + height]), source, image).tolist())


def _paste_patch(canvas: Image.Image, patch: Image.Image, number: int, corner: Tuple[int, int], cell: int) -> None:
    """Put a patch, as large as fits, with its frame and number into a cell of the canvas."""
    room = cell - 2 * (MARGIN + FRAME)
    factor = room / max(patch.size)
    size = tuple(max(1, round(side * factor)) for side in patch.size)
    left, top = (start + (cell - side) // 2 for start, side in zip(corner, size))
    canvas.paste(patch.resize(size, Image.Resampling.LANCZOS), (left, top))
    draw = ImageDraw.Draw(canvas)
    colour = distinct_colour(number)
    frame = (left - FRAME, top - FRAME, left + size[0] + FRAME - 1, top + size[1] + FRAME - 1)
    draw.rectangle(frame, outline=colour, width=FRAME)
    text = str(number + 1)
    plate = (frame[0], frame[1], frame[0] + draw.textlength(text, font=font(14)) + 7, frame[1] + 18)
    draw.rectangle(plate, fill=colour)
    draw.text((plate[0] + 4, plate[1] + 1), text, font=font(14), fill=text_colour(colour))


def report(entries: Sequence[Dict[str, Any]]) -> None:
    """Print the entries as a table."""
    print(f"{'':>3}  {'box x,y,w,h':>26}  {'found x,y,w,h':>26}  confidence   IoU")
    for number, entry in enumerate(entries, start=1):
        box, found = (",".join(f"{side:.0f}" for side in entry[name]) for name in ("box", "found"))
        print(f"{number:3}  {box:>26}  {found:>26}  {entry['confidence']:10.3f}  {entry['iou']:4.2f}")


def read_resized(path: str, size: int, max_size: int) -> Tuple[Tensor, Tensor]:
    """An image as pre-training's evaluation sees it, and as its file has it, uint8 [3, H, W] both.

    Raises:
        InputError: if it can't be read.
    """
    try:
        source = read_image(path)[0]
    except UnreadableImage as error:
        raise InputError(str(error)) from error
    return resize_to(source, resized_size(*source.shape[-2:], size, max_size)), source


def main(args: argparse.Namespace) -> None:
    """Cut, look, draw and write."""
    check_ranges(args, TOOL_RANGES)
    require_ending(args.output, PICTURES, "--output")
    written = [Path(args.output), Path(args.output).with_suffix(".json")]
    refuse_others("--output", written)
    loaded = load_model(args.checkpoint, PRETRAINED, args.device, nheads=args.nheads, dilation=args.dilation,
                        num_patches=args.num_patches, patch_size=args.patch_size)
    size = args.size or max(loaded.args.pretrain_sizes or PRETRAIN_SIZES)
    max_size = args.max_size or loaded.args.pretrain_max_size or PRETRAIN_MAX_SIZE
    image, source = read_resized(args.image, size, max_size)
    boxes = choose_boxes(args, loaded, source)
    cut = to_whole_pixels(boxes, source)
    found, confidences = find_patches(loaded, image, source, cut)
    height, width = source.shape[-2:]
    entries = to_entries(boxes, found * torch.tensor([width, height, width, height]), confidences)
    picture = draw(image, source, cut, entries)
    with writing("--output", args.output):
        written[0].parent.mkdir(parents=True, exist_ok=True)
        picture.save(written[0])
        write_json_lines(written[1], entries)
        remember(written)
    report(entries)
    print(f"{written[0]} and {written[1]}")


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
