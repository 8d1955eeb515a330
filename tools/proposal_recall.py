"""Measure how well boxes cover objects, whatever their class: average recall (AR) at 10, 100 and 1000 boxes per image.

    python -m tools.proposal_recall --checkpoint exps/DETReg_top30_in/checkpoint.pth --coco_path data/MSCoco
    python -m tools.proposal_recall --selective_search --coco_path data/MSCoco

The boxes are those that a model finds, be it pre-trained on regions (DETReg) or a trained detector, or selective
search's proposals, as a baseline. AR at k is COCO's: of all objects, the share that is covered by one of their image's
k best boxes, each object by a box of its own, averaged over the IoU thresholds 0.5, 0.55, … 0.95 (with COCO's
useCats = 0). Crowds and VOC's difficult objects don't count. R50 is the share at the threshold 0.5 alone.
"""
import argparse
import functools
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor

import main as training
from datasets import build_dataset
from datasets.coco import DetectionDataset
from datasets.coco_eval import CocoEvaluator
from datasets.image_io import UnreadableImage
from datasets.selective_search import require_opencv
from engine import to_device
from tools.cache_proposals import ProgressLine
from tools.loading import DETECTOR, Loaded, add_checkpoint_flags, load_model
from tools.output import refuse_others, remember, replace_json, writing
from tools.regions import find_objects, search_regions
from util import recipes
from util.errors import InputError, run_program
from util.parallel import imap_in_processes
from util.ranges import TOOL_RANGES, check_ranges

COUNTS = (10, 100, 1000)  # boxes per image
AREAS = ("AR", "AR_small", "AR_medium", "AR_large")  # of COCO's areas: all, below 32² pixels, to 96², above
# Flags that selective search has no use for.
OF_MODEL = ("device", "nheads", "dilation", "val_size", "max_size", "batch_size")
DATA_FLAGS = ("coco_path", "val_images", "val_annotations", "voc_path")  # as main.py's

Found = Tuple[int, Tensor, Tensor]  # image id, xyxy boxes [n, 4] in pixels of the image, scores [n]


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.proposal_recall", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser, "a model whose boxes are to be measured", required=False)
    parser.add_argument("--selective_search", action="store_true", help="measure selective search's proposals instead")
    group = parser.add_argument_group("annotated images, as for main.py")
    group.add_argument("--coco_path", help="folder with val2017/ and annotations/")
    group.add_argument("--val_images", help="folder of the images (val2017 in --coco_path)")
    group.add_argument("--val_annotations", help="their COCO-format JSON (annotations/instances_val2017.json)")
    group.add_argument("--voc_path", help="or a VOCdevkit folder: the test images of VOC2007")
    parser.add_argument("--val_size", type=int, help="short side that images are resized to for the model (as in its "
                        "training's evaluation)")
    parser.add_argument("--max_size", type=int, help="largest long side (likewise)")
    parser.add_argument("--apply_exif", action="store_true", default=None,
                        help="turn images as their EXIF orientation says (as in the model's training)")
    parser.add_argument("--batch_size", type=int, help="images at a time (1)")
    parser.add_argument("--num_workers", type=int, help="loading processes (2); of selective search one per CPU")
    parser.add_argument("--output", help="JSON file to write the figures to")
    return parser


def build_images(args: argparse.Namespace, loaded: Optional[Loaded]) -> Tuple[DetectionDataset, argparse.Namespace]:
    """The annotated images, prepared as the model needs them, and main.py's flags that describe them.

    Raises:
        InputError: if no flag says where they are, or they are missing or broken.
    """
    flags = training.get_args_parser().parse_args([])
    for name in (*DATA_FLAGS, "batch_size", "num_workers", "device"):
        setattr(flags, name, getattr(args, name))
    if loaded:
        flags.val_size, flags.max_size = loaded.args.val_size, loaded.args.max_size
    flags.apply_exif = loaded.args.apply_exif if loaded else args.apply_exif
    flags.eval = True
    recipes.require_data(recipes.resolve(flags))
    return build_dataset("val", flags), flags


def boxes_of_model(loaded: Loaded, loader: Iterable) -> Iterator[Found]:
    """What a model finds in the images of a loader."""
    for batch in loader:
        (samples,), targets = to_device(batch, torch.device(loaded.args.device))
        sizes = torch.stack([target["orig_size"] for target in targets])
        for target, (boxes, scores) in zip(targets, find_objects(loaded, samples, sizes)):
            yield int(target["image_id"]), boxes, scores


