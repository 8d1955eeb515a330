"""A run that was stopped and resumed ends where an uninterrupted one ends."""
import json

import pytest
import torch

from commands import SMALL_COCO, SMALL_PRETRAIN, run
from datasets.toy import ToySettings, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=96, num_unlabelled=16, num_train=8, num_val=2))
    return folder


def weights(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_resumed_run_is_bit_identical(toy, tmp_path, stage):
    """Dropout, patch dropout, augmentation and the schedule included, and with another number of workers."""
    flags = {"pretrain": [*SMALL_PRETRAIN, "--imagenet_path", toy / "unlabelled", "--feature_recon", "--num_queries", "20",
                          "--query_shuffle"],
             "train": [*SMALL_COCO, "--coco_path", toy / "coco", "--eval_every", "2"]}[stage]
    command = ["main.py", *flags, "--load_backbone", "none", "--lr_drop", "1"]
    run([*command, "--epochs", "2", "--output_dir", tmp_path / "straight"])
    run([*command, "--epochs", "1", "--output_dir", tmp_path / "resumed", "--resume", "auto"])
    done = run([*command, "--epochs", "2", "--output_dir", tmp_path / "resumed", "--resume", "auto", "--num_workers", "0"])
    assert "continuing with epoch 1" in done.stdout
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[name], resumed[name]) for name in straight)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.txt").read_text().splitlines()]
            for name in ("straight", "resumed")]
    assert [line["epoch"] for line in logs[1]] == [0, 1]
    assert logs[0][1]["train_loss"] == logs[1][1]["train_loss"]


def test_fresh_run_in_a_used_folder_starts_its_log_anew(toy, tmp_path):
    command = ["main.py", *SMALL_COCO, "--coco_path", toy / "coco", "--load_backbone", "none", "--output_dir", tmp_path]
    run([*command, "--epochs", "2", "--eval_every", "2"])
    run([*command, "--epochs", "1"])
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1
