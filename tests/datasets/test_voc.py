"""The VOC data set on a small VOCdevkit written by hand."""
import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset, get_coco_api_from_dataset, num_classes_and_names, voc, voc_ap
from datasets.coco_eval import CocoEvaluator
from util.errors import InputError


def xml(objects):
    """An annotation of (name, difficult, xmin, ymin, xmax, ymax); the size in it is wrong, as some of VOC2012's are."""
    items = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        f"<bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin><ymax>{y1}</ymax><ymin>{y0}</ymin></bndbox></object>"
        for name, difficult, x0, y0, x1, y1 in objects)
    return f"<annotation><size><width>40</width><height>60</height><depth>3</depth></size>{items}</annotation>"


PICTURES = {
    ("VOC2007", "trainval", "000005"): [("person", 0, 1, 1, 60, 40), ("dog", 1, 11, 6, 30, 15)],
    ("VOC2007", "trainval", "000007"): [],
    ("VOC2012", "trainval", "2008_000001"): [("aeroplane", 0, 10.5, 5.5, 20.5, 15.5)],
    ("VOC2007", "test", "000001"): [("dog", 0, 11, 6, 30, 15), ("dog", 1, 41, 21, 60, 40), ("cat", 0, 1, 1, 10, 10)],
}


@pytest.fixture
def devkit(tmp_path):
    """Writes PICTURES; the function it returns writes another annotation into it."""
    voc.find_pictures.cache_clear()
    voc._class_names.cache_clear()

    def write(year, name, objects):
        path = tmp_path / year / "Annotations" / f"{name}.xml"
        path.write_text(objects if isinstance(objects, str) else xml(objects))
        return path

    for (year, part, name), objects in PICTURES.items():
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (tmp_path / year / folder).mkdir(parents=True, exist_ok=True)
        with open(tmp_path / year / "ImageSets/Main" / f"{part}.txt", "a") as names:
            names.write(f"{name}\n")
        Image.new("RGB", (60, 40)).save(tmp_path / year / "JPEGImages" / f"{name}.jpg")
        write(year, name, objects)
    write.root = tmp_path
    return write


def arguments(root, **changes):
    values = dict(dataset_file="voc", voc_path=str(root), eval=False, num_classes=None, seed=0, remove_difficult=False,
                  train_sizes=None, val_size=40, max_size=None, crop_resize=None, crop_size=None)
    return argparse.Namespace(**{**values, **changes})


def test_training_takes_trainval_of_both_years(devkit):
    dataset = build_dataset("train", arguments(devkit.root))
    files = [dataset.coco.imgs[image_id]["file_name"] for image_id in dataset.ids]
    assert files == ["VOC2007/JPEGImages/000005.jpg", "VOC2007/JPEGImages/000007.jpg",
                     "VOC2012/JPEGImages/2008_000001.jpg"]


def test_labels_and_boxes(devkit):
    args = arguments(devkit.root)
    count, names = num_classes_and_names(args)
    assert count == 21 and names[1] == "aeroplane" and names[20] == "tvmonitor" and len(names) == 20
    dataset = build_dataset("train", args)
    dataset.transforms = None
    target = dataset[0][1]
    assert target["labels"].tolist() == [15, 12]   # person and dog in VOC's alphabetic order
    assert target["boxes"].tolist() == [[0, 0, 60, 40], [10, 5, 30, 15]]   # pixels 1..60 are 60 pixels
    assert target["area"].tolist() == [2400, 200]
    assert dataset[1][1]["boxes"].shape == (0, 4)
    assert dataset[2][1]["boxes"].tolist() == [[9.5, 4.5, 20.5, 15.5]]


def test_difficult_objects_can_be_left_out_of_training_only(devkit):
    args = arguments(devkit.root, remove_difficult=True)
    train, val = build_dataset("train", args), build_dataset("val", args)
    train.transforms = val.transforms = None
    assert train[0][1]["labels"].tolist() == [15]
    assert val[0][1]["labels"].tolist() == [12, 12, 8]


def detections(boxes, scores, labels):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "scores": torch.tensor(scores),
            "labels": torch.tensor(labels, dtype=torch.int64)}


def average_precision(dataset, found):
    evaluator = CocoEvaluator(get_coco_api_from_dataset(dataset), ["bbox"])
    evaluator.update({dataset.ids[0]: found})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    return evaluator.per_class()


