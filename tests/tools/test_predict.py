"""tools.predict writes what evaluation measures, and pictures a person can read."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

from datasets.coco import CocoDetection, make_coco_transforms
from models import build_postprocess
from tools import predict
from tools.drawing import LabelledBox, distinct_colour, draw_boxes
from tools.loading import DETECTOR, load_model
from util.errors import InputError
from util.misc import collate_fn


def detections(folder: Path) -> List[Dict[str, Any]]:
    return json.loads((folder / "detections.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("changes", [{}, {"model": "deformable_detr", "two_stage": True, "num_classes": 30}])
def test_numbers_are_those_of_evaluation(changes: Dict[str, Any], save_model: Callable[..., Path], photos: Path,
                                         tmp_path: Path, run_main: Callable) -> None:
    """Evaluation's way: data set, collate, model, post-processing, one image at a time."""
    detector = save_model("detector.pth", val_size=64, max_size=80, **changes)
    ground_truth = {"images": [{"id": 1, "file_name": "wide.jpg"}, {"id": 2, "file_name": "below/tall.png"}],
                    "annotations": [], "categories": [{"id": 1, "name": "disc"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(ground_truth))
    transforms = make_coco_transforms("val", val_size=64, max_size=80)
    dataset = CocoDetection(photos, tmp_path / "annotations.json", transforms)
    model, args, _, _ = load_model(str(detector), DETECTOR, "cpu")
    run_main(predict, ["--checkpoint", detector, photos, "--threshold", 0, "--output_dir", tmp_path / "out",
                       "--device", "cpu"])
    found = detections(tmp_path / "out")
    for index, name in enumerate(("wide.jpg", "below/tall.png")):
        samples, targets = collate_fn([dataset[index]])
        with torch.no_grad():
            expected = build_postprocess(args)(model(samples), targets[0]["orig_size"][None])[0]
        mine = [entry for entry in found if entry["file_name"] == str(photos / name)]
        order = expected["scores"].argsort(descending=True)
        boxes = expected["boxes"][order]
        boxes[:, 2:] -= boxes[:, :2]
        torch.testing.assert_close(torch.tensor([entry["bbox"] for entry in mine]), boxes, atol=2e-3, rtol=0)
        scores = torch.tensor([entry["score"] for entry in mine])
        torch.testing.assert_close(scores, expected["scores"][order], atol=2e-5, rtol=0)
        assert [entry["category_id"] for entry in mine] == expected["labels"][order].tolist()


def test_threshold_names_and_pictures(detector: Path, photos: Path, tmp_path: Path, run_main: Callable) -> None:
    out = tmp_path / "out"
    words = ["--checkpoint", detector, photos, "--output_dir", out, "--device", "cpu", "--batch_size", 2]
    printed = run_main(predict, [*words, "--threshold", 0])
    everything = detections(out)
    assert len(everything) == 2 * 12 and "24 objects in 2 images" in printed
    names = {0: "class 0", 1: "disc", 2: "square", 3: "triangle", 4: "star"}
    assert all(entry["category_name"] == names[entry["category_id"]] for entry in everything)
    scores = sorted(entry["score"] for entry in everything)
    _, threshold = max((higher - lower, (higher + lower) / 2) for lower, higher in zip(scores, scores[1:]))
    run_main(predict, [*words, "--threshold", threshold])
    assert detections(out) == [entry for entry in everything if entry["score"] >= threshold]
    run_main(predict, [*words, "--threshold", 1])
    assert detections(out) == []
    # 100 x 60 and 50 x 90 pixels are enlarged by a whole factor to 640 or more.
    assert Image.open(out / "wide.jpg").size == (700, 420) and Image.open(out / "below" / "tall.jpg").size == (400, 720)


def test_class_names_from_an_annotation_file_or_cocos(save_model: Callable[..., Path], detector: Path, photos: Path,
                                                      tmp_path: Path, run_main: Callable) -> None:
    classes = tmp_path / "classes.json"
    categories = [{"id": i, "name": f"Käse {i}"} for i in range(5)]
    classes.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    words = [photos / "wide.jpg", "--threshold", 0, "--output_dir", tmp_path / "out", "--device", "cpu"]
    run_main(predict, ["--checkpoint", detector, "--classes", classes, *words])
    assert all(entry["category_name"] == f"Käse {entry['category_id']}" for entry in detections(tmp_path / "out"))
    loaded = load_model(str(save_model("coco.pth", num_classes=91)), DETECTOR, "cpu")
    names = predict.names_of_classes(loaded, None)
    assert (names[1], names[18], names[90]) == ("person", "dog", "toothbrush")
    classes.write_text("{")
    assert f"annotation file {classes} is not valid JSON" in run_main(
        predict, ["--checkpoint", detector, "--classes", classes, *words], status=2)


def test_unreadable_images_are_named_skipped_and_counted(detector: Path, photos: Path, tmp_path: Path,
                                                         run_main: Callable) -> None:
    broken = photos / "broken.jpg"
    broken.write_bytes((photos / "wide.jpg").read_bytes()[:300])
    words = ["--checkpoint", detector, "--threshold", 0, "--output_dir", tmp_path / "out", "--device", "cpu"]
    errors = run_main(predict, [*words, photos], status=1)
    assert f"skipped: image file {broken} cannot be decoded" in errors and "1 of 3 images could not be read" in errors
    assert len(detections(tmp_path / "out")) == 2 * 12
    assert run_main(predict, [*words, broken], status=2).endswith("error: none of the 1 images can be read\n")


def test_wrong_input_is_told_in_a_sentence(detector: Path, photos: Path, tmp_path: Path, run_main: Callable) -> None:
    def refused(*words: Any) -> str:
        return run_main(predict, ["--checkpoint", detector, "--device", "cpu", *words], status=2)

    (tmp_path / "empty").mkdir()
    assert refused(photos / "nothing.jpg") == f"error: {photos}/nothing.jpg: no such file or folder\n"
    assert f"image folder {tmp_path}/empty has no images" in refused(tmp_path / "empty")
    assert refused(photos, "--threshold", 70) == "error: --threshold 70.0 must be at most 1\n"
    assert refused(photos, "--batch_size", 0) == "error: --batch_size 0 must be at least 1\n"
    assert refused(photos, "--line_width", -1) == "error: --line_width -1 must be at least 1\n"
    assert refused(photos, "--max_detections", 0) == "error: --max_detections 0 must be at least 1\n"
    assert f"annotation file {tmp_path}/none.json" in refused(photos, "--annotations", tmp_path / "none.json")
    assert f"the picture {photos}/wide.jpg would overwrite an image" in refused(photos, "--output_dir", photos)
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert f"--output_dir {out} can't be written" in refused(photos, "--output_dir", out)


def test_pictures_of_equal_names_do_not_overwrite_each_other(photos: Path) -> None:
    (photos / "wide.png").write_bytes(b"")
    sources = predict.find_images([str(photos), str(photos / "below" / "tall.png"), str(photos / "wide.jpg")], "out")
    assert [str(source.picture) for source in sources] == ["out/below/tall.jpg", "out/wide.jpg", "out/wide-2.jpg"]


def test_as_a_program(pretrained: Path, photos: Path) -> None:
    done = run(["-m", "tools.predict", "--checkpoint", pretrained, photos], check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "python -m tools.find_patch" in done.stderr


@pytest.mark.parametrize("size, drawn", [((128, 128), (640, 640)), ((90, 128), (450, 640)), ((1000, 700), (1000, 700)),
                                         ((3000, 2000), (1600, 1067)), ((1, 1), (640, 640))])
def test_small_images_are_enlarged_and_large_ones_reduced(size: tuple, drawn: tuple) -> None:
    assert draw_boxes(torch.zeros(3, size[1], size[0], dtype=torch.uint8), []).size == drawn


def test_labels_stay_inside_and_apart() -> None:
    """Boxes in all corners and over the edges, on black: a label has as many pixels of its colour wherever it is."""
    colour = distinct_colour(2)

    def coloured_pixels(*boxes: LabelledBox) -> int:
        picture = draw_boxes(torch.zeros(3, 640, 640, dtype=torch.uint8), boxes)
        return sum(count for count, value in picture.getcolors(1 << 20) if value == colour)

    def frame_pixels(*boxes: LabelledBox) -> int:
        return coloured_pixels(*(box._replace(text="") for box in boxes))

    places = [(300, 300, 400, 400), (-20, -20, 40, 40), (600, -5, 660, 30), (590, 600, 700, 700), (-9, 620, 30, 639)]
    boxes = [LabelledBox(place, colour, "a long label 0.99") for place in places]
    alone = coloured_pixels(boxes[0]) - frame_pixels(boxes[0])
    assert alone > 1500
    assert all(coloured_pixels(box) - frame_pixels(box) > 0.9 * alone for box in boxes)
    same = [LabelledBox(places[0], colour, "a long label 0.99")] * 3
    assert coloured_pixels(*same) - frame_pixels(*same) > 2.8 * alone


def test_colours_differ() -> None:
    assert len({distinct_colour(number) for number in range(91)}) == 91


def test_thresholds_go_with_the_kind_of_model(save_model: Callable[..., Path], photos: Path, tmp_path: Path,
                                              run_main: Callable) -> None:
    """Deformable DETR's sigmoid scores are lower; what an image's best score is, is said where nothing is shown."""
    softmax = load_model(str(save_model("softmax.pth")), DETECTOR, "cpu")
    sigmoid_file = save_model("sigmoid.pth", model="deformable_detr", val_size=64, max_size=80)
    sigmoid = load_model(str(sigmoid_file), DETECTOR, "cpu")
    assert [predict.default_threshold(softmax, show) for show in predict.VIEWS] == [0.7, 0.7, 0.85]
    assert predict.default_threshold(sigmoid, "boxes") == 0.3
    words = ["--checkpoint", sigmoid_file, photos / "wide.jpg", "--output_dir", tmp_path / "out", "--device", "cpu"]
    nothing = run_main(predict, words).splitlines()[0]
    run_main(predict, [*words, "--threshold", 0, "--max_detections", 3])
    found = detections(tmp_path / "out")
    assert [entry["score"] for entry in found] == sorted((entry["score"] for entry in found), reverse=True)
    assert len(found) == 3 and nothing == f"{photos}/wide.jpg: nothing above 0.3, best {found[0]['score']:.2g}"


def test_true_objects_beside_what_is_found(detector: Path, photos: Path, tmp_path: Path, run_main: Callable) -> None:
    """The file's images are told by the ends of the paths; frames are as wide as asked for."""
    truth = {"images": [{"id": 7, "file_name": "below/tall.png"}], "categories": [{"id": 2, "name": "square"}],
             "annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [10, 20, 30, 40], "area": 1200,
                              "iscrowd": 0}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    true = predict.TrueObjects(str(tmp_path / "truth.json"))
    assert true.of(photos / "below" / "tall.png") == [{"category_id": 2, "category_name": "square",
                                                       "bbox": [10, 20, 30, 40]}]
    assert true.of(photos / "tall.png") is None and true.of(photos / "wide.jpg") is None
    words = ["--checkpoint", detector, photos, "--device", "cpu", "--output_dir", tmp_path / "out", "--hide_labels",
             "--annotations", tmp_path / "truth.json"]
    run_main(predict, [*words, "--line_width", 9])
    wide = Image.open(tmp_path / "out" / "below" / "tall.jpg").copy()
    assert wide.size == (2 * 400 + 12, 720 + 40)
    run_main(predict, [*words, "--line_width", 1])
    thin = Image.open(tmp_path / "out" / "below" / "tall.jpg")

    def coloured(picture: Image.Image) -> int:
        """Pixels nearly of the class's colour in the left half."""
        pixels = torch.from_numpy(np.array(picture.crop((0, 40, 400, 760)), dtype=int))
        return int(((pixels - torch.tensor(distinct_colour(2))).abs().amax(2) < 25).sum())

    # A frame of 240 x 320 pixels, eight to one of the image, has 9 * 2 * (240 + 320) - 4 * 81 pixels.
    assert coloured(wide) - coloured(thin) == pytest.approx(9 * 1120 - 4 * 81 - 1120, rel=0.25)


def test_images_with_an_orientation_that_is_not_applied_are_counted(detector: Path, photos: Path, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is at the right
    for name in ("one", "two"):
        Image.new("RGB", (60, 40), "red").save(photos / f"{name}.jpg", exif=exif)
    words = ["--checkpoint", detector, photos, "--output_dir", tmp_path / "out", "--device", "cpu", "--threshold", 1]
    for more, count in (((), 1), (("--apply_exif",), 0)):
        predict.main(predict.get_args_parser().parse_args([*map(str, words), *more]))
        err = capsys.readouterr().err
        assert err.count("\n") == count
        if count:
            assert err.startswith(f"warning: 2 of 4 images have an EXIF orientation that is not applied, as {photos}/one.jpg")


XML = ("<annotation><object><name>{}</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox>"
       "</object></annotation>")


@pytest.mark.parametrize("place", ["beside", "devkit", "folder"])
def test_true_objects_in_xml_files_have_the_models_class(place: str, photos: Path, tmp_path: Path) -> None:
    """Pixels are counted from 1 and the last one is the object's: 30 x 40 from 10, 20."""
    xml = {"beside": photos / "below/tall.xml", "folder": tmp_path / "labels/tall.xml",
           "devkit": tmp_path / "VOC2007/Annotations/tall.xml"}[place]
    image = tmp_path / "VOC2007/JPEGImages/tall.png" if place == "devkit" else photos / "below/tall.png"
    xml.parent.mkdir(parents=True, exist_ok=True)
    xml.write_text(XML.format("square"))
    folder = {"beside": photos, "devkit": tmp_path, "folder": tmp_path / "labels"}[place]
    for classes, label in (({7: "square"}, 7), ({7: "disc"}, 8), ({}, 1)):
        true = predict.TrueObjects(str(folder), classes)
        assert true.of(image) == [{"category_id": label, "category_name": "square", "bbox": [10, 20, 30, 40]}]
        assert true.of(photos / "wide.jpg") is None


def test_folders_without_whole_xml_files_are_refused(photos: Path) -> None:
    with pytest.raises(InputError, match=f"^--annotations {photos} has no XML files$"):
        predict.TrueObjects(str(photos))
    (photos / "wide.xml").write_text("<annotation>")
    with pytest.raises(InputError, match=f"^annotation file {photos}/wide.xml is not valid XML"):
        predict.TrueObjects(str(photos))
