"""Parts of labelled data: their sizes, that they are always the same, and what few shots leave of the annotations."""
import argparse
import json
import math
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datasets import build_dataset, get_coco_api_from_dataset, num_classes_and_names
from datasets.subsets import _number_of_images, choose_images, choose_shots, keep_chosen, read_class_split
from datasets.toy import ToySettings, write_toy
from datasets.voc import VOC_CLASSES
from util.errors import InputError

NAMES = {1: "cat", 2: "dog", 5: "emu"}


def ground_truth(num_images=200):
    """Image i has i % 4 objects of class 1, one of class 2 if i is even, and one crowd of class 5 if i ends in 0."""
    images, annotations = [], []
    for number in range(num_images):
        image_id = 1000 - 3 * number   # neither ascending nor without gaps
        images.append({"id": image_id, "file_name": f"{number}.png", "height": 20, "width": 30})
        labels = [1] * (number % 4) + [2] * (number % 2 == 0) + [5] * (number % 10 == 0)
        for label in labels:
            annotations.append({"id": 7 * len(annotations) + 1, "image_id": image_id, "category_id": label, "area": 24,
                                "bbox": [1, 2, 6, 4], "iscrowd": int(label == 5)})
    return {"images": images, "annotations": annotations,
            "categories": [{"id": label, "name": name} for label, name in NAMES.items()]}


@pytest.fixture
def own_data(tmp_path):
    """The same on disk, for training and validation."""
    for part in ("train", "val"):
        content = ground_truth(40)
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
        for entry in content["images"]:
            Image.new("RGB", (30, 20)).save(tmp_path / entry["file_name"])
    return tmp_path


def arguments(root, **changes):
    values = dict(dataset_file="coco", coco_path=None, train_images=str(root), val_images=str(root),
                  train_annotations=str(root / "train.json"), val_annotations=str(root / "val.json"), eval=False,
                  seed=0, num_classes=None,
                  train_sizes=None, val_size=20, max_size=40, crop_resize=None, crop_size=None, output_dir="",
                  filter_pct=-1.0, filter_num=-1.0, filter_file=None, filter_seed=None, shots=None, shots_of="boxes",
                  class_split=None, class_part=None)
    return argparse.Namespace(**{**values, **changes})


# Shares of the images


@pytest.mark.parametrize("flags, count", [
    ({"filter_pct": 0.1}, 4), ({"filter_pct": 0.05}, 2), ({"filter_pct": 0.02}, 1), ({"filter_pct": 0.01}, 1),   # of 40
    ({"filter_pct": 1.0}, 40), ({"filter_num": 7.0}, 7), ({"filter_num": 40.0}, 40), ({}, 40)])
def test_sizes(own_data, flags, count):
    assert len(build_dataset("train", arguments(own_data, **flags))) == count
    assert len(build_dataset("val", arguments(own_data, **flags))) == 40


@pytest.mark.parametrize("total, share, expected", [
    (118287, 0.01, 1183), (118287, 0.02, 2366), (118287, 0.05, 5914), (118287, 0.1, 11829), (16551, 0.1, 1655)])
def test_a_hundredth_of_coco_and_a_tenth_of_voc(total, share, expected):
    """118,287 and 16,551 images are in train2017 and in trainval of 2007 and 2012."""
    assert _number_of_images(total, argparse.Namespace(filter_pct=share)) == expected


def test_the_choice_is_fixed():
    """By its seed, and not by the order of the images in the file."""
    content = {"images": [{"id": number} for number in range(1, 11)], "annotations": [], "categories": []}
    chosen = choose_images(content, 3, 0).image_ids
    assert chosen == choose_images({**content, "images": content["images"][::-1]}, 3, 0).image_ids
    assert choose_images(content, 3, 1).image_ids != chosen


@pytest.mark.parametrize("share, seed", [(0.1, 42), (0.25, 42), (0.05, 7)])
def test_a_share_is_the_published_one(share, seed):
    """DETReg's program draws round(n * share) of COCO's ascending ids by numpy's default generator."""
    content = ground_truth()
    ids = sorted(entry["id"] for entry in content["images"])
    published = np.random.default_rng(seed).choice(ids, size=round(len(ids) * share), replace=False)
    assert choose_images(content, round(200 * share), seed).image_ids == sorted(published.tolist())


def test_a_tenth_of_twenty_made_up_ids():
    """Ids 100, 110, …, 290 and the published default seed, 42: the generator takes the second and the sixteenth."""
    content = {"images": [{"id": number} for number in range(290, 90, -10)], "annotations": [], "categories": []}
    assert choose_images(content, 2, 42).image_ids == [110, 250]


def test_the_seed_of_the_run_decides_unless_there_is_one_of_the_choice(own_data):
    def chosen(**flags):
        return build_dataset("train", arguments(own_data, filter_num=9.0, **flags)).ids

    assert chosen(seed=1) == chosen(seed=2, filter_seed=1) != chosen(seed=2)