def test_difficult_objects_are_ignored_in_evaluation(devkit):
    """The test image has a dog at 10, 5, 30, 15 and a difficult one at 40, 20, 60, 40."""
    dataset = build_dataset("val", arguments(devkit.root))

    def dogs(found):
        return average_precision(dataset, found)["dog"]

    easy, hard, empty = [10, 5, 30, 15], [40, 20, 60, 40], [0, 20, 15, 40]
    # The difficult dog, found first, is neither right nor wrong, so that the other, found second, has precision 1.
    assert dogs(detections([hard, easy], [0.9, 0.8], [12, 12])) == pytest.approx((1, 1))
    # Missing it costs nothing either.
    assert dogs(detections([easy], [0.8], [12])) == pytest.approx((1, 1))
    # A detection of nothing is wrong: precision 1/2 at every recall.
    assert dogs(detections([empty, easy], [0.9, 0.8], [12, 12])) == pytest.approx((.5, .5))
    # The usual IoU holds, not a crowd's: a small box inside the difficult dog is not excused (IoU 1/4).
    inside = [40, 20, 50, 30]
    assert dogs(detections([inside, easy], [0.9, 0.8], [12, 12])) == pytest.approx((0.5, 0.5))
    # IoU 0.8 with the difficult dog (16 of its 20 columns): excused at thresholds .50 to .80, wrong at .85 to .95.
    shifted = [40, 20, 56, 40]
    ap, ap50 = dogs(detections([shifted, easy], [0.9, 0.8], [12, 12]))
    assert ap == pytest.approx((7 * 1 + 3 * 0.5) / 10) and ap50 == pytest.approx(1)


def test_classes_without_objects_count_as_nothing(devkit):
    results = average_precision(build_dataset("val", arguments(devkit.root)), detections([[0, 0, 10, 10]], [0.9], [8]))
    assert results["cat"] == pytest.approx((1, 1)) and results["dog"] == (0, 0) and results["sheep"] == (-1, -1)
    assert len(results) == 20


def test_own_names_replace_vocs(devkit, capsys):
    devkit("VOC2007", "000005", [("zebra", 0, 1, 1, 60, 40), ("dog", 0, 11, 6, 30, 15)])
    args = arguments(devkit.root)
    assert num_classes_and_names(args) == (4, {1: "aeroplane", 2: "dog", 3: "zebra"})
    assert "not have VOC's 20 classes but its own 3: aeroplane, dog, zebra" in capsys.readouterr().out
    assert num_classes_and_names(arguments(devkit.root, num_classes=9))[0] == 9
    with pytest.raises(InputError, match="000001.xml has an object of class 'cat', which training lacks"):
        build_dataset("val", args)


def test_a_missing_year_is_said(devkit, capsys):
    (devkit.root / "VOC2012/ImageSets/Main/trainval.txt").unlink()
    assert len(build_dataset("train", arguments(devkit.root))) == 2
    assert "no images of VOC2012" in capsys.readouterr().out


def test_evaluation_does_without_the_training_lists(devkit):
    for year in ("VOC2007", "VOC2012"):
        (devkit.root / year / "ImageSets/Main/trainval.txt").unlink()
    assert len(build_dataset("val", arguments(devkit.root, eval=True))) == 1
    with pytest.raises(InputError, match="--voc_path .* has no VOC2007/ImageSets/Main/trainval.txt or VOC2012/"):
        build_dataset("train", arguments(devkit.root))


@pytest.mark.parametrize("content, message", [
    ("<annotation>", "000005.xml is not valid XML"),
    ("<annotation><object></object></annotation>", "000005.xml has an object without a name"),
    ("<annotation><object><name>dog</name></object></annotation>", "000005.xml has an object 'dog' without four"),
    (xml([("dog", 0, 1, 1, "x", 4)]), "000005.xml has an object 'dog' without four numbers"),
    (xml([("dog", 0, 9, 1, 5, 4)]), "000005.xml has an object 'dog' whose box ends before it begins"),
    (xml([("dog", 0, 9, 1, "nan", 4)]), "000005.xml has an object 'dog' whose box ends before it begins"),
])
def test_wrong_annotations_are_refused_by_name(devkit, content, message):
    devkit("VOC2007", "000005", content)
    with pytest.raises(InputError, match=message):
        build_dataset("train", arguments(devkit.root))


def test_missing_things_are_refused_by_name(devkit):
    with pytest.raises(InputError, match="--voc_path is needed"):
        build_dataset("train", arguments(""))
    with pytest.raises(InputError, match="--voc_path .*nowhere does not exist"):
        build_dataset("train", arguments(devkit.root / "nowhere"))
    with pytest.raises(InputError, match="--masks has no effect with --dataset_file voc"):
        build_dataset("train", arguments(devkit.root, masks=True))
    (devkit.root / "VOC2007/JPEGImages/000005.jpg").unlink()
    train = build_dataset("train", arguments(devkit.root))
    assert train[0][1]["image_id"].tolist() == [2] and train.gather_unreadable() == ["VOC2007/JPEGImages/000005.jpg"]
    train.training = False
    with pytest.raises(InputError, match=r"000005.jpg does not exist \(image id 1 of"):
        train[0]
    (devkit.root / "VOC2007/Annotations/000005.xml").unlink()
    voc.find_pictures.cache_clear()
    with pytest.raises(InputError, match="000005.xml does not exist"):
        build_dataset("train", arguments(devkit.root))


