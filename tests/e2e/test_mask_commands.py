"""The published commands of instance and panoptic segmentation, run as a user runs them."""
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from commands import SMALL_COCO, SMALL_PRETRAIN, run
from datasets.toy import ToySettings, write_toy
from main import get_args_parser, main
from util.errors import InputError
from util.panoptic_ids import rgb_to_ids

ONE_EPOCH = ["--epochs", "1"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A world of a few images."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=96, num_unlabelled=4, num_train=8, num_val=5))
    return folder


@pytest.fixture(scope="module")
def panoptic(toy):
    return ["--coco_path", toy / "coco", "--coco_panoptic_path", toy / "coco", "--dataset_file", "coco_panoptic"]


@pytest.fixture(scope="module")
def box_model(panoptic, backbone, tmp_path_factory):
    """The first of the published commands."""
    out = tmp_path_factory.mktemp("box_model")
    run(["main.py", *panoptic, "--output_dir", out, *SMALL_COCO, *ONE_EPOCH, *backbone])
    assert len(log_line(out)["test_coco_eval_bbox"]) == 12
    return out / "checkpoint.pth"


@pytest.fixture(scope="module")
def segm_model(panoptic, box_model, tmp_path_factory):
    """The second: a mask head on that, with no backbone to be had from anywhere."""
    out = tmp_path_factory.mktemp("segm_model")
    run(["main.py", *"--masks --epochs 25 --lr_drop 15".split(), *panoptic, "--frozen_weights", box_model,
         "--output_dir", out, *SMALL_COCO, *ONE_EPOCH],
        env={"TORCH_HOME": str(out), "https_proxy": "http://127.0.0.1:9"})
    return out / "checkpoint.pth"


def log_line(out):
    line, = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    return line


def tables(done):
    """COCO's and the panoptic evaluation's lines."""
    return [line for line in done.stdout.splitlines() if line.startswith((" Average", "All", "Things", "Stuff"))]


def test_frozen_training_changes_the_mask_head_alone(box_model, segm_model):
    before = torch.load(box_model, weights_only=True)["model"]
    after = torch.load(segm_model, weights_only=True)["model"]
    detector = {name.removeprefix("detr."): value for name, value in after.items() if name.startswith("detr.")}
    assert set(detector) == set(before) and all(torch.equal(value, before[name]) for name, value in detector.items())
    optimizer = torch.load(segm_model, weights_only=True)["optimizer"]
    head = [name for name in after if not name.startswith("detr.")]
    assert len(head) == len(optimizer["state"]) == 32
    assert all(state["exp_avg"].abs().sum() > 0 for state in optimizer["state"].values()), "and all of it"


def test_panoptic_log_and_files(toy, segm_model):
    line = log_line(segm_model.parent)
    assert line["n_parameters"] == sum(
        value.numel() for name, value in torch.load(segm_model, weights_only=True)["model"].items()
        if not name.startswith("detr."))
    assert len(line["test_coco_eval_bbox"]) == len(line["test_coco_eval_masks"]) == 12
    for name in ("test_PQ_all", "test_PQ_th", "test_PQ_st"):
        assert set(line[name]) == {"pq", "sq", "rq", "n"} and 0 <= line[name]["pq"] <= 1
    assert {"train_loss_mask", "train_loss_dice", "test_loss_mask"} <= set(line) and "train_loss_mask_0" not in line
    written = segm_model.parent / "panoptic_eval"
    truth = json.loads((toy / "coco/annotations/panoptic_val2017.json").read_text())
    for image in truth["images"]:
        ids = rgb_to_ids(np.asarray(Image.open(written / f"{image['id']:012d}.png")))
        assert ids.shape == (image["height"], image["width"])
    stored = torch.load(segm_model, weights_only=True)
    assert stored["is_thing_map"] == {category["id"]: bool(category["isthing"]) for category in truth["categories"]}


def test_panoptic_evaluation_is_the_same_for_one_and_two_processes(toy, panoptic, segm_model, tmp_path):
    """Of a model whose queries are all sure of the most frequent stuff, so that it gets something right."""
    truth = json.loads((toy / "coco/annotations/panoptic_val2017.json").read_text())
    stuff = {category["id"] for category in truth["categories"] if not category["isthing"]}
    counts = Counter(segment["category_id"] for annotation in truth["annotations"]
                     for segment in annotation["segments_info"] if segment["category_id"] in stuff)
    checkpoint = torch.load(segm_model, weights_only=True)
    checkpoint["model"]["detr.class_embed.weight"].zero_()
    checkpoint["model"]["detr.class_embed.bias"][counts.most_common(1)[0][0]] = 10
    torch.save(checkpoint, tmp_path / "sure.pth")
    command = ["main.py", *"--batch_size 1 --no_aux_loss --eval --masks".split(), "--resume", tmp_path / "sure.pth",
               *panoptic, *SMALL_COCO, "--output_dir"]
    one, two = (run([*command, tmp_path / launcher], launcher) for launcher in ("single", "pair"))
    assert len(tables(one)) == 12 + 12 + 3 and tables(one) == tables(two)
    assert float(tables(one)[-1].split("|")[1].split()[0]) > 1, "PQ of stuff"
    written = [sorted((tmp_path / launcher / "panoptic_eval").iterdir()) for launcher in ("single", "pair")]
    assert [path.name for path in written[0]] == [path.name for path in written[1]] and len(written[0]) == 5 + 1
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*written))


