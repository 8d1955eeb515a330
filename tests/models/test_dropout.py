"""Dropout: which share is dropped, what stays, and what its gradient is."""
import pytest
import torch

from models.dropout import Dropout, dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_and_the_expected_value(p):
    n = 1_000_003  # not a multiple of four
    y = dropout(torch.ones(n), p, training=True)
    kept = y[y != 0]
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs((y == 0).float().mean() - p) < 4 * deviation
    assert kept.unique().numel() == 1 and abs(kept[0] * (1 - p) - 1) < 1e-4
    assert abs(y.mean() - 1) < 4 * deviation / (1 - p)


def test_neighbours_are_independent():
    """Four elements share a random number, which must not tie them together."""
    zero = dropout(torch.ones(400_000), 0.5, training=True).view(-1, 4) == 0
    correlation = torch.corrcoef(zero.T.float())
    assert (correlation - torch.eye(4)).abs().max() < 0.02


def test_gradient_flows_where_elements_stay():
    x = torch.randn(50, 40, requires_grad=True)
    y = dropout(x, 0.3, training=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)


def test_it_follows_torchs_seed():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(dropout(torch.ones(100), 0.5, training=True))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("p, expected", [(0.0, 1.0), (1.0, 0.0), (1e-9, 1.0)])
def test_the_ends(p, expected):
    assert torch.equal(dropout(torch.ones(1000), p, training=True), torch.full((1000,), expected))


def test_evaluation_empty_tensors_and_types():
    module = Dropout(0.5)
    x = torch.randn(3, 5)
    assert torch.equal(module.eval()(x), x)
    assert module.train()(x[:0]).shape == (0, 5)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    scripted = torch.jit.script(module)
    assert (scripted(torch.ones(1000)) == 0).float().mean() > 0.3
