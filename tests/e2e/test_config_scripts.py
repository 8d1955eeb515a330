"""The recipes in configs/: what each of them says to main.py, and UP-DETR's trained as a user runs them."""
import argparse
import os

import pytest
import torch

from commands import ROOT, SMALL_MODEL, log_lines, recipe_words, run, weights, write_data_root
from main import get_args_parser
from util import recipes

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.sh"))
UPDETR = [name for name in CONFIGS if name.startswith("UPDETR_")]
PRETRAIN, FINE_TUNE = "UPDETR_pretrain", "UPDETR_fine_tune"
# The published recipe on a model and images that a CPU gets through in seconds.
SMALL = [*SMALL_MODEL, *"--num_queries 20 --batch_size 2 --epochs 1 --num_workers 0".split()]
SMALL_PRETRAIN = [*SMALL, *"--pretrain_sizes 64 --pretrain_max_size 96 --patch_size 32 --load_backbone none".split()]
SMALL_FINE_TUNE = [*SMALL, *"--train_sizes 64 --val_size 64 --max_size 96".split()]
# What UP-DETR's paper changes from recipe to recipe.
PUBLISHED = {
    PRETRAIN: dict(num_patches=10, feature_recon=True, fre_cnn=True, lr_backbone=0, eos_coef=0.1),
    f"{PRETRAIN}_1patch": dict(num_patches=1, feature_recon=True, fre_cnn=True, lr_backbone=0, eos_coef=0.01),
    f"{PRETRAIN}_no_reconstruction": dict(num_patches=10, feature_recon=False, fre_cnn=True, lr_backbone=0,
                                          eos_coef=0.1),
    f"{PRETRAIN}_unfrozen_cnn": dict(num_patches=10, feature_recon=True, fre_cnn=False, lr_backbone=1e-4, eos_coef=0.1),
    **{f"{FINE_TUNE}_{data}_{epochs}ep": dict(dataset_file=data, epochs=epochs, lr_drop=drop, lr_backbone=5e-5)
       for data in ("coco", "voc") for epochs, drop in ((150, 100), (300, 200))},
}
COMMON = {PRETRAIN: dict(dataset_file="imagenet", epochs=60, lr_drop=40, batch_size=32, load_backbone="swav"),
          FINE_TUNE: dict(pretrain=f"exps/{PRETRAIN}/checkpoint.pth")}


def said(name, *flags):
    """What a recipe says to main.py, defaults filled in."""
    parser = argparse.ArgumentParser(parents=[get_args_parser()], allow_abbrev=False)
    args = parser.parse_args([*recipe_words(name, *flags, data_root="/data of all"), "--device", "cpu"])
    recipes.require_data(recipes.resolve(args))
    return args


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_is_a_training_and_what_is_appended_wins(name):
    args = said(name)
    assert args.output_dir == f"exps/{name.removesuffix('.sh')}"
    paths = [getattr(args, flag) for flag in ("coco_path", "voc_path", "imagenet_path") if getattr(args, flag)]
    assert len(paths) == 1 and paths[0].startswith("/data of all/")
    changed = said(name, "--epochs", "7", "--output_dir", "my run", "--batch_size", "3")
    assert (changed.epochs, changed.output_dir, changed.batch_size) == (7, "my run", 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_opens_by_saying_what_to_expect(name):
    path = ROOT / "configs" / name
    header = path.read_text().split("exec ")[0]
    assert os.access(path, os.X_OK) and header.startswith("#!/usr/bin/env bash\n")
    assert "# Expected: " in header and "# Run: " in header and f"./configs/{name}" in header and "https://" in header


def test_the_recipes_of_up_detr_are_the_papers():
    assert sorted(PUBLISHED) == [name.removesuffix(".sh") for name in UPDETR]
    for name, expected in PUBLISHED.items():
        args = said(f"{name}.sh")
        expected = {**COMMON[PRETRAIN if name.startswith(PRETRAIN) else FINE_TUNE], **expected, "model": "detr",
                    "pre_norm": True, "lr": 1e-4, "num_queries": 100}
        assert {flag: getattr(args, flag) for flag in expected} == pytest.approx(expected)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_data_root(tmp_path_factory.mktemp("data"), image_size=64, num_unlabelled=8, num_train=8, num_val=2)


@pytest.fixture(scope="module")
def runs(data_root, tmp_path_factory):
    """Run every recipe for an epoch with two processes, and on for a second one with one process.

    Fine-tunings start from what the pre-training left. Gives the folder of all runs, the weights after the first epoch,
    and what was printed with two processes and with one.
    """
    folder = tmp_path_factory.mktemp("exps")
    printed, before = {"pair": "", "single": ""}, {}
    for name in sorted(UPDETR, key=lambda name: name.startswith(FINE_TUNE)):
        flags = ["--output_dir", folder / name, "--device", "cpu"]
        flags += SMALL_PRETRAIN if name.startswith(PRETRAIN) else [
            *SMALL_FINE_TUNE, "--pretrain", folder / f"{PRETRAIN}.sh" / "checkpoint.pth"]
        words = ["main.py", *recipe_words(name, *flags, data_root=data_root)]
        printed["pair"] += run(words, "pair").stdout
        before[name] = weights(folder / name)
        printed["single"] += run([*words, "--epochs", "2", "--resume", "auto"]).stdout
    return folder, before, *printed.values()


def test_up_detr_runs_with_two_processes_and_with_one(runs):
    folder, _, first, second = runs
    assert first.count("distributed: 2 processes, gloo") == len(UPDETR) and "distributed: " not in second
    assert first.count("pretrain: loaded") == 4 and second.count("continuing with epoch 1") == len(UPDETR)


@pytest.mark.parametrize("name", UPDETR)
def test_up_detr_trains_what_its_recipe_says(name, runs):
    folder, earlier, _, _ = runs
    pretraining = name.startswith(PRETRAIN)
    before, after = earlier[name], weights(folder / name)
    assert ("patch2query.weight" in after) == pretraining
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    trains_cnn = not pretraining or "unfrozen" in name
    assert {"query_embed.weight", "bbox_embed.layers.2.weight"} <= changed
    assert any(key.startswith("backbone.0.body.layer4") for key in changed) == trains_cnn
    lines = log_lines(folder / name)
    assert len(lines) == 2 and all(0 < line["train_loss"] < 1000 for line in lines)
    assert all(("train_loss_feature" in line) == (pretraining and "no_rec" not in name) for line in lines)
    assert all(("test_coco_eval_bbox" in line) == (not pretraining) for line in lines)
