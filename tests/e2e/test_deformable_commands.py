"""Deformable DETR's recipes and what follows them, run as a user runs them."""
import json

import pytest
import torch

from commands import (ROOT, SMALL_MODEL, coco_tables, finds_something, log_lines, recipe_words, run, weights,
                      write_agreeable_truth, write_data_root)
from main import get_args_parser, main

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("r50_deformable_detr*.sh"))
REFINED, TWO_STAGE = (f"r50_deformable_detr_plus_iterative_bbox_refinement{rest}.sh" for rest in ("", "_plus_plus_two_stage"))
# The published recipe on a model and images that a CPU gets through in seconds.
SMALL = [*SMALL_MODEL, *"--train_sizes 64 --val_size 64 --max_size 96 --num_queries 20 --load_backbone none --epochs 1 "
         "--num_workers 0".split()]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_data_root(tmp_path_factory.mktemp("data"), image_size=64, num_unlabelled=1, num_train=8, num_val=5)


def test_there_are_five_recipes():
    assert len(CONFIGS) == 5 and {REFINED, TWO_STAGE} < set(CONFIGS)


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory):
    """Run a recipe for two epochs, the first with two processes, the second with one; each recipe once.

    Gives its folder, the weights after the first epoch, and what was printed in both.
    """
    done = {}

    def get(name):
        if name not in done:
            out = tmp_path_factory.mktemp("exps")
            small = [*SMALL, "--output_dir", out] + (["--backbone", "resnet50"] if "dc5" in name else [])
            words = ["main.py", *recipe_words(name, *small, data_root=data_root)]
            first = run(words, "pair").stdout
            before = weights(out)
            second = run([*words, "--epochs", "2", "--resume", "auto"]).stdout
            done[name] = out, before, first, second
        return done[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_trains_on_two_processes_and_goes_on_with_one(name, trained):
    """What is appended wins, also over the recipe's own --output_dir; everything else is the published value."""
    out, before, first, second = trained(name)
    stated = set(first.split("  "))
    assert {"model=deformable_detr", "lr=0.0002", "lr_backbone=2e-05", "lr_drop=40", "num_queries=20"} <= stated
    assert f"num_feature_levels={1 if 'single_scale' in name else 4}" in stated and f"dilation={'dc5' in name}" in stated
    assert f"with_box_refine={'refinement' in name}" in stated and f"two_stage={name == TWO_STAGE}" in stated
    assert "2e-05 for " in first and "of reference_points and sampling_offsets" in first
    assert "continuing with epoch 1" in second and len(coco_tables(second)) == 12
    for line in log_lines(out):
        assert len(line["test_coco_eval_bbox"]) == 12 and 0 < line["train_loss"] < 1000
        assert ("train_loss_ce_enc" in line) == (name == TWO_STAGE)
    after = weights(out)
    assert all(not torch.equal(after[key], before[key]) for key in after if "class_embed" in key or "value_proj.weight" in key)


def test_evaluation_is_the_same_for_one_and_two_processes(trained, data_root, tmp_path):
    checkpoint, coco = trained(TWO_STAGE)[0] / "checkpoint.pth", data_root / "MSCoco"
    truth = write_agreeable_truth(checkpoint, coco / "val2017", coco / "annotations/instances_val2017.json", tmp_path)
    words = recipe_words(TWO_STAGE, *SMALL, "--eval", "--no_aux_loss", "--resume", checkpoint, "--val_annotations", truth,
                         "--output_dir", "", data_root=data_root)
    one, two = (coco_tables(run(["main.py", *words], launcher).stdout) for launcher in ("single", "pair"))
    assert len(one) == 12 and one == two and finds_something(one)


def test_resumed_run_is_bit_identical(data_root, tmp_path):
    """In mixed precision, with a schedule of named epochs."""
    def train(folder, *flags):
        words = [*SMALL, *"--device cpu --model deformable_detr --with_box_refine --two_stage --amp bf16".split(),
                 *"--lr_drop_epochs 1 --eval_every 9 --coco_path".split(), data_root / "MSCoco",
                 "--output_dir", tmp_path / folder, *flags]
        main(get_args_parser().parse_args(list(map(str, words))))
        return torch.load(tmp_path / folder / "checkpoint.pth", weights_only=True)

    straight = train("straight", "--epochs", 2)
    train("resumed")
    resumed = train("resumed", "--epochs", 2, "--resume", "auto")
    assert straight["model"].keys() == resumed["model"].keys() and straight["epoch"] == 1
    assert all(torch.equal(value, resumed["model"][name]) for name, value in straight["model"].items())
    assert [group["lr"] for group in resumed["optimizer"]["param_groups"]] == pytest.approx([2e-5, 2e-6, 2e-6])


def test_another_model_starts_from_its_weights(trained, data_root, tmp_path):
    """Two processes train what has idle heads: refinement without the earlier layers' losses; SGD, named drops."""
    pretrained = trained(TWO_STAGE)[0] / "checkpoint.pth"
    words = recipe_words(REFINED, *SMALL, "--pretrain", pretrained, "--no_aux_loss", "--sgd", "--lr_drop_epochs", 1,
                         "--output_dir", tmp_path, data_root=data_root)
    printed = run(["main.py", *words], "pair").stdout
    assert "pretrain: missed 3 tensors: query_embed.weight, transformer.reference_points.bias, " in printed
    checkpoint = torch.load(tmp_path / "checkpoint0000.pth", weights_only=True)
    assert [group["lr"] for group in checkpoint["optimizer"]["param_groups"]] == pytest.approx([2e-5, 2e-6, 2e-6])
    assert all("momentum_buffer" in state for state in checkpoint["optimizer"]["state"].values())
    earlier = torch.load(pretrained, weights_only=True)["model"]
    assert torch.equal(checkpoint["model"]["bbox_embed.0.layers.0.weight"], earlier["bbox_embed.0.layers.0.weight"])
    assert not torch.equal(checkpoint["model"]["bbox_embed.1.layers.0.weight"], earlier["bbox_embed.1.layers.0.weight"])


def test_its_detections_are_shown(trained, data_root, tmp_path):
    images = data_root / "MSCoco" / "val2017"
    done = run(["-m", "tools.predict", "--checkpoint", trained(TWO_STAGE)[0] / "checkpoint.pth", images, "--threshold", 0,
                "--output_dir", tmp_path])
    found = json.loads((tmp_path / "detections.json").read_text())
    assert "500 objects in 5 images" in done.stdout and len(found) == 500
    assert all(entry["category_name"] for entry in found)
