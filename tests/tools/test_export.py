"""tools.export writes programs that need none of this code and give what the model gives, of any batch, at any size."""
import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
from commands import run
from torch import Tensor, nn

from tools import export
from tools.export import Program
from tools.loading import DETECTOR, load_model
from tools.output import LEDGER

INPUTS = [(1, 64, 64), (2, 97, 130), (5, 33, 257)]  # none of them is a size that the tool tries itself


def fresh_batch(batch: int, height: int, width: int) -> Tuple[Tensor, Tensor]:
    """Random images, the last of which is padded below and on the right."""
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[-1, 2 * height // 3:] = True
    mask[-1, :, width // 2 + 1:] = True
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch)), mask


def load_onnx(path: Path) -> Tuple[Program, str]:
    """By onnxruntime alone."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run_session(images: Tensor, mask: Tensor) -> Dict[str, Tensor]:
        outputs = session.run(names, {"images": images.numpy(), "mask": mask.numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs)))

    return run_session, session.get_modelmeta().custom_metadata_map["detr"]


def load_torchscript(path: Path) -> Tuple[Program, str]:
    files = {"detr": ""}
    return torch.jit.load(str(path), _extra_files=files), files["detr"]


def load_pt2(path: Path) -> Tuple[Program, str]:
    files = {"detr": ""}
    return torch.export.load(str(path), extra_files=files).module(), files["detr"]


# Programs and the JSON in their files, by torch or onnxruntime alone.
LOADERS = {"onnx": load_onnx, "torchscript": load_torchscript, "pt2": load_pt2}
KINDS = {"boxes": {"pre_norm": True, "backbone_last_layer": "layer3"},
         "masks": {"masks": True, "mask_softmax": "per_head"},
         "deformable": {"model": "deformable_detr", "two_stage": True, "with_box_refine": True, "dec_layers": 2,
                        "hidden_dim": 64}}


@pytest.mark.parametrize("form, kind", [("onnx", "boxes"), ("onnx", "masks"), ("pt2", "boxes"),
                                        ("torchscript", "boxes"), ("torchscript", "masks"),
                                        ("torchscript", "deformable")])
def test_written_programs_give_what_the_model_gives(form: str, kind: str, save_model: Callable[..., Path],
                                                    tmp_path: Path, run_main: Callable) -> None:
    skip_what_torch_cannot_write(form)
    flags = {"val_size": 64, "enc_layers": 1, "dec_layers": 1, **KINDS[kind]}
    checkpoint = save_model("model.pth", class_names={1: "Käse"}, **flags)
    path = tmp_path / "new" / f"detr{export.FORMATS[form].ending}"
    words = ["--checkpoint", checkpoint, "--format", form, "--output", path]
    printed = run_main(export, words + (["--opset", 18] if form == "onnx" else []))
    assert printed.startswith(f"{path}: ") and "batches of 1 and 3" in printed and "padding included" in printed
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([LEDGER, path.name])
    model = export.PlainDetector(load_model(str(checkpoint), DETECTOR, "cpu").model)
    program, info = LOADERS[form](path)
    for size in INPUTS:
        images, mask = fresh_batch(*size)
        with torch.no_grad():
            expected, got = model(images, mask), program(images, mask)
        assert list(got) == list(expected)
        assert ("pred_masks" in got) == (kind == "masks")
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], atol=1e-4, rtol=1e-4)
    info = json.loads(info)
    assert info["class_names"] == {"1": "Käse"} and info["val_size"] == 64 and info["mean"] == [0.485, 0.456, 0.406]
    assert info["scores"] == ("sigmoid" if kind == "deformable" else "softmax")
    if form == "onnx":
        assert_onnx_declares(path, kind)


def assert_onnx_declares(path: Path, kind: str) -> None:
    """The operator set that was asked for, and axes under their names."""
    import onnx

    written = onnx.load(str(path))
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == 18
    shapes = {entry.name: [axis.dim_param or axis.dim_value for axis in entry.type.tensor_type.shape.dim]
              for entry in [*written.graph.input, *written.graph.output]}
    assert shapes["images"] == ["batch", 3, "height", "width"] and shapes["mask"] == ["batch", "height", "width"]
    assert shapes["pred_logits"] == ["batch", 12, 6] and shapes["pred_boxes"] == ["batch", 12, 4]
    assert ("pred_masks" in shapes) == (kind == "masks")


def skip_what_torch_cannot_write(form: str) -> None:
    if form != "torchscript" and not export.can_trace():
        pytest.skip(f"torch {torch.__version__} can't write {form}")
    if form == "onnx":
        pytest.importorskip("onnxruntime")


@torch.no_grad()
def test_a_panoptic_model_of_coco(save_model: Callable[..., Path], tmp_path: Path, run_main: Callable) -> None:
    """Things and stuff go with it; the softmax of its mask head can be chosen, for weights that don't come with flags."""
    checkpoint, path = save_model("model.pth", masks=True, mask_softmax="per_head", num_classes=250), tmp_path / "detr.pt"
    run_main(export, ["--checkpoint", checkpoint, "--format", "torchscript", "--output", path, "--mask_softmax", "joint"])
    program, info = load_torchscript(path)
    assert [json.loads(info)["is_thing"][label] for label in ("1", "90", "92", "200")] == [True, True, False, False]
    assert json.loads(info)["class_names"]["1"] == "person"
    images, mask = fresh_batch(*INPUTS[1])
    joint, per_head = (export.PlainDetector(load_model(str(checkpoint), DETECTOR, "cpu", mask_softmax=softmax).model)
                       for softmax in ("joint", "per_head"))
    masks = program(images, mask)["pred_masks"]
    torch.testing.assert_close(masks, joint(images, mask)["pred_masks"], rtol=1e-4, atol=1e-4)  # exports run unfused
    assert (masks - per_head(images, mask)["pred_masks"]).abs().max() > 1e-4


