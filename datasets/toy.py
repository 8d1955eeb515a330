"""A small detection world written to disk as real files: `python -m datasets.toy --output_dir data/toy`.

Textured objects of seven classes lie on crops of the photographs that ship inside scikit-image's wheel. Scenes of one
kind are written without labels for pre-training, and labelled in the layouts of COCO (boxes, polygons, crowds, panoptic
PNGs) and of Pascal VOC:

    unlabelled/<folder>/*.jpg
    coco/annotations/{instances,panoptic}_{train,val}2017.json, coco/annotations/panoptic_{train,val}2017/*.png
    coco/{train,val}2017/*.jpg
    VOCdevkit/VOC2007/{JPEGImages,Annotations,ImageSets/Main/{trainval,test}.txt}   first half of train, and val
    VOCdevkit/VOC2012/{JPEGImages,Annotations,ImageSets/Main/trainval.txt}          second half of train
    toy.json                                                                        how the world was made

A class is told by its shape and texture; colours are drawn anew for each object. The parts (unlabelled, train, val, and
one more for pre-training a classifier) share neither objects nor background pixels: each has random streams of its own
and its own region of every photograph. Each image depends on (seed, part, index) alone.
"""
import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageFilter

from datasets.toy_scene import (CLASS_NAMES, CLASSES, PARTS, PHOTOGRAPHS, STUFF_IDS, STUFF_NAMES, Array, Instance, Scene,
                                ToySettings, background_region, load_photograph, render_scene)
from util.errors import InputError, run_program
from util.ranges import check_ranges
from util.parallel import imap_in_processes

Json = Dict[str, Any]

FORMAT = 1  # raised whenever the same settings would give other files


# ---------------------------------------------------------------------------------------------------------------------
# Annotations
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class _Region:
    """What is annotated as one: an object's or a crowd's visible pixels, bool [H, W]."""

    class_index: int
    mask: Array
    crowd: bool
    instance: Optional[Instance] = None


def _visible_mask(instance: Instance) -> Array:
    """Pixels covered more than half, so that no two objects share one, without crumbs that an occluder left."""
    from scipy import ndimage
    mask = instance.coverage > 0.5
    labels, count = ndimage.label(mask)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        keep = sizes >= max(4, 0.05 * sizes[1:].max())
        keep[0] = False
        mask = keep[labels]
    return mask


def _annotated_regions(scene: Scene) -> List[_Region]:
    """The objects of a scene that show a pixel at least, and its crowd as one blob, as a quick brush would mark it."""
    regions = [_Region(instance.class_index, _visible_mask(instance), False, instance)
               for instance in scene.instances if not instance.in_crowd]
    crowd = [instance for instance in scene.instances if instance.in_crowd]
    if crowd:
        union = Image.fromarray((sum(instance.coverage for instance in crowd) > 0.5).astype(np.uint8) * 255)
        blob = np.asarray(union.filter(ImageFilter.MaxFilter(5))) > 0
        for region in regions:
            blob &= ~region.mask
        regions.append(_Region(crowd[0].class_index, blob, True))
    return [region for region in regions if region.mask.any()]


def _box_of(mask: Array) -> List[int]:
    """[x, y, width, height] of the smallest box around a mask's pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def _uncompressed_rle(mask: Array) -> Json:
    """COCO's run lengths for crowds: alternating counts of zeros and ones, columns first, beginning with zeros."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"counts": counts.tolist(), "size": list(mask.shape)}


def _polygons(mask: Array, coverage: Array) -> List[List[float]]:
    """Outlines [x0, y0, x1, y1, …] of a mask, to a fraction of a pixel thanks to how full its pixels are (`coverage`).

    COCO's polygons can't have holes, so a hole is joined to the outline around it by a cut of no width.
    """
    from skimage import measure
    from scipy import ndimage
    near = ndimage.binary_dilation(mask, structure=np.ones((3, 3)))
    # Never below half inside the mask nor above half outside it: the outline separates exactly the mask's pixels.
    level = np.where(mask, np.maximum(coverage, 0.501), np.where(near, np.minimum(coverage, 0.499), 0.0))
    contours = measure.find_contours(np.pad(level, 1), 0.5, fully_connected="low")
    outer, holes = [], []
    for contour in contours:
        points = measure.approximate_polygon(contour, 0.3)[:, ::-1] - 0.5  # back from the padding, to pixel corners
        if len(points) < 4:
            continue
        x, y = points[:, 0], points[:, 1]
        clockwise = float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1]))
        (outer if clockwise > 0 else holes).append(points)
    for hole in holes:
        distances = [np.linalg.norm(outline[:, None] - hole[None], axis=2) for outline in outer
                     if measure.points_in_poly(hole[:1], outline)[0]]
        around = [i for i, outline in enumerate(outer) if measure.points_in_poly(hole[:1], outline)[0]]
        which = min(range(len(around)), key=lambda i: distances[i].min())
        start, entry = np.unravel_index(distances[which].argmin(), distances[which].shape)
        outline, loop = outer[around[which]], np.concatenate([hole[entry:-1], hole[:entry + 1]])
        outer[around[which]] = np.concatenate([outline[:start + 1], loop, outline[start:]])
    return [np.round(outline[:-1], 2).ravel().tolist() for outline in outer]


