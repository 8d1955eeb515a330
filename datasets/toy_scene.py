"""What the toy world looks like: textured shapes on photographs, each scene a function of (seed, part, index) alone.

A class is told by its shape and texture; colours are drawn anew for each object. The parts (unlabelled, train, val, and
one more for pre-training a classifier) share neither objects nor background pixels: each has random streams of its own
and its own region of every photograph. The photographs ship inside scikit-image's wheel.
"""
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, List, NamedTuple, Tuple

import numpy as np
from PIL import Image

from util.errors import InputError
from util.ranges import SEED, SHARE, Range, check_ranges, count

Array = np.ndarray
Pixels = Tuple[int, int, int, int]

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

LARGEST_OBJECT = 0.625  # diameter as a share of image_size
RANGES = {"image_size": count(32, 4096), **{name: count(0) for name in ("num_unlabelled", "num_train", "num_val")},
          "max_objects": count(1, 100), "min_object": Range(0.05, LARGEST_OBJECT), "empty_share": SHARE,
          "crowd_share": SHARE, "seed": SEED}


@dataclass(frozen=True)
class ToySettings:
    """Everything that decides the bytes of a toy world; the command line has one flag for each field."""

    image_size: int = field(default=128, metadata={"help": "longer side of every image in pixels"})
    num_unlabelled: int = field(default=8000, metadata={"help": "images without labels"})
    num_train: int = field(default=500, metadata={"help": "labelled training images"})
    num_val: int = field(default=200, metadata={"help": "labelled validation images"})
    max_objects: int = field(default=5, metadata={"help": "most objects in an image, crowds not counted"})
    min_object: float = field(default=0.125, metadata={
        "help": "least diameter of an object, as a share of image_size; the largest is 0.625"})
    empty_share: float = field(default=0.04, metadata={"help": "share of images without any object"})
    crowd_share: float = field(default=0.04, metadata={"help": "share of images with a crowd of small objects"})
    seed: int = field(default=0, metadata={"help": "seed of all randomness"})

    def check(self) -> None:
        """Raise InputError, naming the flag, if a value is out of range."""
        check_ranges(self, RANGES)
        if self.empty_share + self.crowd_share > 1:
            raise InputError(f"--empty_share {self.empty_share} and --crowd_share {self.crowd_share} exceed 1 together")


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
def load_photograph(index: int) -> Image.Image:
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
    photograph = load_photograph(index)
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
        diameter = settings.image_size * np.exp(rng.uniform(*np.log((settings.min_object, LARGEST_OBJECT))))
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
