"""The published commands, run as a user runs them, on real files."""
import http.server
import json
import re
import threading
from functools import partial

import pytest
import torch
import torchvision

from commands import (LAUNCHERS, ROOT, SMALL_COCO, SMALL_PRETRAIN, coco_tables, finds_something, log_lines, run,
                      write_agreeable_truth)
from datasets.toy import ToySettings, write_toy

ONE_EPOCH = ["--epochs", "1"]
EVERY_LAUNCHER = pytest.mark.parametrize("launcher", LAUNCHERS)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A world of a few images."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=96, num_unlabelled=24, num_train=8, num_val=5))
    return folder


@pytest.fixture(scope="module")
def weights_cache(tmp_path_factory):
    """torch.hub's cache as it is after the download of a ResNet-50 as SwAV publishes it."""
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    swav = {f"module.{name}": value for name, value in torchvision.models.resnet50().state_dict().items()
            if not name.startswith("fc.")}
    torch.save({**swav, "module.projection_head.0.weight": torch.zeros(2, 2)}, folder / "swav_800ep_pretrain.pth.tar")
    return {"TORCH_HOME": str(home)}


@pytest.fixture(scope="module")
def pretrained(toy, backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    run(["main.py", *"--lr_drop 40 --epochs 60 --pre_norm --num_patches 10 --batch_size 32 --feature_recon --fre_cnn".split(),
         "--imagenet_path", toy / "unlabelled", "--output_dir", out, *SMALL_PRETRAIN, *ONE_EPOCH,
         *backbone])
    return out / "checkpoint.pth"


@pytest.fixture(scope="module")
def finetuned(toy, pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetuned")
    run(["main.py", *"--lr_drop 200 --epochs 300 --lr_backbone 5e-5 --pre_norm".split(), "--coco_path", toy / "coco",
         "--pretrain", pretrained, *SMALL_COCO, *ONE_EPOCH, "--output_dir", out])
    return out / "checkpoint.pth"


def test_published_pretraining_command_with_swav_resnet50(toy, weights_cache, tmp_path):
    """As printed but for the epochs, the batch and the image sizes: ResNet-50, 100 queries, 6 + 6 layers."""
    published = "--lr_drop 40 --epochs 60 --pre_norm --num_patches 10 --batch_size 32 --feature_recon --fre_cnn".split()
    done = run(["main.py", *published, "--imagenet_path", toy / "unlabelled", "--output_dir", tmp_path, *ONE_EPOCH,
                "--batch_size", "12", "--pretrain_sizes", "64", "--patch_size", "32", "--num_workers", "1"],
               env=weights_cache)
    assert "UP-DETR pre-training" in done.stdout and "eos_coef=0.1 " in done.stdout and "lr_drop=40" in done.stdout
    assert re.search(r"Epoch: \[0\]  \[0/2\]  eta: \S+  lr: 0.000100  .*loss: [\d.]+ \([\d.]+\)  .*time: [\d.]+  data: ",
                     done.stdout)
    assert "\nnumber of params: 19164167\n" in done.stdout and "\nStart training\n" in done.stdout
    assert re.search(r"^git:\n  sha: \w+, status: ", done.stdout, re.MULTILINE)
    line, = log_lines(tmp_path)
    assert line["epoch"] == 0 and line["train_loss_feature_4"] > 0 and line["n_parameters"] == 19164167
    assert 0 <= line["train_class_error_unscaled"] <= 100 and line["train_grad_norm"] > 0
    flags = json.loads((tmp_path / "args.json").read_text())
    assert (flags["num_patches"], flags["lr_drop"], flags["batch_size"]) == (10, 40, 12)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "epoch", "args"} <= set(checkpoint)


@EVERY_LAUNCHER
def test_pretraining(toy, backbone, tmp_path, launcher):
    run(["main.py", *"--lr_drop 40 --epochs 60 --pre_norm --num_patches 10 --batch_size 32 --feature_recon --fre_cnn".split(),
         "--imagenet_path", toy / "unlabelled", "--output_dir", tmp_path, *SMALL_PRETRAIN, *ONE_EPOCH, "--num_queries", "20",
         *backbone, "--held_out_share", "0.3"], launcher)
    line, = log_lines(tmp_path)
    assert 0 <= line["test_patch_iou"] <= 1 and 0 <= line["test_control_iou"] <= 1


@EVERY_LAUNCHER
def test_finetuning(toy, pretrained, tmp_path, launcher):
    done = run(["main.py", *"--lr_drop 200 --epochs 300 --lr_backbone 5e-5 --pre_norm".split(), "--coco_path", toy / "coco",
                "--pretrain", pretrained, *SMALL_COCO, *ONE_EPOCH, "--output_dir", tmp_path], launcher)
    assert "pretrain: missed 2 tensors: class_embed.bias, class_embed.weight" in done.stdout
    line, = log_lines(tmp_path)
    assert len(line["test_coco_eval_bbox"]) == 12 and (tmp_path / "eval" / "latest.pth").exists()
    assert {"train_class_error_unscaled", "test_class_error_unscaled", "train_grad_norm"} <= set(line)
    by_class = line["test_coco_eval_bbox_per_class"]
    assert by_class and all(len(figures) == 2 for figures in by_class.values())
    assert all(re.search(rf"^{name} +bbox AP ", done.stdout, re.MULTILINE) for name in by_class)
    assert (tmp_path / "checkpoint_best.pth").exists()


def test_evaluation_is_the_same_for_one_and_two_processes(toy, finetuned, tmp_path):
    truth = write_agreeable_truth(finetuned, toy / "coco/val2017", toy / "coco/annotations/instances_val2017.json", tmp_path)
    command = ["main.py", *"--batch_size 2 --eval --no_aux_loss --pre_norm".split(), "--coco_path", toy / "coco",
               "--val_annotations", truth, "--resume", finetuned, *SMALL_COCO]
    tables = []
    for launcher in ("single", "pair"):
        out = run([*command, "--output_dir", tmp_path / launcher], launcher).stdout
        tables.append(coco_tables(out))
        assert "AP50" in out  # the table of classes
        stored = torch.load(tmp_path / launcher / "eval.pth", weights_only=True)
        assert list(stored["precision"].shape) == stored["counts"] == [10, 101, stored["counts"][2], 4, 3]
        assert json.loads((tmp_path / launcher / "args.json").read_text())["eval"] is True
        assert not (tmp_path / launcher / "log.txt").exists()
    assert len(tables[0]) == 12 and tables[0] == tables[1]
    assert finds_something(tables[0])


@pytest.fixture(scope="module")
def trained_from_scratch(toy, backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("scratch")
    run(["main.py", "--coco_path", toy / "coco", *SMALL_COCO, *ONE_EPOCH, *backbone, "--output_dir", out])
    return out / "checkpoint.pth"


@pytest.mark.parametrize("launcher", ["torchrun", "launch"])
def test_training_detr_on_two_processes(toy, backbone, tmp_path, launcher):
    run(["main.py", "--coco_path", toy / "coco", *SMALL_COCO, *ONE_EPOCH, *backbone], launcher)


def test_evaluation_of_a_checkpoint_from_a_url(toy, trained_from_scratch, tmp_path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=trained_from_scratch.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{trained_from_scratch.name}"
        done = run(["main.py", *"--batch_size 2 --no_aux_loss --eval".split(), "--resume", url, "--coco_path", toy / "coco",
                    *SMALL_COCO], env={"TORCH_HOME": str(tmp_path)})
        server.shutdown()
    assert "Average Precision" in done.stdout


def test_evaluation_of_an_official_checkpoint_with_a_namespace(toy, trained_from_scratch, tmp_path):
    import argparse
    checkpoint = torch.load(trained_from_scratch, weights_only=True)
    official = {"model": checkpoint["model"], "args": argparse.Namespace(**checkpoint["args"])}
    torch.save(official, tmp_path / "official.pth")
    run(["main.py", *"--batch_size 2 --no_aux_loss --eval".split(), "--resume", tmp_path / "official.pth", "--coco_path",
         toy / "coco", *SMALL_COCO])


def test_voc_training_and_evaluation(toy, backbone, tmp_path):
    flags = [*SMALL_COCO, "--voc_path", toy / "VOCdevkit"]
    run(["main.py", *flags, *ONE_EPOCH, *backbone, "--remove_difficult", "--output_dir", tmp_path])
    done = run(["main.py", *flags, "--eval", "--resume", tmp_path / "checkpoint.pth"])
    assert len(log_lines(tmp_path)[0]["test_coco_eval_bbox"]) == 12 and "Average Precision" in done.stdout


def test_evaluation_of_a_pretrained_model_reports_its_control(toy, pretrained):
    done = run(["main.py", "--eval", "--pre_norm", "--feature_recon", "--imagenet_path", toy / "unlabelled",
                "--resume", pretrained, *SMALL_PRETRAIN])
    assert re.search(r"Patches found: mean IoU 0\.\d+, above 0.5 [\d.]+; control .* mean IoU 0\.\d+", done.stdout)


def test_finetuning_in_mixed_precision_with_accumulation(toy, pretrained):
    run(["main.py", "--pre_norm", "--coco_path", toy / "coco", "--pretrain", pretrained, *SMALL_COCO, *ONE_EPOCH,
         "--amp", "bf16", "--accumulate_steps", "3"])


def test_help_lists_every_flag():
    done = run(["main.py", "--help"])
    assert "--feature_recon" in done.stdout and "detr_main" not in " ".join(path.name for path in ROOT.iterdir())
