"""tools.check_data on small data sets, each with one thing wrong, or everything at once."""
import json
import re

import numpy as np
import pytest
from commands import run
from PIL import Image

from datasets import voc
from datasets.coco import CocoDetection
from datasets.coco_panoptic import CocoPanoptic
from tools import check_data
from util.errors import run_program
from util.panoptic_ids import ids_to_rgb

HEIGHT, WIDTH = 40, 60
SKY, WATER, BOAT = 5, 300, 70000


def picture(path, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def annotation(number, image_id, category_id, box, **more):
    x, y, width, height = box
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": width * height,
            "iscrowd": 0, "segmentation": [polygon], **more}


def instances():
    """Three images: two objects, none, and an object with a crowd."""
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH}
                   for number in (3, 5, 7)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [
            annotation(11, 3, 4, [10, 5, 20, 10]),
            annotation(12, 3, 1, [30, 20, 10.5, 12]),
            annotation(13, 7, 1, [0, 0, 60, 40], iscrowd=1, segmentation={"size": [40, 60], "counts": [0, 2400]}),
            annotation(14, 7, 4, [2, 2, 8, 8]),
        ],
    }


def segment_ids():
    """Sky above water and a boat on it."""
    ids = np.full((HEIGHT, WIDTH), SKY)
    ids[20:] = WATER
    ids[15:25, 10:30] = BOAT
    return ids


def panoptic():
    segments = [{"id": SKY, "category_id": 30, "bbox": [0, 0, 60, 20], "area": 1100, "iscrowd": 0},
                {"id": WATER, "category_id": 5, "bbox": [0, 20, 60, 20], "area": 1100, "iscrowd": 0},
                {"id": BOAT, "category_id": 2, "bbox": [10, 15, 20, 10], "area": 200, "iscrowd": 0}]
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH} for number in (3, 5)],
        "categories": [{"id": 2, "name": "boat", "isthing": 1}, {"id": 5, "name": "water", "isthing": 0},
                       {"id": 30, "name": "sky", "isthing": 0}],
        "annotations": [{"image_id": number, "file_name": f"{number}.png",
                         "segments_info": [dict(segment) for segment in segments]} for number in (3, 5)],
    }


class World:
    """COCO's layout in a folder, objects and segments, and a way to check it."""

    def __init__(self, root, capsys):
        self.root, self.capsys = root, capsys
        for part in ("train", "val"):
            for number in (3, 5, 7):
                picture(root / f"{part}2017" / f"{number}.jpg")
                path = root / f"panoptic_{part}2017" / f"{number}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(ids_to_rgb(segment_ids())).save(path)
            self.write(instances(), part)
            self.write(panoptic(), part, "panoptic")

    def file(self, part="train", what="instances"):
        path = self.root / "annotations" / f"{what}_{part}2017.json"
        path.parent.mkdir(exist_ok=True)
        return path

    def write(self, content, part="train", what="instances"):
        self.file(part, what).write_text(content if isinstance(content, str) else json.dumps(content))

    def check(self, *words, status):
        """Lines of problems, and the others; by default of the training part's objects."""
        words = [str(word) for word in (*words, "--num_workers", "0")]
        if not any(word.endswith(("_path", "--dataset_file")) for word in words):
            words += ["--coco_path", str(self.root), *([] if "--image_set" in words else ["--image_set", "train"])]
        args = check_data.get_args_parser().parse_args(words)
        self.capsys.readouterr()
        found = 0
        try:
            run_program(lambda: check_data.main(args))
        except SystemExit as stop:
            found = stop.code
        printed = self.capsys.readouterr()
        assert found == status, printed.out + printed.err
        lines = printed.out.splitlines() + printed.err.splitlines()
        problems = [line for line in lines if line.startswith(("error ", "warning "))]
        return problems, [line for line in lines if line not in problems]


@pytest.fixture
def world(tmp_path, capsys):
    return World(tmp_path, capsys)


