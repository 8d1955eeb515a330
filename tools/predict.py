"""Show what a detector finds in images: `python -m tools.predict --checkpoint FILE_OR_URL IMAGE_OR_FOLDER…`

Writes into --output_dir a picture of each image with its boxes, and detections.json: a list with one entry for each
object,

    {"file_name": "photos/a.jpg", "category_id": 18, "category_name": "dog", "bbox": [x, y, w, h], "score": 0.98}

with the box in pixels of the image file (EXIF orientation ignored unless --apply_exif), left, top, width, height; boxes may
reach a little over the edges, as in `main.py --eval`. Images in which nothing is found have no entry. A model with a
mask head also gives each object's mask as "segmentation", COCO's compressed run lengths.

A model that was trained on panoptic data divides each image into segments instead: panoptic.json has an entry for each
image,

    {"file_name": "photos/a.jpg", "png_file_name": "panoptic/a.png",
     "segments_info": [{"id": 0, "category_id": 18, "category_name": "dog", "isthing": true, "area": 5120}]}

where the PNG holds the pixels' segment ids in COCO's way (red + 256 green + 256² blue).
"""
import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from PIL import Image
from torch import Tensor

from datasets import voc
from datasets.checks import Problem, ground_truth_problems, raise_first
from datasets.coco import class_names, make_coco_transforms, read_ground_truth
from datasets.image_io import UnreadableImage, decode, warn_once
from datasets.pretext import list_images
from models import build_postprocess, fused
from models.segmentation import PostProcessPanoptic, PostProcessSegm
from tools.drawing import distinct_colour, draw_boxes, side_by_side
from tools.loading import DETECTOR, Loaded, add_checkpoint_flags, load_model
from tools.output import refuse_others, remember, write_json_lines, writing
from tools.views import ObjectView, PanopticView, Style, draw_entries, name_of, save_picture
from util.errors import InputError, run_program
from util.files import shown
from util.misc import nested_tensor_from_tensor_list
from util.ranges import TOOL_RANGES, check_ranges

COCO_NUM_CLASSES = (91, 250)  # of the published detectors and panoptic models
VOC_FOLDERS = ("Annotations", "JPEGImages", "images")
VIEWS = ("boxes", "masks", "panoptic")  # what can be shown
# The least score of what is shown, by the kind of model. A sigmoid's scores are lower: no class takes from the others.
SOFTMAX_THRESHOLD, SIGMOID_THRESHOLD, PANOPTIC_THRESHOLD = 0.7, 0.3, 0.85


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
    parser.add_argument("--show", choices=VIEWS,
                        help="boxes alone, masks too, or panoptic maps (the last of these that the model can)")
    parser.add_argument("--threshold", type=float,
                        help="least score of what is shown and written, 0 to 1 (0.7; Deformable DETR: 0.3; panoptic: "
                        "0.85)")
    parser.add_argument("--max_detections", type=int, metavar="N",
                        help="show and write the N best objects of an image at most, at least 1 (all)")
    parser.add_argument("--hide_labels", action="store_true", help="draw no names and scores")
    parser.add_argument("--line_width", type=int, metavar="PIXELS",
                        help="width of frames, at least 1 (as the picture's size asks for)")
    parser.add_argument("--annotations", metavar="JSON_OR_FOLDER", help="COCO-format file, or folder of VOC's XML files, "
                        "with the true objects of images, which are told by their file names: draw them beside what is "
                        "found, each class in one colour")
    parser.add_argument("--classes", metavar="JSON", help="COCO annotation file with the names of the classes "
                        "(those in the checkpoint; for 91 or 250 classes without names COCO's); of a panoptic file "
                        "also which are things")
    parser.add_argument("--batch_size", type=int, default=1, help="images at a time; padding among unequal ones "
                        "changes scores slightly (1)")
    parser.add_argument("--val_size", type=int,
                        help="short side that images are resized to (as in the training's evaluation)")
    parser.add_argument("--max_size", type=int, help="largest long side (likewise)")
    parser.add_argument("--apply_exif", action="store_true", default=None,
                        help="turn images as their EXIF orientation says (as in the training)")
    parser.add_argument("--mask_softmax", choices=("joint", "per_head"),
                        help="of a mask model's attention maps, see main.py (as in the training, else joint)")
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
        if os.path.isdir(given):  # unlike pathlib's, it takes names that no file can have
            for place in list_images(given):
                found.setdefault(given / place, Path(place))
        elif os.path.exists(given):
            found.setdefault(given, Path(given.name))
        else:
            raise InputError(f"{shown(argument)}: no such file or folder")
    originals = {os.path.realpath(path) for path in found}
    taken: Set[Path] = set()
    sources = []
    for path, place in found.items():
        picture = _free_name(Path(output_dir) / place.with_suffix(".jpg"), taken)
        taken.add(picture)
        if os.path.realpath(picture) in originals:
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
    if loaded.class_names or loaded.args.num_classes not in COCO_NUM_CLASSES:
        return loaded.class_names
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    print(f"the checkpoint holds no class names; with {loaded.args.num_classes} classes it is taken for one of COCO "
          "(else give --classes)")
    return dict(enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))


