"""Data of one's own: files under any name, a look at it before training, and the proof that a set-up learns."""
import json
import re

import pytest

from commands import SMALL_COCO, SMALL_PRETRAIN, TRAIN, run
from datasets.toy import ToySettings, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=96, num_unlabelled=6, num_train=6, num_val=3))
    return folder


@pytest.fixture(scope="module")
def own(toy):
    """The same labelled images under names of one's own, with other category ids."""
    folder = toy.parent / "own"
    folder.mkdir()
    for part, name in (("train", "learn"), ("val", "exam")):
        (folder / name).symlink_to(toy / "coco" / f"{part}2017")
        content = json.loads((toy / "coco/annotations" / f"instances_{part}2017.json").read_text())
        for entry in content["categories"]:
            entry["id"] = 100 + 3 * entry["id"]
        for entry in content["annotations"]:
            entry["category_id"] = 100 + 3 * entry["category_id"]
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_training_and_evaluation_on_files_of_other_names(own, tmp_path):
    flags = ["--train_images", "learn", "--train_annotations", "learn.json", "--val_images", "exam",
             "--val_annotations", "exam.json"]
    done = run([*TRAIN, "--coco_path", own, *flags, "--output_dir", tmp_path])
    assert "num_classes=140 " in done.stdout and "training images: 6" in done.stdout
    done = run(["main.py", *SMALL_COCO, "--eval", "--resume", tmp_path / "checkpoint.pth", "--val_images", own / "exam",
                "--val_annotations", own / "exam.json"])
    assert "Average Precision" in done.stdout and re.search(r"^disc +bbox AP", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("launcher", ["single", "pair"])
def test_overfitting_trains_and_evaluates_on_the_same_few_images(toy, tmp_path, launcher):
    done = run([*TRAIN, "--coco_path", toy / "coco", "--overfit", "4", "--batch_size", "1", "--output_dir", tmp_path],
               launcher)
    assert "overfit: training and evaluation see the first 4 training images, not augmented" in done.stdout
    steps = 4 if launcher == "single" else 2
    assert "training images: 4, " in done.stdout and f", {steps} steps an epoch\n" in done.stdout
    assert re.search(rf"Test: .*\[0/{steps}\]", done.stdout)
    assert len(json.loads((tmp_path / "log.txt").read_text())["test_coco_eval_bbox"]) == 12


def test_overfitting_a_pretraining(toy):
    done = run(["main.py", *SMALL_PRETRAIN, "--load_backbone", "none", "--epochs", "1", "--imagenet_path",
                toy / "unlabelled", "--batch_size", "3", "--overfit", "3"])
    assert "Patches found: mean IoU" in done.stdout and "training images: 3\n" in done.stdout