def test_instance_segmentation_on_the_same_box_model(toy, box_model, tmp_path):
    """The box model knows stuff too, which these annotations don't have: it keeps its outputs."""
    coco = ["--coco_path", toy / "coco", *SMALL_COCO]
    done = run(["main.py", *"--masks --epochs 25 --lr_drop 15".split(), "--frozen_weights", box_model, "--output_dir",
                tmp_path, *coco, *ONE_EPOCH])
    assert f"36 classes as in {box_model}; the annotations need 14" in done.stdout
    line = log_line(tmp_path)
    assert len(line["test_coco_eval_masks"]) == 12 and "test_PQ_all" not in line
    truth = json.loads((toy / "coco/annotations/panoptic_val2017.json").read_text())
    names = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["class_names"]
    assert names == {category["id"]: category["name"] for category in truth["categories"]}, "stuff's names too"
    done = run(["main.py", *"--batch_size 1 --no_aux_loss --eval --masks".split(), "--resume",
                tmp_path / "checkpoint.pth", *coco])
    assert len(tables(done)) == 24 and "IoU metric: segm" in done.stdout


def test_frozen_training_goes_on_with_two_processes(panoptic, box_model, segm_model, tmp_path):
    done = run(["main.py", "--masks", *panoptic, "--frozen_weights", box_model, "--resume", segm_model, "--epochs", "2",
                "--batch_size", "1", "--output_dir", tmp_path, *SMALL_COCO], "pair")
    assert f"resume: {segm_model}, continuing with epoch 1" in done.stdout and log_line(tmp_path)["epoch"] == 1
    before, after = (torch.load(path, weights_only=True)["model"] for path in (segm_model, tmp_path / "checkpoint.pth"))
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])} == {
        "bbox_attention", "mask_head"}


def test_panoptic_training_from_an_updetr_on_two_processes(toy, panoptic, tmp_path):
    """A pre-training gives all but the classes and the masks; the detector trains along."""
    updetr = tmp_path / "updetr" / "checkpoint.pth"
    run(["main.py", *SMALL_PRETRAIN, "--pre_norm", "--imagenet_path", toy / "unlabelled", "--load_backbone", "none",
         *ONE_EPOCH, "--output_dir", updetr.parent])
    done = run(["main.py", "--masks", "--pre_norm", *panoptic, "--pretrain", updetr, *SMALL_COCO, *ONE_EPOCH,
                "--mask_softmax", "per_head", "--output_dir", tmp_path], "pair")
    assert "pretrain: missed 34 tensors: bbox_attention.k_linear.bias" in done.stdout
    assert "detr.class_embed.bias" in done.stdout
    before, after = (torch.load(path, weights_only=True)["model"] for path in (updetr, tmp_path / "checkpoint.pth"))
    assert not torch.equal(after["detr.query_embed.weight"], before["query_embed.weight"])
    torch.testing.assert_close(after["detr.query_embed.weight"], before["query_embed.weight"], rtol=0, atol=0.01)


def test_what_a_user_gets_wrong(panoptic, box_model, segm_model, tmp_path):
    def refusal(*flags):
        words = [*SMALL_COCO, *ONE_EPOCH, "--device", "cpu", *map(str, flags)]
        args = get_args_parser().parse_args(words)
        with pytest.raises(InputError) as caught:
            main(args)
        return str(caught.value)

    message = refusal("--masks", *panoptic, "--frozen_weights", segm_model)
    assert message.startswith(f"--frozen_weights {segm_model} holds a post-norm DETR with 36 classes and a mask head ")
    message = refusal("--masks", *panoptic, "--num_classes", "40", "--frozen_weights", box_model)
    assert "with 36 classes but the flags describe a post-norm DETR with 40 classes" in message
    assert "none.pth: no such file" in refusal("--masks", *panoptic, "--frozen_weights", tmp_path / "none.pth")
    assert refusal("--masks", "--eval", *panoptic) == "--eval needs a model to evaluate: --resume FILE_OR_URL"
