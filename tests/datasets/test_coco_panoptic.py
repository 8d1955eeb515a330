"""The panoptic data set on small files of an own category set: targets, masks, ground truth for boxes, and refusals."""
import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_codec
from torch.utils.data import Subset

from datasets import build_dataset, get_coco_api_from_dataset, num_classes_and_names
from datasets.coco_panoptic import CocoPanoptic, is_thing_map
from util.errors import InputError
from util.panoptic_ids import ids_to_rgb

HEIGHT, WIDTH = 20, 30
CATEGORIES = [{"id": 2, "name": "boat", "isthing": 1}, {"id": 9, "name": "bird", "isthing": 1},
              {"id": 5, "name": "water", "isthing": 0}, {"id": 30, "name": "sky", "isthing": 0}]
# Segment ids that need one, two and three bytes.
BOAT, FLOCK, WATER, SKY = 7, 300, 70000, 255


def picture_ids():
    """Sky above water, a boat on it, a flock in the sky, and a void column at the right edge."""
    ids = np.full((HEIGHT, WIDTH), SKY)
    ids[10:] = WATER
    ids[8:12, 4:10] = BOAT
    ids[2:5, 20:26] = FLOCK
    ids[:, -1] = 0
    return ids


def segment(ids, segment_id, category_id, iscrowd=0):
    rows, columns = np.nonzero(ids == segment_id)
    box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    return {"id": segment_id, "category_id": category_id, "iscrowd": iscrowd, "bbox": box, "area": len(rows)}


def panoptic_file():
    ids = picture_ids()
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH} for number in (8, 4)],
        "categories": [dict(category) for category in CATEGORIES],
        "annotations": [
            {"image_id": 8, "file_name": "8.png", "segments_info": [
                segment(ids, WATER, 5), segment(ids, BOAT, 2), segment(ids, FLOCK, 9, iscrowd=1),
                segment(ids, SKY, 30)]},
            {"image_id": 4, "file_name": "4.png", "segments_info": [segment(ids, SKY, 30)]}],
    }


@pytest.fixture
def world(tmp_path):
    """Writes COCO's layout; the function it returns writes another JSON and gives the file's path."""
    rng = np.random.default_rng(0)
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        for folder in (f"{part}2017", f"panoptic_{part}2017"):
            (tmp_path / folder).mkdir()
        for number in (4, 8):
            Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(
                tmp_path / f"{part}2017" / f"{number}.jpg")
            Image.fromarray(ids_to_rgb(picture_ids())).save(tmp_path / f"panoptic_{part}2017" / f"{number}.png")

    def write(content, part="train"):
        path = tmp_path / "annotations" / f"panoptic_{part}2017.json"
        path.write_text(json.dumps(content))
        return path

    write(panoptic_file())
    write(panoptic_file(), "val")
    write.root = tmp_path
    return write


def arguments(root, **changes):
    values = dict(dataset_file="coco_panoptic", coco_path=str(root), coco_panoptic_path=str(root), masks=True,
                  eval=False, num_classes=None, seed=0, train_sizes=None, val_size=40, max_size=None,
                  crop_resize=None, crop_size=None)
    return argparse.Namespace(**{**values, **changes})


def open_set(world, **changes):
    return CocoPanoptic(world.root / "train2017", world.root / "panoptic_train2017",
                        world.root / "annotations/panoptic_train2017.json", **changes)


def box_of(mask):
    """The outermost pixels of a mask, x0, y0, x1, y1."""
    rows, columns = mask.nonzero(as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())]


def test_things_and_stuff_become_objects_with_masks(world):
    dataset = open_set(world)
    assert dataset.ids == [4, 8]
    image, target = dataset[1]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["labels"].tolist() == [5, 2, 9, 30], "in the file's order, with the crowd"
    ids = torch.from_numpy(picture_ids())
    assert target["boxes"].tolist() == [[0, 10, 28, 19], [4, 8, 9, 11], box_of(ids == FLOCK), [0, 0, 28, 9]]
    assert target["area"].tolist() == [10 * 29 - 12, 24, int((ids == FLOCK).sum()), 10 * 29 - 12 - 18]
    assert target["iscrowd"].tolist() == [0, 0, 1, 0] and target["image_id"].tolist() == [8]
    assert target["masks"].dtype == torch.bool
    for mask, segment_id in zip(target["masks"], (WATER, BOAT, FLOCK, SKY)):
        assert torch.equal(mask, ids == segment_id)
    assert not target["masks"][:, :, -1].any(), "void belongs to nobody"


def test_masks_are_decoded_only_when_asked_for(world):
    with_masks = open_set(world)[1][1]
    for path in (world.root / "panoptic_train2017").iterdir():
        path.unlink()
    (world.root / "panoptic_train2017").rmdir()
    without = open_set(world, return_masks=False)[1][1]
    assert set(with_masks) - set(without) == {"masks"}
    assert all(torch.equal(without[name], with_masks[name]) for name in without if name != "boxes")
    assert without["boxes"].tolist()[:2] == [[0, 10, 29, 20], [4, 8, 10, 12]], "those of the JSON"
    with pytest.raises(InputError, match="folder .*panoptic_train2017 of the segments' PNGs does not exist"):
        open_set(world)


