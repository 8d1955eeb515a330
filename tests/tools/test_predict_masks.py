"""tools.predict on models with masks: its masks and maps are those of evaluation; its pictures show them."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_codec

from datasets.image_io import read_image
from models import NUM_CLASSES, fused
from models.segmentation import PostProcessPanoptic
from tools import predict
from tools.drawing import distinct_colour
from tools.loading import DETECTOR, load_model
from tools.mask_drawing import ColouredMask, colours_of_segments, edge, innermost_point, lay_over
from util.misc import nested_tensor_from_tensor_list
from util.panoptic_ids import rgb_to_ids

NAMES = {1: "disc", 2: "square", 3: "sky", 4: "sea"}
IS_THING = {0: True, 1: True, 2: True, 3: False, 4: False}


@pytest.fixture
def masked(save_model: Callable[..., Path]) -> Path:
    """Checkpoint of a tiny DETR with masks, of things alone, whose queries see many classes."""
    path = save_model("masked.pth", class_names=NAMES, masks=True, val_size=64, max_size=80, mask_softmax="per_head")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["detr.class_embed.weight"] *= 8
    checkpoint["model"]["detr.class_embed.bias"][-1] = -10
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def panoptic(masked: Path, tmp_path: Path) -> Path:
    """The same with classes of things and stuff, as a panoptic training saves it."""
    checkpoint = torch.load(masked, weights_only=True)
    torch.save({**checkpoint, "is_thing_map": IS_THING}, tmp_path / "panoptic.pth")
    return tmp_path / "panoptic.pth"


def outputs_of(checkpoint: Path, photo: Path) -> Dict[str, torch.Tensor]:
    """All masks of the model, the image's size and the size it is shown in: 64 pixels wide or high, at most 80."""
    model = load_model(str(checkpoint), DETECTOR, "cpu").model
    transform = predict.make_coco_transforms("val", val_size=64, max_size=80)
    image = read_image(photo)[0]
    sample = transform(image)[0]
    with torch.no_grad(), fused.steps():
        outputs = model(nested_tensor_from_tensor_list([sample]))
    return {**outputs, "original": image.shape[1:], "size": sample.shape[1:]}


def entries(folder: Path, name: str = "detections.json") -> List[Dict[str, Any]]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_masks_are_those_of_the_model(masked: Path, photos: Path, tmp_path: Path, run_main: Callable) -> None:
    words = ["--checkpoint", masked, photos, "--output_dir", tmp_path / "out", "--device", "cpu"]
    run_main(predict, [*words, "--threshold", 0])
    found = [entry for entry in entries(tmp_path / "out") if entry["file_name"].endswith("wide.jpg")]
    outputs = outputs_of(masked, photos / "wide.jpg")
    order = outputs["pred_logits"][0].softmax(-1)[:, :-1].amax(-1).argsort(descending=True)
    enlarged = torch.nn.functional.interpolate(outputs["pred_masks"][:, order], size=outputs["size"], mode="bilinear")
    rows, columns = (torch.arange(n) * m // n for n, m in zip(outputs["original"], outputs["size"]))
    expected = (enlarged[0] > 0)[:, rows][:, :, columns]
    assert len(found) == 12 and expected.any()
    for entry, mask in zip(found, expected):
        assert entry["segmentation"]["size"] == list(outputs["original"])
        assert np.array_equal(mask_codec.decode(entry["segmentation"]).astype(bool), mask.numpy())
    boxes_alone = entries_without_masks(tmp_path / "out")
    run_main(predict, [*words, "--threshold", 0, "--show", "boxes"])
    assert entries(tmp_path / "out") == boxes_alone
    assert "0 objects in 2 images" in run_main(predict, [*words, "--threshold", 1])


def entries_without_masks(folder: Path) -> List[Dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "segmentation"} for entry in entries(folder)]


def test_batches_of_unequal_images_have_masks_of_each(masked: Path, photos: Path, tmp_path: Path,
                                                      run_main: Callable) -> None:
    run_main(predict, ["--checkpoint", masked, photos, "--output_dir", tmp_path / "out", "--device", "cpu",
                       "--threshold", 0, "--batch_size", 2])
    sizes = {Path(entry["file_name"]).name: tuple(entry["segmentation"]["size"]) for entry in entries(tmp_path / "out")}
    assert sizes == {"wide.jpg": (60, 100), "tall.png": (90, 50)}


