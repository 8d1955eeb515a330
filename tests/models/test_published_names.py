"""The names of the published programs' models, called with their arguments in their order."""
import argparse
import math

import pytest
import torch
from torch import nn

import models
from models import backbone, deformable_detr, deformable_transformer, detr, matcher, position_encoding
from models import segmentation, transformer, updetr
from models.classification import FocalClassification
from models.ms_deform_attn import MSDeformAttn
from util.misc import nested_tensor_from_tensor_list


def images():
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, 64, 96, generator=generator), torch.rand(3, 80, 64, generator=generator)]


def joiner(return_interm_layers=False):
    body = backbone.Backbone("resnet18", True, return_interm_layers, False)
    return backbone.Joiner(body, position_encoding.PositionEmbeddingSine(16, 10000, True, 2 * math.pi))


def small_transformer():
    return transformer.Transformer(32, 4, 1, 2, 48, 0.1, "relu", False, True)


def small_detr(return_interm_layers=False):
    torch.manual_seed(0)
    return detr.DETR(joiner(return_interm_layers), small_transformer(), 3, 5, True).eval()


DETR_FLAGS = dict(
    lr=1e-4, lr_backbone=1e-5, batch_size=2, weight_decay=1e-4, epochs=300, lr_drop=200, clip_max_norm=0.1,
    frozen_weights=None, backbone="resnet18", dilation=False, position_embedding="sine", enc_layers=1, dec_layers=2,
    dim_feedforward=48, hidden_dim=32, dropout=0.1, nheads=4, num_queries=5, pre_norm=False, masks=False,
    aux_loss=True, set_cost_class=1, set_cost_bbox=5, set_cost_giou=2, mask_loss_coef=1, dice_loss_coef=1,
    bbox_loss_coef=5, giou_loss_coef=2, eos_coef=0.1, dataset_file="coco", coco_path=".", coco_panoptic_path=None,
    remove_difficult=False, output_dir="", device="cpu", seed=42, resume="x", start_epoch=0, eval=False,
    num_workers=2, world_size=1, dist_url="env://")
DEFORMABLE_FLAGS = {
    **DETR_FLAGS, "lr_backbone_names": ["backbone.0"], "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
    "lr_linear_proj_mult": 0.1, "lr_drop_epochs": None, "sgd": False, "with_box_refine": False, "two_stage": False,
    "position_embedding_scale": 2 * math.pi, "num_feature_levels": 4, "dec_n_points": 4, "enc_n_points": 4,
    "cls_loss_coef": 2, "focal_alpha": 0.25, "cache_mode": False, "set_cost_class": 2}
for name in ("pre_norm", "eos_coef", "world_size", "dist_url"):
    del DEFORMABLE_FLAGS[name]


@pytest.mark.parametrize("build", [models.build_model, detr.build])
def test_build_detr(build):
    model, criterion, postprocessors = build(argparse.Namespace(**DETR_FLAGS))
    assert type(model) is detr.DETR and isinstance(criterion, detr.SetCriterion)
    assert isinstance(criterion.matcher, matcher.HungarianMatcher)
    assert isinstance(postprocessors["bbox"], detr.PostProcess) and model.class_embed.out_features == 92