def test_a_sound_set_is_described(world):
    problems, lines = world.check("--coco_path", world.root, "--masks", status=0)
    assert not problems
    assert lines[:4] == [
        f"train: images in {world.root}/train2017, annotations in {world.file()}; 3 images decoded",
        "train: 3 objects and 1 crowds; 0 to 2 objects in an image, 1.0 on average, 1 images without; 100 queries",
        "train: 2 categories: dog 2, cat 1; --num_classes 5",
        "train: 0 problems"]
    assert len(lines) == 8 and lines[7] == "val: 0 problems"


def change(place, **values):
    """A change of the annotation at this place."""
    def edit(content):
        content["annotations"][place].update(values)
    return edit


def test_missing_and_broken_images_are_listed_with_file_and_id(world):
    (world.root / "train2017/3.jpg").unlink()
    (world.root / "train2017/5.jpg").write_bytes((world.root / "val2017/5.jpg").read_bytes()[:700])
    Image.new("RGB", (50, 40)).save(world.root / "train2017/7.jpg")
    problems, lines = world.check(status=1)
    folder, source = world.root / "train2017", world.file()
    assert problems[0] == f"error    image_file: image file {folder}/3.jpg does not exist (image id 3 of {source})"
    assert re.match(rf"error    image_file: image file {folder}/5.jpg cannot be decoded \(.*\) \(image id 5 of ",
                    problems[1])
    assert problems[2] == (f"error    image_size: image file {folder}/7.jpg is 50x40 pixels, but image id 7 of "
                           f"{source} says 60x40")
    assert len(problems) == 3
    assert "train: 3 problems, of which 3 stop a training: image_file 2, image_size 1" in lines


# What is done to the objects, and the beginning and end of the only line that follows.
WRONG_OBJECTS = {
    "image without id": (lambda content: content["images"][1].pop("id"),
                         "error    image_entry: FILE has an image without an id >= 0: {'file_name': '5.jpg'"),
    "image without name": (lambda content: content["images"][1].pop("file_name"),
                           "error    image_entry: image id 5 of FILE has no file_name"),
    "impossible size": (lambda content: content["images"][1].update(width=0),
                        "error    image_entry: image id 5 of FILE has the size 0x40, not two positive whole numbers"),
    "one image id twice": (lambda content: content["images"].append(dict(content["images"][0])),
                           "error    image_id: image id 3 of FILE is not the only image with this id"),
    "one file twice": (lambda content: content["images"].append({**content["images"][0], "id": 9}),
                       "warning  file_name: image id 9 of FILE shows the same file 3.jpg as image id 3"),
    "unknown image": (change(1, image_id=99),
                      "error    annotation_entry: annotation id 12 of FILE belongs to image id 99, which is not in the "
                      "file"),
    "no annotation id": (change(1, id=None),
                         "error    annotation_entry: FILE has an annotation without an id >= 0: {'id': None"),
    "one annotation id twice": (change(1, id=11),
                                "error    annotation_id: annotation id 11 (image 3.jpg) of FILE is not the only "
                                "annotation with this id"),
    "unknown category": (change(1, category_id=2),
                         "error    category: annotation id 12 (image 3.jpg) of FILE has category_id 2, which is not "
                         "among the categories of the file"),
    "three numbers": (change(1, bbox=[1, 2, 3]),
                      "error    box: annotation id 12 (image 3.jpg) of FILE has the box [1, 2, 3], not four finite "
                      "numbers"),
    "no number": (change(1, bbox=[1, 2, 3, float("nan")]),
                  "error    box: annotation id 12 (image 3.jpg) of FILE has the box [1, 2, 3, nan], not four finite"),
    "negative width": (change(1, bbox=[1, 2, -3, 4]),
                       "error    box: annotation id 12 (image 3.jpg) of FILE has the box [1, 2, -3, 4] with a"),
    "no area": (change(1, bbox=[30, 20, 0, 12]),
                "warning  box_empty: annotation id 12 (image 3.jpg) of FILE has the box [30, 20, 0, 12] without area"),
    "outside": (change(1, bbox=[60, 20, 10, 12]),
                "warning  box_outside: annotation id 12 (image 3.jpg) of FILE has the box [60, 20, 10, 12] outside its "
                "image of 60x40 pixels"),
    "over the edge": (change(1, bbox=[50, 20, 12, 12], segmentation=[[50, 20, 60, 20, 60, 32, 50, 32]]),
                      "warning  box_clipped: annotation id 12 (image 3.jpg) of FILE has the box [50, 20, 12, 12] "
                      "reaching over the edge of its image of 60x40 pixels"),
    "area": (change(1, area="large"),
             "error    area: annotation id 12 (image 3.jpg) of FILE has the area 'large', not a finite number"),
    "crowd mark": (change(1, iscrowd=2),
                   "error    iscrowd: annotation id 12 (image 3.jpg) of FILE has iscrowd 2, neither 0 nor 1"),
    "no polygon": (change(1, segmentation=[["a"] * 6]),
                   "warning  segmentation: annotation id 12 (image id 3) of FILE has a segmentation that cannot be "
                   "drawn on 60x40 pixels (it has the coordinate 'a', not a number of pixels)"),
    "run lengths of another image": (change(2, segmentation={"size": [30, 60], "counts": [1800]}),
                                     "warning  segmentation: annotation id 13 (image id 7) of FILE has a segmentation "
                                     "that cannot be drawn on 60x40 pixels (it is made for 60x30)"),
    "polygon outside": (change(1, segmentation=[[70, 50, 80, 50, 80, 60]]),
                        "warning  segmentation: annotation id 12 (image 3.jpg) of FILE has a segmentation that covers "
                        "no pixel"),
    "polygon elsewhere": (change(1, segmentation=[[10, 20, 30, 20, 30, 32, 10, 32]]),
                          "warning  mask_box: annotation id 12 (image 3.jpg) of FILE has the box [30, 20, 10.5, 12], "
                          "but its mask's is [10, 20, 20, 12]"),
}