def test_the_mask_is_an_input_that_works(save_model: Callable[..., Path], tmp_path: Path, run_main: Callable) -> None:
    """Other padding, other boxes."""
    path = tmp_path / "detr.pt"
    run_main(export, ["--checkpoint", save_model("model.pth"), "--format", "torchscript", "--output", path])
    program = torch.jit.load(str(path))
    images, mask = fresh_batch(1, 128, 128)
    boxes = program(images, mask)["pred_boxes"]
    assert (program(images, torch.zeros_like(mask))["pred_boxes"] - boxes).abs().max() > 1e-4


# The check itself.


class Broken(nn.Module):
    """A program that is right for the batch it was traced with, and only there."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, images: Tensor, mask: Tensor) -> Dict[str, Tensor]:
        out = dict(self.model(images, torch.zeros_like(mask) if self.how == "ignores the mask" else mask))
        if self.how == "one batch size" and len(images) != 2:
            out["pred_boxes"] = out["pred_boxes"][:1]
        if self.how == "not a number":
            out["pred_logits"] = out["pred_logits"] * float("nan")
        return out


@pytest.mark.parametrize("how, sentence", [
    ("ignores the mask", "differ by .* from the model's for a batch of 1, 101 x 150 pixels"),
    ("one batch size", "gives .*'pred_boxes': .1, 12, 4.* for a batch of 3, 101 x 150 pixels, the model"),
    ("not a number", "pred_logits differ by nan")])
def test_a_wrong_program_is_noticed(how: str, sentence: str, detector: Path) -> None:
    model = export.PlainDetector(load_model(str(detector), DETECTOR, "cpu").model)
    assert set(export.largest_differences(model, model).values()) == {0.0}
    with pytest.raises(FloatingPointError, match=sentence):
        export.largest_differences(model, Broken(model, how))


def test_a_wrong_program_is_not_kept(detector: Path, tmp_path: Path, run_main: Callable, monkeypatch) -> None:
    form = export.FORMATS["torchscript"]

    def read(path: Path, device: torch.device) -> nn.Module:
        return Broken(form.read(path, device), "not a number")

    monkeypatch.setitem(export.FORMATS, "torchscript", form._replace(read=read))
    out = tmp_path / "out" / "detr.pt"
    error = run_main(export, ["--checkpoint", detector, "--format", "torchscript", "--output", out], status=3)
    assert error.startswith("error: the written program's pred_logits differ by nan") and error.count("\n") == 1
    assert list(out.parent.iterdir()) == []


def test_every_example_image_is_padded() -> None:
    for batch in (1, 3):
        images, mask = export.example_batch(batch, 101, 150, torch.device("cpu"))
        assert mask[:, -1, 0].all() and mask[:, 0, -1].all() and not mask[:, :40, :60].any()
        assert (images[mask[:, None].expand_as(images)] == 0).all()


# Mistakes.


def test_wrong_input_is_told_in_a_sentence(detector: Path, pretrained: Path, tmp_path: Path,
                                           run_main: Callable) -> None:
    def refused(*words: Any) -> str:
        return run_main(export, ["--checkpoint", detector, *words], status=2)

    assert refused("--format", "pt2", "--output", "detr.onnx") == (
        "error: --output detr.onnx: the name must end in one of .pt2\n")
    assert refused("--format", "pt2", "--opset", 18) == (
        "error: --opset 18 has no effect with --format pt2; it belongs to onnx\n")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "detr.pt"
    assert f"--output {out} can't be written" in refused("--format", "torchscript", "--output", out)
    assert "which finds patches and knows no classes" in run_main(
        export, ["--checkpoint", pretrained, "--format", "pt2"], status=2)


def test_what_is_too_old_or_missing_is_named(detector: Path, tmp_path: Path, run_main: Callable,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(form: str) -> str:
        return run_main(export, ["--checkpoint", detector, "--format", form, "--output",
                                 tmp_path / f"detr{export.FORMATS[form].ending}"], status=2)

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert "pip install -r requirements/export.txt" in refused("onnx")
    with monkeypatch.context() as patch:  # torch's exporter imports a part of onnxscript made for its version
        for name in ("onnx", "onnxscript", "onnxruntime"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(export, "traced", lambda model, form: model)
        patch.setattr(torch.onnx, "export", lambda *args, **flags: importlib.import_module("onnxscript.torch_9_9"))
        assert "pip install --upgrade onnxscript" in refused("onnx")
    monkeypatch.setattr(export, "can_trace", lambda: False)
    assert refused("pt2") == (f"error: --format pt2 needs torch 2.6 or later, this is {torch.__version__}; "
                              "torchscript works with it\n")


def test_as_a_program(detector: Path, tmp_path: Path) -> None:
    out = tmp_path / "detr.pt"
    done = run(["-m", "tools.export", "--checkpoint", detector, "--format", "torchscript", "--output", out])
    assert done.stdout.count("\n") == 1 and out.exists() and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("write", [export.write_torchscript, export.write_pt2])
def test_a_full_disk_raises(write, monkeypatch):
    """Torch's own writer ends the process."""
    monkeypatch.setattr(export, "traced", lambda model, form: torch.export.export(model, (torch.ones(1),)))
    with pytest.raises(OSError, match="No space left"):
        write(torch.nn.ReLU(), Path("/dev/full"), "{}", None)
