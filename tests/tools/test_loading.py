"""A model is built from what its checkpoint says, whoever wrote it; the wrong kind is refused in a sentence."""
import argparse
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import torch
from torch import Tensor

from tools.loading import DETECTOR, PRETRAINED, architecture, load_model
from util.errors import InputError

TOLD = ("num_queries", "hidden_dim", "dim_feedforward", "enc_layers", "dec_layers", "pre_norm", "position_embedding",
        "backbone")


def published_state(published: Dict[str, Any], name: str) -> Dict[str, Tensor]:
    """Tensors without content, of the published shapes."""
    model = published["models"][name]
    state = published_state(published, model["like"]) if model.get("like") else {}
    state.update({key: torch.empty(shape, device="meta") for key, shape in model["add"].items()})
    return {key: value for key, value in state.items() if key not in model["remove"]}


def published_flags(published: Dict[str, Any], name: str) -> Dict[str, Any]:
    """Its flags; those of a model like another one are written down where they differ."""
    model = published["models"][name]
    return {**(published_flags(published, model["like"]) if model.get("like") else {}), **model["args"]}


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "updetr_pretrain",
                                  "updetr_finetune", "detr_resnet101_panoptic"])
def test_the_tensors_of_published_models_tell_their_flags(published: Dict[str, Any], name: str) -> None:
    told = architecture(published_state(published, name), name)
    flags = published_flags(published, name)
    assert {flag: told[flag] for flag in TOLD} == {flag: flags[flag] for flag in TOLD}
    assert told["backbone_last_layer"] == "layer4"
    if name == "updetr_pretrain":
        assert told["feature_recon"]
    else:
        assert told.get("masks", False) == name.endswith("panoptic")


@pytest.mark.parametrize("variant", ["", "_single_scale", "_single_scale_dc5", "_refine", "_two_stage", "_two_stage_no_refine"])
def test_the_tensors_of_published_deformable_detrs_tell_their_flags(published: Dict[str, Any], variant: str) -> None:
    name = "deformable_detr" + variant
    told = architecture(published_state(published, name), name)
    flags = {**published_flags(published, "detr_resnet50"), **published_flags(published, name)}
    names = {"num_feature_levels", "enc_n_points", "dec_n_points", "with_box_refine", "two_stage", *TOLD} - {"pre_norm"}
    if flags["two_stage"]:
        names.remove("num_queries")  # no tensor has so many rows
    assert {flag: told[flag] for flag in names} == {flag: flags[flag] for flag in names}
    assert told["model"] == "deformable_detr" and told["num_classes"] == 91 and "pre_norm" not in told


@pytest.mark.parametrize("changes", [{}, {"with_box_refine": True, "nheads": 2, "dec_n_points": 3},
                                     {"two_stage": True, "num_feature_levels": 5, "num_queries": 7},
                                     {"num_feature_levels": 1, "backbone_last_layer": "layer3"}])
def test_a_deformable_detr_comes_back_whole(save_model: Callable[..., Path], changes: Dict[str, Any]) -> None:
    path = save_model("model.pth", class_names={1: "disc"}, val_size=64, model="deformable_detr", **changes)
    model, args, class_names, _ = load_model(str(path), DETECTOR, "cpu")
    assert not model.training and class_names == {1: "disc"} and args.val_size == 64
    assert {name: getattr(args, name) for name in changes} == changes
    stored = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
def test_a_detreg_comes_back_as_the_detector_of_regions_that_it_is(save_model: Callable[..., Path], model: str) -> None:
    path = save_model("model.pth", class_names={1: "region"}, model=model, dataset_file="regions",
                      object_embedding_loss=True)
    loaded, args, class_names, _ = load_model(str(path), DETECTOR, "cpu")
    stored = torch.load(path, weights_only=True)["model"]
    assert class_names == {1: "region"} and bool(args.position_from_centre) == (model == "detr")
    assert loaded.backbone[1].shift == 0.5
    assert {name for name in stored if name not in loaded.state_dict()} == {
        f"feature_embed.layers.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")}
    assert all(torch.equal(value, stored[name]) for name, value in loaded.state_dict().items())