def test_panoptic_maps_are_those_of_evaluation(panoptic: Path, photos: Path, tmp_path: Path,
                                               run_main: Callable) -> None:
    out = tmp_path / "out"
    words = ["--checkpoint", panoptic, photos, "--output_dir", out, "--device", "cpu"]
    printed = run_main(predict, [*words, "--threshold", 0.2])
    found = entries(out, "panoptic.json")
    assert [entry["png_file_name"] for entry in found] == ["panoptic/below/tall.png", "panoptic/wide.png"]
    count = 0
    for entry in found:
        outputs = outputs_of(panoptic, Path(entry["file_name"]))
        expected, = PostProcessPanoptic(IS_THING, 0.2)(outputs, [outputs["size"]], [outputs["original"]])
        assert (out / entry["png_file_name"]).read_bytes() == expected["png_string"]
        names = [segment.pop("category_name") for segment in entry["segments_info"]]
        assert entry["segments_info"] == expected["segments_info"]
        assert names == [NAMES.get(segment["category_id"], "class 0") for segment in entry["segments_info"]]
        count += len(names)
    assert count > 0 and f"{count} segments in 2 images" in printed
    assert Image.open(out / "wide.jpg").size == (700, 420)
    assert not (out / "detections.json").exists()
    run_main(predict, [*words, "--threshold", 1])
    empty = entries(out, "panoptic.json")
    assert all(entry["segments_info"] == [] for entry in empty)
    assert not rgb_to_ids(np.asarray(Image.open(out / empty[0]["png_file_name"]))).any()
    run_main(predict, [*words, "--show", "masks", "--threshold", 0])
    assert all("segmentation" in entry for entry in entries(out))


def test_what_can_be_shown(detector: Path, masked: Path, photos: Path, tmp_path: Path, run_main: Callable) -> None:
    words = [photos / "wide.jpg", "--output_dir", tmp_path / "out", "--device", "cpu", "--show"]
    for view in ("masks", "panoptic"):
        message = run_main(predict, ["--checkpoint", detector, *words, view], status=2)
        assert message == f"error: --show {view}: the model has no mask head (see main.py --masks)\n"
    message = run_main(predict, ["--checkpoint", masked, *words, "panoptic"], status=2)
    assert "which classes are things? give a panoptic annotation file as --classes" in message
    classes = tmp_path / "panoptic.json"
    categories = [{"id": i, "name": f"class of {i}", "isthing": int(i < 3)} for i in range(5)]
    classes.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    run_main(predict, ["--checkpoint", masked, *words, "panoptic", "--classes", classes, "--threshold", 0.2])
    segments = entries(tmp_path / "out", "panoptic.json")[0]["segments_info"]
    assert segments
    for segment in segments:
        assert segment["isthing"] == (segment["category_id"] < 3)
        assert segment["category_name"] == f"class of {segment['category_id']}"


def test_a_model_with_masks_comes_back_whole(masked: Path, panoptic: Path, save_model: Callable[..., Path]) -> None:
    loaded = load_model(str(masked), DETECTOR, "cpu")
    assert loaded.args.masks and loaded.args.nheads == 4 and loaded.args.num_classes == 5 and not loaded.is_thing_map
    assert loaded.model.bbox_attention.softmax_per_head, "as it was trained"
    assert not load_model(str(masked), DETECTOR, "cpu", mask_softmax="joint").model.bbox_attention.softmax_per_head
    stored = torch.load(masked, weights_only=True)["model"]
    assert all(torch.equal(value, stored[name]) for name, value in loaded.model.state_dict().items())
    assert load_model(str(panoptic), DETECTOR, "cpu").is_thing_map == IS_THING


def test_weights_alone_of_a_published_panoptic_model(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """Its heads are told by its tensors, that it is COCO's by its number of classes."""
    path = save_model("published.pth", masks=True, num_classes=NUM_CLASSES["coco_panoptic"], nheads=2)
    torch.save({"model": torch.load(path, weights_only=True)["model"]}, tmp_path / "weights.pth")
    loaded = load_model(str(tmp_path / "weights.pth"), DETECTOR, "cpu")
    assert loaded.args.nheads == 2 and not loaded.model.bbox_attention.softmax_per_head
    assert (loaded.is_thing_map[90], loaded.is_thing_map[92]) == (True, False)
    assert predict.names_of_classes(loaded, None)[18] == "dog"
    assert predict.view_of(loaded, loaded.is_thing_map, None) == "panoptic"


# Pictures.


def test_masks_tint_their_pixels_alone() -> None:
    image = torch.full((3, 6, 8), 100, dtype=torch.uint8)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:5, 1:6] = True
    tinted = lay_over(image, [ColouredMask(mask, (200, 0, 100))])
    assert torch.equal(tinted[:, ~mask], image[:, ~mask])
    assert tinted[:, 2, 3].tolist() == [150, 50, 100], "half the colour inside"
    assert tinted[:, 1, 1].tolist() == [190, 10, 100], "more of it at the edge"
    assert (image == 100).all()


def test_edges_of_masks() -> None:
    mask = torch.ones(4, 5, dtype=torch.bool)
    assert edge(mask).sum() == 14, "the image's border"
    mask[0, 0] = False
    assert edge(mask)[1, 1] and not edge(mask)[1, 2] and not edge(mask)[0, 0]


def test_names_stand_where_a_segment_is_widest() -> None:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[2:5, :] = True
    mask[2:13, 10:21] = True
    assert innermost_point(mask) == (15.0, 7.0)
    assert innermost_point(torch.ones(1, 1, dtype=torch.bool)) == (0.0, 0.0)


def test_each_thing_has_its_colour_and_stuff_that_of_its_class() -> None:
    colours = colours_of_segments([True, False, True, False], [7, 3, 7, 3])
    assert colours[0] == distinct_colour(0) and colours[2] == distinct_colour(1) and colours[1] == colours[3]