def boxes_of_search(dataset: DetectionDataset, num_workers: Optional[int]) -> Iterator[Found]:
    """Selective search's proposals for all images, scored by their order."""
    paths = [str(dataset.img_folder / dataset.coco.imgs[image_id]["file_name"]) for image_id in dataset.ids]
    try:
        search = functools.partial(_search, apply_exif=dataset.apply_exif)
        for image_id, boxes in zip(dataset.ids, imap_in_processes(search, paths, num_workers, chunksize=4)):
            yield image_id, torch.from_numpy(boxes), torch.linspace(1, 0, len(boxes) + 1)[:-1]
    except UnreadableImage as error:
        raise InputError(str(error)) from error


def _search(path: str, apply_exif: bool) -> np.ndarray:
    torch.set_num_threads(1)  # there is a process for each CPU
    return search_regions(path, apply_exif)


def average_recall(ground_truth: COCO, found: Iterable[Found]) -> Dict[str, Any]:
    """Evaluate boxes on the images for which there are some, or an empty list of them.

    Returns:
        the numbers of `images`, of their `objects` and of `boxes_per_image` (mean); and by number of boxes, "10",
        "100" and "1000", a dict of `AR`, `AR_small`, `AR_medium`, `AR_large` and `R50` in 0..1, None where there is no
        such object.
    """
    evaluator = CocoEvaluator(ground_truth, ["bbox"])
    evaluation = evaluator.coco_eval["bbox"]
    evaluation.params.useCats, evaluation.params.maxDets = 0, list(COUNTS)
    # Without classes COCO's evaluation still passes over what has none of the ground truth's: all boxes get the first.
    label = min(evaluation.params.catIds, default=0)
    image_ids: List[int] = []
    num_boxes = 0
    for image_id, boxes, scores in found:
        labels = torch.full((len(boxes),), label)
        evaluator.update({image_id: {"boxes": boxes, "scores": scores, "labels": labels}})
        image_ids.append(image_id)
        num_boxes += len(boxes)
    evaluator.accumulate()
    objects = [annotation for image_id in image_ids for annotation in ground_truth.imgToAnns[image_id]
               if not annotation["iscrowd"] and not annotation.get("difficult")]
    recall = evaluation.eval["recall"][:, 0]  # thresholds (the first is 0.5), areas, numbers of boxes
    result = {"images": len(image_ids), "objects": len(objects), "boxes_per_image": num_boxes / max(len(image_ids), 1)}
    for position, count in enumerate(COUNTS):
        figures = dict(zip(AREAS, recall[:, :, position].mean(0).tolist()), R50=float(recall[0, 0, position]))
        result[str(count)] = {name: figure if figure >= 0 else None for name, figure in figures.items()}
    return result


def table(result: Dict[str, Any]) -> str:
    """The figures in percent; "-" where there is no such object."""
    names = [*AREAS, "R50"]
    rows = [f"{result['objects']:,} objects in {result['images']:,} images; "
            f"{result['boxes_per_image']:.0f} boxes in an image on average",
            " | ".join(f"{name:>9}" for name in ("boxes", *names))]
    for count in COUNTS:
        figures = [result[str(count)][name] for name in names]
        rows.append(" | ".join(f"{text:>9}" for text in (
            count, *("-" if figure is None else f"{100 * figure:.1f}" for figure in figures))))
    return "\n".join(rows)


def follow(found: Iterable[Found], num_images: int) -> Iterator[Found]:
    """The same, with progress on standard output."""
    progress = ProgressLine.on_stdout(num_images)
    for number, item in enumerate(found, 1):
        yield item
        progress.update(number, number)
    progress.clear()


def main(args: argparse.Namespace) -> None:
    """Find boxes, evaluate them, print the figures and write them if asked to."""
    check_ranges(args, TOOL_RANGES)
    if bool(args.checkpoint) == args.selective_search:
        raise InputError("whose boxes? give either --checkpoint FILE_OR_URL or --selective_search")
    for name in OF_MODEL if args.selective_search else ():
        if getattr(args, name) is not None:
            raise InputError(f"--{name} has no effect with --selective_search")
    args.batch_size = args.batch_size or 1
    if args.output:
        refuse_others("--output", [Path(args.output)])
    loaded = None
    if args.selective_search:
        require_opencv()
    else:
        loaded = load_model(args.checkpoint, DETECTOR, args.device, nheads=args.nheads, dilation=args.dilation,
                            val_size=args.val_size, max_size=args.max_size, apply_exif=args.apply_exif)
    dataset, flags = build_images(args, loaded)
    found = boxes_of_model(loaded, training.build_val_loader(dataset, flags)) if loaded else \
        boxes_of_search(dataset, args.num_workers)
    result = average_recall(dataset.coco, follow(found, len(dataset)))
    print(table(result))
    if args.output:
        with writing("--output", args.output):
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            replace_json(Path(args.output), result)
            remember([Path(args.output)])


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
