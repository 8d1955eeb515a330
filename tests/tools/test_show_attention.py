"""Attention maps: the weights that were really used, in the right place of the picture."""
import argparse
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from commands import run
from PIL import Image

from models import build_model
from tools import show_attention
from tools.attention import Attention, enlarge, look, stride_of
from tools.drawing import distinct_colour


@pytest.fixture
def image() -> torch.Tensor:
    """A normalised image of 3 x 2 places of stride 32, not a multiple of it."""
    return torch.randn(3, 90, 60, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_weights_are_distributions_and_change_nothing(tiny_args: Callable[..., argparse.Namespace],
                                                      image: torch.Tensor) -> None:
    model = build_model(tiny_args(aux_loss=False))[0].eval()
    expected = model(image[None])
    for _ in range(2):
        outputs, attention = look(model, image)
        torch.testing.assert_close(outputs, expected)
    assert attention.decoder.shape == (12, 3, 2) and attention.encoder.shape == (3, 2, 3, 2)
    torch.testing.assert_close(attention.decoder.sum((1, 2)), torch.ones(12))
    torch.testing.assert_close(attention.encoder.sum((2, 3)), torch.ones(3, 2))
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_weights_are_those_of_the_layer_by_hand(tiny_args: Callable[..., argparse.Namespace],
                                                image: torch.Tensor) -> None:
    """The first encoder layer of a post-norm model: softmax of (x + pos) W_q (x + pos)' W_k' / sqrt(d / heads)."""
    model = build_model(tiny_args(aux_loss=False, nheads=1))[0].eval()
    features, positions = model.backbone(batch_of(image))
    x = (model.input_proj(features[-1].tensors) + positions[-1]).flatten(2)[0].T
    attention = model.transformer.encoder.layers[0].self_attn
    q, k, _ = (x @ attention.in_proj_weight.T + attention.in_proj_bias).split(32, dim=1)
    by_hand = (q @ k.T / 32 ** 0.5).softmax(1)
    first, last = (look(model, image, encoder_layer=number)[1].encoder for number in (1, None))
    torch.testing.assert_close(first.flatten(2).flatten(0, 1), by_hand)
    assert (first - last).abs().max() > 1e-3
    torch.testing.assert_close(last, look(model, image, encoder_layer=2)[1].encoder)


def batch_of(image: torch.Tensor) -> Any:
    from util.misc import nested_tensor_from_tensor_list

    return nested_tensor_from_tensor_list([image])


def test_up_detr_can_be_watched_too(tiny_args: Callable[..., argparse.Namespace], image: torch.Tensor) -> None:
    model = build_model(tiny_args(pretraining=True))[0].eval()
    outputs, attention = look(model, image, torch.randn(2, 3, 32, 32))
    assert outputs["pred_boxes"].shape == (1, 8, 4) and attention.decoder.shape == (8, 3, 2)


@pytest.mark.parametrize("height, width, stride",
                         [(96, 64, 32), (97, 64, 32), (90, 60, 32), (128, 128, 16), (130, 17, 16)])
def test_stride(height: int, width: int, stride: int) -> None:
    attention = Attention(torch.zeros(1, -(-height // stride), -(-width // stride)), None)
    assert stride_of(attention, torch.zeros(3, height, width)) == stride


def test_a_map_lies_over_its_place() -> None:
    """All weight in row 1, column 0 of 3 x 2: brightest about (16, 48), nothing in the far corner."""
    weights = torch.zeros(3, 2)
    weights[1, 0] = 0.7
    larger = enlarge(weights, torch.zeros(3, 90, 60), 32)
    assert larger.shape == (90, 60) and larger.max() == 1
    assert larger[48, 8] > 0.95 and larger[:16, 32:].max() < 0.5 and larger[81:, 50:].max() == 0


def test_picture_and_report(detector: Path, photos: Path, tmp_path: Path, run_main: Callable) -> None:
    out = tmp_path / "out" / "attention.png"
    words = ["--checkpoint", detector, photos / "wide.jpg", "--device", "cpu", "--output", out]
    printed = run_main(show_attention, [*words, "--threshold", 0, "--max_detections", 5, "--point", "10,20", "--point",
                                        "99,59"])
    assert printed.count(" looks most at ") == 5 and printed.endswith(f"5 detections, 2 points: {out}\n")
    for line in printed.splitlines()[:5]:
        x, y = map(int, line.split(" looks most at ")[1].split(","))
        assert 0 <= x < 100 and 0 <= y < 60
    picture = Image.open(out)
    # The detections (100 x 60 pixels seen as 80 x 48, drawn eight times as large), two rows of maps, one of points.
    map_height = 192 + show_attention.CAPTION
    heights = [384, map_height, map_height, map_height]
    headlines, gaps = 3 * show_attention.HEADER, 4 * show_attention.MARGIN
    assert picture.height == sum(heights) + headlines + gaps
    colours = {value for _, value in picture.convert("RGB").getcolors(1 << 20)}
    assert {distinct_colour(number) for number in range(5)} <= colours


def test_without_detections_the_encoder_is_shown(detector: Path, photos: Path, tmp_path: Path,
                                                 run_main: Callable) -> None:
    words = ["--checkpoint", detector, photos / "wide.jpg", "--device", "cpu", "--output", tmp_path / "a.png"]
    assert run_main(show_attention, [*words, "--threshold", 1]) == f"0 detections, 4 points: {tmp_path}/a.png\n"


def test_a_model_without_encoder(save_model: Callable[..., Path], photos: Path, tmp_path: Path,
                                 run_main: Callable) -> None:
    words = ["--checkpoint", save_model("plain.pth", enc_layers=0), photos / "wide.jpg", "--device", "cpu", "--output",
             tmp_path / "a.png", "--threshold", 0]
    assert run_main(show_attention, words).endswith(f"8 detections, 0 points: {tmp_path}/a.png\n")
    assert "--point 1,1 has no effect" in run_main(show_attention, [*words, "--point", "1,1"], status=2)


def test_a_deformable_detr_is_refused(save_model: Callable[..., Path], photos: Path, tmp_path: Path,
                                      run_main: Callable) -> None:
    checkpoint = save_model("deformable.pth", model="deformable_detr")
    assert run_main(show_attention, ["--checkpoint", checkpoint, photos / "wide.jpg", "--output", tmp_path / "a.png"],
                    status=2) == (f"error: --checkpoint {checkpoint} holds a Deformable DETR; this program shows DETR's "
                                  "attention, which looks at every place\n")
    assert not (tmp_path / "a.png").exists()


def test_wrong_input_is_told_in_a_sentence(detector: Path, photos: Path, tmp_path: Path, run_main: Callable) -> None:
    def refused(*words: Any) -> str:
        return run_main(show_attention, ["--checkpoint", detector, photos / "wide.jpg", "--device", "cpu", "--output",
                                         tmp_path / "a.png", *words], status=2)

    assert refused("--point", "5") == "error: --point 5: write two numbers, x,y\n"
    assert refused("--point", "100,5") == "error: --point 100,5 lies outside the image, which has 100 x 60 pixels\n"
    assert refused("--decoder_layer", 3) == "error: --decoder_layer 3: the model's decoder has 2 layers\n"
    assert refused("--encoder_layer", 0) == "error: --encoder_layer 0 must be at least 1\n"
    assert refused("--threshold", 2) == "error: --threshold 2.0 must be at most 1\n"
    assert refused("--max_detections", 0) == "error: --max_detections 0 must be at least 1\n"
    assert "the name must end in one of" in refused("--output", "a.txt")


def test_as_a_program(pretrained: Path, photos: Path) -> None:
    done = run(["-m", "tools.show_attention", "--checkpoint", pretrained, photos / "wide.jpg"], check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
