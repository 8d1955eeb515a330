"""Show where a detector looks: `python -m tools.show_attention --checkpoint FILE_OR_URL IMAGE`

Writes one picture: the image with what was found; for each detection, where its query looks in the image (decoder;
DETR, figure 6); and for a few points, which other places that place takes from (encoder; figure 3). Brighter is more.
Each map is the mean over the heads of one layer, scaled by its largest value.
"""
import argparse
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from datasets.image_io import UnreadableImage, read_image
from datasets.transforms import normalize_image, resize_to, resized_size
from models.detr import PostProcess
from tools.attention import Attention, enlarge, look, stride_of
from tools.drawing import Colour, LabelledBox, Rectangle, distinct_colour, draw_boxes, font, text_colour, to_picture
from tools.loading import DETECTOR, add_checkpoint_flags, load_model
from tools.output import PICTURES, refuse_others, remember, require_ending, writing
from tools.predict import names_of_classes
from util.errors import InputError, run_program
from util.plot_utils import pyplot
from util.ranges import TOOL_RANGES, check_ranges
from util.recipes import MODELS

# Of the picture: maps in a row, long side of a map, height of captions, height of headlines, space, in pixels.
COLUMNS, CELL, CAPTION, HEADER, MARGIN = 4, 320, 22, 30, 8
DEFAULT_POINTS = 4  # at most


class Found(NamedTuple):
    """A detection: its name, score in 0..1, box (left, top, right, bottom) in pixels, and the number of its query."""

    name: str
    score: float
    box: Rectangle
    query: int


class Map(NamedTuple):
    """An attention map [H, W] in 0..1 to draw over the image, with a text and a box or a point (a box without area)."""

    weights: Tensor
    marked: Rectangle
    colour: Colour
    text: str


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.show_attention", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", metavar="IMAGE", help="image file")
    add_checkpoint_flags(parser, "a trained detector")
    parser.add_argument("--output", default="outputs/attention.png", help="picture to write (outputs/attention.png)")
    parser.add_argument("--threshold", type=float, default=0.7, help="least score of the detections shown (0.7)")
    parser.add_argument("--max_detections", type=int, default=8, help="show so many, the best first (8)")
    parser.add_argument("--point", action="append", default=[], metavar="x,y",
                        help="a place whose attention in the encoder to show, in pixels of the image; may be repeated "
                             "(the middles of the best detections)")
    parser.add_argument("--decoder_layer", type=int, help="1 for the first (the last)")
    parser.add_argument("--encoder_layer", type=int, help="likewise")
    parser.add_argument("--classes", metavar="JSON", help="COCO annotation file with the names of the classes "
                        "(those in the checkpoint; for 91 classes without names COCO's)")
    parser.add_argument("--val_size", type=int,
                        help="short side that images are resized to (as in the training's evaluation)")
    parser.add_argument("--max_size", type=int, help="largest long side (likewise)")
    parser.add_argument("--apply_exif", action="store_true", default=None,
                        help="turn images as their EXIF orientation says (as in the training)")
    return parser


def parse_point(text: str, width: int, height: int) -> Tuple[float, float]:
    """"x,y" -> a point in an image of this size.

    Raises:
        InputError: unless these are two numbers, inside the image.
    """
    try:
        x, y = map(float, text.split(","))
    except ValueError as error:
        raise InputError(f"--point {text}: write two numbers, x,y") from error
    if not (0 <= x < width and 0 <= y < height):
        raise InputError(f"--point {text} lies outside the image, which has {width} x {height} pixels")
    return x, y


def detections(outputs: Dict[str, Tensor], image: Tensor, names: Dict[int, str], threshold: float) -> List[Found]:
    """What a model found in one image [3, H, W] with at least this score, best first."""
    result, = PostProcess()({name: outputs[name].cpu() for name in ("pred_logits", "pred_boxes")},
                            torch.tensor([image.shape[-2:]]))
    found = []
    for query in result["scores"].argsort(descending=True).tolist():
        score, label, box = (result[name][query].tolist() for name in ("scores", "labels", "boxes"))
        if score >= threshold:
            found.append(Found(names.get(label, f"class {label}"), score, tuple(box), query))
    return found


