"""Flags that change how a model computes, and not what."""
import shutil

import pytest
import torch

from models import build_model, fused
from models.acceleration import COMPILERS, compile_parts, set_precision
from util.errors import InputError


@pytest.fixture(autouse=True)
def fusing():
    with fused.steps():
        yield
    fused.enable(True)


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_a_compiled_model_predicts_and_learns_the_same(tiny_args, images):
    """Names of parameters stay, too."""
    results = []
    for compiled in (False, True):
        args = tiny_args(compile=compiled, enc_layers=1, dec_layers=1)
        torch.manual_seed(0)
        detector, criterion, _ = build_model(args)
        names = list(detector.state_dict())
        compile_parts(detector, args)
        assert list(detector.state_dict()) == names
        assert (detector.transformer.decoder._compiled_call_impl is not None) == compiled
        targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[.5, .5, .3, .3]])}] * 2
        losses = criterion(detector(images), targets)
        sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses).backward()
        results.append((losses, detector.transformer.encoder.layers[0].linear1.weight.grad))
    for name, loss in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-5)


def test_compiling_without_a_compiler_is_one_sentence(tiny_args, monkeypatch):
    args = tiny_args(compile=True)
    detector, _, _ = build_model(args)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"--compile needs a C\+\+ compiler"):
        compile_parts(detector, args)


def test_tf32_needs_a_gpu(tiny_args):
    with pytest.raises(InputError, match="--tf32 has no effect with --device cpu"):
        set_precision(tiny_args(tf32=True))


def test_no_fuse_takes_the_steps_one_by_one(tiny_args):
    args = tiny_args(no_fuse=True)
    set_precision(args)
    detector, _, _ = build_model(args)
    assert not fused.can_fuse(detector.backbone[0].body)
    set_precision(tiny_args())
    assert fused.can_fuse(detector.backbone[0].body)
