"""The COCO data set on small files: what becomes a target, what stays for evaluation, and what is refused."""
import argparse
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_codec
from torch.utils.data import DataLoader, Subset

from datasets import build_dataset, coco, get_coco_api_from_dataset, num_classes_and_names
from datasets.coco import CocoDetection, make_coco_transforms
from util.errors import InputError
from util.misc import collate_fn

NAN = float("nan")


def annotation(number, image_id, category_id, bbox, **more):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, "area": bbox[2] * bbox[3],
            "iscrowd": 0, **more}


def ground_truth():
    """Three images of 60 x 40: one with a usual object, a crowd, one that sticks out and one without area; one with a
    usual object; one with nothing."""
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": 40, "width": 60} for number in (7, 3, 5)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [
            annotation(11, 3, 4, [10, 5, 20, 10], segmentation=[[10, 5, 30, 5, 30, 15, 10, 15]]),
            annotation(12, 3, 1, [0, 0, 60, 40], iscrowd=1, segmentation={"size": [40, 60], "counts": [0, 2400]}),
            annotation(13, 3, 1, [50, 30, 20, 20], area=123.0, segmentation=[[50, 30, 60, 30, 60, 40, 50, 40]]),
            annotation(14, 3, 1, [20, 20, 0, 10], segmentation=[[20, 20, 20, 30, 20, 25]]),
            annotation(15, 7, 1, [1, 2, 3, 4], segmentation=[[1, 2, 4, 2, 4, 6, 1, 6]]),
        ],
    }


@pytest.fixture
def world(tmp_path):
    """Writes a COCO layout; the function it returns writes another JSON and gives the file's path."""
    rng = np.random.default_rng(0)
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        (tmp_path / f"{part}2017").mkdir()
        for number in (3, 5, 7):
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(
                tmp_path / f"{part}2017" / f"{number}.jpg")

    def write(content, part="train"):
        path = tmp_path / "annotations" / f"instances_{part}2017.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    write(ground_truth())
    write(ground_truth(), "val")
    write.root = tmp_path
    return write


def arguments(root, **changes):
    values = dict(dataset_file="coco", coco_path=str(root), eval=False, num_classes=None, seed=0, train_sizes=None,
                  val_size=None, max_size=None, crop_resize=None, crop_size=None)
    return argparse.Namespace(**{**values, **changes})


def open_set(world, **changes):
    return CocoDetection(world.root / "train2017", world.root / "annotations/instances_train2017.json", **changes)


def test_targets_are_clamped_and_without_crowds_and_degenerate_boxes(world):
    dataset = open_set(world)
    assert dataset.ids == [3, 5, 7]
    image, target = dataset[0]
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[10, 5, 30, 15], [50, 30, 60, 40]]
    assert target["labels"].tolist() == [4, 1]
    assert target["area"].tolist() == [200, 123]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["image_id"].tolist() == [3]
    assert target["orig_size"].tolist() == target["size"].tolist() == [40, 60]
    assert dataset[1][1]["boxes"].shape == (0, 4) and dataset[1][1]["labels"].dtype == torch.int64
    assert len(dataset) == 3


def test_ground_truth_for_evaluation_keeps_everything(world):
    dataset = build_dataset("val", arguments(world.root))
    coco = get_coco_api_from_dataset(Subset(Subset(dataset, [0, 1]), [0]))
    assert sorted(coco.anns) == [11, 12, 13, 14, 15]
    assert coco.anns[12]["iscrowd"] == 1
    assert get_coco_api_from_dataset(torch.utils.data.TensorDataset(torch.zeros(1))) is None


def test_masks_from_polygons_and_run_lengths(world):
    content = ground_truth()
    full = np.zeros((40, 60), dtype=np.uint8, order="F")
    full[2:6, 1:4] = 1
    compressed = mask_codec.encode(full)
    content["annotations"][4]["segmentation"] = {"size": [40, 60], "counts": compressed["counts"].decode()}
    content["annotations"][2]["segmentation"] = {"size": [40, 60], "counts": [50 * 40 + 30, 10, 360]}
    world(content)
    dataset = open_set(world, return_masks=True)
    masks = dataset[0][1]["masks"]
    assert masks.dtype == torch.bool and masks.shape == (2, 40, 60)
    assert masks[0, 5:15, 10:30].all() and masks[0].sum() == 200
    assert masks[1, 30:, 50].all() and masks[1].sum() == 10
    assert dataset[1][1]["masks"].shape == (0, 40, 60)
    assert torch.equal(dataset[2][1]["masks"][0], torch.from_numpy(full.astype(bool)))
    assert "masks" not in open_set(world)[0][1]