@pytest.mark.parametrize("case", WRONG_OBJECTS)
def test_wrong_objects_are_listed_one_by_one(world, case):
    edit, expected = WRONG_OBJECTS[case]
    content = instances()
    edit(content)
    world.write(content)
    problems, lines = world.check(status=1)
    # An image that is gone takes no annotation along here: image 5 has none.
    assert len(problems) == 1, problems
    assert problems[0].startswith(expected.replace("FILE", str(world.file())))
    assert re.match("train: 1 problems, of which [01] stop a training", lines[-1])


def test_categories_of_one_name_and_of_one_id_are_listed(world):
    content = instances()
    content["categories"] += [{"id": 8, "name": "cat"}, {"id": 4, "name": "wolf"}]
    world.write(content)
    problems, _ = world.check(status=1)
    assert problems == [f"warning  category_entry: category id {number} of {world.file()} is not the only category "
                        f"with the {what}"
                        for number, what in ((4, "id 4"), (4, "id 4"), (1, "name cat"), (8, "name cat"))]


def test_masks_and_queries_and_classes_are_those_of_the_training(world):
    content = instances()
    del content["annotations"][1]["segmentation"]
    world.write(content)
    world.check(status=0)
    source = world.file()
    assert world.check("--masks", status=1)[0] == [
        f"error    segmentation: annotation id 12 (image 3.jpg) of {source} has no segmentation, which --masks needs"]
    assert world.check("--num_queries", 1, status=1)[0] == [
        f"warning  num_queries: image id 3 (3.jpg) of {source} has 2 objects, but the model has 1 queries "
        "(--num_queries)"]
    assert [line.split(" has ", 1)[1] for line in world.check("--num_classes", 4, status=1)[0]] == [
        "category_id 4, but the model has 4 classes (--num_classes)"] * 2


def test_validation_is_compared_with_the_classes_of_training(world):
    """As in training, also when the validation part is checked alone."""
    content = instances()
    content["categories"].append({"id": 6, "name": "owl"})
    content["annotations"][1]["category_id"] = 6
    world.write(content, "val")
    for words in (["--coco_path", world.root], ["--image_set", "val"]):
        problems, _ = world.check(*words, status=1)
        assert [line.split(" has ", 1)[1] for line in problems] == [
            "category_id 6, but the model has 5 classes (--num_classes)"]


def test_sizes_that_the_json_lacks_are_read_from_the_images(world):
    content = instances()
    for image in content["images"]:
        del image["width"], image["height"]
    world.write(content)
    world.check(status=0)
    content["annotations"][1]["bbox"] = [60, 20, 10, 12]
    world.write(content)
    assert [line.split(" of ")[0] for line in world.check(status=1)[0]] == [
        "warning  box_outside: annotation id 12 (image 3.jpg)"]


