"""Deformable attention against a loop over its definition, its derivatives, and what it costs."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from models import ms_deform_attn
from models.ms_deform_attn import MSDeformAttn, make_levels, sample_and_sum

SHAPES = [(5, 7), (3, 4), (1, 2), (1, 1)]
NUM_TOKENS = sum(height * width for height, width in SHAPES)


def levels_of(shapes=SHAPES):
    return make_levels(shapes, torch.device("cpu"))


def random_case(batch=2, heads=3, width=4, num_queries=6, num_points=2, shapes=SHAPES, dtype=torch.float64, seed=0):
    """Values, points in and around the maps, and weights."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(h * w for h, w in shapes)
    value = torch.randn(batch, num_tokens, heads, width, generator=generator, dtype=dtype)
    size = (batch, num_queries, heads, len(shapes), num_points)
    locations = torch.rand(*size, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(*size, generator=generator, dtype=dtype)
    return value, locations, weights


def pixel(feature_map, row, column):
    """A map's value, zero outside."""
    height, width = feature_map.shape[:2]
    inside = 0 <= row < height and 0 <= column < width
    return feature_map[row, column] if inside else torch.zeros_like(feature_map[0, 0])


def by_definition(value, shapes, locations, weights):
    """Equation 3, one query, head, map and point after the other."""
    batch, num_queries, heads, _, num_points = weights.shape
    out = torch.zeros(batch, num_queries, heads, value.shape[-1], dtype=value.dtype)
    for b, q, h, p in ((b, q, h, p) for b in range(batch) for q in range(num_queries) for h in range(heads)
                       for p in range(num_points)):
        start = 0
        for level, (height, width) in enumerate(shapes):
            feature_map = value[b, start:start + height * width, h].view(height, width, -1)
            start += height * width
            x, y = (locations[b, q, h, level, p] * torch.tensor([width, height]) - 0.5).tolist()
            column, row = math.floor(x), math.floor(y)
            fx, fy = x - column, y - row
            upper = (1 - fx) * pixel(feature_map, row, column) + fx * pixel(feature_map, row, column + 1)
            lower = (1 - fx) * pixel(feature_map, row + 1, column) + fx * pixel(feature_map, row + 1, column + 1)
            sampled = (1 - fy) * upper + fy * lower
            out[b, q, h] += weights[b, q, h, level, p] * sampled
    return out.flatten(2)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition(seed):
    value, locations, weights = random_case(seed=seed)
    expected = by_definition(value, SHAPES, locations, weights)
    torch.testing.assert_close(sample_and_sum(value, levels_of(), locations, weights), expected)
    torch.testing.assert_close(ms_deform_attn._sample_map_by_map(value, levels_of(), locations, weights), expected)
    single = sample_and_sum(value.float(), levels_of(), locations.float(), weights.float())
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


def test_by_hand():
    """A map of 1 x 2 pixels, 10 and 20, whose centres lie at x = 0.25 and 0.75."""
    value = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    for x, expected in ((0.25, 10), (0.75, 20), (0.5, 15), (0.375, 12.5), (0.0, 5), (1.0, 10), (-0.25, 0), (1.25, 0)):
        location = torch.tensor([x, 0.5]).view(1, 1, 1, 1, 1, 2)
        out = sample_and_sum(value, levels_of([(1, 2)]), location, torch.ones(1, 1, 1, 1, 1))
        assert out.item() == pytest.approx(expected), x


@pytest.mark.parametrize("far", [3.0, -40.0, 1e6, -1e12, 1e30])
def test_points_far_outside_see_nothing(far):
    value, locations, weights = random_case(dtype=torch.float32)
    locations = torch.full_like(locations, far).requires_grad_()
    out = sample_and_sum(value.requires_grad_(), levels_of(), locations, weights)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert torch.equal(value.grad, torch.zeros_like(value)) and torch.equal(locations.grad, torch.zeros_like(locations))


def test_gradients_pass_gradcheck():
    value, locations, weights = random_case(batch=1, heads=2, width=2, num_queries=3, shapes=SHAPES[1:])
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert gradcheck(lambda v, x, w: sample_and_sum(v, levels_of(SHAPES[1:]), x, w), inputs)


def test_gradients_equal_those_of_grid_sample():
    """Also on the very pixel centres, where the derivative jumps and gradcheck can't go."""
    value, locations, weights = random_case()
    locations[:, ::2] = 0.5  # a pixel centre of the maps with odd sides
    gradients = []
    for core in (sample_and_sum, ms_deform_attn._sample_map_by_map):
        inputs = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
        out = core(inputs[0], levels_of(), *inputs[1:])
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    for own, other in zip(*gradients):
        torch.testing.assert_close(own, other)


def test_low_precision_is_sampled_in_float32():
    value, locations, weights = (tensor.bfloat16() for tensor in random_case())
    expected = sample_and_sum(value.float(), levels_of(), locations.float(), weights.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sample_and_sum(value, levels_of(), locations, weights)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


def by_stacking(value, shapes, locations, weights):
    """The usual way: sample every map, stack the samples, weigh them, sum them up."""
    batch, _, heads, width = value.shape
    maps = value.split([h * w for h, w in shapes], dim=1)
    sampled = [F.grid_sample(part.permute(0, 2, 3, 1).reshape(batch * heads, width, *shape),
                             (2 * locations[:, :, :, i] - 1).transpose(1, 2).flatten(0, 1), align_corners=False)
               for i, (part, shape) in enumerate(zip(maps, shapes))]
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, locations.shape[1], -1)
    return (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)


def test_keeps_its_inputs_only():
    """What is kept for the backward pass is most of a training's memory: the usual way keeps every sample."""
    value, locations, weights = random_case(width=32, num_queries=NUM_TOKENS, num_points=4, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def kept_by(core):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) or x, lambda x: x):
            out = core(*inputs)
        assert out.requires_grad
        return sum(kept.values())

    own = kept_by(lambda v, x, w: sample_and_sum(v, levels_of(), x, w))
    usual = kept_by(lambda v, x, w: by_stacking(v, SHAPES, x, w))
    assert own == sum(tensor.nbytes for tensor in inputs) and own < usual / 4