def test_samples_after_the_training_transforms(world):
    dataset = build_dataset("train", arguments(world.root, train_sizes=[64], max_size=128))
    image, target = dataset[0]
    assert image.dtype == torch.float32
    assert set(target) == {"image_id", "boxes", "labels", "area", "iscrowd", "orig_size", "size"}
    assert target["size"].tolist() == list(image.shape[1:])
    assert ((target["boxes"] >= 0) & (target["boxes"] <= 1)).all()


def test_samples_depend_on_seed_epoch_and_index_alone(world):
    dataset = build_dataset("train", arguments(world.root, train_sizes=[64, 80, 96]))
    state = torch.random.get_rng_state()
    first = dataset[0][0]
    assert torch.equal(torch.random.get_rng_state(), state)   # the global generator is left alone
    dataset[2]
    assert torch.equal(dataset[0][0], first)
    changed = []
    for epoch in range(1, 6):
        dataset.set_epoch(epoch)
        image = dataset[0][0]
        changed.append(image.shape != first.shape or not torch.equal(image, first))
    assert any(changed)
    dataset.set_epoch(0)
    assert torch.equal(dataset[0][0], first)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_workers(world, workers):
    def batches(num_workers):
        dataset = build_dataset("train", arguments(world.root, train_sizes=[64, 80, 96]))
        loader = DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=collate_fn,
                            persistent_workers=num_workers > 0)
        found = []
        for epoch in range(2):   # with workers that outlive the first epoch
            dataset.set_epoch(epoch)
            found += list(loader)
        return found

    for (images, targets), (other_images, other_targets) in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(images.tensors, other_images.tensors) and torch.equal(images.mask, other_images.mask)
        for target, other in zip(targets, other_targets, strict=True):
            assert all(torch.equal(target[name], other[name]) for name in target)


def test_classes_come_from_the_training_annotations(world):
    assert num_classes_and_names(arguments(world.root)) == (5, {1: "cat", 4: "dog"})
    assert num_classes_and_names(arguments(world.root, num_classes=91)) == (91, {1: "cat", 4: "dog"})


def test_evaluation_needs_only_the_validation_annotations(world):
    (world.root / "annotations/instances_train2017.json").unlink()
    args = arguments(world.root, eval=True)
    assert num_classes_and_names(args)[0] == 5
    assert len(build_dataset("val", args)) == 3
    with pytest.raises(InputError, match="instances_train2017.json does not exist"):
        num_classes_and_names(arguments(world.root))


def test_an_evaluation_keeps_the_validation_annotations_alone(world):
    for evaluating, kept in ((False, 2), (True, 1)):
        coco._read_json.cache_clear()
        coco._read_categories.cache_clear()
        args = arguments(world.root, eval=evaluating)
        dataset = build_dataset("val", args)
        num_classes_and_names(args)   # reads the training annotations, as the first did
        assert coco._read_json.cache_info().currsize == kept
        assert coco.read_ground_truth(dataset.source) is dataset.coco.dataset


def move(world):
    """Gives the files names of their own; returns the flags that name them."""
    (world.root / "annotations/instances_train2017.json").rename(world.root / "boxes.json")
    (world.root / "train2017").rename(world.root / "pictures")
    return dict(train_images="pictures", train_annotations="boxes.json")


def test_own_names_are_relative_to_coco_path(world):
    args = arguments(world.root, **move(world))
    assert num_classes_and_names(args) == (5, {1: "cat", 4: "dog"})
    dataset = build_dataset("train", args)
    assert dataset[0][0].shape[0] == 3 and dataset.source == world.root / "boxes.json"
    assert len(build_dataset("val", args)) == 3, "the other part keeps COCO's names"


def test_own_names_may_be_absolute_and_need_no_coco_path(world, tmp_path_factory, monkeypatch):
    own = move(world)
    absolute = {name: str(world.root / path) for name, path in own.items()}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert len(build_dataset("train", arguments(None, coco_path=None, **absolute))) == 3
    assert len(build_dataset("train", arguments(elsewhere, **absolute))) == 3
    monkeypatch.chdir(world.root)
    args = arguments(None, coco_path=None, **own)
    assert len(build_dataset("train", args)) == 3, "relative to where the program runs"
    with pytest.raises(InputError, match="--coco_path is needed, .* or --val_images and --val_annotations"):
        build_dataset("val", args)
    with pytest.raises(InputError, match="--train_annotations is needed with --train_images, or --coco_path"):
        build_dataset("train", arguments(None, coco_path=None, train_images="pictures", num_classes=5))


def test_evaluation_of_an_own_set_needs_its_validation_part_alone(world):
    args = arguments(None, coco_path=None, eval=True, val_images=str(world.root / "val2017"),
                     val_annotations=str(world.root / "annotations/instances_val2017.json"))
    assert num_classes_and_names(args)[0] == 5 and len(build_dataset("val", args)) == 3
    with pytest.raises(InputError, match="--coco_path is needed, .* or --val_annotations"):
        num_classes_and_names(arguments(None, coco_path=None, eval=True))


