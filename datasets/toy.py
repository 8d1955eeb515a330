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
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageFilter

from util.errors import InputError, run_program

Array = np.ndarray
Json = Dict[str, Any]
Pixels = Tuple[int, int, int, int]

FORMAT = 1  # raised whenever the same settings would give other files

PARTS = ("unlabelled", "train", "val", "classifier")


class Photograph(NamedTuple):
    """A picture in skimage/data and the stuff class that its pixels count as."""

    file_name: str
    stuff: str


PHOTOGRAPHS = (
    Photograph("astronaut.png", "portrait"), Photograph("camera.png", "portrait"),
    Photograph("brick.png", "brickwork"),
    Photograph("grass.png", "ground"), Photograph("gravel.png", "ground"),
    Photograph("chelsea.png", "cat"),
    Photograph("coffee.png", "tabletop"),
    Photograph("motorcycle_left.png", "garage"),
    Photograph("hubble_deep_field.jpg", "space"), Photograph("moon.png", "space"), Photograph("rocket.jpg", "space"),
    Photograph("ihc.png", "tissue"), Photograph("retina.jpg", "tissue"),
)


@dataclass(frozen=True)
class ToySettings:
    """Everything that decides the bytes of a toy world; the command line has one flag for each field."""

    image_size: int = field(default=128, metadata={"help": "longer side of every image in pixels"})
    num_unlabelled: int = field(default=8000, metadata={"help": "images without labels"})
    num_train: int = field(default=500, metadata={"help": "labelled training images"})
    num_val: int = field(default=200, metadata={"help": "labelled validation images"})
    max_objects: int = field(default=5, metadata={"help": "most objects in an image, crowds not counted"})
    empty_share: float = field(default=0.04, metadata={"help": "share of images without any object"})
    crowd_share: float = field(default=0.04, metadata={"help": "share of images with a crowd of small objects"})
    seed: int = field(default=0, metadata={"help": "seed of all randomness"})

    def check(self) -> None:
        """Raise InputError, naming the flag, if a value is out of range."""
        if not 32 <= self.image_size <= 4096:
            raise InputError(f"--image_size must lie between 32 and 4096, got {self.image_size}")
        for name in ("num_unlabelled", "num_train", "num_val", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} must not be negative, got {getattr(self, name)}")
        if not 1 <= self.max_objects <= 100:
            raise InputError(f"--max_objects must lie between 1 and 100, got {self.max_objects}")
        if min(self.empty_share, self.crowd_share) < 0 or self.empty_share + self.crowd_share > 1:
            raise InputError("--empty_share and --crowd_share must not be negative nor exceed 1 together, "
                             f"got {self.empty_share} and {self.crowd_share}")


# ---------------------------------------------------------------------------------------------------------------------
# Classes: shapes and textures are functions of object coordinates u, v, in which every shape fits the unit disc
# ---------------------------------------------------------------------------------------------------------------------

def _radius_and_angle(u: Array, v: Array) -> Tuple[Array, Array]:
    return np.hypot(u, v), np.arctan2(v, u)


def _in_triangle(u: Array, v: Array) -> Array:
    slope = np.float32(np.sqrt(3.0))
    return (v < 0.5) & (slope * u - v < 1.0) & (-slope * u - v < 1.0)


def _in_star(u: Array, v: Array) -> Array:
    """Five points at radius 1, valleys at radius 0.48: fold all sides onto one and compare with its line."""
    radius, angle = _radius_and_angle(u, v)
    fold = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    valley_x, valley_y = 0.48 * np.cos(np.pi / 5), 0.48 * np.sin(np.pi / 5)
    return radius * (np.cos(fold) * valley_y + np.sin(fold) * (1 - valley_x)) < valley_y


def _in_ring(u: Array, v: Array) -> Array:
    squared = u * u + v * v
    return (squared < 0.96) & (squared > 0.25)


def _in_cross(u: Array, v: Array) -> Array:
    wide, high = np.abs(u), np.abs(v)
    return (np.minimum(wide, high) < 0.31) & (np.maximum(wide, high) < 0.93)