def test_kinds_can_be_left_aside(world):
    content = instances()
    content["annotations"][0]["bbox"] = [60, 20, 10, 12]
    world.write(content)
    (world.root / "train2017/5.jpg").unlink()
    assert world.check("--ignore", "box_outside", status=1)[0][0].startswith("error    image_file")
    world.check("--ignore", "box_outside", "image_file", status=0)


@pytest.mark.parametrize("content, message", [
    ("{", "annotation file FILE is not valid JSON"),
    ("[]", 'annotation file FILE is not in COCO format: it has no list "images"'),
    ('{"images": [], "annotations": [], "categories": []}', "annotation file FILE has no categories"),
    ('{"images": [], "annotations": [], "categories": [{"name": "cat"}]}',
     "annotation file FILE has a category without an id >= 0"),
])
def test_a_part_that_cannot_be_checked_leaves_the_other(world, content, message):
    world.write(content, "train")
    broken = instances()
    broken["annotations"][1]["bbox"] = [1, 2, -3, 4]
    world.write(broken, "val")
    flags = ["--train_annotations", world.file(), "--val_annotations", world.file("val"), "--num_classes", 5]
    if "no categories" in message:
        flags = flags[:-2]
    problems, lines = world.check("--coco_path", world.root, *flags, status=2)
    assert problems[0].startswith("error    json: " + message.replace("FILE", str(world.file())))
    assert any(line.startswith("val: ") for line in lines)
    if "--num_classes" in flags:
        assert len(problems) == 2 and problems[1].startswith("error    box: ")


def test_missing_files_and_folders(world):
    problems, _ = world.check("--train_images", "learn", status=2)
    assert problems == [f"error    json: folder {world.root}/learn does not exist"], "not every image as well"
    problems, _ = world.check("--train_annotations", "learn.json", status=2)
    assert problems == [f"error    json: annotation file {world.root}/learn.json does not exist"]


@pytest.mark.parametrize("words, message", [
    (["--image_set", "train", "--voc_path", "nowhere"], "--voc_path nowhere does not exist"),
    (["--coco_path", "nowhere"], "--coco_path nowhere does not exist"),
    (["--voc_path", "x", "--clean", "y"], "--clean has no effect with --dataset_file voc"),
    (["--imagenet_path", "x", "--num_queries", "5"], "--num_queries has no effect with --dataset_file imagenet"),
    (["--imagenet_path", "x", "--image_set", "val"], "--imagenet_val_path is needed"),
    (["--coco_path", ".", "--num_queries", "0"], "--num_queries 0 must be at least 1"),
])
def test_wrong_flags_are_one_line(world, words, message):
    problems, lines = world.check(*words, status=2)
    assert not problems and len(lines) == 1 and lines[0].startswith(f"error: {message}")


def test_own_files_need_no_coco_path(world):
    problems, lines = world.check("--train_images", world.root / "val2017", "--train_annotations", world.file("val"),
                                  "--dataset_file", "coco", "--image_set", "train", status=0)
    assert lines[0].startswith(f"train: images in {world.root}/val2017, annotations in {world.file('val')}")
    assert not problems


# ---- panoptic


WRONG_SEGMENTS = {
    "segment without pixels": (lambda segments: segments.append({**segments[0], "id": 9}),
                               "error    segmentation: segment id 9 (image id 3) of FILE has no pixel in PNG"),
    "pixels without segment": (lambda segments: segments.pop(2),
                               "warning  stray_pixels: PNG (image id 3 of FILE) has 200 pixels of id 70000, which is "
                               "not among its segments"),
    "area": (lambda segments: segments[2].update(area=190),
             "warning  area: segment id 70000 (image id 3) of FILE has the area 190, but 200 pixels in PNG"),
    "box": (lambda segments: segments[2].update(bbox=[10, 15, 40, 10]),
            "warning  mask_box: segment id 70000 (image id 3) of FILE has the box [10, 15, 40, 10], but its mask's is "
            "[10, 15, 20, 10]"),
    "category": (lambda segments: segments[2].update(category_id=3),
                 "error    category: segment id 70000 (image id 3) of FILE has category_id 3, which is not among"),
    "one id twice": (lambda segments: segments.append(dict(segments[2])),
                     "error    annotation_id: segment id 70000 (image id 3) of FILE is not the image's only segment"),
    "id of void": (lambda segments: segments.append({**segments[2], "id": 0}),
                   "error    annotation_entry: image id 3 of FILE has a segment without an id from 1 to 16777215"),
}


