"""A copy of a COCO or panoptic JSON without what `tools.check_data` found to be wrong."""
import copy
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Sequence, Set, Tuple

from datasets.checks import Problem
from tools.output import write_whole, writing
from util.errors import InputError

Json = Dict[str, Any]

# Kinds of problems for which the entry that has them goes.
_DROPS = ("image_entry", "image_id", "image_file", "image_size", "annotation_entry", "category", "box", "box_empty",
          "box_outside", "iscrowd")


def targets(folder: str, sources: Dict[str, Path]) -> Dict[str, Path]:
    """Where the copy of each part's JSON goes: into `folder`, under its own name.

    Raises:
        InputError: two parts have files of one name, or such a file exists.
    """
    paths = {part: Path(folder, source.name) for part, source in sources.items()}
    if len(set(paths.values())) < len(paths):
        raise InputError(f"--clean {folder}: the parts' files have one name, so that each needs a folder of its own: "
                         "check them one by one, with --image_set")
    for path in paths.values():
        if os.path.lexists(path):
            raise InputError(f"--clean {folder}: {path} exists already, choose another folder")
    return paths


def clean(content: Json, problems: Sequence[Problem], masks: bool) -> Tuple[Json, List[str]]:
    """Make the cleaned copy.

    Images and objects that training could not use go, and objects that it would leave out; boxes are clipped to their
    image, wrong areas replaced, and an id that is not the only one renewed (unless the whole entry is a repetition).
    A segmentation that can't be drawn goes, with its object where masks are trained. What may be right is left as it
    is: masks that don't match their boxes, many objects, categories beyond the model's classes, repeated names.

    Args:
        content: the JSON, left as it is.
        problems: all that was found in it.
        masks: whether masks will be trained.

    Returns:
        The copy, and what was done.
    """
    content = copy.deepcopy(content)
    done: Counter = Counter()
    dropped: Set[int] = set()  # by id(), since entries are dicts
    repeated: Set[int] = set()
    for problem in problems:
        entry = _entry_of(problem, content)
        if entry is content:
            continue
        if problem.kind == "annotation_id" and _is_instance(problem, entry):
            repeated.add(id(entry))
        elif problem.kind == "segmentation" and _is_instance(problem, entry) and not masks:
            entry.pop("segmentation", None)
            done["segmentations removed"] += 1
        elif problem.kind in (*_DROPS, "annotation_id", "segmentation"):
            dropped.add(id(entry))
        elif problem.cure:
            entry.update(problem.cure)
            done[f"values of {' and '.join(problem.cure)} corrected"] += 1
        else:
            done["problems left as they are"] += 1
    _drop(content, dropped, done)
    if repeated:
        _renew_ids(content, repeated, done)
    return content, [f"{count} {what}" for what, count in done.items() if count]


def _entry_of(problem: Problem, content: Json) -> Any:
    """The image, annotation or segment that has the problem; the content itself if it is the whole file or a category."""
    if problem.segment is not None:
        return content["annotations"][problem.annotation]["segments_info"][problem.segment]
    if problem.annotation is not None:
        return content["annotations"][problem.annotation]
    return content if problem.image is None else content["images"][problem.image]


def _is_instance(problem: Problem, entry: Any) -> bool:
    """Whether the entry is an annotation of an instances file."""
    return problem.annotation is not None and problem.segment is None and "segments_info" not in entry


def _drop(content: Json, dropped: Set[int], done: Counter) -> None:
    """Take out what is dropped, annotations of images that are no more, and images without a panoptic annotation."""
    before = {name: len(content[name]) for name in ("images", "annotations")}
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and isinstance(annotation.get("segments_info"), list):
            segments = annotation["segments_info"]
            annotation["segments_info"] = [segment for segment in segments if id(segment) not in dropped]
            done["segments dropped"] += len(segments) - len(annotation["segments_info"])
    is_panoptic = any("segments_info" in annotation for annotation in content["annotations"]
                      if isinstance(annotation, dict))
    annotations = [annotation for annotation in content["annotations"] if id(annotation) not in dropped]
    annotated = {annotation["image_id"] for annotation in annotations}
    content["images"] = [image for image in content["images"]
                         if id(image) not in dropped and (not is_panoptic or image["id"] in annotated)]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [annotation for annotation in annotations if annotation["image_id"] in ids]
    for name, count in before.items():
        done[f"{name} dropped"] = count - len(content[name])


def _renew_ids(content: Json, repeated: Set[int], done: Counter) -> None:
    """Give annotations whose id another one has a new one; drop them if that one is the same in all."""
    first = {annotation["id"]: annotation for annotation in content["annotations"] if id(annotation) not in repeated}
    following = max((annotation["id"] for annotation in content["annotations"]), default=0)
    kept = []
    for annotation in content["annotations"]:
        if id(annotation) in repeated:
            if annotation == first.get(annotation["id"]):
                done["repetitions dropped"] += 1
                continue
            following += 1
            annotation["id"] = following
            done["ids renewed"] += 1
        kept.append(annotation)
    content["annotations"] = kept


def write(content: Json, path: Path) -> None:
    """Write the copy to a file that doesn't exist yet (`targets` has looked).

    Raises:
        InputError: it can't be written.
    """
    with writing("--clean", str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, ensure_ascii=False))
