"""The Airbus converter on run lengths drawn by hand."""
import argparse
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_codec

from datasets import build_dataset
from tools import convert_airbus
from tools.convert_airbus import is_for_validation, to_rle
from util.errors import InputError

SHARE = 0.5
NAMES = [f"{number:04x}.jpg" for number in range(12)]


def test_run_lengths_go_down_the_columns():
    # 3 rows, 4 columns: pixels 2, 3 (column 1, rows 2 and 3), 5 (column 2, row 2) and 10 ... 12 (column 4).
    expected = np.array([[0, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1]])
    rle = to_rle([2, 2, 5, 1, 10, 3], 3, 4)
    assert mask_codec.decode(rle).tolist() == expected.tolist()
    assert mask_codec.toBbox(rle).tolist() == [0, 0, 4, 3] and mask_codec.area(rle) == 6
    assert mask_codec.decode(to_rle([1, 12], 3, 4)).all()
    assert mask_codec.decode(to_rle([1, 1, 2, 1], 3, 4)).sum() == 2   # runs may touch


@pytest.mark.parametrize("runs", [[0, 1], [12, 2], [5, 2, 6, 1], [5, 1, 2, 1], [3, 0]])
def test_impossible_run_lengths(runs):
    assert to_rle(runs, 3, 4) is None


@pytest.fixture
def airbus(tmp_path):
    """Twelve images of 16 x 12; image i has i % 3 ships, of one column and of two."""
    (tmp_path / "images").mkdir()
    lines = ["ImageId,EncodedPixels"]
    for number, name in enumerate(NAMES):
        Image.new("RGB", (16, 12)).save(tmp_path / "images" / name)
        lines += [f"{name},", f"{name},14 4", f"{name},14 4\n{name},27 3 39 3"][number % 3:number % 3 + 1]
    (tmp_path / "ships.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def convert(root, *flags):
    convert_airbus.main(convert_airbus.get_args_parser().parse_args(
        ["--csv", str(root / "ships.csv"), "--images", str(root / "images"), "--output_dir", str(root / "annotations"),
         "--val_share", str(SHARE), *flags]))
    return {part: json.loads((root / f"annotations/instances_{part}.json").read_text()) for part in ("train", "val")}


def test_the_two_files(airbus, capsys):
    parts = convert(airbus)
    assert parts["train"]["categories"] == [{"id": 1, "name": "ship"}]
    names = {part: [entry["file_name"] for entry in content["images"]] for part, content in parts.items()}
    with_ships = [name for number, name in enumerate(NAMES) if number % 3]
    assert sorted(names["train"] + names["val"]) == with_ships
    assert all(is_for_validation(name, SHARE) == (name in names["val"]) for name in with_ships)
    annotations = parts["train"]["annotations"] + parts["val"]["annotations"]
    assert len({entry["id"] for entry in annotations}) == len(annotations) == 4 * 1 + 4 * 2
    assert {(*entry["bbox"], entry["area"]) for entry in annotations} == {(1, 1, 1, 4, 4), (2, 2, 2, 3, 6)}
    assert f"{len(names['train'])} images, {len(parts['train']['annotations'])} ships" in capsys.readouterr().out


def test_images_without_ships_on_request(airbus):
    parts = convert(airbus, "--keep_empty")
    assert sum(len(content["images"]) for content in parts.values()) == 12
    ids = {part: {entry["file_name"]: entry["id"] for entry in content["images"]} for part, content in parts.items()}
    fewer = convert(airbus)
    for part, content in fewer.items():
        assert all(ids[part][entry["file_name"]] == entry["id"] for entry in content["images"])


def test_training_reads_them(airbus):
    parts = convert(airbus)
    args = argparse.Namespace(
        dataset_file="coco", coco_path=None, masks=True, seed=0, num_classes=None, eval=False,
        train_images=str(airbus / "images"),
        train_annotations=str(airbus / "annotations/instances_train.json"), val_images=str(airbus / "images"),
        val_annotations=str(airbus / "annotations/instances_val.json"), train_sizes=None, val_size=12, max_size=None,
        crop_resize=None, crop_size=None)
    dataset = build_dataset("val", args)
    assert len(dataset) == len(parts["val"]["images"]) > 0
    for _, target in (dataset[index] for index in range(len(dataset))):
        assert target["masks"].shape[1:] == (12, 16)
        assert target["masks"].sum((1, 2)).tolist() == target["area"].tolist()


@pytest.mark.parametrize("content, message", [
    ("", "doesn't begin with the line ImageId,EncodedPixels"),
    ("a,b\n0001.jpg,1 2\n", "doesn't begin with the line"),
    ("ImageId,EncodedPixels\n", "lists no images"),
    ("ImageId,EncodedPixels\n0001.jpg,1 2 3\n", "line 2: the pixels of '0001.jpg' are not pairs of numbers"),
    ("ImageId,EncodedPixels\n0001.jpg,1 x\n", "line 2: the pixels"),
    ("ImageId,EncodedPixels\n0001.jpg\n", "line 2: the pixels"),
    ("ImageId,EncodedPixels\n0001.jpg,190 5\n", "a ship of 0001.jpg has pixels .* outside its 16 x 12"),
    ("ImageId,EncodedPixels\nother.jpg,1 5\n", "the CSV names .*other.jpg does not exist"),
    ("ImageId,EncodedPixels\n0001.jpg,1 5\n", "--val_share 0.5 leaves no ships for ")])
def test_mistakes(airbus, content, message):
    (airbus / "ships.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        convert(airbus)
    with pytest.raises(InputError, match="^--val_share 1.0 must be less than 1$"):
        convert(airbus, "--val_share", "1")