def _coco_annotations(regions: Sequence[_Region]) -> List[Json]:
    """COCO's annotations without their ids and image ids."""
    annotations = []
    for region in regions:
        if region.crowd:
            segmentation: Any = _uncompressed_rle(region.mask)
        else:
            segmentation = _polygons(region.mask, region.instance.coverage)
        annotations.append({"segmentation": segmentation, "area": int(region.mask.sum()), "iscrowd": int(region.crowd),
                            "bbox": _box_of(region.mask), "category_id": CLASSES[region.class_index].category_id})
    return annotations


def _colour_of(category_id: int) -> Tuple[int, int, int]:
    """A category's colour; the steps and 176 have no common divisor, so ids below 176 share no channel's value."""
    return 40 + 67 * category_id % 176, 40 + 113 * category_id % 176, 40 + 151 * category_id % 176


def _panoptic(scene: Scene, regions: Sequence[_Region]) -> Tuple[Array, List[Json]]:
    """Returns COCO's panoptic image uint8 [H, W, 3] (id = R + 256 G + 256² B, 0 is void) and its segments.

    Pixels of dropped crumbs are void; what no object covers is stuff of the photograph's class.
    """
    height, width = scene.image.shape[:2]
    covered = np.zeros((height, width), bool)
    for instance in scene.instances:
        covered |= instance.coverage > 0.5
    masks = [(region.mask, CLASSES[region.class_index].category_id, int(region.crowd)) for region in regions]
    for region in regions:
        covered |= region.mask
    masks.append((~covered, STUFF_IDS[PHOTOGRAPHS[scene.photograph].stuff], 0))
    picture = np.zeros((height, width, 3), np.uint8)
    segments: Dict[int, Json] = {}
    for mask, category_id, crowd in masks:
        if not mask.any():
            continue
        red, green, blue = _colour_of(category_id)
        while (number := red + 256 * green + 65536 * blue) in segments:
            red = (red + 13) % 256
        picture[mask] = red, green, blue
        segments[number] = {"id": number, "category_id": category_id, "area": int(mask.sum()), "bbox": _box_of(mask),
                            "iscrowd": crowd}
    return picture, list(segments.values())


def _voc_xml(folder: str, file_name: str, scene: Scene) -> bytes:
    """VOC's XML: boxes in 1-based pixels with both ends inside; tiny and mostly hidden objects are difficult."""
    height, width = scene.image.shape[:2]
    root = ElementTree.Element("annotation")
    for tag, text in (("folder", folder), ("filename", file_name)):
        ElementTree.SubElement(root, tag).text = text
    size = ElementTree.SubElement(root, "size")
    for tag, number in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, tag).text = str(number)
    ElementTree.SubElement(root, "segmented").text = "0"
    for instance in scene.instances:
        mask = _visible_mask(instance)
        if not mask.any():
            continue
        difficult = instance.visible_share < 0.6 or mask.sum() < (0.075 * max(width, height)) ** 2
        x, y, box_width, box_height = _box_of(mask)
        element = ElementTree.SubElement(root, "object")
        for tag, text in (("name", CLASSES[instance.class_index].name), ("pose", "Unspecified"),
                          ("truncated", str(int(instance.truncated))), ("difficult", str(int(difficult)))):
            ElementTree.SubElement(element, tag).text = text
        box = ElementTree.SubElement(element, "bndbox")
        for tag, number in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + box_width), ("ymax", y + box_height)):
            ElementTree.SubElement(box, tag).text = str(number)
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

def _voc_place(part: str, index: int, settings: ToySettings) -> Tuple[str, str, str]:
    """Returns (year folder, image set, image name) of a labelled image."""
    half = (settings.num_train + 1) // 2
    if part == "val":
        return "VOC2007", "test", f"{settings.num_train + index + 1:06d}"
    if index < half:
        return "VOC2007", "trainval", f"{index + 1:06d}"
    return "VOC2012", "trainval", f"2012_{index + 1:06d}"


def _write_unlabelled(root: Path, index: int, settings: ToySettings) -> None:
    scene = render_scene(settings, "unlabelled", index)
    path = root / "unlabelled" / f"{index % 8:02d}" / f"{index:06d}.jpg"
    Image.fromarray(scene.image).save(path, quality=92)


