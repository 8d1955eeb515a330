"""tools.show_regions: proposals on the left, a model's boxes on the right."""
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from tools import show_regions
from tools.loading import DETECTOR, load_model
from tools.regions import find_objects
from tools.show_regions import HEADER, MARGIN, best_boxes, draw

pytest.importorskip("cv2")


def scene(path: Path) -> Path:
    """A plain rectangle on plain ground, twice as wide as high."""
    pixels = np.full((100, 200, 3), 30, dtype=np.uint8)
    pixels[25:75, 50:150, 0] = 230
    Image.fromarray(pixels).save(path)
    return path


def test_a_picture_of_both(detector: Path, tmp_path: Path, run_main: Callable) -> None:
    paths = [scene(tmp_path / name) for name in ("a.png", "b.png")]
    printed = run_main(show_regions, ["--checkpoint", detector, *paths, "--num_boxes", 5, "--device", "cpu", "--output",
                                      tmp_path / "out" / "regions.png"])
    with Image.open(tmp_path / "out" / "regions.png") as picture:
        assert picture.size == (2 * (400 + MARGIN), HEADER + 2 * (200 + MARGIN))
    assert printed.splitlines()[-1] == f"picture: {tmp_path}/out/regions.png"
    assert printed.count("regions of selective search, 5 boxes of the model") == 2


def test_the_best_boxes_come_first(detector: Path, tmp_path: Path) -> None:
    loaded = load_model(str(detector), DETECTOR, "cpu")
    image, proposed, found = best_boxes(str(scene(tmp_path / "scene.png")), loaded, 4)
    assert image.shape == (3, 100, 200) and proposed.shape[1] == 4 and len(proposed) <= 4 and found.shape == (4, 4)
    assert (proposed - torch.tensor([50, 25, 150, 75])).abs().max(1).values.min() <= 5
    boxes, scores = find_objects(loaded, torch.rand(2, 3, 64, 80), torch.tensor([[64, 80], [128, 160]]))[1]
    assert (scores.diff() <= 0).all() and len(boxes) == loaded.args.num_queries


def test_pictures_of_different_shapes() -> None:
    """Rows as high as their pictures, columns as wide as the widest."""
    rows = [(Image.new("RGB", size, "red"), Image.new("RGB", size, "blue")) for size in ((40, 20), (10, 30))]
    canvas = draw(rows, ("left", "right"))
    assert canvas.size == (2 * (40 + MARGIN), HEADER + 20 + MARGIN + 30 + MARGIN)
    top = HEADER + 20 + MARGIN
    assert [canvas.getpixel(place) for place in ((5, top), (40 + MARGIN + 5, top), (20, top))] == \
        [(255, 0, 0), (0, 0, 255), (255, 255, 255)]


def test_wrong_use_is_told(detector: Path, tmp_path: Path, run_main: Callable) -> None:
    for words, message in ((["--num_boxes", 0], "--num_boxes 0 must be at least 1"),
                           (["--output", "a.gif"], "--output a.gif: the name must end in one of .png, .jpg, .webp")):
        assert run_main(show_regions, ["--checkpoint", detector, "none.jpg", *words], status=2) == f"error: {message}\n"
    message = run_main(show_regions, ["--checkpoint", detector, tmp_path / "none.jpg"], status=2)
    assert message == f"error: image file {tmp_path}/none.jpg does not exist\n"