def check_panoptic(world, *words, status):
    return world.check("--coco_path", world.root, "--coco_panoptic_path", world.root, "--image_set", "train", *words,
                       status=status)


@pytest.mark.parametrize("case", WRONG_SEGMENTS)
def test_wrong_segments_are_listed(world, case):
    edit, expected = WRONG_SEGMENTS[case]
    content = panoptic()
    edit(content["annotations"][0]["segments_info"])
    world.write(content, what="panoptic")
    problems, _ = check_panoptic(world, status=1)
    names = {"FILE": world.file(what="panoptic"), "PNG": world.root / "panoptic_train2017/3.png"}
    for name, path in names.items():
        expected = expected.replace(name, str(path))
    assert problems[0].startswith(expected)
    # A segment that is listed twice has its pixels only once.
    assert len(problems) == (2 if case == "one id twice" else 1), problems


def test_panoptic_crowds_are_learnt_and_not_evaluated(world):
    """A set of crowds alone is one to train on, and nothing to evaluate on."""
    content = panoptic()
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["iscrowd"] = 1
    world.write(content, what="panoptic")
    problems, lines = check_panoptic(world, status=0)
    assert not problems and lines[1].startswith("train: 6 objects and 0 crowds; 3 to 3 objects in an image")


def test_panoptic_pictures_and_annotations(world):
    _, lines = check_panoptic(world, status=0)
    assert lines[1].startswith("train: 6 objects and 0 crowds; 3 to 3 objects in an image")
    content = panoptic()
    content["images"].append({**content["images"][0], "id": 7, "file_name": "7.jpg"})
    content["annotations"].append({"image_id": 8, "file_name": "8.png", "segments_info": []})
    world.write(content, what="panoptic")
    folder, source = world.root / "panoptic_train2017", world.file(what="panoptic")
    (folder / "3.png").unlink()
    Image.new("RGB", (30, 40)).save(folder / "5.png")
    problems, _ = check_panoptic(world, status=1)
    assert problems == [
        f"error    annotation_entry: {source} has an annotation of image id 8, which is not in the file",
        f"warning  annotation_entry: image id 7 of {source} has no annotation",
        f"error    image_file: image file {folder}/3.png does not exist (image id 3 of {source})",
        f"error    image_size: segment file {folder}/5.png is 30x40 pixels, but image id 5 of {source} is 60x40"]


# ---- cleaned copies


def test_a_cleaned_copy_of_everything_wrong_trains(world):
    """Every edit of a single object on an image of its own; then the copy is checked and loaded, with masks."""
    content = {**instances(), "images": [], "annotations": []}
    for number, (edit, _) in enumerate(WRONG_OBJECTS.values()):
        part = instances()
        edit(part)
        for image in part["images"]:
            if "id" in image:
                image["id"] += 100 * number
        for item in part["annotations"]:
            item["image_id"] += 100 * number
            item["id"] = None if item["id"] is None else item["id"] + 100 * number
        content["images"] += part["images"]
        content["annotations"] += part["annotations"]
    world.write(content)
    (world.root / "train2017/7.jpg").unlink()
    source = world.file().read_bytes()
    problems, lines = world.check("--masks", "--clean", world.root / "clean", status=1)
    copy = world.root / "clean/instances_train2017.json"
    assert f"{copy}: " in lines[-1] and "1 ids renewed" in lines[-1] and "images dropped" in lines[-1]
    assert world.file().read_bytes() == source, "the original stays as it is"
    # Left: what may be right.
    problems, _ = world.check("--masks", "--train_annotations", copy, status=1)
    assert {line.split()[1] for line in problems} == {"file_name:", "mask_box:"}
    dataset = CocoDetection(world.root / "train2017", copy, return_masks=True)
    boxes = [dataset[index][1]["boxes"] for index in range(len(dataset))]
    assert sum(map(len, boxes)) > len(WRONG_OBJECTS)
    clipped = [item["bbox"] for item in json.loads(copy.read_text())["annotations"] if item["bbox"][0] == 50]
    assert clipped == [[50, 20, 10, 12]]