def _write_labelled(root: Path, part: str, index: int, settings: ToySettings) -> Json:
    """Write one labelled image's files; returns what the JSON files have to say of it."""
    scene = render_scene(settings, part, index)
    height, width = scene.image.shape[:2]
    image_id = index + 1 + (settings.num_train if part == "val" else 0)
    file_name = f"{image_id:012d}.jpg"
    coco_path = root / "coco" / f"{part}2017" / file_name
    Image.fromarray(scene.image).save(coco_path, quality=92)

    year, _, name = _voc_place(part, index, settings)
    voc = root / "VOCdevkit" / year
    shutil.copyfile(coco_path, voc / "JPEGImages" / f"{name}.jpg")
    (voc / "Annotations" / f"{name}.xml").write_bytes(_voc_xml(year, f"{name}.jpg", scene))

    regions = _annotated_regions(scene)
    picture, segments = _panoptic(scene, regions)
    Image.fromarray(picture).save(root / "coco" / "annotations" / f"panoptic_{part}2017" / f"{image_id:012d}.png")
    return {"image": {"id": image_id, "file_name": file_name, "width": width, "height": height,
                      "photograph": PHOTOGRAPHS[scene.photograph].file_name, "crop": list(scene.crop)},
            "annotations": _coco_annotations(regions),
            "panoptic": {"image_id": image_id, "file_name": f"{image_id:012d}.png", "segments_info": segments}}


def _write_chunk(job: Tuple[str, str, int, int, ToySettings]) -> List[Json]:
    root, part, start, stop, settings = job
    if part == "unlabelled":
        for index in range(start, stop):
            _write_unlabelled(Path(root), index, settings)
        return []
    return [_write_labelled(Path(root), part, index, settings) for index in range(start, stop)]


def map_in_processes(function: Callable[[Any], Any], jobs: Sequence[Any], num_workers: Optional[int]) -> List[Any]:
    """[function(job) for job in jobs], drawn by processes that read the photographs once.

    Args:
        function: a module's function; jobs and results travel between processes.
        num_workers: None for one process per available core, 0 or 1 to stay in this process.
    Raises:
        InputError: if scikit-image's photographs are missing.
    """
    for index in range(len(PHOTOGRAPHS)):
        load_photograph(index)  # before the workers start: one clear error, and forked workers inherit what is read
    return list(imap_in_processes(function, jobs, num_workers))


def _write_images(root: Path, settings: ToySettings, num_workers: Optional[int]) -> Dict[str, List[Json]]:
    """Write all images with a pool of processes; returns the records of the labelled parts in the images' order."""
    counts = {"train": settings.num_train, "val": settings.num_val, "unlabelled": settings.num_unlabelled}
    jobs = [(str(root), part, start, min(start + 50, count), settings)
            for part, count in counts.items() for start in range(0, count, 50)]
    records: Dict[str, List[Json]] = {"train": [], "val": []}
    for job, result in zip(jobs, map_in_processes(_write_chunk, jobs, num_workers)):
        if job[1] in records:
            records[job[1]].extend(result)
    return records


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")))


def _write_annotations(root: Path, records: Dict[str, List[Json]]) -> None:
    """COCO's JSON files of both parts; ids of annotations run on from train to val, so they are unique overall."""
    things = [{"id": toy_class.category_id, "name": toy_class.name, "supercategory": "object"} for toy_class in CLASSES]
    stuff = [{"id": STUFF_IDS[name], "name": name, "supercategory": "photograph"} for name in STUFF_NAMES]
    panoptic = [dict(category, isthing=isthing, color=list(_colour_of(category["id"])))
                for isthing, group in ((1, things), (0, stuff)) for category in group]
    annotation_id = 1
    for part, part_records in records.items():
        annotations = []
        for record in part_records:
            for annotation in record["annotations"]:
                annotations.append(dict(annotation, image_id=record["image"]["id"], id=annotation_id))
                annotation_id += 1
        head = {"info": {"description": f"toy world, {part}"}, "licenses": [],
                "images": [record["image"] for record in part_records]}
        folder = root / "coco" / "annotations"
        _write_json(folder / f"instances_{part}2017.json", dict(head, annotations=annotations, categories=things))
        _write_json(folder / f"panoptic_{part}2017.json",
                    dict(head, annotations=[record["panoptic"] for record in part_records], categories=panoptic))


def _write_image_sets(root: Path, settings: ToySettings) -> None:
    names: Dict[Tuple[str, str], List[str]] = {}
    for image_set in (("VOC2007", "trainval"), ("VOC2007", "test"), ("VOC2012", "trainval")):
        names[image_set] = []
    for part, count in (("train", settings.num_train), ("val", settings.num_val)):
        for index in range(count):
            year, image_set, name = _voc_place(part, index, settings)
            names[year, image_set].append(name)
    for (year, image_set), lines in names.items():
        path = root / "VOCdevkit" / year / "ImageSets" / "Main" / f"{image_set}.txt"
        path.write_text("".join(line + "\n" for line in lines))