def test_images_keep_their_annotations_and_the_file_stays_whole(own_data):
    whole = build_dataset("train", arguments(own_data))
    part = build_dataset("train", arguments(own_data, filter_num=12.0))
    assert len(part) == 12
    assert all(part.coco.imgToAnns[image_id] == whole.coco.imgToAnns[image_id] for image_id in part.ids)
    assert len(build_dataset("train", arguments(own_data))) == 40   # what was read is remembered, not what was left


# Few shots


@pytest.mark.parametrize("shots", [1, 5, 10])
def test_shots_of_boxes(shots):
    content = ground_truth()
    chosen = choose_shots(content, shots, "boxes", 0)
    left = keep_chosen(content, chosen)
    assert Counter(entry["category_id"] for entry in left["annotations"]) == {1: shots, 2: shots}   # 5 has crowds alone
    assert {entry["image_id"] for entry in left["annotations"]} == {entry["id"] for entry in left["images"]}
    assert set(chosen.annotation_ids) <= set(choose_shots(content, shots + 3, "boxes", 0).annotation_ids)
    assert chosen == choose_shots(content, shots, "boxes", 0) != choose_shots(content, shots, "boxes", 1)


def test_shots_of_images():
    content = ground_truth()
    chosen = choose_shots(content, 6, "images", 0)
    left = keep_chosen(content, chosen)
    for label in (1, 2):
        assert len({entry["image_id"] for entry in left["annotations"] if entry["category_id"] == label}) >= 6
    assert 6 <= len(left["images"]) <= 12
    mine = [entry for entry in content["annotations"] if entry["image_id"] in set(chosen.image_ids)]
    assert left["annotations"] == mine   # all annotations, crowds too


def test_classes_with_too_few_objects_are_named(capsys):
    content = ground_truth(12)
    chosen = choose_shots(content, 7, "boxes", 0)
    assert capsys.readouterr().out == "fewer than 7 boxes of 2 classes: dog (6), emu (0)\n"
    assert len(chosen.annotation_ids) == 7 + 6


def test_difficult_objects_are_no_shots():
    content = ground_truth(20)
    for entry in content["annotations"]:
        entry["difficult"] = int(entry["image_id"] != 1000 - 3 * 7)   # all but those of the eighth image
    assert choose_shots(content, 5, "boxes", 0).image_ids == [1000 - 3 * 7]


# Written down and read again


@pytest.mark.parametrize("flags", [{"filter_pct": 0.2}, {"shots": 3}, {"shots": 2, "shots_of": "images"}])
def test_a_choice_that_was_written_down(own_data, tmp_path, flags, capsys):
    output = tmp_path / "run"
    first = build_dataset("train", arguments(own_data, output_dir=str(output), **flags))
    printed = capsys.readouterr().out
    again = build_dataset("train", arguments(own_data, filter_file=str(output / "train_subset.json")))
    assert again.ids == first.ids and again.objects_per_image().tolist() == first.objects_per_image().tolist()
    assert f"train: {len(first)} of 40 images, " in printed and "--filter_seed 0)" in printed
    written = json.loads((output / "train_subset.json").read_text())
    assert written["made_by"]["filter_seed"] == 0 and written["image_ids"] == first.ids


def test_a_choice_that_is_read_where_it_would_be_written_stays(own_data, tmp_path):
    output, written = str(tmp_path / "run"), tmp_path / "run/train_subset.json"
    build_dataset("train", arguments(own_data, output_dir=output, filter_num=3.0))
    before = written.read_text()
    build_dataset("train", arguments(own_data, output_dir=output, filter_file=str(written)))
    assert written.read_text() == before and "filter_num" in before


def test_a_choice_that_cannot_be_written_down_is_said(own_data, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="run/train_subset.json can't be written"):
        build_dataset("train", arguments(own_data, output_dir=str(tmp_path / "run"), filter_num=3.0))


def test_a_pipe_in_the_choice_s_place_is_replaced(own_data, tmp_path):
    os.mkfifo(tmp_path / "train_subset.json")
    build_dataset("train", arguments(own_data, output_dir=str(tmp_path), filter_num=3.0))
    assert len(json.loads((tmp_path / "train_subset.json").read_text())["image_ids"]) == 3


def test_a_list_of_ids(own_data, tmp_path):
    path = tmp_path / "ids.json"
    path.write_text("[1000, 991]")
    assert build_dataset("train", arguments(own_data, filter_file=str(path))).ids == [991, 1000]
    for content, message in (("[1000, 5]", "the training annotations have no image 5$"),
                             ('["1000"]', "the training annotations have no image '1000'$"),
                             ('{"image_ids": [1000], "annotation_ids": [2]}', "have no annotation 2$"),
                             ("{}", "is neither a JSON list of image ids nor"), ("[1", "is not valid JSON")):
        path.write_text(content)
        with pytest.raises(InputError, match=f"^--filter_file .*{message}"):
            build_dataset("train", arguments(own_data, filter_file=str(path)))


