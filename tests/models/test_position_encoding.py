"""Position encodings against their formula, worked out for single numbers."""
import math

import pytest
import torch

from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from util.errors import InputError
from util.misc import NestedTensor


def feature_map(height, width, valid=None):
    """An empty map [1, 1, height, width] of which the upper left `valid` (height, width) is image."""
    mask = torch.ones(1, height, width, dtype=torch.bool)
    rows, columns = valid or (height, width)
    mask[:, :rows, :columns] = False
    return NestedTensor(torch.zeros(1, 1, height, width), mask)


def test_sine_by_hand():
    # Four numbers per axis: sin and cos of p, then of p / 10000^(2/4) = p / 100.
    # Rows come first. Positions count from 1.
    encoding = PositionEmbeddingSine(4)(feature_map(3, 5))[0]
    assert encoding.shape == (8, 3, 5) and encoding.dtype == torch.float32
    row, column = 2, 4  # the pixel at index (1, 3)
    expected = [math.sin(row), math.cos(row), math.sin(row / 100), math.cos(row / 100),
                math.sin(column), math.cos(column), math.sin(column / 100), math.cos(column / 100)]
    assert encoding[:, 1, 3].tolist() == pytest.approx(expected, abs=1e-6)


def test_normalised_sine_by_hand():
    # The third of five rows, of which four are image: 3 / 4 of a turn. The last of two columns: a whole turn.
    encoding = PositionEmbeddingSine(2, normalize=True)(feature_map(5, 3, valid=(4, 2)))[0]
    assert encoding[:, 2, 1].tolist() == pytest.approx(
        [math.sin(1.5 * math.pi), math.cos(1.5 * math.pi), 0.0, 1.0], abs=1e-5)
    encoding = PositionEmbeddingSine(2, normalize=True, scale=1.0)(feature_map(4, 2))[0]
    assert encoding[:, 2, 1].tolist() == pytest.approx(
        [math.sin(0.75), math.cos(0.75), math.sin(1.0), math.cos(1.0)], abs=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_sine_does_not_see_padding(normalize):
    encode = PositionEmbeddingSine(8, normalize=normalize)
    assert torch.equal(encode(feature_map(6, 9, valid=(4, 5)))[:, :, :4, :5], encode(feature_map(4, 5)))


def test_positions_of_centres_by_hand():
    """Deformable DETR counts to the middle of a pixel: the first of two lies at a quarter of the range, the second at three."""
    mask = torch.tensor([[[False, False, True]]])
    encoding = PositionEmbeddingSine(2, normalize=True, scale=2 * math.pi, from_centre=True)
    columns = encoding(NestedTensor(torch.zeros(1, 1, 1, 3), mask))[0, 2:, 0, :2]
    torch.testing.assert_close(columns, torch.tensor([[1.0, -1.0], [0.0, 0.0]]), rtol=0, atol=1e-5)


def test_scale_without_normalize_is_refused():
    with pytest.raises(ValueError, match="scale=1.0 has no effect without normalize=True"):
        PositionEmbeddingSine(4, scale=1.0)


def test_learned_puts_columns_first():
    encode = PositionEmbeddingLearned(3)
    encoding = encode(NestedTensor(torch.zeros(2, 1, 4, 5), None))
    assert encoding.shape == (2, 6, 4, 5)
    assert torch.equal(encoding[1, :, 2, 3], torch.cat([encode.col_embed.weight[3], encode.row_embed.weight[2]]))
    assert torch.equal(encoding[0], encoding[1])
    assert 0 <= encode.row_embed.weight.min() and encode.row_embed.weight.max() <= 1, "uniform in 0..1"


@pytest.mark.parametrize("size", [(51, 10), (10, 51)])
def test_a_map_larger_than_the_learned_table_is_refused(size):
    with pytest.raises(InputError, match=rf"--position_embedding learned has a table of 50 rows and columns but the feature map is {size[0]} x {size[1]}"):
        PositionEmbeddingLearned(3)(NestedTensor(torch.zeros(1, 1, *size), None))
    PositionEmbeddingLearned(3)(NestedTensor(torch.zeros(1, 1, 50, 50), None))