@pytest.mark.parametrize("image_set", ["train", "val"])
def test_overfitting_takes_the_first_training_images_without_augmentation(world, image_set):
    (world.root / "annotations/instances_val2017.json").unlink()
    dataset = build_dataset(image_set, arguments(world.root, overfit=2, val_size=80))
    assert len(dataset) == 2 and [int(dataset[i][1]["image_id"]) for i in range(2)] == [3, 5]
    first = dataset[0][0]
    assert first.shape == (3, 80, 120)
    for epoch in range(1, 5):
        dataset.set_epoch(epoch)
        assert torch.equal(dataset[0][0], first)
    assert len(get_coco_api_from_dataset(dataset).anns) == 5


def test_overfitting_needs_images_and_objects(world):
    with pytest.raises(InputError, match="--overfit 4 is more than the 3 images of .*instances_train2017.json"):
        build_dataset("train", arguments(world.root, overfit=4))
    content = ground_truth()
    content["annotations"] = content["annotations"][4:]
    world(content)
    with pytest.raises(InputError, match="--overfit 2: the first 2 images of .* have no objects"):
        build_dataset("train", arguments(world.root, overfit=2))


def test_missing_area_and_iscrowd_are_filled_in(world):
    content = ground_truth()
    del content["annotations"][0]["area"], content["annotations"][0]["iscrowd"]
    world(content)
    dataset = open_set(world)
    assert dataset[0][1]["area"][0] == 200
    assert dataset.coco.anns[11]["iscrowd"] == 0


def test_boxes_outside_are_left_out_with_a_message(world, capsys):
    content = ground_truth()
    content["annotations"][0]["bbox"] = [60, 5, 20, 10]
    world(content)
    dataset = open_set(world)
    assert dataset[0][1]["labels"].tolist() == [1]
    printed = capsys.readouterr().out
    assert "1 boxes lie outside their images" in printed and "annotation id 11 (image 3.jpg)" in printed


@pytest.mark.parametrize("field, value, message", [
    ("bbox", [10, 5, NAN, 10], "annotation id 11 (image 3.jpg) of {file} has the box [10, 5, nan, 10], not four"),
    ("bbox", [10, 5, -4, 10], "annotation id 11 (image 3.jpg) of {file} has the box [10, 5, -4, 10] with a negative"),
    ("bbox", [10, 5, 4], "annotation id 11 (image 3.jpg) of {file} has the box [10, 5, 4], not four finite"),
    ("bbox", None, "annotation id 11 (image 3.jpg) of {file} has the box None, not four finite"),
    ("area", "x", "annotation id 11 (image 3.jpg) of {file} has the area 'x', not a finite number"),
    ("category_id", 9, "annotation id 11 (image 3.jpg) of {file} has category_id 9, which is not among the categories"),
    ("category_id", None, "annotation id 11 (image 3.jpg) of {file} has category_id None, which is not among"),
    ("image_id", 99, "annotation id 11 of {file} belongs to image id 99, which is not in the file"),
    ("id", 12, "annotation id 12 (image 3.jpg) of {file} is not the only annotation with this id"),
    ("id", "a", "{file} has an annotation without an id >= 0"),
])
def test_wrong_annotations_are_refused_by_name(world, field, value, message):
    content = ground_truth()
    content["annotations"][0][field] = value
    path = world(content)
    with pytest.raises(InputError) as refusal:
        open_set(world)
    assert message.format(file=path) in str(refusal.value)


def test_category_beyond_the_classes_is_refused(world):
    message = r"annotation id 11 \(image 3.jpg\) .*json has category_id 4, but the model has 3"
    with pytest.raises(InputError, match=message):
        build_dataset("train", arguments(world.root, num_classes=3))


def test_category_of_the_validation_set_beyond_the_classes_is_refused(world):
    content = ground_truth()
    content["categories"].append({"id": 9, "name": "late"})
    content["annotations"][4]["category_id"] = 9
    path = world(content, "val")
    with pytest.raises(InputError) as refusal:
        build_dataset("val", arguments(world.root))
    assert f"annotation id 15 (image 7.jpg) of {path} has category_id 9, but the model has 5" in str(refusal.value)


@pytest.mark.parametrize("content, message", [
    ("{broken", "is not valid JSON"),
    ("[1, 2]", 'is not in COCO format: it has no list "images"'),
    ('{"images": [], "annotations": []}', 'is not in COCO format: it has no list "categories"'),
    ('{"images": [], "annotations": [], "categories": []}', "has no categories, so --num_classes must be given"),
    ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "lists no images"),
    ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]}', "image id 1 of .* has no file_name"),
    ('{"images": [], "annotations": [], "categories": [{"name": "x"}]}', "has a category without an id"),
])
def test_files_that_are_not_coco_are_refused(world, content, message):
    path = world(content)
    with pytest.raises(InputError, match=message) as refusal:
        open_set(world)
    assert str(path) in str(refusal.value)