def test_samples_after_the_training_transforms(world):
    dataset = build_dataset("train", arguments(world.root, train_sizes=[24, 32], max_size=64))
    for epoch in range(4):
        dataset.set_epoch(epoch)
        image, target = dataset[1]
        count = len(target["labels"])
        assert target["masks"].shape == (count, *image.shape[1:]) and target["boxes"].shape == (count, 4)
        assert target["size"].tolist() == list(image.shape[1:])
        assert ((target["boxes"] >= 0) & (target["boxes"] < 1 + 1e-6)).all()


def test_classes_things_and_names_come_from_the_file(world):
    args = arguments(world.root)
    assert num_classes_and_names(args) == (31, {2: "boat", 5: "water", 9: "bird", 30: "sky"})
    assert num_classes_and_names(arguments(world.root, num_classes=250))[0] == 250
    assert is_thing_map(args) == {2: True, 9: True, 5: False, 30: False}


def test_evaluation_needs_only_the_validation_annotations(world):
    (world.root / "annotations/panoptic_train2017.json").unlink()
    args = arguments(world.root, eval=True)
    assert num_classes_and_names(args)[0] == 31 and is_thing_map(args)[2]
    assert len(build_dataset("val", args)) == 2


def test_evaluation_knows_every_category_of_the_training(world):
    """Else a map could hold one that its ground truth doesn't have, hours later."""
    content = panoptic_file()
    world({**content, "categories": CATEGORIES + [{"id": 31, "name": "cloud", "isthing": 0}]})
    with pytest.raises(InputError) as caught:
        build_dataset("val", arguments(world.root))
    annotations = world.root / "annotations"
    assert str(caught.value) == (f"category id 31 of {annotations}/panoptic_train2017.json is missing among the "
                                 f"categories of {annotations}/panoptic_val2017.json; list it there, even if no "
                                 "segment is of it")
    assert len(build_dataset("val", arguments(world.root, masks=False))) == 2


def test_the_pngs_may_lie_beside_the_json(world):
    (world.root / "panoptic_val2017").rename(world.root / "annotations/panoptic_val2017")
    dataset = build_dataset("val", arguments(world.root))
    assert dataset[1][1]["masks"].any()
    assert dataset.coco_panoptic_folder == world.root / "annotations/panoptic_val2017"
    assert dataset.coco_panoptic_json == world.root / "annotations/panoptic_val2017.json"


def test_own_names(world):
    """The PNGs' folder is named as the file, beside it or in --coco_panoptic_path."""
    (world.root / "annotations/panoptic_train2017.json").rename(world.root / "annotations/own.json")
    (world.root / "panoptic_train2017").rename(world.root / "own")
    (world.root / "train2017").rename(world.root / "pictures")
    flags = dict(train_images="pictures", train_annotations="annotations/own.json")
    assert build_dataset("train", arguments(world.root, **flags))[1][1]["masks"].shape[0] == 4
    (world.root / "own").rename(world.root / "annotations/own")
    absolute = {name: str(world.root / path) for name, path in flags.items()}
    args = arguments(None, coco_path=None, coco_panoptic_path=None, **absolute)
    assert build_dataset("train", args)[1][1]["masks"].shape[0] == 4
    assert is_thing_map(args)[2]
    with pytest.raises(InputError, match="--coco_panoptic_path is needed, .*, or --val_annotations"):
        build_dataset("val", args)


def test_segments_are_the_ground_truth_of_boxes_and_masks(world):
    dataset = build_dataset("val", arguments(world.root))
    coco = get_coco_api_from_dataset(Subset(dataset, [0]))
    assert [coco.anns[number]["category_id"] for number in sorted(coco.anns)] == [5, 2, 9, 30, 30]
    assert coco.anns[3]["iscrowd"] == 1
    for annotation in coco.imgToAnns[8]:
        mask = mask_codec.decode(coco.annToRLE(annotation)).astype(bool)
        np.testing.assert_array_equal(mask, picture_ids() == annotation["segment_id"])
    (world.root / "panoptic_val2017/8.png").unlink()
    assert mask_codec.area(coco.annToRLE(coco.imgToAnns[8][1])) == 24, "read once, for all evaluations"