def test_the_device_is_not_waited_for(host_reads):
    value, locations, weights = (tensor.requires_grad_() for tensor in random_case(dtype=torch.float32))
    with host_reads:
        sample_and_sum(value, levels_of(), locations, weights).sum().backward()
    assert not host_reads.waited


# The module.


def attention(seed=0, **changes):
    """A module whose points and weights depend on the query."""
    torch.manual_seed(seed)
    module = MSDeformAttn(**{"d_model": 12, "n_levels": len(SHAPES), "n_heads": 3, "n_points": 2, **changes})
    for projection in (module.sampling_offsets, module.attention_weights):
        torch.nn.init.normal_(projection.weight, std=0.5)
    return module


@pytest.mark.parametrize("numbers", [2, 4])
def test_module_equals_the_definition(numbers):
    """Offsets are pixels of each map around a point; in a box they are halves of its sides over the number of points."""
    module = attention().double()
    query, memory = torch.randn(2, 5, 12).double(), torch.randn(2, NUM_TOKENS, 12).double()
    reference = torch.rand(2, 5, len(SHAPES), numbers).double()
    padding = torch.rand(2, NUM_TOKENS) > 0.7
    value = module.value_proj(memory) * (~padding)[:, :, None]
    offsets = module.sampling_offsets(query).view(2, 5, 3, len(SHAPES), 2, 2)
    weights = module.attention_weights(query).view(2, 5, 3, -1).softmax(-1).view(2, 5, 3, len(SHAPES), 2)
    locations = torch.empty_like(offsets)
    for level, (height, width) in enumerate(SHAPES):
        for axis, size in enumerate((width, height)):
            centre = reference[:, :, level, axis, None, None]
            unit = 1 / size if numbers == 2 else reference[:, :, level, 2 + axis, None, None] / 2 / 2
            locations[:, :, :, level, :, axis] = centre + offsets[:, :, :, level, :, axis] * unit
    expected = module.output_proj(by_definition(value.view(2, NUM_TOKENS, 3, 4), SHAPES, locations, weights))
    torch.testing.assert_close(module(query, reference, memory, levels_of(), padding), expected)


def test_starts_with_equal_weights_and_heads_looking_eight_ways():
    module = MSDeformAttn(32, n_levels=2, n_heads=8, n_points=3)
    assert not module.attention_weights.weight.any() and not module.attention_weights.bias.any()
    assert not module.sampling_offsets.weight.any()
    offsets = module.sampling_offsets.bias.view(8, 2, 3, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for point in range(3):
            expected = torch.tensor(direction) * (point + 1.0)
            torch.testing.assert_close(offsets[head, :, point], expected.expand(2, 2), rtol=0, atol=1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads don't divide the width 32"):
        MSDeformAttn(32, n_heads=5)


def test_torchscript_gives_the_same():
    module = attention().eval()
    query, memory, reference = torch.randn(2, 5, 12), torch.randn(2, NUM_TOKENS, 12), torch.rand(2, 5, len(SHAPES), 2)
    padding = torch.zeros(2, NUM_TOKENS, dtype=torch.bool)
    scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(query, reference, memory, levels_of(), padding),
                               module(query, reference, memory, levels_of(), padding))