def test_build_matcher():
    built = matcher.build_matcher(argparse.Namespace(**{**DETR_FLAGS, "set_cost_giou": 3}))
    assert (built.cost_class, built.cost_bbox, built.cost_giou) == (1, 5, 3)
    outputs = {"pred_logits": torch.zeros(1, 3, 4), "pred_boxes": torch.tensor([[[0.1] * 4, [0.5] * 4, [0.8] * 4]])}
    targets = [{"labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.8] * 4, [0.1] * 4])}]
    for each in (built, matcher.HungarianMatcher(1, 5, 2)):
        assert [part.tolist() for part in each(outputs, targets)[0]] == [[0, 2], [1, 0]]


@pytest.mark.parametrize("build", [models.build_model, deformable_detr.build])
def test_build_deformable_detr(build):
    model, criterion, postprocessors = build(argparse.Namespace(**DEFORMABLE_FLAGS))
    assert type(model) is deformable_detr.DeformableDETR
    assert isinstance(postprocessors["bbox"], deformable_detr.PostProcess)
    assert isinstance(criterion.matcher.classification, FocalClassification)
    built = deformable_transformer.build_deforamble_transformer(argparse.Namespace(**DEFORMABLE_FLAGS))
    assert isinstance(built, deformable_transformer.DeformableTransformer)


def test_detr_its_criterion_and_post_processing():
    model = small_detr()
    criterion = detr.SetCriterion(3, matcher.HungarianMatcher(1, 5, 2), {"loss_ce": 1, "loss_bbox": 5}, 0.1,
                                  ["labels", "boxes", "cardinality"])
    outputs = model(nested_tensor_from_tensor_list(images()))
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    losses = criterion(outputs, targets)
    assert {"loss_ce", "loss_ce_0", "loss_bbox", "loss_giou", "class_error", "cardinality_error"} <= set(losses)
    results = detr.PostProcess()(outputs, torch.tensor([[64, 96], [80, 64]]))
    assert [len(result["scores"]) for result in results] == [5, 5]
    assert detr.MLP(4, 8, 2, 3)(torch.zeros(1, 4)).shape == (1, 2)


def test_masks():
    model = segmentation.DETRsegm(small_detr(True), False).eval()
    sizes = torch.tensor([[64, 96], [80, 64]])
    with torch.no_grad():
        outputs = model(nested_tensor_from_tensor_list(images()))
        assert outputs["pred_masks"].shape == (2, 5, 20, 24)
        results = detr.PostProcess()(outputs, sizes)
        results = segmentation.PostProcessSegm(0.5)(results, outputs, sizes, sizes)
        assert results[0]["masks"].shape == (5, 1, 64, 96)
        panoptic = segmentation.PostProcessPanoptic({i: True for i in range(3)}, 0.0)(outputs, sizes, sizes)
    assert set(panoptic[0]) == {"png_string", "segments_info"}


def test_attention_maps_and_mask_head():
    torch.manual_seed(0)
    attention = segmentation.MHAttentionMap(32, 16, 4, 0.0, True)
    hidden = torch.zeros(2, 3, 4, dtype=torch.bool)
    hidden[0, :, 3] = True
    maps = attention(torch.rand(2, 5, 32), torch.rand(2, 32, 3, 4), hidden)
    assert maps.shape == (2, 5, 4, 3, 4) and attention.k_linear.weight.shape == (16, 32)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 5))
    assert segmentation.MHAttentionMap(32, 16, 4, bias=False).q_linear.bias is None
    dropping = segmentation.MHAttentionMap(32, 16, 4, 0.5)(torch.rand(2, 5, 32), torch.rand(2, 32, 3, 4))
    assert (dropping == 0).any()
    head = segmentation.MaskHeadSmallConv(32 + 4, [64, 32, 16], 32)
    fpns = [torch.rand(2, 64, 6, 8), torch.rand(2, 32, 12, 16), torch.rand(2, 16, 24, 32)]
    assert head(torch.rand(2, 32, 3, 4), maps, fpns).shape == (2 * 5, 1, 24, 32)


def test_dice_loss_by_hand():
    inputs, targets = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Probabilities 1/2, 1/2 and 1/2, 3/4: 1 - (2 * 1/2 + 1) / (1 + 1 + 1) and 1 - (2 * 3/4 + 1) / (5/4 + 1 + 1).
    expected = (1 - 2 / 3) + (1 - 2.5 / 3.25)
    assert segmentation.dice_loss(inputs, targets, 2).item() == pytest.approx(expected / 2)
    square = segmentation.dice_loss(inputs[:, None], targets[:, None], torch.tensor(4.0))
    assert square.item() == pytest.approx(expected / 4), "masks of any shape"


def test_sigmoid_focal_loss_by_hand():
    inputs, targets = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 0.0]])
    half, three = 0.5 ** 2 * math.log(2), 0.75 ** 2 * math.log(4)
    assert segmentation.sigmoid_focal_loss(inputs, targets, 2).item() == pytest.approx(
        (0.25 * half + 0.75 * three) / 2 / 2)
    assert segmentation.sigmoid_focal_loss(inputs, targets, 1, 0.4, 1).item() == pytest.approx(
        (0.4 * 0.5 * math.log(2) + 0.6 * 0.75 * math.log(4)) / 2)
    assert segmentation.sigmoid_focal_loss(inputs, targets, 1, -1).item() == pytest.approx((half + three) / 2)