def test_class_beyond_num_classes_is_refused(devkit):
    message = r"annotation id 1 \(image VOC2007/JPEGImages/000005.jpg\) .* has category_id 15"
    with pytest.raises(InputError, match=message):
        build_dataset("train", arguments(devkit.root, num_classes=10))


def test_an_evaluation_may_know_fewer_classes(devkit, capsys):
    whole = build_dataset("val", arguments(devkit.root, eval=True))
    labels = torch.cat([target["labels"] for _, target in whole])
    known = int(labels.max())
    dataset = build_dataset("val", arguments(devkit.root, eval=True, num_classes=known))
    assert f"the model has {known} classes: it doesn't know " in capsys.readouterr().out
    assert torch.cat([target["labels"] for _, target in dataset]).tolist() == labels[labels < known].tolist()
    assert dataset.coco.anns.keys() == whole.coco.anns.keys()


def test_all_detections_of_a_difficult_object_are_ignored(devkit):
    """Three detections of the difficult dog come first, then the other dog: its AP is 1 all the same."""
    dataset = build_dataset("val", arguments(devkit.root))
    boxes = [[40, 20, 60, 40], [40, 20, 60, 40], [41, 20, 60, 40], [10, 5, 30, 15]]
    dog = voc.VOC_CLASSES.index("dog") + 1
    evaluator = CocoEvaluator(get_coco_api_from_dataset(dataset), ["bbox"])
    evaluator.update({1: detections(boxes, [0.9, 0.8, 0.7, 0.6], [dog] * 4)})
    evaluator.accumulate()
    evaluator.summarize()
    assert evaluator.per_class()["dog"][1] == pytest.approx(1.0)
    # Two classes have objects: the dog is found, the cat is not.
    assert evaluator.voc_ap50() == {"11_points": pytest.approx(0.5), "all_points": pytest.approx(0.5)}


def test_average_precision_by_eleven_and_by_all_points():
    """Right, wrong, right of 3 objects: precision 1 up to recall 1/3, 2/3 up to 2/3, then 0."""
    scores, verdicts = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, -1])
    assert voc_ap.all_points_ap(scores, verdicts, 3) == pytest.approx((1 + 2 / 3) / 3)
    precision = np.where(np.arange(101) <= 33, 1, np.where(np.arange(101) <= 66, 2 / 3, 0))
    assert voc_ap.eleven_points_ap(precision) == pytest.approx((4 + 3 * 2 / 3) / 11)
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 10, 10], [51, 50, 10, 10], [90, 0, 5, 5]])
    objects = np.array([[0, 0, 10, 10], [50, 50, 10, 10]])
    assert voc_ap.judge(boxes, objects, np.array([False, True])).tolist() == [1, 0, -1, -1, 0]


def test_other_layouts_are_read(tmp_path):
    """A year's folder itself, names with blanks, images of other endings or names, and XML files beside images."""
    def picture(path, annotation, name=""):
        path.parent.mkdir(parents=True, exist_ok=True)
        annotation.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(path)
        text = xml([("cat", 0, 1, 1, 10, 10)]).replace("<size>", f"<filename>{name}</filename><size>")
        annotation.write_text(text, encoding="utf-8-sig")
        annotation.with_name("._" + annotation.name).write_bytes(b"\0\5\x16\7")  # as macOS adds them

    year = tmp_path / "year"
    picture(year / "JPEGImages/a photo 1.png", year / "Annotations/a photo 1.xml")
    picture(year / "JPEGImages/other.bmp", year / "Annotations/b.xml", "other.bmp")
    picture(year / "JPEGImages/c.JPG", year / "Annotations/c.xml", "absent.jpg")
    picture(year / "JPEGImages/d\u2028e.Jpg", year / "Annotations/d\u2028e.XML")
    picture(year / "JPEGImages/f.jpg", year / "Annotations/f.xml")
    (year / "ImageSets/Main").mkdir(parents=True)
    for part in ("train", "val"):
        (year / f"ImageSets/Main/{part}.txt").write_text("a photo 1\nb\nc  -1\r\nd\u2028e\nf.jpg\n", encoding="utf-8-sig")
    beside = tmp_path / "beside"
    picture(beside / "train/x.png", beside / "train/x.xml")
    picture(beside / "valid/y.png", beside / "valid/y.xml")
    upper, apart = tmp_path / "upper", tmp_path / "apart"
    picture(upper / "z.Png", upper / "z.Xml")
    picture(apart / "u.png", apart / "annotations/u.xml")
    for root, parts in ((year, {"train": 5, "val": 5}), (beside, {"train": 1, "val": 1}),
                        (beside / "train", {"train": 1, "val": 1}), (upper, {"train": 1, "val": 1}),
                        (apart, {"train": 1, "val": 1})):
        for part, count in parts.items():
            dataset = build_dataset(part, arguments(root, eval=part == "val"))
            assert len(dataset) == count
            for index in range(count):
                assert dataset[index][1]["boxes"].shape == (1, 4)
