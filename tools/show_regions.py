"""Show the regions that selective search proposes beside the boxes that a model finds, the best of each:

    python -m tools.show_regions --checkpoint exps/DETReg_top30_in/checkpoint.pth photo.jpg other.jpg

DETReg's pre-training shows a model the former; what it finds afterwards is the latter.
"""
import argparse
from pathlib import Path
from typing import List, Tuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from datasets.coco import make_coco_transforms
from datasets.image_io import UnreadableImage, read_image
from datasets.selective_search import require_opencv
from tools.drawing import LabelledBox, distinct_colour, draw_boxes, font
from tools.loading import DETECTOR, Loaded, add_checkpoint_flags, load_model
from tools.output import PICTURES, refuse_others, remember, require_ending, writing
from tools.regions import find_objects, search_regions
from util.errors import InputError, run_program
from util.misc import nested_tensor_from_tensor_list
from util.ranges import TOOL_RANGES, check_ranges

# Of the figure, in pixels: largest sides of an image, space between images, and the headline.
PANEL, MARGIN, HEADER = 400, 6, 28


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.show_regions", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, a row of the picture for each")
    add_checkpoint_flags(parser, "a model that was pre-trained on regions, or any detector")
    parser.add_argument("--num_boxes", type=int, default=10, help="boxes to show of each (10)")
    parser.add_argument("--output", default="outputs/regions.png", help="picture to write (outputs/regions.png)")
    parser.add_argument("--val_size", type=int,
                        help="short side that images are resized to for the model (as in its training's evaluation)")
    parser.add_argument("--max_size", type=int, help="largest long side (likewise)")
    parser.add_argument("--apply_exif", action="store_true", default=None,
                        help="turn images as their EXIF orientation says (as in the training)")
    return parser


def best_boxes(path: str, loaded: Loaded, count: int) -> Tuple[Tensor, Tensor, Tensor]:
    """The best proposals in an image file and the best boxes of the model.

    Returns:
        the image uint8 [3, H, W]; in its pixels, xyxy boxes [n, 4] of selective search and of the model, n <= count,
        the best first.

    Raises:
        InputError: if the file can't be read.
    """
    try:
        apply_exif = bool(loaded.args.apply_exif)
        image = read_image(path, apply_exif=apply_exif)[0]
        proposed = torch.from_numpy(search_regions(path, apply_exif))
    except UnreadableImage as error:
        raise InputError(str(error)) from error
    transforms = make_coco_transforms("val", val_size=loaded.args.val_size, max_size=loaded.args.max_size)
    device = torch.device(loaded.args.device)
    samples = nested_tensor_from_tensor_list([transforms(image)[0]]).to(device)
    found, _ = find_objects(loaded, samples, torch.tensor([image.shape[-2:]], device=device))[0]
    return image, proposed[:count], found[:count]


def draw_panel(image: Tensor, boxes: Tensor) -> Image.Image:
    """An image with boxes, the best in front, within PANEL x PANEL pixels."""
    drawn = [LabelledBox(tuple(box), distinct_colour(number)) for number, box in enumerate(boxes.tolist())]
    picture = draw_boxes(image, drawn)
    picture.thumbnail((PANEL, PANEL), Image.Resampling.LANCZOS)
    return picture


def draw(rows: List[Tuple[Image.Image, Image.Image]], headlines: Tuple[str, str]) -> Image.Image:
    """Rows of two pictures of one size each, below their headlines."""
    column = max(left.width for left, _ in rows) + MARGIN
    canvas = Image.new("RGB", (2 * column, HEADER + sum(left.height + MARGIN for left, _ in rows)), "white")
    write = ImageDraw.Draw(canvas)
    for number, headline in enumerate(headlines):
        write.text((number * column + MARGIN, 6), headline, font=font(15), fill="black")
    top = HEADER
    for row in rows:
        for number, picture in enumerate(row):
            canvas.paste(picture, (number * column, top))
        top += row[0].height + MARGIN
    return canvas


def main(args: argparse.Namespace) -> None:
    """Propose, find, draw and write."""
    check_ranges(args, TOOL_RANGES)
    require_ending(args.output, PICTURES, "--output")
    refuse_others("--output", [Path(args.output)])
    require_opencv()
    loaded = load_model(args.checkpoint, DETECTOR, args.device, nheads=args.nheads, dilation=args.dilation,
                        val_size=args.val_size, max_size=args.max_size, apply_exif=args.apply_exif)
    rows = []
    for path in args.images:
        image, proposed, found = best_boxes(path, loaded, args.num_boxes)
        print(f"{path}: {len(proposed)} regions of selective search, {len(found)} boxes of the model", flush=True)
        rows.append((draw_panel(image, proposed), draw_panel(image, found)))
    with writing("--output", args.output):
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        draw(rows, (f"selective search, best {args.num_boxes}", f"the model, best {args.num_boxes}")).save(args.output)
        remember([Path(args.output)])
    print(f"picture: {args.output}")


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
