"""Winograd's 3×3 convolutions: the results and gradients of direct ones, by float64."""
import pytest
import torch
import torch.nn.functional as F

from models import winograd

GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)


def made_up(batch, channels, outputs, height, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=generator).relu().to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    return x, weight.to(memory_format=torch.channels_last), torch.randn(outputs, generator=generator)


def assert_close(actual, expected, factors, terms):
    """Errors are small beside a sum of so many products of two factors: beside a result itself they are not if terms cancel."""
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    first, second = (factor.double().square().mean().sqrt() for factor in factors)
    assert (actual - expected).square().mean().sqrt() <= 2e-6 * first * second * terms ** 0.5


@pytest.mark.parametrize("shape", [(1, 16, 24, 8, 8), (3, 8, 8, 13, 17), (2, 24, 16, 5, 30), (1, 4, 4, 1, 1), (2, 3, 5, 4, 3)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("at_once", [1, 6, winograd.AT_ONCE])
def test_a_convolution(shape, relu, with_residual, at_once, monkeypatch):
    monkeypatch.setattr(winograd, "AT_ONCE", at_once)
    x, weight, bias = made_up(*shape)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    residual = torch.randn(expected.shape) if with_residual else None
    kept = None if residual is None else residual.clone()
    if with_residual:
        expected = expected + residual
    found = winograd.convolve(x, winograd.at_points(weight), bias, residual, relu)
    assert_close(found, expected.relu() if relu else expected, (x, weight), 9 * x.shape[1])
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert residual is None or torch.equal(residual, kept)


@pytest.mark.parametrize("shape", [(1, 16, 24, 8, 8), (3, 8, 8, 13, 17), (1, 4, 4, 1, 1)])
@pytest.mark.parametrize("at_once", [1, winograd.AT_ONCE])
def test_gradients(shape, at_once, monkeypatch):
    monkeypatch.setattr(winograd, "AT_ONCE", at_once)
    x, weight, _ = made_up(*shape)
    reference_x, reference_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    out = F.conv2d(reference_x, reference_weight, padding=1)
    grad = torch.randn(out.shape).to(memory_format=torch.channels_last)
    expected = torch.autograd.grad(out, (reference_x, reference_weight), grad.double())
    assert_close(winograd.input_gradient(grad, weight), expected[0], (grad, weight), 9 * grad.shape[1])
    assert_close(winograd.weight_gradient(grad, x), expected[1], (grad, x), grad[:, 0].numel())


def test_errors_stay_near_those_of_a_direct_convolution():
    x, weight, bias = made_up(1, 256, 256, 40, 50)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    direct = F.conv2d(x, weight, bias, padding=1)
    found = winograd.convolve(x, winograd.at_points(weight), bias)
    assert (found - expected).abs().max() <= 5 * (direct - expected).abs().max()


@pytest.mark.parametrize("change", [
    {"x": (2, 128, 4, 12)}, {"x": (2, 128, 9, 9)}, {"x": (2, 64, 16, 16), "weight": (128, 64, 3, 3)},
    {"weight": (64, 128, 3, 3)}, {"weight": (128, 128, 1, 1)}, {"geometry": ([2, 2], [1, 1], [1, 1], 1)},
    {"geometry": ([1, 1], [2, 2], [2, 2], 1)}, {"geometry": ([1, 1], [0, 0], [1, 1], 1)},
    {"dtype": torch.bfloat16}, {"dtype": torch.float64}])
def test_it_is_used_only_where_it_is_faster_and_exact(change):
    plain = {"x": (2, 128, 16, 16), "weight": (128, 128, 3, 3), "geometry": GEOMETRY, "dtype": torch.float32}

    def suits(x, weight, geometry, dtype):
        return winograd.suits(torch.empty(x, dtype=dtype), torch.empty(weight), geometry)

    assert suits(**plain) and not suits(**{**plain, **change})


def test_products_of_reduced_precision_turn_it_off():
    x, weight = torch.empty(1, 128, 16, 16), torch.empty(128, 128, 3, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        assert not winograd.suits(x, weight, GEOMETRY)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert winograd.suits(x, weight, GEOMETRY)


def test_a_batch_decides_only_in_training():
    """A detector's results don't depend on how many images it gets at once."""
    weight = torch.empty(128, 128, 3, 3)
    small, large = torch.empty(1, 128, 16, 16), torch.empty(4, 128, 16, 16)
    assert winograd.suits(small, weight, GEOMETRY) and winograd.suits(large, weight, GEOMETRY)
    assert winograd.suits(large, weight, GEOMETRY, trained=True) and not winograd.suits(small, weight, GEOMETRY, trained=True)