def _in_crescent(u: Array, v: Array) -> Array:
    return (u * u + v * v < 0.96) & ((u - 0.48) ** 2 + v * v > 0.56)


def _stripes(u: Array, v: Array, scale: float, phase: float) -> Array:
    return ((u * 2.2 * scale + phase) % 1.0) < 0.5


def _checkers(u: Array, v: Array, scale: float, phase: float) -> Array:
    cells = 2.9 * scale
    return (np.floor(u * cells + phase) + np.floor(v * cells + phase)) % 2 < 1


def _dots(u: Array, v: Array, scale: float, phase: float) -> Array:
    cells = 2.6 * scale
    row = v * cells + phase
    column = u * cells + phase + 0.5 * (np.floor(row) % 2)
    return (column % 1.0 - 0.5) ** 2 + (row % 1.0 - 0.5) ** 2 < 0.10


def _concentric(u: Array, v: Array, scale: float, phase: float) -> Array:
    return ((np.hypot(u, v) * 2.6 * scale + phase) % 1.0) < 0.5


def _segments(u: Array, v: Array, scale: float, phase: float) -> Array:
    count = round(5 * scale)
    return ((np.arctan2(v, u) / (2 * np.pi) * count + phase) % 1.0) < 0.5


def _grid_lines(u: Array, v: Array, scale: float, phase: float) -> Array:
    cells = 3.2 * scale
    return ((u * cells + phase) % 1.0 < 0.32) | ((v * cells + phase) % 1.0 < 0.32)


def _gradient(u: Array, v: Array, scale: float, phase: float) -> Array:
    return np.clip(0.5 + 0.55 * scale * v, 0.0, 1.0)


@dataclass(frozen=True)
class ToyClass:
    """An object class: `shape(u, v)` says what is inside, `texture(u, v, scale, phase)` in 0..1 mixes two colours."""

    name: str
    category_id: int
    shape: Callable[[Array, Array], Array]
    texture: Callable[[Array, Array, float, float], Array]


# Category ids leave gaps, as COCO's do, so that nobody gets away with taking an id for an index.
CLASSES = (
    ToyClass("disc", 1, lambda u, v: u * u + v * v < 0.96, _stripes),
    ToyClass("square", 3, lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.74, _checkers),
    ToyClass("triangle", 4, _in_triangle, _dots),
    ToyClass("star", 7, _in_star, _concentric),
    ToyClass("ring", 8, _in_ring, _segments),
    ToyClass("cross", 11, _in_cross, _grid_lines),
    ToyClass("crescent", 13, _in_crescent, _gradient),
)
CLASS_NAMES = tuple(toy_class.name for toy_class in CLASSES)
STUFF_NAMES = tuple(dict.fromkeys(photograph.stuff for photograph in PHOTOGRAPHS))
STUFF_IDS = {name: 21 + 2 * i for i, name in enumerate(STUFF_NAMES)}


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------

SUPERSAMPLING = 4  # sub-pixels per pixel and direction when an object is drawn
MIN_VISIBLE = 0.55  # no object is covered or cut off beyond this share of its area
OBJECT_SIZES = (0.125, 0.625)  # diameters as shares of image_size
CROWD_SIZES = (0.07, 0.11)


@dataclass
class Instance:
    """One object of a scene. `coverage` float32 [H, W] in 0..1 is how much of each pixel its visible part covers."""

    class_index: int
    coverage: Array
    whole_area: float  # of the whole object in pixels, hidden and cut-off parts included
    truncated: bool
    in_crowd: bool = False

    @property
    def visible_share(self) -> float:
        return float(self.coverage.sum()) / self.whole_area


@dataclass
class Scene:
    """An image uint8 [H, W, 3], its objects from back to front, and the crop (x0, y0, x1, y1) of its photograph."""

    image: Array
    instances: List[Instance]
    photograph: int
    crop: Pixels


def image_rng(seed: int, part: str, index: int) -> np.random.Generator:
    """The random stream of one image, different for every (seed, part, index)."""
    return np.random.default_rng([seed, PARTS.index(part), index])


