"""Scripted models give bit for bit what the models give that they were made of."""
import pytest
import torch

from models.backbone import Backbone, Joiner
from models.deformable_detr import DeformableDETR
from models.deformable_transformer import DeformableTransformer
from models.detr import DETR
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from models.segmentation import DETRsegm
from models.transformer import Transformer
from models.updetr import UPDETR
from util.misc import nested_tensor_from_tensor_list


@pytest.fixture
def batch():
    """Images of two sizes, with padding."""
    generator = torch.Generator().manual_seed(2)
    return nested_tensor_from_tensor_list([torch.rand(3, 100, 90, generator=generator),
                                           torch.rand(3, 80, 130, generator=generator)])


def joiner(name="resnet18", all_maps=False, dilation=False, positions=None, num_maps=None):
    torch.manual_seed(0)
    positions = positions or PositionEmbeddingSine(16, normalize=True)
    return Joiner(Backbone(name, True, all_maps, dilation, num_maps=num_maps), positions)


def make_detr(backbone, aux_loss=False, pre_norm=False, activation="relu"):
    transformer = Transformer(32, 4, 1, 2, 48, 0.1, activation, pre_norm, True)
    return DETR(backbone, transformer, 5, 7, aux_loss).eval()


def assert_equal(model, *inputs):
    """Also what was saved and loaded would be equal, since that is the same program; aux_outputs are left out."""
    scripted = torch.jit.script(model)
    with torch.no_grad():
        out, expected = scripted(*inputs), model(*inputs)
    assert set(out) == set(expected) - {"aux_outputs", "enc_outputs"} and "pred_boxes" in out
    for name, value in out.items():
        assert torch.equal(value, expected[name]), name
    return out


@pytest.mark.parametrize("pre_norm, activation", [(False, "relu"), (True, "gelu")])
@pytest.mark.parametrize("aux_loss", [False, True])
def test_detr(batch, pre_norm, activation, aux_loss):
    assert_equal(make_detr(joiner(), aux_loss, pre_norm, activation), batch)


def test_detr_with_learned_positions_and_a_dilated_backbone(batch):
    assert_equal(make_detr(joiner("resnet50", dilation=True, positions=PositionEmbeddingLearned(16))), batch)


@pytest.mark.parametrize("aux_loss", [False, True])
def test_masks(batch, aux_loss):
    out = assert_equal(DETRsegm(make_detr(joiner(all_maps=True), aux_loss)).eval(), batch)
    assert "pred_masks" in out


@pytest.mark.parametrize("separate_groups", [True, False])
def test_updetr_without_reconstruction(batch, separate_groups):
    transformer = Transformer(32, 4, 1, 2, 48, 0.1, "relu", False, True)
    model = UPDETR(joiner(), transformer, 2, 6, False, 3, False, separate_groups=separate_groups).eval()
    assert_equal(model, batch, torch.rand(2, 2, 3, 32, 32))


@pytest.mark.parametrize("refine, two_stage, aux_loss", [(False, False, True), (True, True, False)])
def test_deformable_detr(batch, refine, two_stage, aux_loss):
    transformer = DeformableTransformer(32, 4, 1, 2, 48, 0.1, "relu", True, 4, 4, 4, two_stage)
    model = DeformableDETR(joiner(num_maps=3), transformer, 5, 7, 4, aux_loss, refine, two_stage).eval()
    assert_equal(model, batch)


def test_training_without_dropout(batch):
    model = make_detr(joiner()).train()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    scripted = torch.jit.script(model)
    out, expected = scripted(batch), model(batch)
    for name, value in out.items():
        assert torch.equal(value, expected[name]), name
