"""The toy world: files as their layouts want them, reproducible, parts apart, never half written."""
import itertools
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from datasets import toy
from datasets.toy import write_toy
from datasets.toy_scene import (CLASS_NAMES, PARTS, PHOTOGRAPHS, ToySettings, background_region, image_rng, render_background,
                                render_scene, render_single_object)
from util.errors import InputError

SETTINGS = ToySettings(num_unlabelled=10, num_train=30, num_val=8, empty_share=0.1, crowd_share=0.2)
LABELLED = {"train": 30, "val": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    assert write_toy(folder, SETTINGS, num_workers=1)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def coco(world, part):
    return COCO(str(world / f"coco/annotations/instances_{part}2017.json"))


def panoptic(world, part):
    return json.loads((world / f"coco/annotations/panoptic_{part}2017.json").read_text())


def box_around(mask):
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()]


def test_the_number_of_workers_does_not_change_a_byte(world, tmp_path):
    write_toy(tmp_path / "again", SETTINGS, num_workers=3)
    first, again = contents(world), contents(tmp_path / "again")
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_another_seed_gives_other_images():
    one, other = (render_scene(ToySettings(seed=seed), "train", 3).image for seed in (0, 1))
    assert one.shape != other.shape or (one != other).any()


def test_an_image_does_not_depend_on_how_many_there_are():
    few, many = (render_scene(ToySettings(num_train=number), "train", 3).image for number in (4, 4000))
    assert np.array_equal(few, many)


@pytest.mark.parametrize("part", LABELLED)
def test_coco_boxes_lie_inside_and_fit_their_outlines(world, part):
    data = coco(world, part)
    assert len(data.imgs) == LABELLED[part]
    for annotation in data.dataset["annotations"]:
        image = data.imgs[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert 0 <= x < x + width <= image["width"] and 0 <= y < y + height <= image["height"]
        mask = data.annToMask(annotation)
        # An outline is drawn to a fraction of a pixel, and pycocotools fills it by its own rule.
        assert abs(int(mask.sum()) - annotation["area"]) <= 0.1 * annotation["area"] + 6
        if annotation["iscrowd"]:
            assert mask.sum() == annotation["area"] and box_around(mask) == annotation["bbox"]
        else:
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]])
            assert (points >= 0).all() and (points <= (image["width"], image["height"])).all()
            ends = points.min(axis=0), points.max(axis=0)
            assert np.abs(np.concatenate(ends) - (x, y, x + width, y + height)).max() <= 1.0


def test_a_ring_keeps_its_hole():
    v, u = np.mgrid[-20:20, -20:20] + 0.5
    mask = (np.hypot(u, v) < 18) & (np.hypot(u, v) > 9)
    polygons = toy._polygons(mask, mask.astype(np.float32))
    assert len(polygons) == 1
    data = COCO()
    data.imgs = {1: {"height": 40, "width": 40}}
    filled = data.annToMask({"image_id": 1, "segmentation": polygons})
    assert filled[20, 20] == 0 and filled[20, 6] == 1
    assert abs(int(filled.sum()) - int(mask.sum())) < 0.05 * mask.sum()


