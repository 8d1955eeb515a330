"""DETReg's recipes: pre-training on regions, and fine-tuning from it, as a user runs them."""
import json
import os
import textwrap

import pytest
import torch

from commands import ROOT, SMALL_MODEL, SMALL_PRETRAIN, log_lines, recipe_words, run
from datasets.toy import ToySettings, write_toy
from main import get_args_parser, main
from tools import cache_proposals, predict
from util.errors import InputError
from util.recipes import resolve
from util.training_state import TrainingState

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("DETReg_*.sh"))
PRETRAINING = {"DETReg_top30_in": "ilsvrc/train", "DETReg_top30_in100": "ilsvrc100/train",
               "DETReg_top30_in_detr": "ilsvrc/train", "DETReg_top30_coco": "MSCoco/train2017"}
# What the recipes say, by the published facts: epochs, the epochs after which rates fall, and what they train on.
STATED = {
    "DETReg_top30_in": (5, 40, None), "DETReg_top30_in100": (50, 40, None), "DETReg_top30_in_detr": (60, 40, None),
    "DETReg_top30_coco": (50, 40, None), "DETReg_fine_tune_full_coco": (50, 40, -1),
    "DETReg_fine_tune_1pct_coco": (2000, 2000, 0.01), "DETReg_fine_tune_2pct_coco": (1000, 1000, 0.02),
    "DETReg_fine_tune_5pct_coco": (500, 500, 0.05), "DETReg_fine_tune_10pct_coco": (400, 400, 0.1),
    "DETReg_fine_tune_full_pascal": (100, 70, -1), "DETReg_fine_tune_10pct_pascal": (200, 150, 0.1),
}
SMALL = [*SMALL_MODEL, *"--num_queries 20 --batch_size 2 --num_workers 0 --epochs 1 --device cpu".split()]
SMALL_REGIONS = [*SMALL_PRETRAIN, *SMALL,
                 *"--batch_size 4 --load_backbone none --crop_resize 80 --crop_size 60 90".split()]
SMALL_LABELLED = [*SMALL, *"--train_sizes 64 --val_size 64 --max_size 96 --crop_resize 64 --crop_size 48 64".split()]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """A folder laid out as the recipes expect, with a world of a few images, and their regions in `cache`."""
    root = tmp_path_factory.mktemp("data")
    write_toy(root / "toy", ToySettings(image_size=96, num_unlabelled=8, num_train=20, num_val=2), num_workers=1)
    (root / "MSCoco").symlink_to(root / "toy/coco")
    for place, images in {"ilsvrc/train": "unlabelled", "ilsvrc100/train": "unlabelled",
                          "pascal/VOCdevkit": "VOCdevkit"}.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(root / "toy" / images)
    return root


@pytest.fixture(scope="module")
def caches(data_root, tmp_path_factory):
    """Where the regions of each folder of images are."""
    done = {}
    for images in ("ilsvrc/train", "MSCoco/train2017"):
        done[images] = str(tmp_path_factory.mktemp("caches") / "cache")
        cache_proposals.main(cache_proposals.get_args_parser().parse_args(
            ["--imagenet_path", str(data_root / images), "--cache_path", done[images], "--num_workers", "1"]))
    return {**done, "ilsvrc100/train": done["ilsvrc/train"]}  # the same images


def train(*flags):
    """main.py in this process; returns the checkpoint that it leaves."""
    args = get_args_parser().parse_args(list(map(str, flags)))
    main(args)
    return torch.load(os.path.join(args.output_dir, "checkpoint.pth"), weights_only=True)


# The recipes.


def test_there_are_eleven_recipes():
    assert set(CONFIGS) == set(STATED)


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_state_the_published_values(name, data_root):
    args = resolve(get_args_parser().parse_args([*recipe_words(f"{name}.sh", data_root=data_root), "--device", "cpu"]))
    epochs, lr_drop, share = STATED[name]
    assert (args.epochs, args.lr_drop, args.filter_pct) == (epochs, lr_drop, share)
    assert args.output_dir == f"exps/{name}" and args.model == ("detr" if "detr" in name else "deformable_detr")
    assert args.lr == (1e-4 if "detr" in name else 2e-4) and args.num_queries == (100 if "detr" in name else 300)
    if name in PRETRAINING:
        assert args.imagenet_path == str(data_root / PRETRAINING[name]) and args.dataset_file == "regions"
        assert (args.strategy, args.max_prop, args.lr_backbone, args.load_backbone) == ("topk", 30, 0, "swav")
        assert args.object_embedding_loss and args.object_embedding_coef == 1
        assert args.obj_embedding_head == "intermediate"
        assert args.load_embedding == "swav" and args.pre_norm == (True if "detr" in name else None)
    else:
        assert args.lr_backbone == 2e-5 and args.pretrain.startswith("exps/DETReg_top30_")


