"""The whole detector: its inputs and outputs, TorchScript, construction by hand, and post-processing."""
import pytest
import torch
from torch import nn

from models import build_model
from models.backbone import Backbone, Joiner
from models.detr import DETR, MLP, PostProcess
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from models.transformer import Transformer
from util.misc import NestedTensor, nested_tensor_from_tensor_list


@pytest.fixture
def detr(tiny_args):
    def make(**changes):
        torch.manual_seed(0)
        return build_model(tiny_args(**changes))[0].eval()

    return make


def assert_same(first, second, atol=1e-5):
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=atol)


def test_output_shapes_and_ranges(detr, images):
    out = detr()(images)
    assert sorted(out) == ["aux_outputs", "pred_boxes", "pred_logits"]
    for layer in (out, *out["aux_outputs"]):
        assert layer["pred_logits"].shape == (2, 12, 6) and layer["pred_boxes"].shape == (2, 12, 4)
        assert layer["pred_boxes"].min() > 0 and layer["pred_boxes"].max() < 1
    assert len(out["aux_outputs"]) == 1


def test_auxiliary_outputs_do_not_change_the_prediction(detr, images):
    with torch.no_grad():
        plain = detr(aux_loss=False)(images)
        assert sorted(plain) == ["pred_boxes", "pred_logits"]
        assert_same(plain, detr()(images))


@torch.no_grad()
def test_a_nested_tensor_a_list_and_a_batched_tensor_are_the_same(detr, images):
    model = detr()
    assert_same(model(images), model(nested_tensor_from_tensor_list(images)))
    batched = torch.stack([images[0], images[1].transpose(1, 2)])
    assert_same(model(batched), model(list(batched)))
    assert_same(model(batched), model(NestedTensor(batched, torch.zeros(2, 64, 96, dtype=torch.bool))))


@torch.no_grad()
def test_order_of_images_in_the_batch_does_not_matter(detr, images):
    model = detr()
    first, second = model(images), model(images[::-1])
    assert_same({name: first[name].flip(0) for name in ("pred_logits", "pred_boxes")}, second)


@torch.no_grad()
def test_images_of_equal_size_are_predicted_as_if_alone(detr, images):
    model = detr()
    batch = [images[0], images[1].transpose(1, 2), images[0].flip(2)]
    together = model(batch)
    for i, image in enumerate(batch):
        assert_same({name: together[name][i:i + 1] for name in ("pred_logits", "pred_boxes")}, model([image]))


def test_mlp_by_hand():
    """Two inputs, two hidden units, one output: relu([[1, -1], [2, 0]] x + [0, 1]) then [1, 1] h - 3, without relu."""
    mlp = MLP(2, 2, 1, 2)
    values = {"layers.0.weight": [[1.0, -1.0], [2.0, 0.0]], "layers.0.bias": [0.0, 1.0],
              "layers.1.weight": [[1.0, 1.0]], "layers.1.bias": [-3.0]}
    mlp.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    # x = (1, 3): hidden (-2 -> 0, 3); out 0. x = (-1, 0): hidden (-1 -> 0, -1 -> 0); out -3.
    assert mlp(torch.tensor([[1.0, 3.0], [-1.0, 0.0]])).tolist() == [[0.0], [-3.0]]


# Construction by hand, as notebooks do it.


def test_construction_by_hand(detr, images):
    """Without `build_model`; the weights of a built model fit, and the predictions are the same."""
    backbone = Backbone("resnet18", train_backbone=True, return_interm_layers=False, dilation=False)
    joiner = Joiner(backbone, PositionEmbeddingSine(16, normalize=True))
    joiner.num_channels = backbone.num_channels
    transformer = Transformer(d_model=32, nhead=4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=48,
                              normalize_before=True, return_intermediate_dec=True)
    by_hand = DETR(joiner, transformer, num_classes=5, num_queries=12)
    built = detr(pre_norm=True)
    by_hand.load_state_dict(built.state_dict())
    with torch.no_grad():
        assert_same(by_hand.eval()(images), built(images), atol=0)
    assert by_hand.aux_loss is False


