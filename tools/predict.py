"""Show what a detector finds in images: `python -m tools.predict --checkpoint FILE_OR_URL IMAGE_OR_FOLDER…`

Writes into --output_dir a picture of each image with its boxes, and detections.json: a list with one entry for each
object,

    {"file_name": "photos/a.jpg", "category_id": 18, "category_name": "dog", "bbox": [x, y, w, h], "score": 0.98}

with the box in pixels of the image file (EXIF orientation ignored, as in training), left, top, width, height; boxes may
reach a little over the edges, as in `main.py --eval`. Images in which nothing is found have no entry.
"""
import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor

from datasets.coco import class_names, make_coco_transforms, read_ground_truth
from datasets.image_io import UnreadableImage, read_image
from datasets.pretext import list_images
from models import build_postprocess
from tools.drawing import LabelledBox, distinct_colour, draw_boxes
from tools.loading import DETECTOR, Loaded, add_checkpoint_flags, load_model
from tools.output import write_json_lines, writing
from util.errors import InputError, run_program
from util.misc import nested_tensor_from_tensor_list

COCO_NUM_CLASSES = 91


class Source(NamedTuple):
    """An image to look at, and the file its picture goes to."""

    path: Path
    picture: Path


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.predict", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER",
                        help="image files, or folders to search for them")
    add_checkpoint_flags(parser, "a trained detector")
    parser.add_argument("--output_dir", default="outputs/predict",
                        help="folder for pictures and JSON (outputs/predict)")
    parser.add_argument("--threshold", type=float, default=0.7, help="least score of what is shown and written (0.7)")
    parser.add_argument("--classes", metavar="JSON", help="COCO annotation file with the names of the classes "
                        "(those in the checkpoint; for 91 classes without names COCO's)")
    parser.add_argument("--batch_size", type=int, default=1, help="images at a time; padding among unequal ones "
                        "changes scores slightly (1)")
    parser.add_argument("--val_size", type=int,
                        help="short side that images are resized to (as in the training's evaluation)")
    parser.add_argument("--max_size", type=int, help="largest long side (likewise)")
    return parser


def find_images(arguments: Sequence[str], output_dir: str) -> List[Source]:
    """The images that files and folders name, in order, and a picture's name for each.

    Pictures from a folder keep their place below it.

    Raises:
        InputError: if one doesn't exist, a folder has no images, or a picture would overwrite an image.
    """
    found: Dict[Path, Path] = {}  # where the picture goes, by image
    for argument in arguments:
        given = Path(argument)
        if given.is_dir():
            for place in list_images(given):
                found.setdefault(given / place, Path(place))
        elif given.exists():
            found.setdefault(given, Path(given.name))
        else:
            raise InputError(f"{argument}: no such file or folder")
    originals = {path.resolve() for path in found}
    taken: Set[Path] = set()
    sources = []
    for path, place in found.items():
        picture = _free_name(Path(output_dir) / place.with_suffix(".jpg"), taken)
        taken.add(picture)
        if picture.resolve() in originals:
            raise InputError(f"--output_dir {output_dir}: the picture {picture} would overwrite an image; "
                             "choose another folder")
        sources.append(Source(path, picture))
    return sources


def _free_name(path: Path, taken: Set[Path]) -> Path:
    number, free = 1, path
    while free in taken:
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def names_of_classes(loaded: Loaded, annotation_file: Optional[str]) -> Dict[int, str]:
    """Names by class id: the annotation file's if given, else the checkpoint's, else COCO's for as many classes."""
    if annotation_file:
        return class_names(read_ground_truth(annotation_file))
    if loaded.class_names or loaded.args.num_classes != COCO_NUM_CLASSES:
        return loaded.class_names
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    print("the checkpoint holds no class names; with 91 classes it is taken for one of COCO (else give --classes)")
    return dict(enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))