@pytest.fixture(scope="module")
def recipe_runs(data_root, caches, tmp_path_factory):
    """Run every recipe for an epoch, with one and with two processes; gives the folder of the runs of each kind.

    Fine-tunings start from what the pre-training on ImageNet's images left.
    """
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"processes{processes}")
        for name in sorted(CONFIGS, key=lambda name: name not in PRETRAINING):
            added = ["--output_dir", folders[processes] / name]
            if name in PRETRAINING:
                added += [*SMALL_REGIONS, "--cache_path", caches[PRETRAINING[name]]]
            else:
                added += [*SMALL_LABELLED, "--batch_size", 1, "--eval_every", 1,
                          "--pretrain", folders[1] / "DETReg_top30_in/checkpoint.pth"]
                if "10pct" not in name:  # a world of 20 images has no 1 % for two processes
                    added += ["--filter_pct", 0.1]
            flags = recipe_words(f"{name}.sh", *added, data_root=data_root)
            if processes == 1:
                train(*flags)
            else:
                run(["main.py", *flags], "pair")
    return folders


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_train_with_one_and_two_processes(name, recipe_runs):
    for processes, folder in recipe_runs.items():
        (line,) = log_lines(folder / name)
        assert 0 < line["train_loss"] < 1000 and ("train_loss_object_embedding" in line) == (name in PRETRAINING)
        assert len(line.get("test_coco_eval_bbox", [])) == (0 if name in PRETRAINING else 12)
        checkpoint = torch.load(folder / name / "checkpoint.pth", weights_only=True)
        assert checkpoint["args"]["world_size"] == processes
        assert any("feature_embed" in key for key in checkpoint["model"]) == (name in PRETRAINING)


# From pre-training to fine-tuning, by hand.


@pytest.fixture(scope="module", params=["detr", "deformable_detr"])
def pretrained(request, data_root, caches, tmp_path_factory):
    """A model pre-trained for two epochs in DETReg's terms; gives its name, its flags, its folder and the output."""
    out = tmp_path_factory.mktemp("pretrained")
    flags = ["--model", request.param, "--dataset", "imagenet", "--data_root", data_root, "--object_embedding_loss",
             *SMALL_REGIONS, "--cache_path", caches["ilsvrc/train"], "--output_dir", out]
    done = run(["main.py", *flags, "--epochs", 2])
    return request.param, flags, out, done.stdout


def test_the_start_of_a_pre_training_tells_what_is_predicted(pretrained):
    model, _, out, printed = pretrained
    assert printed.split("\n\n", 1)[1].startswith(f"DETReg pre-training of {'DETR' if model == 'detr' else 'Deformable DETR'}\n")
    assert "\nobject embeddings: --obj_embedding_head intermediate of --load_embedding none, weight 1\n" in printed
    assert [line["epoch"] for line in log_lines(out)] == [0, 1]
    stored = torch.load(out / "checkpoint.pth", weights_only=True)
    assert stored["class_names"] == {1: "region"}
    # Nothing of the frozen network: the detector's own backbone is the only ResNet.
    assert sum(key.endswith("conv1.weight") and "layer" not in key for key in stored["model"]) == 1
    groups = stored["optimizer"]["param_groups"]
    assert len(stored["optimizer"]["state"]) == sum(len(group["params"]) for group in groups)
    assert not groups[1]["params"]


def test_a_resumed_pre_training_is_bit_identical(pretrained, tmp_path):
    model, flags, out, _ = pretrained
    train(*flags, "--output_dir", tmp_path)
    resumed = train(*flags, "--output_dir", tmp_path, "--epochs", 2, "--resume", "auto")
    straight = torch.load(out / "checkpoint.pth", weights_only=True)
    assert straight["model"].keys() == resumed["model"].keys() and resumed["epoch"] == 1
    assert all(torch.equal(value, resumed["model"][name]) for name, value in straight["model"].items())


def test_fine_tuning_starts_from_the_detector(pretrained, data_root, tmp_path):
    """With as many classes as the pre-training had: its class still does not enter."""
    model, _, out, _ = pretrained
    done = run(["main.py", "--model", model, "--dataset", "coco", "--data_root", data_root, *SMALL_LABELLED,
                "--num_classes", 91, "--filter_num", 2, "--lr", 1e-9, "--lr_backbone", 0, "--pretrain",
                out / "checkpoint.pth", "--output_dir", tmp_path])
    heads = 2 if model == "detr" else 4
    assert f"pretrain: missed {heads} tensors: class_embed." in done.stdout
    assert f"pretrain: skipped {heads + 4} tensors: class_embed." in done.stdout
    assert ("positions count to a pixel's centre, as in " in done.stdout) == (model == "detr")
    before, after = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (out, tmp_path))
    assert set(before["model"]) - set(after["model"]) == {f"feature_embed.layers.{i}.{part}" for i in (0, 1)
                                                          for part in ("weight", "bias")}
    for name, value in after["model"].items():
        if name not in ("class_embed.bias", *(f"class_embed.{i}.bias" for i in range(2))):  # may have started alike
            assert torch.allclose(value, before["model"][name], atol=1e-6) == ("class_embed" not in name), name
    assert after["args"]["position_from_centre"] == (True if model == "detr" else None)