def test_heads_of_a_deformable_detr_must_share_its_points(save_model: Callable[..., Path], tmp_path: Path) -> None:
    state = torch.load(save_model("model.pth", model="deformable_detr", nheads=2, enc_n_points=1, dec_n_points=1),
                       weights_only=True)["model"]
    weights = tmp_path / "weights.pth"
    torch.save({"model": state}, weights)
    with pytest.raises(InputError, match=r"weights.pth samples 8 points of 4 feature levels, which 8 attention heads can't "
                                         r"share; give --nheads$"):
        load_model(str(weights), DETECTOR, "cpu")
    assert load_model(str(weights), DETECTOR, "cpu", nheads=2).args.enc_n_points == 1


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True, "backbone_last_layer": "layer3"},
                                     {"position_embedding": "learned", "nheads": 2, "dec_layers": 1},
                                     {"masks": True, "mask_softmax": "per_head"}])
def test_our_checkpoint_comes_back_whole(save_model: Callable[..., Path], changes: Dict[str, Any]) -> None:
    path = save_model("model.pth", class_names={1: "disc"}, val_size=64, **changes)
    model, args, class_names, _ = load_model(str(path), DETECTOR, "cpu")
    assert not model.training and class_names == {1: "disc"} and args.val_size == 64 and args.max_size == 1333
    assert args.nheads == changes.get("nheads", 4)
    assert args.masks == ("masks" in changes) and (not args.masks or model.bbox_attention.softmax_per_head)
    stored = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_what_is_given_counts_more_than_what_is_stored(detector: Path, pretrained: Path) -> None:
    assert load_model(str(detector), DETECTOR, "cpu", val_size=32).args.val_size == 32
    assert load_model(str(pretrained), PRETRAINED, "cpu", num_patches=4).args.num_patches == 4


def test_official_checkpoints_hold_a_namespace_or_weights_alone(detector: Path, tmp_path: Path) -> None:
    stored = torch.load(detector, weights_only=True)
    with_namespace, weights = tmp_path / "namespace.pth", tmp_path / "weights.pth"
    torch.save({"model": stored["model"], "args": argparse.Namespace(nheads=2, masks=False)}, with_namespace)
    torch.save({"model": stored["model"]}, weights)
    assert load_model(str(with_namespace), DETECTOR, "cpu").args.nheads == 2
    loaded = load_model(str(weights), DETECTOR, "cpu")
    assert (loaded.args.nheads, loaded.args.val_size, loaded.class_names) == (8, 800, {})
    with pytest.raises(InputError, match="--hidden_dim 32 must be a multiple of 4 and of --nheads 5"):
        load_model(str(weights), DETECTOR, "cpu", nheads=5)


def test_wrong_kinds_are_named(detector: Path, pretrained: Path, published: Dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds an UP-DETR pre-training model, .* python -m tools.find_patch"):
        load_model(str(pretrained), DETECTOR, "cpu")
    with pytest.raises(InputError, match="holds a post-norm DETR with 5 classes, .* python -m tools.predict"):
        load_model(str(detector), PRETRAINED, "cpu")
    other = tmp_path / "classifier.pth"
    torch.save({"fc.weight": torch.zeros(2, 2)}, other)
    with pytest.raises(InputError, match="holds something else than a detector; this program shows DETR, Def"):
        load_model(str(other), DETECTOR, "cpu")
    state = torch.load(detector, weights_only=True)["model"]
    state["backbone.0.body.layer1.7.conv1.weight"] = torch.zeros(1)
    torch.save({"model": state}, other)
    with pytest.raises(InputError, match="its backbone, with 3, 2, 2, 2 residual blocks, is none of resnet18"):
        load_model(str(other), DETECTOR, "cpu")
    with pytest.raises(InputError, match="--checkpoint missing.pth: no such file"):
        load_model("missing.pth", DETECTOR, "cpu")


def test_a_model_of_regions_sees_images_as_large_as_in_its_pre_training(save_model: Callable[..., Path]) -> None:
    """Its flags name no size of evaluation."""
    path = save_model("regions.pth", dataset_file="regions", model="detr", pretrain_sizes=[48, 64], pretrain_max_size=96)
    args = load_model(str(path), DETECTOR, "cpu").args
    assert (args.val_size, args.max_size) == (64, 96)
    assert load_model(str(path), DETECTOR, "cpu", val_size=50).args.val_size == 50