def _make_folders(root: Path) -> None:
    folders = [f"unlabelled/{number:02d}" for number in range(8)]
    folders += [f"coco/{part}2017" for part in ("train", "val")]
    folders += [f"coco/annotations/panoptic_{part}2017" for part in ("train", "val")]
    folders += [f"VOCdevkit/{year}/{folder}" for year in ("VOC2007", "VOC2012")
                for folder in ("JPEGImages", "Annotations", "ImageSets/Main")]
    for folder in folders:
        (root / folder).mkdir(parents=True)


def _manifest(settings: ToySettings) -> Json:
    regions = {photograph.file_name: {part: background_region(i, part, *load_photograph(i).size) for part in PARTS}
               for i, photograph in enumerate(PHOTOGRAPHS)}
    return {"format": FORMAT, "settings": asdict(settings), "classes": list(CLASS_NAMES), "stuff": list(STUFF_NAMES),
            "background_regions": regions}


def _is_already_there(output_dir: Path, settings: ToySettings) -> bool:
    """True for a toy world of the same settings, False for nothing or an empty folder; InputError for anything else."""
    if not output_dir.exists() and not output_dir.is_symlink():
        return False
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return False
    manifest = output_dir / "toy.json"
    if not manifest.is_file():
        raise InputError(f"--output_dir {output_dir} exists and holds something else than toy data")
    try:
        made = json.loads(manifest.read_text())
    except ValueError as error:
        raise InputError(f"{manifest} is not valid JSON: {error}") from error
    if not isinstance(made, dict) or (made.get("format"), made.get("settings")) != (FORMAT, asdict(settings)):
        raise InputError(f"--output_dir {output_dir} holds toy data made with other settings (see {manifest})")
    return True


def write_toy(output_dir: Union[str, Path], settings: ToySettings = ToySettings(),
              num_workers: Optional[int] = None) -> bool:
    """Write a toy world to `output_dir`, which appears only when it is complete.

    Args:
        output_dir: a folder that doesn't exist, is empty, or already holds the toy world of the same settings.
        settings: sizes and seed; with the installed libraries they decide every byte, whatever the number of workers.
        num_workers: processes that draw images; None takes one per available core, 0 and 1 draw in this process.
    Returns: True if it was written, False if it was there already.
    Raises:
        InputError: for values out of range, a folder with other content, or missing photographs.
    """
    settings.check()
    output_dir = Path(output_dir)
    if _is_already_there(output_dir, settings):
        return False
    manifest = _manifest(settings)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.partial-", dir=output_dir.parent))
    try:
        os.chmod(partial, 0o755)  # mkdtemp makes a folder for its owner alone
        _make_folders(partial)
        records = _write_images(partial, settings, num_workers)
        _write_annotations(partial, records)
        _write_image_sets(partial, settings)
        (partial / "toy.json").write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already unless something failed
    return True


def _summary(output_dir: Path) -> str:
    """What is in a toy folder, in a few lines."""
    manifest = json.loads((output_dir / "toy.json").read_text())
    unlabelled = manifest["settings"]["num_unlabelled"]
    lines = [f"{unlabelled} unlabelled images, {len(manifest['stuff'])} kinds of background"]
    for part in ("train", "val"):
        content = json.loads((output_dir / "coco" / "annotations" / f"instances_{part}2017.json").read_text())
        crowds = sum(annotation["iscrowd"] for annotation in content["annotations"])
        empty = len(content["images"]) - len({annotation["image_id"] for annotation in content["annotations"]})
        names = {category["id"]: category["name"] for category in content["categories"]}
        counts = {name: 0 for name in names.values()}
        for annotation in content["annotations"]:
            counts[names[annotation["category_id"]]] += 1 - annotation["iscrowd"]
        lines.append(f"{len(content['images'])} {part} images ({empty} empty) with {crowds} crowds and "
                     + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return "\n".join(lines)


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m datasets.toy", description="Write a small detection data set.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to make")
    for item in fields(ToySettings):
        parser.add_argument(f"--{item.name}", type=type(item.default), default=item.default, help=item.metadata["help"])
    parser.add_argument("--num_workers", type=int, help="processes that draw; as many as cores if not given")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the toy world that the flags describe and print what is in it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a terminated run, too, clears up behind itself
    check_ranges(args)
    settings = ToySettings(**{item.name: getattr(args, item.name) for item in fields(ToySettings)})
    start = time.perf_counter()
    written = write_toy(args.output_dir, settings, args.num_workers)
    print(_summary(args.output_dir))
    if written:
        print(f"wrote {args.output_dir} in {time.perf_counter() - start:.1f} s")
    else:
        print(f"{args.output_dir} was made with the same settings before: nothing to do")


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