def read_batches(sources: Sequence[Source], batch_size: int,
                 failed: List[Path]) -> Iterator[List[Tuple[Source, Tensor]]]:
    """Batches of images, uint8 [3, H, W]; one that can't be read is reported, noted in `failed` and passed over."""
    batch = []
    for source in sources:
        try:
            batch.append((source, read_image(source.path)[0]))
        except UnreadableImage as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            failed.append(source.path)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


class Detector:
    """A loaded model with the pre- and post-processing of evaluation."""

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.device = loaded.model, torch.device(loaded.args.device)
        self.transforms = make_coco_transforms("val", val_size=loaded.args.val_size, max_size=loaded.args.max_size)
        self.postprocess = build_postprocess(loaded.args)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> List[Dict[str, Tensor]]:
        """Find objects in images, uint8 [3, Hi, Wi].

        Returns:
            for each image `scores` [N] in 0..1, `labels` int64 [N] and `boxes` [N, 4] as xyxy pixels, on the CPU, best
            first.
        """
        samples = nested_tensor_from_tensor_list([self.transforms(image)[0] for image in images]).to(self.device)
        sizes = torch.tensor([image.shape[-2:] for image in images], device=self.device)
        results = []
        for result in self.postprocess(self.model(samples), sizes):
            order = result["scores"].argsort(descending=True)
            results.append({name: value[order].cpu() for name, value in result.items()})
        return results


def to_entries(path: Path, found: Dict[str, Tensor], names: Dict[int, str], threshold: float) -> List[Dict[str, Any]]:
    """Detections of one image as entries of detections.json (see the module's text)."""
    entries = []
    columns = (found[name].tolist() for name in ("scores", "labels", "boxes"))
    for score, label, (left, top, right, bottom) in zip(*columns):
        if score >= threshold:
            box = [round(number, 3) for number in (left, top, right - left, bottom - top)]
            entries.append({"file_name": str(path), "category_id": label,
                            "category_name": names.get(label, f"class {label}"), "bbox": box, "score": round(score, 5)})
    return entries


def draw_entries(image: Tensor, entries: Sequence[Dict[str, Any]], path: Path) -> None:
    """Write the picture of one image with its detections."""
    boxes = []
    for entry in entries:
        left, top, width, height = entry["bbox"]
        boxes.append(LabelledBox((left, top, left + width, top + height), distinct_colour(entry["category_id"]),
                                 f"{entry['category_name']} {entry['score']:.2f}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_boxes(image, boxes).save(path, quality=92, subsampling=0)


def main(args: argparse.Namespace) -> None:
    """Detect, draw and write; exits with status 1 at the end if some images could not be read."""
    if not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold} is not within 0 and 1")
    for name in ("batch_size", "val_size", "max_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)} is not at least 1")
    sources = find_images(args.images, args.output_dir)
    loaded = load_model(args.checkpoint, DETECTOR, args.device, nheads=args.nheads, dilation=args.dilation,
                        val_size=args.val_size, max_size=args.max_size)
    names, detector = names_of_classes(loaded, args.classes), Detector(loaded)
    entries: List[Dict[str, Any]] = []
    failed: List[Path] = []
    for batch in read_batches(sources, args.batch_size, failed):
        for (source, image), found in zip(batch, detector([image for _, image in batch])):
            mine = to_entries(source.path, found, names, args.threshold)
            with writing("--output_dir", args.output_dir):
                draw_entries(image, mine, source.picture)
            counts = Counter(entry["category_name"] for entry in mine)
            listed = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
            print(f"{source.path}: {listed}", flush=True)
            entries += mine
    if len(failed) == len(sources):
        raise InputError(f"none of the {len(sources)} images can be read")
    json_path = Path(args.output_dir) / "detections.json"
    with writing("--output_dir", args.output_dir):
        write_json_lines(json_path, entries)
    print(f"{len(entries)} objects in {len(sources) - len(failed)} images: {json_path}, pictures beside it")
    if failed:
        print(f"{len(failed)} of {len(sources)} images could not be read", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