@pytest.mark.parametrize("flags, message", [
    ({"filter_pct": 0.0}, "--filter_pct 0 is not a share of the images, above 0 and up to 1$"),
    ({"filter_pct": 10.0}, "--filter_pct 10 is not a share of the images, above 0 and up to 1; 10 percent are 0.1$"),
    ({"filter_pct": 101.0}, "--filter_pct 101 is not a share of the images, above 0 and up to 1$"),
    ({"filter_pct": math.nan}, "--filter_pct nan must be a finite number$"),
    ({"filter_num": 0.0}, "--filter_num 0 is not a number of images from 1 to 40"),
    ({"filter_num": 41.0}, "--filter_num 41 is not a number of images from 1 to 40"),
    ({"filter_num": 1.5}, "--filter_num 1.5 is not a number of images")])
def test_senseless_numbers_are_refused(own_data, flags, message):
    with pytest.raises(InputError, match=f"^{message}"):
        build_dataset("train", arguments(own_data, **flags))


# Base and novel classes


@pytest.fixture
def split(tmp_path):
    path = tmp_path / "split.json"
    path.write_text('{"novel": ["dog"]}')
    return str(path)


def test_base_and_novel_classes(own_data, split):
    """Of 40 images 20 have a dog; 30 have a cat, and 0 and 20 have emus alone."""
    for part, labels, images in (("novel", {2}, 20), ("base", {1, 5}, 32)):
        args = arguments(own_data, class_split=split, class_part=part)
        train, val = build_dataset("train", args), build_dataset("val", args)
        assert {entry["category_id"] for entry in train.coco.dataset["annotations"]} == labels
        assert len(train) == images and len(val) == 40
        assert set(get_coco_api_from_dataset(val).getCatIds()) == labels   # evaluation passes over all other classes
        assert num_classes_and_names(args) == (6, NAMES)   # labels and the model's outputs stay what they are


def test_shots_of_the_novel_classes(own_data, split):
    dataset = build_dataset("train", arguments(own_data, class_split=split, class_part="novel", shots=4))
    assert len(dataset) == 4 and dataset.objects_per_image().tolist() == [1] * 4
    assert all(target["labels"].tolist() == [2] for _, target in (dataset[index] for index in range(4)))


@pytest.mark.parametrize("content, message", [
    ('{"novel": ["zebra"]}', "names a class that the annotations lack: 'zebra'"),
    ('{"novel": [["dog"]]}', r"names a class that the annotations lack: \['dog'\]"),
    ('{"novel": ["dog"], "base": ["cat", "dog"]}', "has 'dog' in both parts"),
    ('{"novel": []}', "has no novel classes"), ('["dog"]', "is not a JSON object with a list"), ("{", "is not valid JSON")])
def test_broken_splits_are_refused(own_data, tmp_path, content, message):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(InputError, match=f"^--class_split .*{message}"):
        build_dataset("train", arguments(own_data, class_split=str(path), class_part="novel"))


def test_the_usual_splits(root):
    """COCO's novel classes are the 20 that VOC has; VOC's three splits have five novel classes each."""
    for number in (1, 2, 3):
        categories = [{"id": label, "name": name} for label, name in enumerate(VOC_CLASSES, start=1)]
        path = str(root / f"datasets/splits/voc{number}.json")
        assert len(read_class_split(path, "novel", {"categories": categories})) == 5
        assert len(read_class_split(path, "base", {"categories": categories})) == 15
    other = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
             "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}
    novel = json.loads((root / "datasets/splits/coco.json").read_text())["novel"]
    assert sorted(novel) == sorted(other.get(name, name) for name in VOC_CLASSES)


# VOC


def test_a_tenth_of_voc(tmp_path):
    write_toy(tmp_path / "toy", ToySettings(image_size=64, num_unlabelled=1, num_train=20, num_val=2), num_workers=1)
    nowhere = dict(train_images=None, val_images=None, train_annotations=None, val_annotations=None)
    args = arguments(tmp_path, **nowhere, dataset_file="voc", voc_path=str(tmp_path / "toy/VOCdevkit"), remove_difficult=False,
                     filter_pct=0.1, output_dir=str(tmp_path / "run"))
    dataset = build_dataset("train", args)
    places = np.random.default_rng(0).choice(np.arange(20), size=2, replace=False)  # in the list of images
    assert dataset.ids == sorted((places + 1).tolist())
    assert len(dataset) == 2 and len(build_dataset("val", args)) == 2
    args.filter_pct, args.filter_file = -1.0, str(tmp_path / "run/train_subset.json")
    assert build_dataset("train", args).ids == dataset.ids