def instances_file(image_ids=(8, 4), category_id=2):
    outline = [4, 8, 11, 8, 11, 12, 4, 12]
    return {"images": [{"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH} for number in image_ids],
            "annotations": [{"id": 5, "image_id": image_ids[0], "category_id": category_id, "bbox": [4, 8, 7, 4],
                             "segmentation": [outline]}],
            "categories": [{"id": category_id, "name": "boat"}]}


def test_boxes_are_evaluated_on_the_instances_where_they_are_there(world):
    (world.root / "annotations/instances_val2017.json").write_text(json.dumps(instances_file()))
    dataset = build_dataset("val", arguments(world.root))
    assert list(get_coco_api_from_dataset(dataset).anns) == [5]
    assert dataset[1][1]["labels"].tolist() == [5, 2, 9, 30], "targets stay the segments"


@pytest.mark.parametrize("other", [instances_file(image_ids=(8,)), instances_file(category_id=5),
                                   {**instances_file(), "images": [{"file_name": "8.jpg"}, 4]}])
def test_instances_of_another_set_are_not_taken(world, other, capsys):
    (world.root / "annotations/instances_val2017.json").write_text(json.dumps(other))
    dataset = build_dataset("val", arguments(world.root))
    assert get_coco_api_from_dataset(dataset) is dataset.coco
    assert "boxes are evaluated on the segments" in capsys.readouterr().out


def test_images_without_annotation_are_left_out(world, capsys):
    content = panoptic_file()
    del content["annotations"][1]
    world(content)
    assert open_set(world).ids == [8]
    assert "1 images have no annotation and are left out, the first is image id 4 of" in capsys.readouterr().out


def spoil(content, **changes):
    content["annotations"][0]["segments_info"][1].update(changes)
    return content


@pytest.mark.parametrize("changes, message", [
    ({"category_id": 3}, "segment id 7 (image id 8) of {file} has category_id 3, which is not among the categories"),
    ({"bbox": [1, 2, 3]}, "segment id 7 (image id 8) of {file} has the box [1, 2, 3], not four finite numbers"),
    ({"bbox": None}, "segment id 7 (image id 8) of {file} has the box None, not four finite numbers"),
    ({"area": "much"}, "segment id 7 (image id 8) of {file} has the area 'much', not a finite number"),
    ({"iscrowd": "no"}, "segment id 7 (image id 8) of {file} has iscrowd 'no', neither 0 nor 1"),
    ({"id": WATER}, "segment id 70000 (image id 8) of {file} is not the image's only segment with this id"),
    ({"id": 0}, "image id 8 of {file} has a segment without an id from 1 to 16777215"),
    ({"id": 256**3}, "image id 8 of {file} has a segment without an id from 1 to 16777215"),
])
def test_wrong_segments_are_refused_by_name(world, changes, message):
    path = world(spoil(panoptic_file(), **changes))
    with pytest.raises(InputError) as refusal:
        open_set(world)
    assert message.format(file=path) in str(refusal.value)


def without_isthing(content):
    del content["categories"][0]["isthing"]


def of_unknown_image(content):
    content["annotations"][1]["image_id"] = 99


def without_segments(content):
    del content["annotations"][0]["segments_info"]


def twice(content):
    content["annotations"].append(content["annotations"][0])


@pytest.mark.parametrize("change, message", [
    (without_isthing, "category id 2 of .* has no isthing, 1 for a thing and 0 for stuff: is it a panoptic file?"),
    (of_unknown_image, "has an annotation of image id 99, which is not in the file"),
    (without_segments, "has an annotation of image id 8 without file_name and segments_info"),
    (twice, "image id 8 of .* has two annotations"),
    (lambda content: content["annotations"].clear(), "image id 8 of .* has no annotation"),
    (lambda content: content["images"].clear(), "lists no images"),
])
def test_files_that_are_not_panoptic_are_refused(world, change, message):
    content = panoptic_file()
    change(content)
    path = world(content)
    with pytest.raises(InputError, match=message) as refusal:
        open_set(world)
    assert str(path) in str(refusal.value)


def test_segments_missing_in_the_png_are_refused_with_file_and_id(world):
    path = world(spoil(panoptic_file(), id=8))
    with pytest.raises(InputError) as refusal:
        open_set(world)[1]
    assert str(refusal.value) == (f"segment id 8 (image id 8) of {path} has no pixel in "
                                  f"{world.root / 'panoptic_train2017/8.png'}")


def test_pngs_that_are_missing_broken_or_of_another_size_are_refused(world):
    png = world.root / "panoptic_train2017/8.png"
    Image.fromarray(ids_to_rgb(picture_ids().T)).save(png)
    with pytest.raises(InputError, match=r"8.png is 20x30 pixels, but image id 8 of .*json is 30x20"):
        open_set(world)[1]
    png.write_bytes(png.read_bytes()[:60])
    with pytest.raises(InputError, match=r"8.png cannot be decoded .*\(image id 8 of .*panoptic_train2017.json\)"):
        open_set(world)[1]
    png.unlink()
    with pytest.raises(InputError, match=r"8.png does not exist \(image id 8 of .*panoptic_train2017.json\)"):
        open_set(world)[1]


def test_missing_folders_are_refused(world, tmp_path):
    for changes, message in (({"coco_panoptic_path": None}, "--coco_panoptic_path is needed"),
                             ({"coco_panoptic_path": tmp_path / "x"}, "--coco_panoptic_path .*x does not exist"),
                             ({"coco_path": None}, "--coco_path is needed")):
        with pytest.raises(InputError, match=message):
            build_dataset("train", arguments(world.root, **changes))