def background_region(photograph: int, part: str, width: int, height: int) -> Pixels:
    """The quarter (x0, y0, x1, y1) of a photograph of width x height pixels from which `part` may take its backgrounds.

    Which quarter a part gets turns with the photograph, so that no part sees, say, only skies.
    """
    quarter = (PARTS.index(part) + photograph) % 4
    x0, y0 = (quarter % 2) * (width // 2), (quarter // 2) * (height // 2)
    return x0, y0, x0 + width // 2, y0 + height // 2


@functools.lru_cache(maxsize=None)
def _photograph(index: int) -> Image.Image:
    try:
        import skimage
    except ImportError as error:
        raise InputError("the toy data needs the photographs of scikit-image: pip install scikit-image") from error
    path = Path(skimage.__file__).parent / "data" / PHOTOGRAPHS[index].file_name
    if not path.is_file():
        raise InputError(f"the installed scikit-image has no {path}: install its wheel from PyPI")
    with Image.open(path) as image:
        return image.convert("RGB")


@functools.lru_cache(maxsize=None)
def _background_source(index: int, part: str) -> Tuple[Image.Image, Pixels]:
    """A region as an image of its own, so that resampling can't reach beyond its border."""
    photograph = _photograph(index)
    region = background_region(index, part, *photograph.size)
    return photograph.crop(region), region


def _draw_background(rng: np.random.Generator, part: str, width: int, height: int) -> Tuple[Array, int, Pixels]:
    """Returns a float32 [height, width, 3] image in 0..255, the photograph's index and the crop in its pixels."""
    index = int(rng.integers(len(PHOTOGRAPHS)))
    source, region = _background_source(index, part)
    scale = min(source.width / width, source.height / height) * rng.uniform(0.6, 1.0)
    crop_width, crop_height = int(width * scale), int(height * scale)
    x = int(rng.integers(source.width - crop_width + 1))
    y = int(rng.integers(source.height - crop_height + 1))
    patch = source.resize((width, height), Image.BICUBIC, box=(x, y, x + crop_width, y + crop_height))
    if rng.random() < 0.5:
        patch = patch.transpose(Image.FLIP_LEFT_RIGHT)
    pixels = np.asarray(patch, dtype=np.float32)
    gain = rng.uniform(0.75, 1.15) * rng.uniform(0.85, 1.15, size=3)
    crop = (region[0] + x, region[1] + y, region[0] + x + crop_width, region[1] + y + crop_height)
    return pixels * gain.astype(np.float32) + np.float32(rng.uniform(-8, 16)), index, crop


def _two_colours(rng: np.random.Generator, background: Array) -> Array:
    """Two random colours [2, 3] in 0..255 differing enough in luminance for a texture, and from the background [3]."""
    while True:
        colours = rng.uniform(10, 255, size=(2, 3))
        luminance = colours @ (0.299, 0.587, 0.114)
        seen = np.concatenate([colours, colours.mean(axis=0, keepdims=True)])  # a gradient passes through the middle
        if abs(luminance[0] - luminance[1]) > 75 and np.linalg.norm(seen - background, axis=1).min() > 60:
            return colours.astype(np.float32)


def _draw_object(rng: np.random.Generator, toy_class: ToyClass, diameter: float,
                 background: Array) -> Tuple[Array, Array]:
    """Returns colour float32 [h, w, 3] in 0..255 and coverage float32 [h, w] in 0..1, tight around a random object.

    Its colours differ from `background`, a colour [3].
    """
    squeeze = rng.uniform(0.72, 1.0)
    radius_u, radius_v = (diameter / 2 * part for part in ((1.0, squeeze) if rng.random() < 0.5 else (squeeze, 1.0)))
    angle = rng.uniform(0, 2 * np.pi)
    cosine, sine = np.cos(angle), np.sin(angle)
    half_width = np.hypot(radius_u * cosine, radius_v * sine)
    half_height = np.hypot(radius_u * sine, radius_v * cosine)
    width, height = int(np.ceil(2 * half_width)) + 1, int(np.ceil(2 * half_height)) + 1
    centre_x, centre_y = half_width + rng.uniform(0, 1), half_height + rng.uniform(0, 1)
    x = ((np.arange(width * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - centre_x).astype(np.float32)
    y = ((np.arange(height * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - centre_y).astype(np.float32)[:, None]
    u = (x * np.float32(cosine) + y * np.float32(sine)) / np.float32(radius_u)
    v = (y * np.float32(cosine) - x * np.float32(sine)) / np.float32(radius_v)

    inside = toy_class.shape(u, v).astype(np.float32)
    mix = toy_class.texture(u, v, float(rng.uniform(0.85, 1.2)), float(rng.uniform())) * inside
    coverage, mix = (_average_subpixels(values) for values in (inside, mix))
    mix = mix / np.maximum(coverage, 1e-6)
    first, second = _two_colours(rng, background)
    colour = second + mix[:, :, None] * (first - second)
    light = rng.uniform(0, 2 * np.pi)
    shade = np.cos(light) * np.linspace(-1, 1, width)[None] + np.sin(light) * np.linspace(-1, 1, height)[:, None]
    colour *= (1 + rng.uniform(0.08, 0.22) * shade).astype(np.float32)[:, :, None]
    rows, columns = np.flatnonzero(coverage.any(axis=1)), np.flatnonzero(coverage.any(axis=0))
    tight = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return colour[tight], coverage[tight]


def _average_subpixels(values: Array) -> Array:
    height, width = values.shape[0] // SUPERSAMPLING, values.shape[1] // SUPERSAMPLING
    return values.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean(axis=(1, 3), dtype=np.float32)


class _Canvas:
    """A float image [H, W, 3] on which objects are put one over the other, as long as each stays visible enough."""

    def __init__(self, background: Array) -> None:
        self.pixels = background
        self.mean_colour = background.mean(axis=(0, 1))
        self.instances: List[Instance] = []

    def try_to_put(self, class_index: int, colour: Array, coverage: Array, x: int, y: int, crowd: bool = False) -> bool:
        """Put an object's upper left corner at (x, y); False, and nothing done, if too little of one would remain."""
        height, width = self.pixels.shape[:2]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + coverage.shape[1], width), min(y + coverage.shape[0], height)
        if x0 >= x1 or y0 >= y1:
            return False
        window, inner = (slice(y0, y1), slice(x0, x1)), (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
        shown = coverage[inner]
        area = float(coverage.sum())
        if shown.sum() < 0.8 * area:
            return False
        left = [instance.coverage[window] * (1 - shown) for instance in self.instances]
        for instance, rest in zip(self.instances, left):
            lost = float(instance.coverage[window].sum() - rest.sum())
            if lost and instance.coverage.sum() - lost < MIN_VISIBLE * instance.whole_area:
                return False
        for instance, rest in zip(self.instances, left):
            instance.coverage[window] = rest
        full = np.zeros((height, width), np.float32)
        full[window] = shown
        self.pixels[window] += shown[:, :, None] * (colour[inner] - self.pixels[window])
        truncated = float(shown.sum()) < 0.98 * area
        self.instances.append(Instance(class_index, full, area, truncated, crowd))
        return True


def render_scene(settings: ToySettings, part: str, index: int) -> Scene:
    """Draw image `index` of a part with its objects: as a rule 1 to `max_objects`, sometimes none or a crowd besides.

    Multiples of the golden ratio decide which images are empty or crowded, so that even small parts have their share.
    """
    rng = image_rng(settings.seed, part, index)
    short = int(round(settings.image_size * rng.uniform(0.75, 1.0)))
    width, height = (settings.image_size, short) if rng.random() < 0.5 else (short, settings.image_size)
    background, photograph, crop = _draw_background(rng, part, width, height)
    canvas = _Canvas(background)
    kind = (0.5 + 0.6180339887498949 * index) % 1.0
    if kind >= settings.empty_share:
        if kind < settings.empty_share + settings.crowd_share:
            _put_crowd(rng, canvas, settings.image_size)
        _put_objects(rng, canvas, settings)
    return Scene(_finish(rng, canvas.pixels), canvas.instances, photograph, crop)


def _put_objects(rng: np.random.Generator, canvas: _Canvas, settings: ToySettings) -> None:
    height, width = canvas.pixels.shape[:2]
    for _ in range(int(rng.integers(1, settings.max_objects + 1))):
        class_index = int(rng.integers(len(CLASSES)))
        diameter = settings.image_size * np.exp(rng.uniform(*np.log(OBJECT_SIZES)))
        colour, coverage = _draw_object(rng, CLASSES[class_index], diameter, canvas.mean_colour)
        over_x, over_y = coverage.shape[1] // 8, coverage.shape[0] // 8
        for _ in range(12):
            x = int(rng.integers(-over_x, max(width - coverage.shape[1] + over_x, -over_x) + 1))
            y = int(rng.integers(-over_y, max(height - coverage.shape[0] + over_y, -over_y) + 1))
            if canvas.try_to_put(class_index, colour, coverage, x, y):
                break


def _put_crowd(rng: np.random.Generator, canvas: _Canvas, image_size: int) -> None:
    """Many small objects of one class around one place."""
    height, width = canvas.pixels.shape[:2]
    class_index = int(rng.integers(len(CLASSES)))
    spread = 0.11 * image_size
    centre_x, centre_y = rng.uniform(2 * spread, width - 2 * spread), rng.uniform(2 * spread, height - 2 * spread)
    for _ in range(int(rng.integers(10, 19))):
        colour, coverage = _draw_object(rng, CLASSES[class_index], image_size * rng.uniform(*CROWD_SIZES),
                                        canvas.mean_colour)
        for _ in range(12):
            x = int(rng.normal(centre_x, spread)) - coverage.shape[1] // 2
            y = int(rng.normal(centre_y, spread)) - coverage.shape[0] // 2
            if canvas.try_to_put(class_index, colour, coverage, x, y, crowd=True):
                break


def _finish(rng: np.random.Generator, pixels: Array) -> Array:
    """Sensor noise over objects and background alike, then uint8."""
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(1.5, 4.0))
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def render_single_object(rng: np.random.Generator, size: int, part: str = "classifier") -> Tuple[Array, int, int]:
    """Draw one object somewhere on a background; the default part shares no pixels with the images of the data set.

    Returns: the image uint8 [size, size, 3], the index of the object's class in `CLASSES`, and that of the photograph
    behind it in `PHOTOGRAPHS`. The object's diameter is between 0.4 and 0.95 of `size`; at least 0.8 of it lies inside.
    """
    background, photograph, _ = _draw_background(rng, part, size, size)
    canvas = _Canvas(background)
    class_index = int(rng.integers(len(CLASSES)))
    colour, coverage = _draw_object(rng, CLASSES[class_index], size * rng.uniform(0.4, 0.95), canvas.mean_colour)
    done = False
    while not done:
        x, y = (int(rng.integers(-n // 10, size - n + n // 10 + 1)) for n in coverage.shape[::-1])
        done = canvas.try_to_put(class_index, colour, coverage, x, y)
    return _finish(rng, canvas.pixels), class_index, photograph


def render_background(rng: np.random.Generator, size: int, part: str = "classifier") -> Tuple[Array, int]:
    """Returns a crop uint8 [size, size, 3] of a photograph without objects, and its index in `PHOTOGRAPHS`."""
    background, photograph, _ = _draw_background(rng, part, size, size)
    return _finish(rng, background), photograph


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
        _photograph(index)  # before the workers start: one clear error, and forked workers inherit what is read
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers <= 1:
        return [function(job) for job in jobs]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent)
    try:
        return list(pool.map(function, jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run must not finish all jobs first


def _end_with_parent() -> None:
    """Let this worker process end when its parent is killed, rather than wait for jobs for ever."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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
    regions = {photograph.file_name: {part: background_region(i, part, *_photograph(i).size) for part in PARTS}
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