def read_batches(sources: Sequence[Source], batch_size: int, failed: List[Path], turned: List[Path],
                 apply_exif: bool = False) -> Iterator[List[Tuple[Source, Tensor]]]:
    """Batches of images, uint8 [3, H, W]; one that can't be read is reported, noted in `failed` and passed over. One that
    has an EXIF orientation which isn't applied is noted in `turned`."""
    batch = []
    for source in sources:
        try:
            decoded = decode(source.path, apply_exif=apply_exif)
            batch.append((source, decoded.image))
        except UnreadableImage as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            failed.append(source.path)
        else:
            turned += [source.path] * (decoded.orientation != 1)
            if decoded.doubt:
                warn_once("image_range", f"image file {shown(source.path)} {decoded.doubt}")
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def is_thing_of(loaded: Loaded, annotation_file: Optional[str]) -> Dict[int, bool]:
    """Which classes are things: as a panoptic annotation file says if given, else as the checkpoint does, else {}."""
    categories = read_ground_truth(annotation_file)["categories"] if annotation_file else []
    told = {category["id"]: bool(category["isthing"]) for category in categories if "isthing" in category}
    return told or loaded.is_thing_map


class TrueObjects:
    """The objects that a COCO-format annotation file, or VOC's XML files in a folder tree, have for images. These are told
    by the ends of their paths: to XML files without their endings, and whether or not they lie in VOC's folders of images.

    Args:
        annotations: the file or the folder.
        classes: names of the model's classes by id, by which its true objects count; others get ids of their own.

    Raises:
        InputError: there are no annotations, or something in them is wrong.
    """

    def __init__(self, annotations: str, classes: Optional[Dict[int, str]] = None) -> None:
        self.is_voc = os.path.isdir(annotations)
        truth = _read_xml_files(Path(annotations)) if self.is_voc else read_ground_truth(annotations)
        raise_first(ground_truth_problems(truth, annotations, num_classes=sys.maxsize))
        names = class_names(truth)
        ids = {name: label for label, name in (classes or {}).items()}
        if classes:
            for name in names.values():
                ids.setdefault(name, max(ids.values()) + 1)
        objects: Dict[int, List[Dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
        for found in truth["annotations"]:
            if found["image_id"] in objects:
                category = found["category_id"]
                name = name_of(category, names)
                objects[found["image_id"]].append({"category_id": ids.get(name, category), "category_name": name,
                                                   "bbox": found["bbox"]})
        self.by_place = {Path(image["file_name"]).parts: objects[image["id"]] for image in truth["images"]}

    def of(self, path: Path) -> Optional[List[Dict[str, Any]]]:
        """Return the objects of an image as a view's entries, without scores; None if the file doesn't have the image."""
        parts = _place(path.absolute()) if self.is_voc else path.parts
        return next((self.by_place[parts[start:]] for start in range(len(parts)) if parts[start:] in self.by_place), None)


def _read_xml_files(folder: Path) -> Dict[str, Any]:
    """Read all XML files of a folder tree as a COCO dict, whose images have the files' places (see `_place`) for names."""
    problems: List[Problem] = []
    pictures = [voc.Picture("/".join(_place(path.relative_to(folder))), path, voc.read_annotation(path, problems)[0])
                for path in sorted(folder.rglob("*.xml"))]
    if not pictures:
        raise InputError(f"--annotations {shown(folder)} has no XML files")
    raise_first(problems)
    return voc.as_coco(pictures, dict(enumerate(voc.names_of(pictures), start=1)))


def _place(path: Path) -> Tuple[str, ...]:
    """What an image and its XML file have in common: their paths without ending and without VOC's folders of files."""
    return tuple(part for part in path.with_suffix("").parts if part not in VOC_FOLDERS)


class Detector:
    """A loaded model with the pre- and post-processing of evaluation. After each call `best` has each image's best score.

    Args:
        threshold: least score of what is found.
        max_detections: most objects of an image; None for all.
        with_masks: also find the masks of objects.
        is_thing_map: find panoptic maps instead of objects; whether each class is a thing.
    """

    def __init__(self, loaded: Loaded, threshold: float = 0.0, with_masks: bool = False,
                 is_thing_map: Optional[Dict[int, bool]] = None, max_detections: Optional[int] = None) -> None:
        self.best: List[float] = []
        self.max_detections = max_detections
        self.model, self.device, self.threshold = loaded.model, torch.device(loaded.args.device), threshold
        if loaded.args.masks:
            # Masks take most of the time. What is below the threshold needs none.
            loaded.model.min_score = threshold
            self.model = loaded.model if with_masks or is_thing_map else loaded.model.detr
        self.transforms = make_coco_transforms("val", val_size=loaded.args.val_size, max_size=loaded.args.max_size)
        self.postprocess, self.with_masks, self.segm = build_postprocess(loaded.args), with_masks, PostProcessSegm()
        self.panoptic = PostProcessPanoptic(is_thing_map, threshold) if is_thing_map else None

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> List[Dict[str, Any]]:
        """Find objects in images, uint8 [3, Hi, Wi].

        Returns:
            for each image `scores` [N] in 0..1, `labels` int64 [N], `boxes` [N, 4] as xyxy pixels and with masks
            `masks` bool [N, 1, Hi, Wi], on the CPU, best first; or what `PostProcessPanoptic` returns.
        """
        samples = nested_tensor_from_tensor_list([self.transforms(image)[0] for image in images])
        inside = ~samples.mask
        resized = torch.stack([inside[:, :, 0].sum(1), inside[:, 0].sum(1)], dim=1)
        originals = torch.tensor([image.shape[-2:] for image in images])
        with fused.steps():
            outputs = self.model(samples.to(self.device))
        if self.panoptic:
            self.best = outputs["pred_logits"].softmax(-1)[..., :-1].amax((1, 2)).tolist()
            return self.panoptic(outputs, resized, originals)
        results, masks = [], []
        self.best = []
        for i, result in enumerate(self.postprocess(outputs, originals.to(self.device))):
            order = result["scores"].argsort(descending=True)
            self.best.append(float(result["scores"][order[0]]))
            order = order[result["scores"][order] >= self.threshold][:self.max_detections]
            results.append({name: value[order].cpu() for name, value in result.items()})
            if self.with_masks:
                masks.append(outputs["pred_masks"][i, order].cpu())
        return self.segm(results, {"pred_masks": masks}, originals, resized) if self.with_masks else results


def view_of(loaded: Loaded, things: Dict[int, bool], asked: Optional[str]) -> str:
    """What is to be shown: what is asked for, or the most that the model can.

    Raises:
        InputError: if the model can't show what is asked for.
    """
    able = ["boxes"] + ["masks"] * bool(loaded.args.masks) + ["panoptic"] * bool(loaded.args.masks and things)
    if asked and asked not in able:
        reason = ("which classes are things? give a panoptic annotation file as --classes" if loaded.args.masks else
                  "the model has no mask head (see main.py --masks)")
        raise InputError(f"--show {asked}: {reason}")
    return asked or able[-1]


def default_threshold(loaded: Loaded, show: str) -> float:
    """The least score of what is shown, unless --threshold says it."""
    if show == "panoptic":
        return PANOPTIC_THRESHOLD
    return SIGMOID_THRESHOLD if loaded.args.model == "deformable_detr" else SOFTMAX_THRESHOLD


def draw_beside(picture: Image.Image, image: Tensor, true: Optional[List[Dict[str, Any]]], style: Style) -> Image.Image:
    """Put the true objects of an image to the left of the picture of what was found, if they are known."""
    if true is None:
        return side_by_side([draw_boxes(image, []), picture], ["not annotated", "found"])
    colours = [distinct_colour(entry["category_id"]) for entry in true]
    return side_by_side([draw_entries(image, true, colours, style), picture], [f"true: {len(true)}", "found"])


def main(args: argparse.Namespace) -> None:
    """Detect, draw and write; exits with status 1 at the end if some images could not be read."""
    check_ranges(args, TOOL_RANGES)
    sources = find_images(args.images, args.output_dir)
    loaded = load_model(args.checkpoint, DETECTOR, args.device, nheads=args.nheads, dilation=args.dilation,
                        val_size=args.val_size, max_size=args.max_size, mask_softmax=args.mask_softmax,
                        apply_exif=args.apply_exif)
    names, things = names_of_classes(loaded, args.classes), is_thing_of(loaded, args.classes)
    true = TrueObjects(args.annotations, names) if args.annotations else None
    show = view_of(loaded, things, args.show)
    for flag in ("max_detections", "line_width") if show == "panoptic" else ():
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag} is for objects; panoptic maps are shown (--show boxes or masks shows objects)")
    style = Style(not args.hide_labels, args.line_width, by_class=true is not None)
    view = (PanopticView if show == "panoptic" else ObjectView)(names, style)
    threshold = default_threshold(loaded, show) if args.threshold is None else args.threshold
    detector = Detector(loaded, threshold, show == "masks", things if show == "panoptic" else None, args.max_detections)
    json_path = Path(args.output_dir) / view.json_name
    files = {source: view.files(source.picture, args.output_dir) for source in sources}
    refuse_others("--output_dir", [json_path, *itertools.chain(*files.values())])
    entries: List[Dict[str, Any]] = []
    failed: List[Path] = []
    turned: List[Path] = []
    for batch in read_batches(sources, args.batch_size, failed, turned, bool(loaded.args.apply_exif)):
        results = detector([image for _, image in batch])
        for (source, image), found, best in zip(batch, results, detector.best):
            with writing("--output_dir", args.output_dir):
                mine = view.entries(source.path, found, source.picture, args.output_dir)
                picture = view.draw(image, found, mine)
                save_picture(draw_beside(picture, image, true.of(source.path), style) if true else picture, source.picture)
                remember(files[source])
            listed = ", ".join(f"{count} {name}" for name, count in view.counts(mine).most_common())
            listed = listed or f"nothing above {threshold:g}, best {best:.2g}"
            print(f"{shown(source.path)}: {listed}", flush=True)
            entries += mine
    if len(failed) == len(sources):
        raise InputError(f"none of the {len(sources)} images can be read")
    with writing("--output_dir", args.output_dir):
        write_json_lines(json_path, entries)
        remember([json_path])
    print(f"{sum(view.counts(entries).values())} {view.counted} in {len(sources) - len(failed)} images: {json_path}, "
          "pictures beside it")
    if turned:
        print(f"warning: {len(turned)} of {len(sources)} images have an EXIF orientation that is not applied, as "
              f"{shown(turned[0])}: they are looked at, and boxes count, as the pixels are stored (--apply_exif turns them)",
              file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(sources)} images could not be read", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
