"""Pre-training on regions and fine-tuning on part of the labels, as a user runs them."""
import json

import pytest

from commands import SMALL_COCO, SMALL_PRETRAIN, run
from datasets.toy import ToySettings, write_toy
from tools import cache_proposals


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=96, num_unlabelled=8, num_train=20, num_val=2), num_workers=1)
    return folder


def test_pre_training_on_cached_regions(toy, tmp_path):
    """Of COCO's images as well: any folder will do."""
    images, cache = toy / "coco/train2017", tmp_path / "cache"
    cache_proposals.main(cache_proposals.get_args_parser().parse_args(
        ["--imagenet_path", str(images), "--cache_path", str(cache), "--num_workers", "1"]))
    done = run(["main.py", "--dataset_file", "regions", "--imagenet_path", images, "--cache_path", cache,
                *SMALL_PRETRAIN, "--epochs", "1", "--load_backbone", "none", "--output_dir", tmp_path / "out"])
    assert done.stdout.split("\n\n", 1)[1].startswith("DETReg pre-training of Deformable DETR\n")
    assert f"regions in an image: 30 at most, chosen by --strategy topk, from --cache_path {cache}\n" in done.stdout
    line = json.loads((tmp_path / "out/log.txt").read_text())
    assert line["train_loss_bbox"] > 0 and line["unreadable_images"] == 0


def test_fine_tuning_on_a_tenth(toy, tmp_path):
    done = run(["main.py", "--coco_path", toy / "coco", *SMALL_COCO, "--load_backbone", "none", "--epochs", "1",
                "--filter_pct", "0.1", "--batch_size", "2", "--output_dir", tmp_path / "out"])
    assert "train: 2 of 20 images, " in done.stdout and "(--filter_pct 0.1 --filter_seed 42)" in done.stdout
    assert len(json.loads((tmp_path / "out/train_subset.json").read_text())["image_ids"]) == 2
