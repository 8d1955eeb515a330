"""Names and rows that the converter changes; what it makes of each kind of checkpoint. It needs no Detectron2."""
import json
from typing import Any, Dict

import pytest
import torch
from torch import Tensor

from commands import run
from d2.converter import COCO_IDS, backbone_name, class_rows, config_options, convert, find_category_ids
from models import build_model
from models.detr import MLP
from util.checkpoint import EMBEDDING_HEAD, save_checkpoint
from util.errors import InputError


@pytest.mark.parametrize("ours, theirs", [
    ("conv1.weight", "stem.conv1.weight"),
    ("bn1.running_mean", "stem.conv1.norm.running_mean"),
    ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
    ("layer1.0.bn1.weight", "res2.0.conv1.norm.weight"),
    ("layer2.3.bn3.bias", "res3.3.conv3.norm.bias"),
    ("layer3.22.conv2.weight", "res4.22.conv2.weight"),
    ("layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
    ("layer4.0.downsample.1.running_var", "res5.0.shortcut.norm.running_var"),
])
def test_names_of_the_backbone(ours: str, theirs: str) -> None:
    assert backbone_name(ours) == theirs


def test_ids_of_coco() -> None:
    assert len(COCO_IDS) == 80 and COCO_IDS[0] == 1 and COCO_IDS[-1] == 90
    # Traffic light and stop sign, on either side of the first gap; toilet and tv, of one of the last.
    assert [COCO_IDS.index(number) for number in (10, 13, 70, 72)] == [9, 11, 61, 62]


def published_state(published: Dict[str, Any], name: str) -> Dict[str, Tensor]:
    """Tensors of the published shapes, without content."""
    model = published["models"][name]
    state = published_state(published, model["like"]) if model.get("like") else {}
    state.update({key: torch.empty(shape, device="meta") for key, shape in model["add"].items()})
    return {key: value for key, value in state.items() if key not in model["remove"]}


@pytest.mark.parametrize("name, count", [("detr_resnet50", 80), ("detr_resnet101", 80), ("updetr_finetune", 80)])
def test_published_detectors(published: Dict[str, Any], name: str, count: int) -> None:
    state = published_state(published, name)
    converted = convert({key: torch.empty(value.shape) for key, value in state.items()}, COCO_IDS)
    assert len(converted) == len(state) and all(key.startswith("detr.") for key in converted)
    assert converted["detr.class_embed.weight"].shape == (count + 1, 256)
    assert converted["detr.backbone.0.body.net.res4.5.conv3.norm.bias"].shape == (1024,)
    assert not any("layer" in key and key.startswith("detr.backbone.") for key in converted)


def test_published_pretraining_leaves_out_what_only_the_pretext_uses(published: Dict[str, Any]) -> None:
    state = published_state(published, "updetr_pretrain")
    converted = convert(state, None)
    left_out = [key for key in state if key.split(".")[0] in ("patch2query", "feature_align", "class_embed")]
    assert left_out and len(converted) == len(state) - len(left_out)
    assert "detr.query_embed.weight" in converted and "detr.class_embed.weight" not in converted


def test_rows_of_the_classifier_follow_the_category_ids() -> None:
    weight = torch.arange(14.0)[:, None] * torch.ones(1, 2)
    assert class_rows(weight, [3, 7, 12])[:, 0].tolist() == [3, 7, 12, 13]
    assert class_rows(weight[:, 0], [0, 1])[:].tolist() == [0, 1, 13]
    with pytest.raises(InputError, match="category id 13 has no output in --source_model, which has 13 classes"):
        class_rows(weight, [3, 13])


def test_a_model_with_masks_keeps_its_head_beside_the_detector() -> None:
    detector = {"query_embed.weight": torch.zeros(2, 4), "input_proj.weight": torch.zeros(4, 8, 1, 1),
                "backbone.0.body.conv1.weight": torch.zeros(1), "class_embed.bias": torch.arange(5.0)}
    with_masks = {**{f"detr.{key}": value for key, value in detector.items()}, "mask_head.lay1.weight": torch.ones(1),
                  "bbox_attention.q_linear.bias": torch.ones(1)}
    converted = convert(with_masks, [1, 3])
    assert set(converted) == {
        "detr.detr.query_embed.weight", "detr.detr.input_proj.weight", "detr.detr.class_embed.bias",
        "detr.detr.backbone.0.body.net.stem.conv1.weight", "detr.mask_head.lay1.weight",
        "detr.bbox_attention.q_linear.bias"}
    assert converted["detr.detr.class_embed.bias"].tolist() == [1, 3, 4]
    assert set(convert(detector, [1], with_masks=True)) == {key for key in converted if key.startswith("detr.detr.")}


def test_category_ids_come_from_annotations_then_the_checkpoint_then_coco(tmp_path) -> None:
    state = {"class_embed.weight": torch.zeros(10, 4)}
    annotations = tmp_path / "instances.json"
    categories = [{"id": 8, "name": "b"}, {"id": 2}]
    annotations.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    stored = {"class_names": {5: "x", 1: "y"}}
    assert find_category_ids(stored, state, str(annotations)) == [2, 8]
    assert find_category_ids(stored, state, None) == [1, 5]
    for outputs in (91, 250):
        assert find_category_ids({}, {"class_embed.weight": torch.zeros(outputs + 1, 4)}, None) == COCO_IDS
        assert find_category_ids({}, {"detr.class_embed.weight": torch.zeros(outputs + 1, 4)}, None) == COCO_IDS
    with pytest.raises(InputError, match="which categories its 9 outputs stand for: pass --annotations"):
        find_category_ids({}, state, None)


@pytest.mark.parametrize("changes, words", [({"position_embedding": "learned"}, "learned position encodings")])
def test_a_model_without_an_equal_in_the_wrapper_is_refused(tiny_args, changes, words) -> None:
    with pytest.raises(InputError, match=words):
        convert(build_model(tiny_args(**changes))[0].state_dict(), [1])


def test_something_else_than_a_detector_is_refused() -> None:
    with pytest.raises(InputError, match="something else than a detector"):
        convert(MLP(2, 2, 2, 2).state_dict(), [1])


def test_options_name_what_differs_from_the_defaults(tiny_args) -> None:
    state = build_model(tiny_args(pre_norm=True, backbone_last_layer="layer3"))[0].state_dict()
    options = config_options({"args": {"nheads": 4}}, state, 3)
    assert dict(zip(options[::2], options[1::2])) == {
        "MODEL.DETR.NUM_OBJECT_QUERIES": "12", "MODEL.DETR.HIDDEN_DIM": "32", "MODEL.DETR.DIM_FEEDFORWARD": "48",
        "MODEL.DETR.ENC_LAYERS": "2", "MODEL.DETR.DEC_LAYERS": "2", "MODEL.DETR.PRE_NORM": "True",
        "MODEL.DETR.NHEADS": "4", "MODEL.DETR.NUM_CLASSES": "3", "MODEL.RESNETS.DEPTH": "18",
        "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
        "MODEL.RESNETS.OUT_FEATURES": '["res4"]'}
    assert config_options({}, state, 3, with_masks=True)[-1] == '["res2", "res3", "res4"]'
    centred = config_options({"args": {"nheads": 4, "position_from_centre": True}}, state, 3)
    assert centred[centred.index("MODEL.DETR.POSITION_FROM_CENTRE") + 1] == "True"


def test_heads_are_read_off_a_mask_model(tiny_args) -> None:
    state = build_model(tiny_args(masks=True, nheads=4))[0].state_dict()
    options = config_options({}, state, 3, with_masks=True)
    assert options[options.index("MODEL.DETR.NHEADS") + 1] == "4"


def test_a_pre_training_on_regions_is_refused(tiny_args) -> None:
    state = {**build_model(tiny_args())[0].state_dict(), EMBEDDING_HEAD: torch.zeros(2, 2)}
    with pytest.raises(InputError, match="^--source_model holds a DETReg pre-training model: .*: "
                                         "fine-tune it first with main.py --pretrain$"):
        convert(state, [1])


def test_the_published_resnet50_needs_no_options(published: Dict[str, Any]) -> None:
    assert config_options({}, published_state(published, "detr_resnet50"), 80) == []
    dilated = config_options({"args": {"dilation": True}}, published_state(published, "detr_resnet50_dc5"), 80)
    assert dilated == ["MODEL.RESNETS.RES5_DILATION", "2"]


def test_the_program(tiny_args, tmp_path) -> None:
    model = build_model(tiny_args())[0]
    source, output = tmp_path / "detr.pth", tmp_path / "d2.pth"
    save_checkpoint({"model": model.state_dict(), "class_names": {1: "disc", 4: "star"}}, str(source))
    done = run(["d2/converter.py", "--source_model", source, "--output_model", output])
    assert "2 classes with category ids 1, 4" in done.stdout and "MODEL.DETR.NUM_CLASSES 2" in done.stdout
    assert f"--config-file d2/configs/detr_256_6_6_torchvision.yaml MODEL.WEIGHTS {output} " in done.stdout
    converted = torch.load(output, weights_only=True)["model"]
    assert torch.equal(converted["detr.class_embed.bias"], model.class_embed.bias.detach()[[1, 4, 5]])
    refused = run(["d2/converter.py", "--source_model", tmp_path / "none.pth", "--output_model", output], check=False)
    assert refused.returncode == 2 and refused.stderr == f"error: --source_model {tmp_path}/none.pth: no such file\n"
