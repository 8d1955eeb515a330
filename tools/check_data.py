"""List everything that is wrong with a data set: `python -m tools.check_data --coco_path DIR`

Reads the set as training would: checks the annotations, decodes every image, and draws every mask. Each problem is one
line with file and id,

    error    image_file: image file my_data/train2017/7.jpg does not exist (image id 7 of …/instances_train2017.json)
    warning  box_outside: annotation id 12 (image 9.jpg) of … has the box [700, 5, 20, 10] outside its image of …

where an error stops a training (one of image files only if there are more than one in a hundred; an evaluation always), and
a warning is about something that is left out or doubtful. Then follows a summary.
The exit status is 0 if nothing is wrong, 1 if there is any problem, 2 if an annotation file or a folder cannot be read
or a flag is wrong.
"""
import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from datasets.checks import KINDS, Problem
from datasets.survey import Files, Survey, find_files, survey
from tools import clean_copy
from util.errors import InputError, run_program
from util.parallel import imap_in_processes
from util.ranges import TOOL_RANGES, check_ranges
from util.recipes import RECIPES

_OWN_FILES = ("coco_path", "train_images", "train_annotations", "val_images", "val_annotations", "clean")
# By --dataset_file: the flags that have an effect; one of the first tells the data set if it isn't given.
FLAGS_OF = {
    "coco_panoptic": ("coco_panoptic_path", "num_classes", "num_queries", "apply_exif", *_OWN_FILES),
    "voc": ("voc_path", "num_classes", "num_queries", "apply_exif"),
    "imagenet": ("imagenet_path", "imagenet_val_path"),
    "coco": ("coco_path", "num_classes", "num_queries", "masks", "apply_exif", *_OWN_FILES),
}
PARTS = ("train", "val")
NUM_QUERIES = RECIPES["detr", "coco"]["num_queries"]
_CHUNK = 16  # images that travel to a process together
_PROGRESS_SECONDS = 10


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags; those that main.py has too mean the same."""
    kinds = "\n".join(f"  {name:17} {meaning}" for name, meaning in KINDS.items())
    parser = argparse.ArgumentParser("python -m tools.check_data", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"kinds of problems:\n{kinds}")
    parser.add_argument("--dataset_file", choices=tuple(FLAGS_OF), help="by default what the given path says")
    parser.add_argument("--coco_path", help="folder with train2017/, val2017/ and annotations/")
    parser.add_argument("--coco_panoptic_path", help="folder with panoptic_train2017/, panoptic_val2017/, annotations/")
    for part in PARTS:
        parser.add_argument(f"--{part}_images", help=f"folder of images ({part}2017 in --coco_path)")
        parser.add_argument(f"--{part}_annotations", help="JSON (COCO's own in annotations/); relative to --coco_path, "
                            "of panoptic sets to --coco_panoptic_path")
    parser.add_argument("--voc_path", help="the VOCdevkit folder, with VOC2007/ and VOC2012/")
    parser.add_argument("--imagenet_path", help="folder tree of images to pre-train on")
    parser.add_argument("--imagenet_val_path", help="folder tree of held-out images")
    parser.add_argument("--image_set", choices=PARTS, help="the part to check (both)")
    parser.add_argument("--num_classes", type=int, help="classes of the model (highest training label + 1)")
    parser.add_argument("--num_queries", type=int, help="queries of the model, the most objects it can find "
                        f"({NUM_QUERIES})")
    parser.add_argument("--masks", action="store_true", default=None,
                        help="masks will be trained: each object needs one")
    parser.add_argument("--apply_exif", action="store_true", default=None,
                        help="images will be turned as their EXIF orientation says")
    parser.add_argument("--ignore", nargs="+", default=[], choices=[kind for kind in KINDS if kind != "json"],
                        metavar="KIND", help="kinds of problems, see below, to leave aside")
    parser.add_argument("--clean", metavar="DIR", help="write copies of the JSON files without what is wrong into this "
                        "folder; an existing file is never overwritten")
    parser.add_argument("--num_workers", type=int, help="processes that decode (one per CPU)")
    return parser


def resolve(args: argparse.Namespace) -> None:
    """Fill in what isn't given.

    Raises:
        InputError: flags have no effect or impossible values.
    """
    if args.dataset_file is None:
        args.dataset_file = next((name for name, flags in FLAGS_OF.items() if getattr(args, flags[0])), "coco")
    for name in sorted({flag for flags in FLAGS_OF.values() for flag in flags}):
        if getattr(args, name) is not None and name not in FLAGS_OF[args.dataset_file]:
            raise InputError(f"--{name} has no effect with --dataset_file {args.dataset_file}")
    check_ranges(args, TOOL_RANGES)
    args.num_queries = args.num_queries or NUM_QUERIES
    args.masks, args.apply_exif = bool(args.masks), bool(args.apply_exif)


def files_to_check(args: argparse.Namespace) -> Dict[str, Files]:
    """Where each part lies that is to be checked.

    Raises:
        InputError: the flags don't say.
    """
    parts = [args.image_set] if args.image_set else list(PARTS)
    if args.dataset_file == "imagenet" and not args.image_set:
        parts = PARTS if args.imagenet_val_path else PARTS[:1]
    return {part: find_files(part, args) for part in parts}


def find_all(found: Survey, num_workers: Optional[int]) -> Iterator[Problem]:
    """The problems of the annotations, then those of the images in their order, while processes decode them."""
    yield from found.problems
    latest = time.monotonic()
    for number, problems in enumerate(imap_in_processes(_run, found.checks, num_workers, _CHUNK), start=1):
        yield from problems
        if time.monotonic() - latest > _PROGRESS_SECONDS:
            latest = time.monotonic()
            print(f"{number} of {len(found.checks)} images decoded", file=sys.stderr, flush=True)


def _run(check: Any) -> List[Problem]:
    return check.run()


def summarize(part: str, files: Files, found: Survey, problems: List[Problem], num_queries: int) -> None:
    """Print what a part consists of and how many problems of which kind it has."""
    print(f"{part}: {files}; {len(found.checks)} images decoded")
    if found.objects:
        counts = found.objects
        print(f"{part}: {sum(counts)} objects and {found.crowds} crowds; {min(counts)} to {max(counts)} objects in an "
              f"image, {sum(counts) / len(counts):.1f} on average, {counts.count(0)} images without; "
              f"{num_queries} queries")
        listed = sorted(found.classes.items(), key=lambda item: -item[1])
        print(f"{part}: {len(listed)} categories: {', '.join(f'{name} {count}' for name, count in listed)}; "
              f"--num_classes {found.num_classes}")
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(problem.kind for problem in problems).most_common())
    errors = sum(problem.fatal for problem in problems)
    print(f"{part}: {len(problems)} problems" + (f", of which {errors} stop a training: {kinds}" if problems else ""))


def main(args: argparse.Namespace) -> None:
    """Check, print, and write the cleaned copies; exits with status 1 or 2 if there is any problem."""
    resolve(args)
    files = files_to_check(args)
    targets = clean_copy.targets(args.clean, {part: files[part].annotations for part in files}) if args.clean else {}
    status = 0
    for part in files:
        found = survey(part, files[part], args)
        problems = []
        for problem in find_all(found, args.num_workers):
            if problem.kind not in args.ignore:
                problems.append(problem)
                print(f"{'error' if problem.fatal else 'warning':8} {problem.kind}: {problem.sentence}", flush=True)
        summarize(part, files[part], found, problems, args.num_queries)
        status = max(status, 2 if found.unreadable else min(len(problems), 1))
        if part in targets and not found.unreadable:
            write_clean(targets[part], found, problems, args.masks)
    if status:
        sys.exit(status)


def write_clean(path: Path, found: Survey, problems: List[Problem], masks: bool) -> None:
    """Write the cleaned copy and say what was done."""
    content, done = clean_copy.clean(found.content, problems, masks)
    clean_copy.write(content, path)
    print(f"{path}: {len(content['images'])} images and {len(content['annotations'])} annotations; "
          + (", ".join(done) or "nothing was wrong"))


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