def test_backbones_parts():
    assert issubclass(backbone.Backbone, backbone.BackboneBase)
    assert backbone.FrozenBatchNorm2d(4)(torch.ones(1, 4, 2, 2)).shape == (1, 4, 2, 2)
    features, positions = joiner()(nested_tensor_from_tensor_list(images()))
    assert len(features) == len(positions) == 1 and positions[0].shape[1] == 32
    learned = position_encoding.PositionEmbeddingLearned(16)
    assert learned(features[0]).shape == (2, 32, 3, 3)
    flags = argparse.Namespace(**DETR_FLAGS)
    assert isinstance(backbone.build_backbone(flags), backbone.Joiner)
    assert isinstance(position_encoding.build_position_encoding(flags), position_encoding.PositionEmbeddingSine)
    assert isinstance(transformer.build_transformer(flags), transformer.Transformer)


def test_updetr():
    torch.manual_seed(0)
    model = updetr.UPDETR(joiner(), small_transformer(), 2, 6, True, 3, True, False, 0.1).eval()
    out = model(nested_tensor_from_tensor_list(images()), torch.rand(2, 3, 3, 32, 32))
    assert out["pred_logits"].shape == (2, 6, 3) and out["pred_feature"].shape == (2, 6, 512)
    assert updetr.build is detr.build


def test_deformable_transformer_and_its_layers():
    arguments = (32, 4, 1, 2, 48, 0.1, "relu", True, 2, 3, 4, True, 7)
    built = deformable_transformer.DeformableTransformer(*arguments)
    assert built.level_embed.shape == (2, 32) and built.two_stage and len(built.decoder.layers) == 2
    assert built.encoder.layers[0].self_attn.n_points == 4 and built.decoder.layers[0].cross_attn.n_points == 3
    layer = deformable_transformer.DeformableTransformerEncoderLayer(32, 48, 0.1, "relu", 2, 4, 3)
    assert layer.linear1.out_features == 48 and layer.self_attn.n_heads == 4 and layer.self_attn.n_levels == 2
    assert len(deformable_transformer.DeformableTransformerEncoder(layer, 3).layers) == 3
    layer = deformable_transformer.DeformableTransformerDecoderLayer(32, 48, 0.1, "relu", 2, 4, 3)
    assert layer.self_attn.num_heads == 4 and layer.cross_attn.n_points == 3
    assert len(deformable_transformer.DeformableTransformerDecoder(layer, 3, True).layers) == 3
    assert MSDeformAttn(32, 2, 4, 3).sampling_offsets.out_features == 2 * 4 * 3 * 2


def test_deformable_detr_its_criterion_and_post_processing():
    torch.manual_seed(0)
    body = backbone.Backbone("resnet18", True, False, False, num_maps=2)
    parts = backbone.Joiner(body, position_encoding.PositionEmbeddingSine(16, normalize=True))
    built = deformable_transformer.DeformableTransformer(32, 4, 1, 2, 48, 0.1, "relu", True, 2, 4, 4, True, 7)
    model = deformable_detr.DeformableDETR(parts, built, 3, 9, 2, True, True, True).eval()
    outputs = model(nested_tensor_from_tensor_list(images()))
    assert outputs["pred_logits"].shape == (2, 7, 3), "as many as the transformer proposes"
    criterion = deformable_detr.SetCriterion(3, matcher.HungarianMatcher(2, 5, 2), {}, ["labels", "boxes"], 0.25)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    assert {"loss_ce", "loss_ce_0", "loss_ce_enc"} <= set(criterion(outputs, targets))
    results = deformable_detr.PostProcess()(outputs, torch.tensor([[64, 96], [80, 64]]))
    assert len(results) == 2 and deformable_detr.MLP is detr.MLP


def test_clones_and_activations():
    layers = transformer._get_clones(nn.Linear(2, 3), 4)
    assert len(layers) == 4 and torch.equal(layers[0].weight, layers[3].weight) and layers[0] is not layers[3]
    x = torch.tensor([-1.0, 2.0])
    assert transformer._get_activation_fn("relu")(x).tolist() == [0, 2]
    torch.testing.assert_close(transformer._get_activation_fn("gelu")(x), nn.functional.gelu(x))
