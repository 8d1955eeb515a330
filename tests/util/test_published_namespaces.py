"""Namespaces of the published programs' parsers, and flags stored in checkpoints, build models and data sets."""
import argparse
import json
import math
from typing import Any, Callable, Dict

import pytest
import torch
from PIL import Image

import main
from datasets import build_dataset
from models import build_model
from models.backbone import build_backbone
from models.deformable_transformer import build_deformable_transformer
from models.position_encoding import build_position_encoding
from models.transformer import build_transformer
from util import recipes
from util.errors import InputError
from util.training_state import plain_args

SMALL = {"backbone": "resnet18", "enc_layers": 1, "dec_layers": 2, "hidden_dim": 32, "dim_feedforward": 32,
         "num_queries": 20, "resume": "x", "device": "cpu"}
PROGRAMS = ("detr", "updetr_pretrain", "updetr_finetune", "deformable", "detreg")


@pytest.fixture
def space(original_flags: Dict[str, Any]) -> Callable[..., argparse.Namespace]:
    """The Namespace of a program's parser where no flag but those of a small model is given."""
    def make(program: str, **changes: Any) -> argparse.Namespace:
        flags = {flag["dest"]: flag["default"] for flag in original_flags[program].values()}
        return argparse.Namespace(**{**flags, **SMALL, **changes})
    return make


def test_the_table_of_all_flags_is_the_parsers():
    assert recipes.BLANK == vars(main.get_args_parser().parse_args([]))


@pytest.mark.parametrize("program", PROGRAMS)
def test_builds_what_the_program_built(space, program):
    args = space(program)
    before = dict(vars(args))
    model, criterion, postprocessors = build_model(args)
    assert vars(args) == before
    assert set(postprocessors) == {"bbox"} and len(model.query_embed.weight) == 20
    deformable = program in ("deformable", "detreg")
    assert type(model).__name__ == ("UPDETR" if "pretrain" in program else "DeformableDETR" if deformable else "DETR")
    assert criterion.weight_dict["loss_ce"] == (2 if deformable else 1)
    build_backbone(args)
    build_position_encoding(args)
    (build_deformable_transformer if deformable else build_transformer)(args)
    assert vars(args) == before


@pytest.mark.parametrize("program, changes, expected", [
    ("detr", {}, ("detr", "coco")), ("detr", {"dataset_file": "coco_panoptic", "masks": True}, ("detr", "coco_panoptic")),
    ("detr", {"dataset_file": "voc"}, ("detr", "voc")), ("updetr_pretrain", {}, ("detr", "imagenet")),
    ("updetr_pretrain", {"dataset_file": "ImageNet"}, ("detr", "imagenet")),
    ("updetr_finetune", {}, ("detr", "coco")), ("deformable", {}, ("deformable_detr", "coco")),
    ("deformable", {"dataset_file": "voc"}, ("deformable_detr", "voc")),
    ("deformable", {"lr_drop_epochs": [20, 30]}, ("deformable_detr", "coco")),
    ("deformable", {"position_embedding": "learned"}, ("deformable_detr", "coco")),
    ("detreg", {}, ("deformable_detr", "regions")), ("detreg", {"dataset": "coco"}, ("deformable_detr", "coco")),
    ("detreg", {"dataset": "voc", "dataset_file": "voc", "model": "detr"}, ("detr", "voc")),
    ("detreg", {"model": "detr", "object_embedding_loss": True}, ("detr", "regions"))])
def test_each_program_is_recognised(space, program, changes, expected):
    args = recipes.resolve(space(program, **changes))
    assert (args.model, args.dataset_file) == expected


def test_paths_that_detregs_program_derives_are_not_given(space):
    paths = {"coco_path": "data/MSCoco", "imagenet_path": "data/ilsvrc", "voc_path": "data/pascal"}
    args = recipes.resolve(space("detreg", **paths))
    assert (args.dataset_file, args.imagenet_path, args.coco_path) == ("regions", "data/ilsvrc/train", None)
    args = recipes.resolve(space("detreg", dataset="coco", **paths))
    assert (args.dataset_file, args.coco_path, args.voc_path) == ("coco", "data/MSCoco", None)
    args = recipes.resolve(space("detreg", dataset="coco", coco_path="elsewhere"))
    assert (args.dataset_file, args.coco_path) == ("coco", "elsewhere")