def test_masks_that_cannot_be_drawn_cost_only_the_mask_where_none_is_trained(world):
    content = instances()
    content["annotations"][1]["segmentation"] = [[70, 50, 80, 50, 80, 60]]
    world.write(content)
    kept = {}
    for words in ([], ["--masks"]):
        folder = world.root / f"clean{len(words)}"
        world.check(*words, "--clean", folder, status=1)
        world.check(*words, "--train_annotations", folder / world.file().name, status=0)
        kept[len(words)] = json.loads((folder / world.file().name).read_text())["annotations"]
    assert kept[0][1] == {key: value for key, value in instances()["annotations"][1].items() if key != "segmentation"}
    assert kept[1] == [entry for entry in instances()["annotations"] if entry["id"] != 12]


def test_repeated_annotations_are_dropped_and_other_ones_renamed(world):
    content = instances()
    content["annotations"] += [dict(content["annotations"][0]), annotation(12, 7, 4, [2, 2, 8, 8])]
    world.write(content)
    _, lines = world.check("--clean", world.root / "clean", status=1)
    assert lines[-1].endswith("3 images and 5 annotations; 1 repetitions dropped, 1 ids renewed")
    copy = json.loads((world.root / "clean" / world.file().name).read_text())
    assert copy["annotations"] == [*instances()["annotations"], annotation(15, 7, 4, [2, 2, 8, 8])]


def test_a_cleaned_panoptic_copy_trains(world):
    content = panoptic()
    first, second = content["annotations"]
    first["segments_info"][0]["area"] = 3
    first["segments_info"] += [{**first["segments_info"][0], "id": 9}, {**first["segments_info"][1], "id": 0}]
    content["images"].append({**content["images"][0], "id": 7, "file_name": "7.jpg"})
    (world.root / "panoptic_train2017/5.png").unlink()
    world.write(content, what="panoptic")
    check_panoptic(world, "--clean", world.root / "clean", status=1)
    copy = world.root / "clean/panoptic_train2017.json"
    check_panoptic(world, "--train_annotations", copy, status=0)
    cleaned = panoptic()
    assert json.loads(copy.read_text()) == {**cleaned, "images": cleaned["images"][:1],
                                            "annotations": cleaned["annotations"][:1]}
    dataset = CocoPanoptic(world.root / "train2017", world.root / "panoptic_train2017", copy)
    assert len(dataset) == 1 and dataset[0][1]["masks"].sum() == HEIGHT * WIDTH


def test_copies_never_overwrite(world):
    (world.root / "clean").mkdir()
    (world.root / "clean" / world.file().name).touch()
    assert "exists already, choose another folder" in world.check("--clean", world.root / "clean", status=2)[1][0]
    (world.root / "val2017/labels.json").write_text(json.dumps(instances()))
    (world.root / "train2017/labels.json").write_text(json.dumps(instances()))
    flags = ["--train_annotations", "train2017/labels.json", "--val_annotations", "val2017/labels.json"]
    _, lines = world.check("--coco_path", world.root, *flags, "--clean", world.root / "new", status=2)
    assert "the parts' files have one name" in lines[0]
    world.check("--coco_path", world.root, *flags, "--clean", world.root / "new", "--image_set", "val", status=0)
    assert json.loads((world.root / "new/labels.json").read_text()) == instances()


# ---- VOC and unlabelled images


@pytest.fixture
def devkit(tmp_path):
    voc.find_pictures.cache_clear()
    voc._class_names.cache_clear()
    for part, name in (("trainval", "a"), ("trainval", "b"), ("test", "c")):
        picture(tmp_path / f"VOC2007/JPEGImages/{name}.jpg")
        for folder in ("Annotations", "ImageSets/Main"):
            (tmp_path / "VOC2007" / folder).mkdir(parents=True, exist_ok=True)
        with open(tmp_path / "VOC2007/ImageSets/Main" / f"{part}.txt", "a") as names:
            names.write(f"{name}\n")
        write_xml(tmp_path, name, "dog", 1, 1, 20, 30)
    return tmp_path


