"""The lines at a run's start, in numbers that can be counted by hand."""
import argparse

import pytest
import torch
from torch import nn

from util import summary


@pytest.fixture
def args():
    return argparse.Namespace(batch_size=4, accumulate_steps=3, num_queries=10, num_classes=91, num_patches=None,
                              dataset_file="coco", resume="", pretrain="", load_backbone="supervised")


@pytest.fixture
def model():
    """6 parameters in the backbone, 4 of them fixed, and 3 outside it."""
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"stem": nn.Linear(4, 1, bias=False), "layer": nn.Linear(1, 1)}),
                           "head": nn.Linear(2, 1)})
    model["backbone"]["stem"].requires_grad_(False)
    return model


def optimizer(model):
    return torch.optim.AdamW([{"params": model["head"].parameters()},
                              {"params": model["backbone"]["layer"].parameters(), "lr": 1e-5}], lr=1e-4)


def lines(args, model, objects, names={3: "cat", 90: "dog"}):
    return summary.training_summary(args, model, optimizer(model), names, 3, objects, 7).splitlines()


def test_a_training(args, model, monkeypatch):
    monkeypatch.setattr(summary, "get_world_size", lambda: 2)
    assert lines(args, model, torch.tensor([0, 10, 5])) == [
        "effective batch size: 24 (2 processes x 4 images x 3 accumulated batches), 7 steps an epoch",
        "learning rates: 0.0001 for 3 parameters outside the backbone, 1e-05 for 2 parameters of the backbone, "
        "4 parameters are fixed",
        "weights: backbone from supervised (--load_backbone), the rest at random",
        "training images: 3, 2 classes with labels up to 90 (--num_classes 91)",
        "objects in an image: 5.0 on average, 10 at most; --num_queries 10"]


def test_parameters_with_a_rate_of_their_own(args, model):
    """Deformable DETR's, named by a flag."""
    args.lr_linear_proj_names = ["head", "offsets"]
    assert lines(args, model, None)[1] == (
        "learning rates: 0.0001 for 3 parameters of head and offsets, 1e-05 for 2 parameters of the backbone, "
        "4 parameters are fixed")


def test_more_objects_than_queries(args, model):
    assert lines(args, model, torch.tensor([11, 10, 30]))[-1] == (
        "warning: 2 training images have more objects than --num_queries 10; no more than 10 of them can be found")


def test_images_without_any_or_with_unknown_objects(args, model):
    assert lines(args, model, torch.zeros(3, dtype=torch.int64))[-1].startswith("objects in an image: 0.0 on average, 0 ")
    assert lines(args, model, None)[-1].startswith("training images: 3")
    assert lines(args, model, torch.zeros(0, dtype=torch.int64))[-1].startswith("training images: 3")


def test_a_pre_training(args, model):
    args.dataset_file, args.num_patches = "imagenet", 5
    assert lines(args, model, None, {})[-2:] == ["training images: 3", "patches in an image: 5, for each 2 queries"]


@pytest.mark.parametrize("flags, line", [
    (dict(object_embedding_loss=True),
     "object embeddings: --obj_embedding_head head of --load_embedding swav, weight 0.5"),
    (dict(object_embedding_loss=False), "object embeddings: none (--object_embedding_loss predicts them)")])
def test_a_pre_training_on_regions(args, model, flags, line):
    vars(args).update(dataset_file="regions", max_prop=30, strategy="topk", cache_path="cache",
                      obj_embedding_head="head", load_embedding="swav", object_embedding_coef=0.5, **flags)
    assert lines(args, model, None, {1: "region"})[-2:] == [
        "regions in an image: 30 at most, chosen by --strategy topk, from --cache_path cache", line]


@pytest.mark.parametrize("flags, line", [
    (dict(resume="a.pth", pretrain="b.pth"), "all from a.pth (--resume)"),
    (dict(pretrain="b.pth"), "what fits from b.pth (--pretrain), the rest at random"),
    (dict(frozen_weights="c.pth"), "the detector from c.pth (--frozen_weights), its mask head at random"),
    (dict(load_backbone="none"), "all at random"),
    (dict(load_backbone="swav"), "backbone from swav (--load_backbone), the rest at random")])
def test_where_weights_come_from(args, flags, line):
    vars(args).update(flags)
    assert summary.evaluation_summary(args, {1: "cat"}, 5, None).splitlines() == [
        f"weights: {line}", "evaluation images: 5, 1 classes with labels up to 1 (--num_classes 91)"]
