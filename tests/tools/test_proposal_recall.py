"""Average recall against scenes counted by hand; models and selective search through the program."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.coco import index_ground_truth
from datasets.toy import ToySettings, write_toy
from tools import proposal_recall
from tools.proposal_recall import average_recall, table
from tools.regions import without_classes


def ground_truth(*objects: Dict[str, Any]) -> Any:
    """Two images of 400 x 400 pixels; an object needs `image_id` and `bbox` (x, y, width, height)."""
    annotations = [{"id": number, "category_id": number % 3 + 1, "iscrowd": 0,
                    "area": item["bbox"][2] * item["bbox"][3], **item} for number, item in enumerate(objects)]
    return index_ground_truth({"images": [{"id": image_id, "width": 400, "height": 400} for image_id in (1, 2)],
                               "categories": [{"id": number, "name": str(number)} for number in (1, 2, 3)],
                               "annotations": annotations})


def found(image_id: int, *boxes: List[float]) -> Any:
    """Boxes in x0, y0, x1, y1, the best first."""
    return image_id, torch.tensor(boxes, dtype=torch.float64).view(-1, 4), torch.linspace(1, 0.5, len(boxes))


MISS = [390.0, 390.0, 399.0, 399.0]


def test_recall_counted_by_hand() -> None:
    """An exact box first, an exact one at rank 11, and at rank 101 one of IoU 0.8, which 7 thresholds of 10 accept."""
    objects = ground_truth({"image_id": 1, "bbox": [10, 10, 100, 100]}, {"image_id": 1, "bbox": [200, 200, 50, 50]},
                           {"image_id": 2, "bbox": [0, 0, 20, 20]})
    result = average_recall(objects, [found(1, *[MISS] * 10, [10, 10, 110, 110], *[MISS] * 89, [200, 200, 250, 240]),
                                      found(2, [0, 0, 20, 20])])
    assert (result["images"], result["objects"], result["boxes_per_image"]) == (2, 3, 51)
    assert result["10"] == pytest.approx(dict(AR=1 / 3, AR_small=1, AR_medium=0, AR_large=0, R50=1 / 3))
    assert result["100"] == pytest.approx(dict(AR=2 / 3, AR_small=1, AR_medium=0, AR_large=1, R50=2 / 3))
    assert result["1000"] == pytest.approx(dict(AR=2.7 / 3, AR_small=1, AR_medium=0.7, AR_large=1, R50=1))


def test_a_box_covers_one_object_whatever_its_class() -> None:
    twins = ground_truth({"image_id": 1, "bbox": [0, 0, 50, 50]}, {"image_id": 1, "bbox": [0, 0, 50, 50]})
    assert average_recall(twins, [found(1, [0, 0, 50, 50])])["10"]["AR"] == pytest.approx(0.5)
    assert average_recall(twins, [found(1, [0, 0, 50, 50], [0, 0, 50, 50])])["10"]["AR"] == pytest.approx(1)


def test_crowds_and_difficult_objects_do_not_count() -> None:
    objects = ground_truth({"image_id": 1, "bbox": [0, 0, 50, 50]},
                           {"image_id": 1, "bbox": [99, 0, 50, 50], "iscrowd": 1},
                           {"image_id": 2, "bbox": [0, 0, 50, 50], "difficult": 1})
    result = average_recall(objects, [found(1, [0, 0, 50, 50]), found(2)])
    assert (result["objects"], result["boxes_per_image"], result["10"]["AR"]) == (1, 0.5, pytest.approx(1))


def test_what_is_not_there_has_no_recall() -> None:
    result = average_recall(ground_truth({"image_id": 1, "bbox": [0, 0, 50, 50]}), [found(1)])
    assert result["10"] == dict(AR=0, AR_small=None, AR_medium=0, AR_large=None, R50=0)
    assert table(result).splitlines()[1:3] == ["    boxes |        AR |  AR_small | AR_medium |  AR_large |       R50",
                                               "       10 |       0.0 |         - |       0.0 |         - |       0.0"]


def test_a_query_is_an_object_as_surely_as_its_classes_say() -> None:
    probability = torch.tensor([[[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]]])
    outputs = {"pred_logits": probability.log(), "pred_boxes": torch.rand(1, 2, 4)}
    mine = without_classes(outputs, sigmoid=False)
    assert torch.allclose(mine["pred_logits"].softmax(-1), torch.tensor([[[0.7, 0.3], [0.2, 0.8]]]))
    assert mine["pred_boxes"] is outputs["pred_boxes"]
    outputs["pred_logits"] = probability.logit()
    mine = without_classes(outputs, sigmoid=True)
    assert torch.allclose(mine["pred_logits"].sigmoid(), torch.tensor([[[0.5], [0.8]]]))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=64, num_unlabelled=1, num_train=20, num_val=3))
    return folder


def figures(output: Path) -> Dict[str, Any]:
    return json.loads(output.read_text())


@pytest.mark.parametrize("changes", [{}, {"model": "deformable_detr", "two_stage": True, "num_classes": 30}])
@pytest.mark.parametrize("flag, place", [("--coco_path", "coco"), ("--voc_path", "VOCdevkit")])
def test_boxes_of_a_model(changes: Dict[str, Any], flag: str, place: str, save_model: Callable[..., Path], toy: Path,
                          tmp_path: Path, run_main: Callable) -> None:
    """Each of its 12 queries gives a box, also where several of its classes are probable."""
    checkpoint = save_model("detector.pth", val_size=64, max_size=80, **changes)
    output = tmp_path / "out" / "recall.json"
    printed = run_main(proposal_recall, ["--checkpoint", checkpoint, flag, toy / place, "--device", "cpu",
                                         "--batch_size", 2, "--num_workers", 0, "--output", output])
    result = figures(output)
    assert (result["images"], result["boxes_per_image"]) == (3, 12) and result["100"] == result["1000"]
    assert printed.endswith(table(result) + "\n") and "12 boxes in an image on average" in printed


def test_selective_search_finds_what_stands_out(tmp_path: Path, run_main: Callable) -> None:
    """A plain rectangle on plain ground, in an image that isn't square."""
    pytest.importorskip("cv2")
    pixels = np.full((100, 200, 3), 30, dtype=np.uint8)
    pixels[25:75, 50:150, 0] = 230
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "scene.png")
    (tmp_path / "annotations.json").write_text(json.dumps({
        "images": [{"id": 7, "file_name": "scene.png", "width": 200, "height": 100}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [50, 25, 100, 50], "area": 5000}]}))
    words = ["--selective_search", "--val_images", tmp_path / "images", "--val_annotations",
             tmp_path / "annotations.json", "--num_workers", 0]
    run_main(proposal_recall, [*words, "--output", tmp_path / "recall.json"])
    result = figures(tmp_path / "recall.json")
    assert result["objects"] == 1 and result["10"]["R50"] == 1 and result["10"]["AR"] >= 0.9
    (tmp_path / "images" / "scene.png").write_bytes(b"no image")
    message = run_main(proposal_recall, words, status=2)
    assert message.startswith(f"error: image file {tmp_path}/images/scene.png cannot be decoded")


def test_wrong_use_is_told(detector: Path, pretrained: Path, toy: Path, run_main: Callable) -> None:
    for words in ([], ["--checkpoint", detector, "--selective_search"]):
        assert run_main(proposal_recall, [*words, "--coco_path", toy / "coco"], status=2) == \
            "error: whose boxes? give either --checkpoint FILE_OR_URL or --selective_search\n"
    assert "error: --coco_path is missing" in run_main(proposal_recall, ["--checkpoint", detector], status=2)
    assert "which finds patches and knows no classes" in run_main(
        proposal_recall, ["--checkpoint", pretrained, "--coco_path", toy / "coco"], status=2)
    assert "error: --batch_size 0 must be at least 1" in run_main(
        proposal_recall, ["--checkpoint", detector, "--batch_size", 0], status=2)
