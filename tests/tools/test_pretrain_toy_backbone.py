"""The toy backbone pre-trainer: it learns, and the detector takes what it writes."""
import numpy as np
import pytest
import torch

from models.backbone import Backbone, load_backbone_weights
from tools import pretrain_toy_backbone as program
from util.checkpoint import load_checkpoint
from util.errors import InputError


def flags(output, *more):
    return program.get_args_parser().parse_args(["--output", str(output), "--device", "cpu", *more])


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("backbone") / "made" / "backbone.pth"
    patch = pytest.MonkeyPatch()
    patch.setattr(program, "HELD_OUT", 80)
    patch.setattr(program, "measure_places", lambda resnet, device: (0.0, 0.0))
    results = program.main(flags(output, "--steps", "24", "--num_images", "120", "--batch_size", "16", "--lr", "1e-3"))
    patch.undo()
    return output, results


def test_a_detector_takes_the_weights(short_run, capsys):
    output, _ = short_run
    backbone = Backbone("resnet18", False, return_interm_layers=False, dilation=False, last_layer="layer3")
    load_backbone_weights(backbone.body, str(output), "resnet18")
    state = load_checkpoint(str(output))["model"]
    assert torch.equal(backbone.body.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    assert torch.equal(backbone.body.bn1.running_var, state["bn1.running_var"])
    assert not any(name.startswith(("fc.", "layer4.")) for name in state)


def test_results_are_kept_with_the_weights(short_run):
    output, results = short_run
    assert load_checkpoint(str(output))["results"] == results
    assert results["background accuracy"] > 1.5 / len(program.PHOTOGRAPHS)
    assert all(0 <= value <= 1 for value in results.values())


def test_cosine_similarity_is_that_of_all_pairs():
    """A network without layers but one convolution that copies: features are the images' mean colours."""
    network = program.build_classifier("resnet18", "layer3")
    for name in ("bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "conv1"):
        setattr(network, name, torch.nn.Identity())
    network.fc = torch.nn.Linear(3, program.NUM_CLASSES)
    images = torch.zeros(3, 3, program.CANVAS, program.CANVAS, dtype=torch.uint8)
    images[0, 0], images[1, 1], images[2] = 255, 255, 255
    colours = program.normalise(images).mean((2, 3)).numpy()
    unit = colours / np.linalg.norm(colours, axis=1, keepdims=True)
    result = program.measure(network, images, torch.tensor([0, 1, len(program.CLASSES)]))
    assert result["cosine similarity of objects"] == pytest.approx(float(unit[0] @ unit[1]), abs=1e-4)
    expected = (unit[0] @ unit[1] + unit[0] @ unit[2] + unit[1] @ unit[2]) / 3
    assert result["cosine similarity of all"] == pytest.approx(float(expected), abs=1e-4)


def test_places_are_found_by_features_that_say_where(monkeypatch):
    """Features that are the scene's own smoothed pixels find a patch far better than chance."""
    monkeypatch.setattr(program, "feature_map", lambda resnet, images: torch.nn.functional.avg_pool2d(images, 4))
    found, chance = program.measure_places(torch.nn.Identity(), torch.device("cpu"), scenes=12)
    assert found > chance + 0.1


def test_training_batches_have_every_size():
    images = torch.zeros(2, 3, program.CANVAS, program.CANVAS, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    shapes = {program.training_batch(images, step, generator).shape for step in range(8)}
    assert shapes == {(2, 3, size, size) for size in program.SIZES}


@pytest.mark.parametrize("more, message", [(["--steps", "0"], "--steps 0 must be at least 2"),
                                           (["--num_images", "1"], "--num_images 1 must be at least 2")])
def test_values_out_of_range_are_refused(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        program.main(flags(tmp_path / "backbone.pth", *more))


def test_a_folder_as_output_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        program.main(flags(tmp_path))