def test_defaults_of_a_parser_are_not_given(space):
    args = recipes.resolve(space("detr", lr=3e-4))
    assert args.given == {**SMALL, "lr": 3e-4, "dataset_file": "coco"}
    assert args.lr_backbone == 1e-5 and args.epochs == 300 and args.accumulate_steps == 1


def test_what_is_asked_for_in_vain_is_still_refused(space):
    for program, changes, flag in (
            ("detr", {"mask_loss_coef": 2}, "mask_loss_coef"), ("detr", {"remove_difficult": True}, "remove_difficult"),
            ("deformable", {"masks": True}, "masks"), ("detreg", {"strategy": "mc_1", "dataset": "coco"}, "strategy")):
        with pytest.raises(InputError, match=f"^--{flag} "):
            recipes.resolve(space(program, **changes))
    for changes in ({"dataset_file": "lvis"}, {"dataset_file": None, "dataset": "lvis"}):
        with pytest.raises(InputError, match="'lvis' is not one of "):
            recipes.resolve(space("detr", **changes))


def test_a_gpu_that_is_not_there_is_not_asked_for(space, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        assert recipes.resolve(space("detr", device=device)).device == "cpu"


def test_an_empty_path_is_not_given(space):
    args = recipes.resolve(space("detr", frozen_weights="", coco_panoptic_path=""))
    assert args.frozen_weights is None and args.dataset_file == "coco"


def test_what_programs_do_unasked(space):
    """DETReg's DETR counts positions from pixels' centres; UP-DETR's masks take one softmax for each head."""
    assert not recipes.resolve(space("detr")).position_from_centre
    args = recipes.resolve(space("detreg", model="detr", dataset="coco"))
    assert args.position_from_centre and args.position_embedding_scale == 2 * math.pi
    assert recipes.resolve(space("detr", masks=True)).mask_softmax == "joint"
    assert recipes.resolve(space("updetr_finetune", masks=True)).mask_softmax == "per_head"


def test_the_published_voc_model_has_its_classes(space):
    assert build_model(space("updetr_finetune", dataset_file="voc"))[0].class_embed.out_features == 21
    detreg = space("detreg", dataset="voc", dataset_file="voc")
    assert build_model(detreg)[0].class_embed[0].out_features == 21


def test_flags_of_our_own_checkpoints_build_their_model(tiny_args):
    for changes in ({}, {"masks": True}, {"lr_drop_epochs": [3, 5]}, {"dataset": "coco", "data_root": "x"}):
        args = tiny_args(**changes)
        keys = build_model(args)[0].state_dict().keys()
        stored = json.loads(json.dumps(plain_args(args)))
        assert build_model(stored)[0].state_dict().keys() == keys
        assert build_model(argparse.Namespace(**stored))[0].state_dict().keys() == keys


def test_data_sets(space, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "val2017/1.jpg")
    content = {"images": [{"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}],
               "categories": [{"id": 3, "name": "cat"}],
               "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [4, 3, 10, 20], "area": 200,
                                "iscrowd": 0}]}
    for part in ("train", "val"):
        (tmp_path / f"annotations/instances_{part}2017.json").write_text(json.dumps(content))
    for program in ("detr", "updetr_finetune", "deformable"):
        image, target = build_dataset("val", space(program, coco_path=str(tmp_path)))[0]
        assert image.shape == (3, 800, 1066) and target["labels"].tolist() == [3]
    (tmp_path / "MSCoco").symlink_to(tmp_path)
    assert len(build_dataset("val", space("detreg", dataset="coco", data_root=str(tmp_path)))) == 1
    assert len(build_dataset("train", space("updetr_pretrain", imagenet_path=str(tmp_path)))) == 1


def test_flags_of_every_published_model_are_understood(published):
    models = published.get("models", published)
    for name, model in models.items():
        args = recipes.settled(argparse.Namespace(**model["args"]))
        pretraining = "imagenet" if name.startswith("updetr_pretrain") else "regions"
        assert args.model == ("deformable_detr" if "def" in name else "detr"), name
        assert (args.dataset_file == pretraining) == ("pretrain" in name), name
        recipe = recipes.RECIPES[args.model, args.dataset_file]
        given = {flag: value for flag, value in model["args"].items() if flag in recipe}
        assert {flag: getattr(args, flag) for flag in given} == given, name