def test_missing_folders_and_files_are_refused(world, tmp_path):
    with pytest.raises(InputError, match="--coco_path .*nowhere does not exist"):
        build_dataset("train", arguments(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="--coco_path is needed"):
        build_dataset("train", arguments(""))
    with pytest.raises(InputError, match="image folder .*elsewhere does not exist"):
        CocoDetection(tmp_path / "elsewhere", world.root / "annotations/instances_train2017.json")
    with pytest.raises(InputError, match="--dataset_file 'lvis' is not one of coco, coco_panoptic, voc, imagenet"):
        build_dataset("train", arguments(world.root, dataset_file="lvis"))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_refused_by_name(world, workers):
    (world.root / "train2017/3.jpg").write_bytes(b"\xff\xd8 not much of a picture")
    batches = iter(DataLoader(open_set(world), num_workers=workers, collate_fn=lambda batch: batch))
    try:
        next(batches)
    except InputError as error:
        sentence = error.with_traceback(None).sentence   # its traceback would keep the worker alive for a while
    assert sentence.startswith(f"image file {world.root / 'train2017/3.jpg'} cannot be decoded")
    assert sentence.endswith(f"(image id 3 of {world.root / 'annotations/instances_train2017.json'})")


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(InputError("one sentence")))
    assert type(error) is InputError and str(error) == "one sentence"


def test_missing_images_and_other_sizes_are_refused(world):
    (world.root / "train2017/5.jpg").unlink()
    Image.new("RGB", (40, 60)).save(world.root / "train2017/7.jpg")
    dataset = open_set(world)
    with pytest.raises(InputError, match=r"5.jpg does not exist \(image id 5 of"):
        dataset[1]
    with pytest.raises(InputError, match=r"7.jpg is 40x60 pixels, but image id 7 of .* says 60x40"):
        dataset[2]


def test_senseless_sizes_are_refused(world):
    for image_set, name, value in (("val", "val_size", 0), ("val", "max_size", -1), ("train", "train_sizes", [0, 64]),
                                   ("train", "crop_resize", [0]), ("train", "crop_size", [0, 0])):
        with pytest.raises(InputError, match=f"^--{name} {min(np.ravel(value))} must be at least 1$"):
            build_dataset(image_set, arguments(world.root, **{name: value}))
    with pytest.raises(InputError, match="--crop_size 60 40 is not a smallest and a largest side"):
        build_dataset("train", arguments(world.root, crop_size=[60, 40]))


def test_segmentations_that_cannot_be_drawn_are_refused(world):
    content = ground_truth()
    content["annotations"][0]["segmentation"] = {"size": [4, 6], "counts": [4, 20]}
    world(content)
    with pytest.raises(InputError, match=r"annotation id 11 \(image id 3\) .* cannot be drawn on 60x40 pixels"):
        open_set(world, return_masks=True)[0]
    del content["annotations"][0]["segmentation"]
    world(content)
    with pytest.raises(InputError, match="annotation id 11 .* has no segmentation, which --masks needs"):
        open_set(world, return_masks=True)


def test_image_sizes_may_be_absent(world):
    content = ground_truth()
    for image in content["images"]:
        del image["height"], image["width"]
    world(content)
    dataset = CocoDetection(world.root / "train2017", world.root / "annotations/instances_train2017.json",
                            make_coco_transforms("val", val_size=40))
    assert dataset[0][1]["labels"].tolist() == [4, 1]


def test_a_training_without_an_object_is_refused(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "1.jpg")
    entry = {"id": 1.0, "image_id": 1, "category_id": 1.0, "bbox": [1, 2, 3, 4]}
    content = {"images": [{"id": 1, "file_name": "1.jpg", "width": 40.0, "height": 30}], "annotations": [entry],
               "categories": [{"id": 1, "name": "two\nlines"}]}
    file = tmp_path / "a.json"

    def load(**change):
        file.write_text(json.dumps({**content, **change}))
        return CocoDetection(tmp_path, file, training=True)

    assert load()[0][1]["boxes"].tolist() == [[1, 2, 4, 6]]
    for annotations in ([], [{**entry, "iscrowd": 1}], [{**entry, "bbox": [1, 2, 0, 4]}]):
        with pytest.raises(InputError, match="has no object to learn from"):
            load(annotations=annotations)
    with pytest.raises(InputError, match="category id 1099511627776, which would need a model"):
        load(categories=[{"id": 2**40, "name": "x"}])