def default_points(found: Sequence[Found], image: Tensor) -> List[Tuple[float, float]]:
    """The middles of the best detections that lie in the image [3, H, W]; without detections, of its quarters."""
    height, width = image.shape[-2:]
    middles = [((item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2) for item in found]
    inside = [(min(max(x, 0), width - 1), min(max(y, 0), height - 1)) for x, y in middles]
    quarters = [(x * width / 4, y * height / 4) for y in (1, 3) for x in (1, 3)]
    return inside[:DEFAULT_POINTS] or quarters


def decoder_maps(image: Tensor, found: Sequence[Found], attention: Attention) -> List[Map]:
    """Where the query of each detection looks."""
    stride = stride_of(attention, image)
    return [Map(enlarge(attention.decoder[item.query], image, stride), item.box, distinct_colour(number),
                f"{item.name} {item.score:.2f}") for number, item in enumerate(found)]


def encoder_maps(image: Tensor, points: Sequence[Tuple[float, float]], attention: Attention) -> List[Map]:
    """Which places each point's place takes from; none without an encoder."""
    if attention.encoder is None:
        return []
    stride = stride_of(attention, image)
    return [Map(enlarge(attention.encoder[int(y) // stride, int(x) // stride], image, stride), (x, y, x, y),
                distinct_colour(number), f"point {number + 1}") for number, (x, y) in enumerate(points)]


def draw_map(image: Tensor, item: Map) -> Image.Image:
    """The image [3, H, W] in dark grey, the map glowing over it, the box or point, and the text below."""
    glow = torch.from_numpy(pyplot().colormaps["inferno"](item.weights.numpy())[..., :3]).permute(2, 0, 1)
    grey = image.float().mean(0, keepdim=True).expand(3, -1, -1) / 255
    picture = to_picture(((0.6 * grey * (1 - item.weights) + glow).clamp(0, 1) * 255).byte())
    scale = CELL / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (picture.width, picture.height + CAPTION), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = (side * scale for side in item.marked)
    if (left, top) == (right, bottom):
        for radius, colour in ((7, "black"), (5, item.colour)):
            draw.ellipse((left - radius, top - radius, left + radius, top + radius), fill=colour)
    else:
        draw.rectangle((left, top, right, bottom), outline=item.colour, width=3)
    draw.rectangle((0, picture.height, canvas.width, canvas.height), fill=item.colour)
    draw.text((5, picture.height + 2), item.text, font=font(15), fill=text_colour(item.colour))
    return canvas


def draw(image: Tensor, found: Sequence[Found], rows: Sequence[Tuple[str, Sequence[Map]]]) -> Image.Image:
    """The whole picture.

    Args:
        image: uint8 [3, H, W]; found: its detections; rows: a headline and maps for each part below.
    """
    boxes = [LabelledBox(item.box, distinct_colour(number), f"{item.name} {item.score:.2f}")
             for number, item in enumerate(found)]
    parts: List[Tuple[str, List[Image.Image]]] = [(f"{len(found)} detections", [draw_boxes(image, boxes)])]
    for headline, maps in rows:
        drawn = [draw_map(image, item) for item in maps]
        parts += [(headline if start == 0 else "", drawn[start:start + COLUMNS])
                  for start in range(0, len(drawn), COLUMNS)]
    width = max(sum(cell.width + MARGIN for cell in cells) for _, cells in parts) + MARGIN
    height = sum((HEADER if headline else 0) + cells[0].height + MARGIN for headline, cells in parts)
    canvas = Image.new("RGB", (width, height), "white")
    write, top = ImageDraw.Draw(canvas), 0
    for headline, cells in parts:
        if headline:
            write.text((MARGIN, top + 5), headline, font=font(17), fill="black")
            top += HEADER
        for column, cell in enumerate(cells):
            canvas.paste(cell, (MARGIN + column * (cell.width + MARGIN), top))
        top += cells[0].height + MARGIN
    return canvas


def report(found: Sequence[Found], maps: Sequence[Map], scale: Tensor) -> None:
    """Print each detection and the place its query looks at most, in pixels of the file, which are `scale` [x, y] times
    the image's."""
    for item, shown in zip(found, maps):
        row, column = divmod(int(shown.weights.argmax()), shown.weights.shape[1])
        left, top, right, bottom = (torch.tensor(item.box) * scale.repeat(2)).tolist()
        x, y = (torch.tensor([column, row]) * scale).tolist()
        print(f"{item.name} {item.score:.2f} at {left:.0f},{top:.0f},{right - left:.0f},{bottom - top:.0f} "
              f"looks most at {x:.0f},{y:.0f}")


def main(args: argparse.Namespace) -> None:
    """Look, draw and write."""
    check_ranges(args, TOOL_RANGES)
    require_ending(args.output, PICTURES, "--output")
    refuse_others("--output", [Path(args.output)])
    loaded = load_model(args.checkpoint, DETECTOR, args.device, nheads=args.nheads, dilation=args.dilation,
                        val_size=args.val_size, max_size=args.max_size, apply_exif=args.apply_exif)
    try:
        image, (height, width) = read_image(args.image, apply_exif=bool(loaded.args.apply_exif))
    except UnreadableImage as error:
        raise InputError(str(error)) from error
    points = [parse_point(text, width, height) for text in args.point]
    if loaded.args.model != "detr":
        raise InputError(f"--checkpoint {args.checkpoint} holds a {MODELS[loaded.args.model]}; "
                         "this program shows DETR's attention, which looks at every place")
    image = resize_to(image, resized_size(height, width, loaded.args.val_size, loaded.args.max_size))
    scale = torch.tensor([width / image.shape[2], height / image.shape[1]])
    outputs, attention = look(loaded.model, normalize_image(image).to(loaded.args.device),
                              decoder_layer=args.decoder_layer, encoder_layer=args.encoder_layer)
    if args.point and attention.encoder is None:
        raise InputError(f"--point {args.point[0]} has no effect: the model has no encoder")
    found = detections(outputs, image, names_of_classes(loaded, args.classes), args.threshold)[:args.max_detections]
    points = [(x / scale[0].item(), y / scale[1].item()) for x, y in points] or default_points(found, image)
    looks, takes = decoder_maps(image, found, attention), encoder_maps(image, points, attention)
    with writing("--output", args.output):
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        draw(image, found, [("where the query of each detection looks (decoder)", looks),
                            ("from which places each point takes (encoder)", takes)]).save(args.output)
        remember([Path(args.output)])
    report(found, looks, scale)
    print(f"{len(found)} detections, {len(takes)} points: {args.output}")


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
