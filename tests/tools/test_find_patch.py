"""tools.find_patch shows what evaluation of a pre-training measures."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from commands import run
from PIL import Image

from datasets.pretext import PatchPretext, PretextDataset, RandomPatches
from engine import most_confident_boxes
from tools import find_patch
from tools.loading import PRETRAINED, load_model
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import InputError
from util.misc import collate_fn


def entries_of(path: Path) -> List[Dict[str, Any]]:
    return json.loads(path.with_suffix(".json").read_text())


def iou(one: List[float], other: List[float]) -> float:
    """Of two boxes x, y, w, h, by hand."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / (one[2] * one[3] + other[2] * other[3] - overlap)


def test_finds_what_evaluation_finds(pretrained: Path, photos: Path) -> None:
    """Evaluation's way: data set, collate, model, the most confident query."""
    loaded = load_model(str(pretrained), PRETRAINED, "cpu")
    dataset = PretextDataset(photos, ["wide.jpg", "below/tall.png"], PatchPretext(RandomPatches(3), [64], 96),
                             training=False, patch_size=32)
    samples, patches, targets = collate_fn([dataset[0]])
    with torch.no_grad():
        expected, confidence = most_confident_boxes(loaded.model(samples, patches), 3)
    image, source = find_patch.read_resized(str(photos / "wide.jpg"), 64, 96)
    assert source.shape == (3, 60, 100) and list(image.shape[1:]) == targets[0]["size"].tolist()
    boxes = box_cxcywh_to_xyxy(targets[0]["boxes"]) * torch.tensor([100, 60, 100, 60])
    found, mine = find_patch.find_patches(loaded, image, source, boxes.round().long())
    torch.testing.assert_close(found, box_cxcywh_to_xyxy(expected[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(mine, confidence[0], atol=1e-5, rtol=0)


def test_writes_a_picture_and_json(pretrained: Path, photos: Path, tmp_path: Path, run_main: Callable) -> None:
    output = tmp_path / "made" / "patches.png"
    printed = run_main(find_patch, ["--checkpoint", pretrained, photos / "wide.jpg", "--box", "10,20,30,40", "--box",
                                    "0,0,100,60", "--output", output, "--device", "cpu"])
    entries = entries_of(output)
    assert [entry["box"] for entry in entries] == [[10, 20, 30, 40], [0, 0, 100, 60]]
    for entry in entries:
        assert 0 <= entry["confidence"] <= 1
        assert entry["iou"] == pytest.approx(iou(entry["box"], entry["found"]), abs=1e-3)
    assert "10,20,30,40" in printed and str(output) in printed
    # The image, resized to 96 x 58, is drawn seven times as large, beside one column of two patches.
    width, height = Image.open(output).size
    assert width > 672 + find_patch.CELL and height == 406 + find_patch.HEADER


def test_random_boxes_depend_on_the_seed_alone_and_lie_inside(pretrained: Path, photos: Path, tmp_path: Path,
                                                              run_main: Callable) -> None:
    drawn = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        run_main(find_patch, ["--checkpoint", pretrained, photos / "wide.jpg", "--random", 4, "--seed", seed,
                              "--output", tmp_path / f"{name}.png", "--device", "cpu"])
        drawn.append([entry["box"] for entry in entries_of(tmp_path / f"{name}.png")])
    assert drawn[0] == drawn[1] != drawn[2]
    for left, top, width, height in drawn[0] + drawn[2]:
        assert 0 <= left and 0 <= top and left + width <= 100.01 and top + height <= 60.01 and min(width, height) > 0


def test_more_patches_than_the_model_has_are_shown_in_turn(pretrained: Path, photos: Path) -> None:
    """The model has three groups of queries: the fourth patch is shown like a first one."""
    loaded = load_model(str(pretrained), PRETRAINED, "cpu")
    image, source = find_patch.read_resized(str(photos / "wide.jpg"), 64, 96)
    boxes = torch.tensor([[0, 0, 30, 30], [20, 10, 60, 50], [5, 5, 90, 55], [40, 0, 96, 40], [60, 20, 80, 57]])
    together, confidence = find_patch.find_patches(loaded, image, source, boxes)
    first = find_patch.find_patches(loaded, image, source, boxes[:3])
    fourth = find_patch.find_patches(loaded, image, source, boxes[3:4])
    assert together.shape == (5, 4) and confidence.shape == (5,)
    torch.testing.assert_close(together[:3], first[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together[3:4], fourth[0], atol=1e-5, rtol=0)


def test_a_tiny_box_keeps_a_pixel(pretrained: Path) -> None:
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    boxes = torch.tensor([[29.6, 19.6, 30.0, 20.0], [3.2, 4.1, 3.3, 4.2], [-0.0, 0.0, 30.0, 20.0]])
    assert find_patch.to_whole_pixels(boxes, image).tolist() == [[29, 19, 30, 20], [3, 4, 4, 5], [0, 0, 30, 20]]


@pytest.mark.parametrize("text, sentence", [
    ("1,2,3", "--box 1,2,3: write four numbers, x,y,w,h"), ("a,b,c,d", "write four numbers"),
    ("1,2,0,4", "--box 1,2,0,4: width and height must be more than 0"), ("1,2,3,-4", "must be more than 0"),
    ("90,2,20,4", "--box 90,2,20,4 reaches outside the image, which has 100 x 60 pixels"),
    ("-1,2,20,4", "reaches outside the image"), ("1,nan,2,2", "reaches outside the image")])
def test_wrong_boxes_are_told(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        find_patch.parse_box(text, 100, 60)


def test_wrong_input_is_told_in_a_sentence(pretrained: Path, detector: Path, photos: Path, tmp_path: Path,
                                           run_main: Callable) -> None:
    def refused(*words: Any) -> str:
        return run_main(find_patch, ["--device", "cpu", "--checkpoint", *words], status=2)

    wide = photos / "wide.jpg"
    assert refused(pretrained, wide) == "error: which patches? give --box x,y,w,h or --random N\n"
    assert "use python -m tools.predict" in refused(detector, wide, "--random", 1)
    assert "image file nothing.jpg does not exist" in refused(pretrained, "nothing.jpg", "--random", 1)
    assert "the name must end in one of .png" in refused(pretrained, wide, "--random", 1, "--output", "x.json")
    assert "--num_queries 12 is not a multiple of --num_patches 7" in refused(
        pretrained, wide, "--random", 1, "--num_patches", 7)
    Image.new("RGB", (12, 12)).save(tmp_path / "tiny.png")
    assert "is too small for random patches of at least 8 pixels" in refused(
        pretrained, tmp_path / "tiny.png", "--random", 1, "--size", 12)


def test_as_a_program(pretrained: Path, photos: Path, tmp_path: Path) -> None:
    done = run(["-m", "tools.find_patch", "--checkpoint", pretrained, photos / "wide.jpg", "--random", 1, "--output",
                tmp_path / "out.png", "--device", "cpu"])
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/out.png and {tmp_path}/out.json"