def test_default_sizes_are_the_published_ones(published):
    """The tutorial's calls, without sizes: their shapes are those of the published pre-norm model."""
    with torch.device("meta"):
        backbone = Joiner(Backbone("resnet50", True, False, False), PositionEmbeddingSine(128, normalize=True))
        backbone.num_channels = 2048
        model = DETR(backbone, Transformer(d_model=256, return_intermediate_dec=True, normalize_before=True), 91, 100)
    plain = published["models"]["detr_resnet50"]["add"]
    expected = {**plain, **published["models"]["detr_resnet50_pre_norm"]["add"]}
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected


# TorchScript.


class Encode(nn.Module):
    """Scripted models take tensors from outside; inside them a NestedTensor is made and taken apart."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, tensors: torch.Tensor, mask: torch.Tensor):
        return self.module(NestedTensor(tensors, mask))


@pytest.mark.parametrize("encoding", [PositionEmbeddingSine(8), PositionEmbeddingSine(8, normalize=True),
                                      PositionEmbeddingLearned(8)], ids=["sine", "normalised", "learned"])
def test_position_encodings_script(encoding):
    x, mask = torch.randn(2, 4, 5, 6), torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[1, 3:] = True
    scripted = torch.jit.script(Encode(encoding))
    assert torch.equal(scripted(x, mask), encoding(NestedTensor(x, mask)))


@pytest.mark.parametrize("all_maps", [False, True])
def test_backbone_scripts(all_maps, images):
    backbone = Backbone("resnet18", train_backbone=True, return_interm_layers=all_maps, dilation=False)
    scripted = torch.jit.script(backbone)
    batch = nested_tensor_from_tensor_list(images)
    with torch.no_grad():
        out, expected = scripted(batch), backbone(batch)
    assert list(out) == list(expected)
    for name in expected:
        assert torch.equal(out[name].tensors, expected[name].tensors)
        assert torch.equal(out[name].mask, expected[name].mask)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_whole_detector_scripts(detr, images, pre_norm, tmp_path):
    model = detr(aux_loss=False, pre_norm=pre_norm)
    batch = nested_tensor_from_tensor_list(images)
    torch.jit.save(torch.jit.script(Encode(model)), str(tmp_path / "detr.pt"))
    with torch.no_grad():
        expected = model(batch)
        assert_same(torch.jit.script(model)(batch), expected)
        assert_same(torch.jit.load(str(tmp_path / "detr.pt"))(batch.tensors, batch.mask), expected)


def test_the_scripted_detector_takes_images_of_any_size(detr):
    model = detr(aux_loss=False)
    scripted = torch.jit.script(model)
    for size in ((64, 96), (130, 50), (33, 257)):
        batch = nested_tensor_from_tensor_list([torch.randn(3, *size)])
        with torch.no_grad():
            assert_same(scripted(batch), model(batch))


# Post-processing.


def test_post_processing_by_hand():
    logits = torch.tensor([[[0.1, 0.3, 0.6], [0.5, 0.4, 0.1]]]).log()
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    result, = PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]))
    assert sorted(result) == ["boxes", "labels", "scores"]
    # The best of the real classes, "no object" aside, even where that would be likelier.
    assert result["labels"].tolist() == [1, 0] and result["labels"].dtype == torch.int64
    assert result["scores"].tolist() == pytest.approx([0.3, 0.5])
    # Height 100, width 200; left, top, right, bottom.
    torch.testing.assert_close(result["boxes"], torch.tensor([[80.0, 30.0, 120.0, 70.0], [0.0, 0.0, 100.0, 100.0]]))


def test_every_image_is_scaled_by_its_own_size():
    outputs = {"pred_logits": torch.zeros(2, 1, 3), "pred_boxes": torch.tensor([[[0.5, 0.5, 1.0, 1.0]]] * 2)}
    results = PostProcess()(outputs, torch.tensor([[10, 20], [30, 40]]))
    assert [result["boxes"].tolist() for result in results] == [[[0, 0, 20, 10]], [[0, 0, 40, 30]]]


@pytest.mark.parametrize("sizes", [torch.tensor([[10, 20]]), torch.tensor([10, 20]), torch.zeros(2, 3)],
                         ids=["one", "flat", "three"])
def test_sizes_of_another_number_are_refused(sizes):
    outputs = {"pred_logits": torch.zeros(2, 1, 3), "pred_boxes": torch.zeros(2, 1, 4)}
    with pytest.raises(ValueError, match=r"target_sizes must be \[2, 2\], got"):
        PostProcess()(outputs, sizes)
