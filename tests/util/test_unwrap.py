"""Weights are found in whatever a training program wrapped them in; VOC models of DETReg's program get our labels."""
import argparse

import numpy as np
import pytest
import torch

from util.checkpoint import load_checkpoint, model_state
from util.unwrap import find_weights

STATE = {"input_proj.weight": torch.ones(2), "transformer.decoder.norm.weight": torch.zeros(3)}


def named(prefix):
    return {prefix + name: value for name, value in STATE.items()}


@pytest.mark.parametrize("checkpoint", [
    STATE, {"model": STATE}, {"state_dict": named("model.")}, {"model_ema": STATE}, {"ema": {"module": STATE, "updates": 3}},
    {"model": named("module.")}, {"model": named("_orig_mod.")}, {"model": named("module._orig_mod.")},
    {"model": named("_orig_mod.module.")}, {"state_dict": named("model._orig_mod.")},
    {"state_dict": {**named("model."), "criterion.empty_weight": torch.ones(2)}, "epoch": 3},
    {"model": {"input_proj._orig_mod.weight": STATE["input_proj.weight"],
               "transformer.decoder.norm.weight": STATE["transformer.decoder.norm.weight"]}},
    {"model": {**named("module."), "n_averaged": torch.tensor(3)}},
    {"model": {name: value.numpy() for name, value in STATE.items()}},
    {"model": {**STATE, "backbone.0.body.bn1.num_batches_tracked": torch.tensor(1)}},
    {"model": "detr", "state_dict": STATE}])
def test_wrapped_weights_are_found(checkpoint):
    found = model_state(checkpoint, "a.pth")
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_what_holds_no_weights_has_none():
    for checkpoint in ({}, {"model": {}}, {"model": {"a": 1}}, {"epoch": 1}):
        assert find_weights(checkpoint) == {}


@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.arange(6).reshape(2, 3),
                                   np.str_("a"), np.datetime64("2026-11-29"), np.array(["a", "bc"])])
def test_numbers_of_numpy_are_read(value, tmp_path):
    torch.save({"model": STATE, "best": value}, tmp_path / "a.pth")
    found = load_checkpoint(str(tmp_path / "a.pth"))["best"]
    assert np.array_equal(found, value) and np.asarray(found).dtype == np.asarray(value).dtype


def heads(rows):
    return torch.arange(float(rows))[:, None].expand(rows, 2)


@pytest.mark.parametrize("args", [{"dataset": "voc", "dataset_file": "voc"}, argparse.Namespace(dataset="voc")])
def test_voc_models_of_detregs_program_count_from_one_here(args):
    deformable = {"transformer.level_embed": torch.ones(1), "class_embed.0.weight": heads(21), "class_embed.0.bias": heads(21)[:, 0]}
    found = model_state({"model": deformable, "args": args}, "a.pth")
    assert found["class_embed.0.weight"][:, 0].tolist() == found["class_embed.0.bias"].tolist() == [20, *range(20)]
    detr = {"class_embed.weight": heads(22), "bbox_embed.weight": heads(22)}
    found = model_state({"model": detr, "args": args}, "a.pth")
    assert found["class_embed.weight"][:, 0].tolist() == [20, *range(20), 21]  # no object stays on top
    assert torch.equal(found["bbox_embed.weight"], detr["bbox_embed.weight"])


def test_other_voc_models_keep_their_labels():
    model = {"class_embed.weight": heads(22)}
    ours = {"args": {"dataset_file": "voc", "load_embedding": None}}, {"args": {"dataset_file": "voc"}, "class_names": {}}
    for checkpoint in (*ours, {"args": {"dataset_file": "coco"}}, {}):
        assert torch.equal(model_state({"model": model, **checkpoint}, "a.pth")["class_embed.weight"], heads(22))
    updetr = {"model": {"class_embed.weight": heads(21)}, "args": {"dataset_file": "voc"}}  # 20 classes and no object
    assert torch.equal(model_state(updetr, "a.pth")["class_embed.weight"], heads(21))


@pytest.mark.parametrize("place", ["model_state", "state_dict_ema", "network", "weights", "params", "teacher", "checkpoint"])
def test_other_names_of_places_and_wrappers(place):
    weights = find_weights({place: {"_fsdp_wrapped_module.a._checkpoint_wrapped_module.weight": torch.ones(2)}, "epoch": 1})
    assert list(weights) == ["a.weight"]
