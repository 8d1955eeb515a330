"""Parts of a labelled data set: a share of its images, a few shots of each class, the base or the novel classes.

All choices are functions of `--filter_seed` (`--seed` unless given) and the annotations alone. A share of the images
is the one that DETReg's program takes: its low-label numbers are of these images. More shots contain the fewer ones.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.checks import class_names, is_count
from util.distributed import is_main_process, print_main
from util.errors import InputError
from util.files import read_json, replace_file

__all__ = ["SUBSET_FILE", "Chosen", "choose_images", "choose_shots", "keep_chosen", "keep_classes", "restriction"]

SUBSET_FILE = "train_subset.json"  # in --output_dir: what was chosen, for --filter_file


@dataclass(frozen=True)
class Chosen:
    """A choice.

    Attributes:
        image_ids: ids of the images, ascending.
        annotation_ids: ids of the only annotations that count; None if all of these images do.
    """

    image_ids: list[int]
    annotation_ids: list[int] | None = None


def restriction(image_set: str, args: argparse.Namespace) -> Callable[[dict], dict] | None:
    """Returns what the flags do to a checked COCO dict (which stays as it is), None for nothing.

    Reads `class_split`, `class_part` and, for "train", `filter_pct`, `filter_num`, `filter_file`, `shots`, `shots_of`,
    `filter_seed`, `seed` and `output_dir`, where what was chosen is written to `SUBSET_FILE`.
    """
    flags = ("class_split",) + (("filter_pct", "filter_num", "filter_file", "shots") if image_set == "train" else ())
    if all(getattr(args, flag, None) in (None, -1) for flag in flags):
        return None

    def restrict(ground_truth: dict) -> dict:
        if args.class_split:
            labels = read_class_split(args.class_split, args.class_part, ground_truth)
            ground_truth = keep_classes(ground_truth, labels, drop_empty=image_set == "train")
            print_main(f"{image_set}: {len(labels)} {args.class_part} classes of {args.class_split}, "
                       f"{len(ground_truth['annotations'])} objects in {len(ground_truth['images'])} images")
        return _choose(ground_truth, args) if image_set == "train" else ground_truth

    return restrict


def choose_images(ground_truth: dict, count: int, seed: int) -> Chosen:
    """Chooses images at random, as DETReg's program does: `default_rng(seed).choice` without replacement.

    It is called on places in the ascending ids; for VOC, whose ids count the images of the lists, these are the places
    in the lists.

    Args:
        ground_truth: COCO dict.
        count: how many.
        seed: decides which.
    """
    ids = _image_ids(ground_truth)
    places = np.random.default_rng(seed % 2**64).choice(len(ids), size=count, replace=False)
    return Chosen(sorted(ids[place] for place in places))


def choose_shots(ground_truth: dict, shots: int, unit: str, seed: int) -> Chosen:
    """Chooses a few objects of each class, or images with it; crowds and difficult objects don't count.

    Args:
        ground_truth: COCO dict.
        shots: how many of each class.
        unit: "boxes": so many objects of each class are annotated, and no others. "images": so many images that show
            it, with all annotations; an image may serve several classes, and a class may get more by others' images.
        seed: decides which.
    """
    found: dict[int, list[tuple[int, int]]] = {label: [] for label in class_names(ground_truth)}
    for annotation in ground_truth["annotations"]:
        if not annotation["iscrowd"] and not annotation.get("difficult"):
            found[annotation["category_id"]].append((annotation["id"], annotation["image_id"]))
    annotations, images, short = [], [], []
    for label, objects in found.items():
        pool = sorted({item[unit == "images"] for item in objects})
        chosen = {pool[position] for position in _shuffled(len(pool), [seed % 2**32, label])[:shots]}
        if len(chosen) < shots:
            short.append(f"{class_names(ground_truth)[label]} ({len(chosen)})")
        annotations += sorted(chosen) if unit == "boxes" else []
        images += chosen if unit == "images" else {image for name, image in objects if name in chosen}
    if short:
        print_main(f"fewer than {shots} {unit} of {len(short)} classes: {', '.join(short)}")
    return Chosen(sorted(set(images)), sorted(annotations) if unit == "boxes" else None)


def keep_chosen(ground_truth: dict, chosen: Chosen) -> dict:
    """Returns a COCO dict of the chosen images, and annotations, alone."""
    images = set(chosen.image_ids)
    annotations = [entry for entry in ground_truth["annotations"] if entry["image_id"] in images]
    if chosen.annotation_ids is not None:
        wanted = set(chosen.annotation_ids)
        annotations = [entry for entry in annotations if entry["id"] in wanted]
    return {**ground_truth, "images": [entry for entry in ground_truth["images"] if entry["id"] in images],
            "annotations": annotations}


def keep_classes(ground_truth: dict, labels: set[int], drop_empty: bool) -> dict:
    """Returns a COCO dict of some classes.

    Args:
        ground_truth: COCO dict.
        labels: category ids to keep; they stay what they are.
        drop_empty: leave out images that show none of them.
    """
    annotations = [entry for entry in ground_truth["annotations"] if entry["category_id"] in labels]
    shown = {entry["image_id"] for entry in annotations}
    return {**ground_truth, "annotations": annotations,
            "images": [entry for entry in ground_truth["images"] if not drop_empty or entry["id"] in shown],
            "categories": [entry for entry in ground_truth["categories"] if entry["id"] in labels]}


def read_class_split(path: str, part: str, ground_truth: dict) -> set[int]:
    """Reads which classes are base or novel.

    Args:
        path: JSON file {"novel": [names], "base": [names]}; without "base", these are all others.
        part: "base" or "novel".
        ground_truth: COCO dict whose categories have these names.

    Returns:
        The category ids of the part.

    Raises:
        InputError: the file is missing or broken, a class is in both parts, or the data has no such class.
    """
    content = _read_json("--class_split", path)
    if not isinstance(content, dict) or not isinstance(content.get("novel"), list) or not isinstance(
            content.get("base", []), list):
        raise InputError(f'--class_split {path} is not a JSON object with a list "novel" (and "base") of class names')
    labels = {name: label for label, name in class_names(ground_truth).items()}
    unknown = [name for name in [*content["novel"], *content.get("base", [])]
               if not isinstance(name, str) or name not in labels]
    if unknown:
        raise InputError(f"--class_split {path} names a class that the annotations lack: {unknown[0]!r}")
    novel = {labels[name] for name in content["novel"]}
    base = {labels[name] for name in content["base"]} if "base" in content else set(labels.values()) - novel
    if novel & base:
        raise InputError(f"--class_split {path} has {class_names(ground_truth)[min(novel & base)]!r} in both parts")
    chosen = novel if part == "novel" else base
    if not chosen:
        raise InputError(f"--class_split {path} has no {part} classes")
    return chosen


def _choose(ground_truth: dict, args: argparse.Namespace) -> dict:
    """Applies the flags that choose training images, and writes down what was chosen."""
    total = len(ground_truth["images"])
    seed = args.seed if args.filter_seed is None else args.filter_seed
    if args.filter_file:
        chosen, made_by = _read_choice(args.filter_file, ground_truth), {"filter_file": args.filter_file}
    elif args.shots is not None:
        chosen = choose_shots(ground_truth, args.shots, args.shots_of, seed)
        made_by = {"shots": args.shots, "shots_of": args.shots_of, "filter_seed": seed}
    elif args.filter_pct != -1 or args.filter_num != -1:
        chosen = choose_images(ground_truth, _number_of_images(total, args), seed)
        name = "filter_pct" if args.filter_pct != -1 else "filter_num"
        made_by = {name: getattr(args, name), "filter_seed": seed}
    else:
        return ground_truth
    result = keep_chosen(ground_truth, chosen)
    flags = " ".join(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
                     for name, value in made_by.items())
    print_main(f"train: {len(result['images'])} of {total} images, {len(result['annotations'])} of "
               f"{len(ground_truth['annotations'])} objects ({flags})")
    if not result["annotations"]:
        raise InputError(f"{flags} leaves no object to train on")
    _write_choice(chosen, made_by, args)
    return result


def _number_of_images(total: int, args: argparse.Namespace) -> int:
    if args.filter_pct != -1:
        if not 0 < args.filter_pct <= 1:
            hint = f"; {args.filter_pct:g} percent are {args.filter_pct / 100:g}" if args.filter_pct <= 100 else ""
            raise InputError(f"--filter_pct {args.filter_pct:g} is not a share of the images, above 0 and up to 1"
                             + (hint if args.filter_pct > 1 else ""))
        return max(1, round(total * args.filter_pct))
    if args.filter_num < 1 or args.filter_num != int(args.filter_num) or args.filter_num > total:
        raise InputError(f"--filter_num {args.filter_num:g} is not a number of images from 1 to {total}")
    return int(args.filter_num)


def _read_choice(path: str, ground_truth: dict) -> Chosen:
    """Reads a `SUBSET_FILE`, or a bare JSON list of image ids."""
    content = _read_json("--filter_file", path)
    images, annotations = (content, None) if isinstance(content, list) else (
        content.get("image_ids"), content.get("annotation_ids")) if isinstance(content, dict) else (None, None)
    if not isinstance(images, list) or not isinstance(annotations, (list, type(None))):
        raise InputError(f"--filter_file {path} is neither a JSON list of image ids nor an object with a list "
                         '"image_ids"')
    for kind, ids, entries in (("image", images, "images"), ("annotation", annotations or (), "annotations")):
        known = {entry["id"] for entry in ground_truth[entries]}
        unknown = [one for one in ids if not is_count(one) or one not in known]
        if unknown:
            raise InputError(f"--filter_file {path}: the training annotations have no {kind} {unknown[0]!r}")
    return Chosen(images, annotations)


def _write_choice(chosen: Chosen, made_by: dict, args: argparse.Namespace) -> None:
    if not args.output_dir or not is_main_process():
        return
    path = Path(args.output_dir, SUBSET_FILE)
    if args.filter_file and path.exists() and path.samefile(args.filter_file):
        return  # which also says how the choice was first made
    content = {"made_by": made_by, "image_ids": chosen.image_ids, "annotation_ids": chosen.annotation_ids}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(content) + "\n").encode())  # not into a pipe that lies there
    except OSError as error:
        raise InputError(f"{path} can't be written ({error})") from error


def _read_json(flag: str, path: str) -> object:
    return read_json(path, flag)


def _image_ids(ground_truth: dict) -> list[int]:
    return sorted(entry["id"] for entry in ground_truth["images"])


def _shuffled(count: int, seed: list[int]) -> np.ndarray:
    """0..count-1 in an order that the seed decides."""
    # numpy's old generator: its stream, unlike the new one's, stays the same in every version.
    return np.random.RandomState(seed).permutation(count)