def test_coco_has_crowds_empty_images_gaps_between_ids_and_sizes_that_vary(world):
    data = coco(world, "train")
    annotations = data.dataset["annotations"]
    assert any(annotation["iscrowd"] for annotation in annotations)
    assert {annotation["image_id"] for annotation in annotations} < set(data.imgs)
    ids = sorted(data.cats)
    assert ids != list(range(min(ids), max(ids) + 1))
    assert [data.cats[number]["name"] for number in ids] == list(CLASS_NAMES)
    assert {annotation["category_id"] for annotation in annotations} == set(ids)
    sizes = {(image["width"], image["height"]) for image in data.imgs.values()}
    assert len(sizes) > 10
    assert all(max(size) == 128 and min(size) >= 96 for size in sizes)
    for image in data.imgs.values():
        with Image.open(world / "coco/train2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) and picture.mode == "RGB"


@pytest.mark.parametrize("part", LABELLED)
def test_ids_of_both_parts_differ(world, part):
    data, other = coco(world, part), coco(world, "val" if part == "train" else "train")
    assert not set(data.imgs) & set(other.imgs)
    assert not set(data.anns) & set(other.anns)


@pytest.mark.parametrize("part", LABELLED)
def test_panoptic_pictures_agree_with_their_json(world, part):
    content = panoptic(world, part)
    kinds = {category["id"]: category["isthing"] for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    objects = coco(world, part).imgToAnns
    assert set(kinds.values()) == {0, 1}
    assert len(content["annotations"]) == LABELLED[part]
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        assert annotation["file_name"] == image["file_name"].replace(".jpg", ".png")
        with Image.open(world / f"coco/annotations/panoptic_{part}2017" / annotation["file_name"]) as picture:
            rgb = np.asarray(picture)
        numbers = rgb.astype(int) @ (1, 256, 65536)
        assert numbers.shape == (image["height"], image["width"])
        assert set(np.unique(numbers)) - {0} == {segment["id"] for segment in annotation["segments_info"]}
        for segment in annotation["segments_info"]:
            assert (numbers == segment["id"]).sum() == segment["area"]
            assert box_around(numbers == segment["id"]) == segment["bbox"]
        things = [segment for segment in annotation["segments_info"] if kinds[segment["category_id"]]]
        assert sorted((s["category_id"], s["area"], s["iscrowd"]) for s in things) == \
            sorted((a["category_id"], a["area"], a["iscrowd"]) for a in objects[image["id"]])
        assert len(annotation["segments_info"]) - len(things) == 1
        assert (numbers == 0).mean() < 0.05


def test_voc_boxes_count_from_one_and_include_both_ends(world):
    names = {(year, image_set): (world / f"VOCdevkit/{year}/ImageSets/Main/{image_set}.txt").read_text().split()
             for year, image_set in (("VOC2007", "trainval"), ("VOC2007", "test"), ("VOC2012", "trainval"))}
    assert [len(group) for group in names.values()] == [15, 8, 15]
    data = coco(world, "train")
    difficult = set()
    for (year, image_set), group in names.items():
        for name in group:
            root = ElementTree.parse(world / f"VOCdevkit/{year}/Annotations/{name}.xml").getroot()
            with Image.open(world / f"VOCdevkit/{year}/JPEGImages/{root.findtext('filename')}") as picture:
                assert picture.size == (int(root.findtext("size/width")), int(root.findtext("size/height")))
            boxes = []
            for element in root.iter("object"):
                assert element.findtext("name") in CLASS_NAMES
                difficult.add(element.findtext("difficult"))
                left, top, right, bottom = (int(element.findtext(f"bndbox/{side}"))
                                            for side in ("xmin", "ymin", "xmax", "ymax"))
                assert 1 <= left <= right <= picture.size[0] and 1 <= top <= bottom <= picture.size[1]
                boxes.append([left - 1, top - 1, right - left + 1, bottom - top + 1])
            if image_set == "trainval":
                image_id = int(name.split("_")[-1])
                assert all(a["bbox"] in boxes for a in data.imgToAnns[image_id] if not a["iscrowd"])
    assert difficult == {"0", "1"}


def test_unlabelled_images_lie_in_several_folders(world):
    paths = sorted((world / "unlabelled").rglob("*.jpg"))
    assert len(paths) == 10 and len({path.parent for path in paths}) > 2


def test_parts_take_their_backgrounds_from_disjoint_regions():
    for photograph, (one, other) in itertools.product(range(len(PHOTOGRAPHS)), itertools.combinations(PARTS, 2)):
        first, second = (background_region(photograph, part, 451, 300) for part in (one, other))
        assert first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]


@pytest.mark.parametrize("part", PARTS)
def test_backgrounds_stay_in_the_region_of_their_part(world, part):
    regions = json.loads((world / "toy.json").read_text())["background_regions"]
    for index in range(20):
        scene = render_scene(SETTINGS, part, index)
        left, top, right, bottom = regions[PHOTOGRAPHS[scene.photograph].file_name][part]
        assert left <= scene.crop[0] < scene.crop[2] <= right and top <= scene.crop[1] < scene.crop[3] <= bottom


def test_parts_draw_from_random_streams_of_their_own():
    draws = [image_rng(0, part, index).random() for part in PARTS for index in range(50)]
    assert len(set(draws)) == len(draws)


def test_objects_stay_visible_and_few():
    for index in range(60):
        instances = [instance for instance in render_scene(SETTINGS, "train", index).instances if not instance.in_crowd]
        assert len(instances) <= SETTINGS.max_objects
        assert all(instance.visible_share > 0.5 for instance in instances)


def test_single_objects_and_backgrounds_for_a_classifier():
    rng = np.random.default_rng(0)
    drawn = [render_single_object(rng, 40) for _ in range(60)]
    assert all(image.shape == (40, 40, 3) and image.dtype == np.uint8 for image, _, _ in drawn)
    assert {class_index for _, class_index, _ in drawn} == set(range(len(CLASS_NAMES)))
    image, photograph = render_background(rng, 24)
    assert image.shape == (24, 24, 3) and 0 <= photograph < len(PHOTOGRAPHS)


def test_the_same_settings_again_are_nothing_to_do(world):
    before = contents(world)
    assert not write_toy(world, SETTINGS)
    assert contents(world) == before


def test_other_settings_in_the_same_folder_are_refused(world):
    with pytest.raises(InputError, match="holds toy data made with other settings"):
        write_toy(world, ToySettings(num_train=3))


def test_a_foreign_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds something else than toy data"):
        write_toy(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "new").mkdir()
    assert write_toy(tmp_path / "new", ToySettings(num_unlabelled=1, num_train=1, num_val=1), num_workers=1)
    assert (tmp_path / "new" / "toy.json").exists()


@pytest.mark.parametrize("change, flag", [
    ({"image_size": 8}, "--image_size"), ({"num_val": -1}, "--num_val"), ({"max_objects": 0}, "--max_objects"),
    ({"min_object": 0.7}, "--min_object"),
    ({"crowd_share": 1.5}, "--crowd_share")])
def test_values_out_of_range_name_their_flag(tmp_path, change, flag):
    with pytest.raises(InputError, match=flag):
        write_toy(tmp_path / "toy", ToySettings(**change))


def test_a_failing_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(toy, "_write_image_sets", fail)
    with pytest.raises(OSError, match="disk full"):
        write_toy(tmp_path / "toy", ToySettings(num_unlabelled=2, num_train=2, num_val=1), num_workers=1)
    assert list(tmp_path.iterdir()) == []


def start_writing(folder):
    """A program of its own that is in the middle of writing far more images than it will get to."""
    flags = ["--output_dir", str(folder), "--num_unlabelled", "99999", "--num_workers", "2"]
    args = toy.get_args_parser().parse_args(flags)
    program = multiprocessing.get_context("fork").Process(target=toy.main, args=(args,))
    program.start()
    while program.is_alive() and not list(folder.parent.rglob("*.jpg")):
        time.sleep(0.02)
    return program


def test_a_terminated_program_leaves_nothing(tmp_path):
    program = start_writing(tmp_path / "toy")
    program.terminate()
    program.join(60)
    assert program.exitcode == 143
    assert list(tmp_path.iterdir()) == []


def test_a_killed_program_leaves_no_data_set_and_no_workers(tmp_path):
    program = start_writing(tmp_path / "toy")
    program.kill()
    program.join(60)
    assert not (tmp_path / "toy").exists()
    deadline = time.monotonic() + 60
    written = -1
    while written != (written := len(list(tmp_path.rglob("*.jpg")))):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_the_program_says_what_it_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    args = toy.get_args_parser().parse_args(["--output_dir", str(tmp_path / "toy"), "--num_unlabelled", "2",
                                             "--num_train", "3", "--num_val", "2", "--num_workers", "1"])
    toy.main(args)
    printed = capsys.readouterr().out
    assert re.search(r"2 unlabelled images.*3 train images.*2 val images.*wrote .*toy in", printed, re.DOTALL)
    toy.main(args)
    assert "nothing to do" in capsys.readouterr().out


def test_the_program_tells_mistakes_in_one_line(tmp_path, root):
    command = [sys.executable, "-m", "datasets.toy", "--output_dir", str(tmp_path / "toy"), "--image_size", "5"]
    refused = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == "error: --image_size 5 must be at least 32\n"