def test_a_pre_trained_model_shows_its_regions(pretrained, data_root, tmp_path, capsys):
    flags = ["--checkpoint", pretrained[2] / "checkpoint.pth", data_root / "toy/coco/val2017", "--threshold", 0,
             "--val_size", 64, "--output_dir", tmp_path]
    predict.main(predict.get_args_parser().parse_args(list(map(str, flags))))
    found = json.loads((tmp_path / "detections.json").read_text())
    assert f"{len(found)} objects in 2 images" in capsys.readouterr().out and found
    assert {entry["category_name"] for entry in found if entry["category_id"] == 1} <= {"region"}


def test_evaluating_a_pre_training_as_a_detector_names_both_models(pretrained, data_root):
    model, _, out, _ = pretrained
    with pytest.raises(InputError, match=r"holds a DETReg pre-training model: a .* but the flags describe a .*; to "
                                         r"start a fine-tuning from it use --pretrain$"):
        train("--model", model, "--dataset", "coco", "--data_root", data_root, *SMALL_LABELLED, "--num_classes", 91,
              "--eval", "--resume", out / "checkpoint.pth")


def test_a_seed_that_is_drawn_and_checkpoints_now_and_then(data_root, caches, tmp_path, monkeypatch):
    saved, whole = [], TrainingState.save

    def save(self, args, epoch, *rest, **options):
        saved.append(epoch)
        whole(self, args, epoch, *rest, **options)

    monkeypatch.setattr(TrainingState, "save", save)
    flags = ["--dataset", "coco_pretrain", "--data_root", data_root, *SMALL_REGIONS, "--cache_path",
             caches["MSCoco/train2017"], "--random_seed", "--save_every", 2, "--epochs", 3, "--batch_size", 16,
             "--output_dir", tmp_path]
    stored = train(*flags)
    assert saved == [1, 2] and stored["epoch"] == 2 and len(log_lines(tmp_path)) == 3
    assert stored["args"]["seed"] != 42


# Two processes.

PROGRAM = """
    import sys
    import torch
    from torch import nn
    from main import get_args_parser
    from models import build_model
    from util.distributed import get_rank, get_world_size, init_distributed_mode

    gradients = {}
    for name in ("detr", "deformable_detr"):
        args = get_args_parser().parse_args(["--model", name, *"--device cpu --dataset_file regions --num_queries 7 "
            "--object_embedding_loss --backbone resnet18 --load_backbone none --hidden_dim 32 --nheads 2 "
            "--enc_layers 1 --dec_layers 2 --dim_feedforward 64 --dropout 0 --lr_backbone 1e-5".split()])
        if not gradients:
            init_distributed_mode(args)
        torch.manual_seed(0)
        model, criterion, _ = build_model(args)
        torch.manual_seed(1)
        images = torch.randn(4, 3, 64, 64)
        targets = [{"labels": torch.ones(n, dtype=torch.int64), "boxes": torch.rand(n, 4) * 0.3 + 0.3,
                    "patches": torch.randn(n, 3, 32, 32)} for n in (3, 2, 0, 0)]  # the second process has no regions
        share = slice(get_rank() * 4 // get_world_size(), (get_rank() + 1) * 4 // get_world_size())
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if get_world_size() > 1 else model
        for _ in range(2):  # the second forward fails if a parameter missed the first reduction
            model.zero_grad()
            losses = criterion(wrapped(images[share]), targets[share])
            sum(losses[key] * weight for key, weight in criterion.weight_dict.items() if key in losses).backward()
        gradients.update({f"{name} {key}": p.grad for key, p in model.named_parameters() if p.requires_grad})
    if get_rank() == 0:
        torch.save(gradients, sys.argv[1])
"""


def test_gradients_of_two_processes_equal_those_of_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    for launcher in ("single", "pair"):
        run([program, tmp_path / f"{launcher}.pth"], launcher, env={"PYTHONPATH": str(ROOT)})
    one, two = (torch.load(tmp_path / f"{launcher}.pth", weights_only=True) for launcher in ("single", "pair"))
    for model in ("detr", "deformable_detr"):
        assert one[f"{model} feature_embed.layers.1.weight"].abs().max() > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=name)