def write_xml(devkit, name, label, x0, y0, x1, y1):
    (devkit / f"VOC2007/Annotations/{name}.xml").write_text(
        f"<annotation><object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object></annotation>")


def test_voc(world, devkit):
    problems, lines = world.check("--voc_path", devkit, status=0)
    assert "train: 2 objects and 0 crowds; 1 to 1 objects in an image" in "\n".join(lines)
    assert "train: 20 categories: dog 2, aeroplane 0" in "\n".join(lines)


def test_wrong_voc_files_are_listed(world, devkit):
    folder = devkit / "VOC2007/Annotations"
    (folder / "a.xml").write_text("<annotation><object>")
    write_xml(devkit, "b", "dog", 70, 1, 80, 30)
    (devkit / "VOC2007/JPEGImages/c.jpg").unlink()
    write_xml(devkit, "c", "dragon", 9, 9, 5, 20)
    problems, _ = world.check("--voc_path", devkit, status=1)
    assert problems[0].startswith(f"error    annotation_entry: annotation file {folder}/a.xml is not valid XML")
    assert problems[1:] == [
        f"warning  box_outside: annotation id 1 (image VOC2007/JPEGImages/b.jpg) of {devkit} has the box [69.0, 0.0, "
        "11.0, 30.0] outside its image of 60x40 pixels",
        f"error    box: annotation file {folder}/c.xml has an object 'dragon' whose box ends before it begins",
        f"error    image_file: image file {devkit}/VOC2007/JPEGImages/c.jpg does not exist (image id 1 of {devkit})"]


def test_voc_classes_are_those_of_training(world, devkit):
    write_xml(devkit, "c", "dragon", 9, 9, 15, 20)
    for words in ([], ["--image_set", "val"]):
        problems, _ = world.check("--voc_path", devkit, *words, status=1)
        assert problems == [f"error    category: {devkit}/VOC2007/Annotations/c.xml has an object of class 'dragon', "
                            "which training lacks"]


def test_unlabelled_images(world, tmp_path):
    folder = tmp_path / "photos"
    for number in range(3):
        picture(folder / f"{number}.jpg", number)
    world.check("--imagenet_path", folder, status=0)
    (folder / "0.jpg").write_bytes(b"no image")
    Image.new("RGB", (90, 12)).save(folder / "1.jpg")
    problems, lines = world.check("--imagenet_path", folder, "--imagenet_val_path", folder, status=1)
    assert re.match(rf"warning  image_file: image file {folder}/0.jpg cannot be decoded .*"
                    r"\(pre-training passes over such images, up to 1% of all\)", problems[0])
    assert problems[1] == (f"warning  image_small: image file {folder}/1.jpg has only 90x12 pixels (pre-training "
                           "passes over it)")
    assert problems[2:] == problems[:2] and f"val: images in {folder}; 3 images decoded" in lines
    assert world.check("--imagenet_path", tmp_path / "none", status=2)[0] == [
        f"error    json: folder {tmp_path}/none does not exist"]


# ---- as a user does


def test_the_program_on_several_processes(world, tmp_path):
    """Status, problems in the order of the file, and the copy that passes."""
    content = instances()
    content["annotations"][1]["bbox"] = [1, 2, -3, 4]
    world.write(content)
    (world.root / "train2017/5.jpg").unlink()
    words = ["-m", "tools.check_data", "--coco_path", world.root, "--num_workers", "2"]
    done = run([*words, "--clean", tmp_path / "clean"], check=False)
    assert done.returncode == 1 and not done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("error    box: ") and lines[1].startswith("error    image_file: ")
    assert lines[5] == "train: 2 problems, of which 2 stop a training: box 1, image_file 1"
    assert lines[6] == (f"{tmp_path}/clean/instances_train2017.json: 2 images and 3 annotations; 1 images dropped, "
                        "1 annotations dropped")
    done = run([*words, "--train_annotations", tmp_path / "clean/instances_train2017.json"])
    assert "train: 0 problems" in done.stdout
