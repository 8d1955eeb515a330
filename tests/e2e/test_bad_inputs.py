"""What users get wrong: every mistake ends in one sentence that names it, and spoils nothing."""
import json
import shutil
import subprocess
import sys

import pytest
import torch

from commands import ROOT, SMALL_PRETRAIN, TRAIN, run
from datasets.toy import ToySettings, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=96, num_unlabelled=12, num_train=4, num_val=2))
    return folder


@pytest.fixture
def coco(toy, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(toy / "coco", tmp_path / "coco")
    return tmp_path / "coco"


def refusal(arguments, env=None):
    """The sentence that a refused command ends with."""
    done = run(arguments, check=False, env=env)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def edit(coco, change, image_set="train"):
    path = coco / "annotations" / f"instances_{image_set}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content


def test_no_data_set():
    assert "--coco_path" in refusal(["main.py"])


def test_missing_folder(tmp_path):
    assert str(tmp_path / "nowhere") in refusal([*TRAIN, "--coco_path", tmp_path / "nowhere"])


def test_broken_json(coco):
    path = coco / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:-50])
    assert path.name in refusal([*TRAIN, "--coco_path", coco])


def test_a_missing_image_of_the_evaluation(coco):
    image = next((coco / "val2017").iterdir())
    image.unlink()
    message = refusal([*TRAIN, "--coco_path", coco])
    assert image.name in message and "image id" in message


def test_broken_training_images_are_replaced_up_to_a_limit(coco, tmp_path):
    images = sorted((coco / "train2017").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:200])
    done = run([*TRAIN, "--coco_path", coco, "--output_dir", tmp_path / "out"])
    assert done.stderr.count(f"passed over: image file {images[0]} cannot be decoded") == 1
    assert "1 unreadable images were replaced so far: " + images[0].name in done.stdout
    assert json.loads((tmp_path / "out" / "log.txt").read_text())["unreadable_images"] == 1
    images[1].unlink()
    assert "2 of the 4 images of" in refusal([*TRAIN, "--coco_path", coco])


def test_category_id_out_of_range(coco):
    content = edit(coco, lambda content: None)
    annotation = max(content["annotations"], key=lambda annotation: annotation["category_id"])
    message = refusal([*TRAIN, "--coco_path", coco, "--num_classes", annotation["category_id"]])
    assert "--num_classes" in message and f"annotation id {annotation['id']}" in message


def test_boxes_outside_are_clipped_or_dropped(coco):
    def spoil(content):
        content["annotations"][0]["bbox"] = [-20, -20, 50, 60]
        content["annotations"][1]["bbox"] = [5000, 5000, 10, 10]

    edit(coco, spoil)
    run([*TRAIN, "--coco_path", coco])


def test_batch_larger_than_the_data_set(coco):
    assert "--batch_size 64" in refusal([*TRAIN, "--coco_path", coco, "--batch_size", "64"])


def test_flag_of_another_training(coco):
    assert "--num_patches has no effect" in refusal([*TRAIN, "--coco_path", coco, "--num_patches", "10"])


def test_unknown_flag(coco):
    done = run([*TRAIN, "--coco_path", coco, "--frozen_weigths", "x"], check=False)
    assert done.returncode == 2 and "unrecognized arguments: --frozen_weigths" in done.stderr


def test_queries_not_divisible_by_patches(toy):
    message = refusal(["main.py", *SMALL_PRETRAIN, "--imagenet_path", toy / "unlabelled", "--num_patches", "7"])
    assert "--num_queries 100 is not a multiple of --num_patches 7" in message


def test_unreachable_weights_name_the_way_out(coco, tmp_path):
    """The proxy refuses every connection, as a machine without internet does."""
    message = refusal([*TRAIN[:-4], "--epochs", "1", "--coco_path", coco],
                      env={"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"})
    assert "--load_backbone FILE" in message


def test_resuming_a_pretraining_as_a_detector(toy, coco, tmp_path):
    run(["main.py", *SMALL_PRETRAIN, "--imagenet_path", toy / "unlabelled", "--load_backbone", "none", "--epochs", "1",
         "--output_dir", tmp_path])
    message = refusal([*TRAIN, "--coco_path", coco, "--resume", tmp_path / "checkpoint.pth"])
    assert "an UP-DETR pre-training model" in message and "--pretrain" in message


def test_checkpoint_of_another_kind(coco, tmp_path):
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    assert "none of its tensors fits" in refusal([*TRAIN, "--coco_path", coco, "--pretrain", tmp_path / "other.pth"])
    assert "something else than a detector" in refusal([*TRAIN, "--coco_path", coco, "--resume", tmp_path / "other.pth"])
    assert "no such file" in refusal([*TRAIN, "--coco_path", coco, "--resume", tmp_path / "none.pth"])


def test_full_disk_keeps_the_earlier_checkpoint(coco, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    command = [*TRAIN[:-2], "--coco_path", coco, "--output_dir", tmp_path, "--resume", "auto"]
    run([*command, "--epochs", "1"])
    earlier = (tmp_path / "checkpoint.pth").read_bytes()
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); " \
              "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", limited, *map(str, command), "--epochs", "2"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 2
    assert "could not write the checkpoint" in done.stderr and "is intact" in done.stderr
    assert (tmp_path / "checkpoint.pth").read_bytes() == earlier
    assert not list(tmp_path.glob("*.tmp"))
    run([*command, "--epochs", "2"])  # redoes the epoch that wasn't saved, and its line of the log
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]


def test_unreadable_pretraining_images_are_replaced_up_to_a_limit(toy, tmp_path):
    shutil.copytree(toy / "unlabelled", tmp_path / "images")
    files = sorted(path for path in (tmp_path / "images").rglob("*.jpg"))
    files[0].write_bytes(b"not a picture")
    command = ["main.py", *SMALL_PRETRAIN, "--imagenet_path", tmp_path / "images", "--load_backbone", "none", "--epochs", "1",
               "--output_dir", tmp_path / "out"]
    done = run(command)
    assert done.stderr.count("passed over: ") == 1 and files[0].name in done.stderr
    assert json.loads((tmp_path / "out" / "log.txt").read_text())["unreadable_images"] == 1
    files[1].write_bytes(b"not a picture either")
    assert "more than 1%" in refusal(command)
