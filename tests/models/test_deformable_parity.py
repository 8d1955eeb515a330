"""Parity with the Deformable DETR of Hugging Face's `transformers`, which shares no code with ours: the same random
weights must give the same predictions in every variant, and the same predictions the same losses."""
import copy

import pytest
import torch
from hugging_face import DEFORMABLE_DETR, copy_weights, randomise_batch_norm
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from models import build_model
from util.misc import nested_tensor_from_tensor_list


def hugging_face_model(args):
    layers = ("basic", [64, 128, 256, 512], [2, 2, 2, 2])
    stages = ["stage2", "stage3", "stage4"][-min(args.num_feature_levels, 3):]
    backbone = ResNetConfig(embedding_size=64, hidden_sizes=layers[1], depths=layers[2], layer_type=layers[0],
                            out_features=stages)
    model = DeformableDetrForObjectDetection(DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        d_model=args.hidden_dim, encoder_layers=args.enc_layers, decoder_layers=args.dec_layers,
        encoder_ffn_dim=args.dim_feedforward, decoder_ffn_dim=args.dim_feedforward, encoder_attention_heads=args.nheads,
        decoder_attention_heads=args.nheads, encoder_n_points=args.enc_n_points, decoder_n_points=args.dec_n_points,
        num_queries=args.num_queries, num_labels=args.num_classes, num_feature_levels=args.num_feature_levels,
        with_box_refine=args.with_box_refine, two_stage=args.two_stage, two_stage_num_proposals=args.num_queries,
        class_cost=int(args.set_cost_class), dropout=0.0, disable_custom_kernels=True))
    if args.with_box_refine:
        # Since its version 5 the library gives all layers one class head here, unlike earlier ones and published weights.
        model.class_embed = nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
        if args.two_stage:
            model.model.decoder.class_embed = model.class_embed
    return model


@torch.no_grad()
def randomise(model):
    """Weights that make predictions of all queries and layers differ, points lie far and wide, and batch norms act."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if hasattr(module, "running_var"):
            randomise_batch_norm(module, generator)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.2, generator=generator)
        elif isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            for parameter in module.parameters(recurse=False):
                parameter.normal_(0, 0.2, generator=generator)


VARIANTS = {"plain": {}, "single scale": {"num_feature_levels": 1}, "five levels": {"num_feature_levels": 5},
            "points": {"enc_n_points": 2, "dec_n_points": 3}, "refined": {"with_box_refine": True},
            "two stages": {"with_box_refine": True, "two_stage": True}}  # theirs has no two stages without refinement


@pytest.fixture(params=VARIANTS)
def trio(request, tiny_args):
    """Our model and criterion, and their model with the same weights."""
    torch.manual_seed(0)
    args = tiny_args(model="deformable_detr", dec_layers=3, **VARIANTS[request.param])
    model, criterion, _ = build_model(args)
    randomise(model)
    theirs = hugging_face_model(args)
    copy_weights(model, theirs, DEFORMABLE_DETR)
    return model.eval(), criterion, theirs.eval()


@torch.no_grad()
def test_predictions_of_every_layer_and_losses(trio, images, targets):
    ours, criterion, theirs = trio
    batch = nested_tensor_from_tensor_list(images)
    assert batch.mask.any()
    out = ours(batch)
    expected = theirs(batch.tensors, pixel_mask=(~batch.mask).long())
    layers = [*out["aux_outputs"], out]
    assert out["pred_boxes"].std(1).mean() > 1e-2, "the queries' predictions must differ for this to mean anything"
    torch.testing.assert_close(out["pred_logits"], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(out["pred_boxes"], expected.pred_boxes, rtol=0, atol=1e-4)
    references = [expected.init_reference_points, *expected.intermediate_reference_points.unbind(1)[:-1]]
    states = expected.intermediate_hidden_states.unbind(1)
    for i, (layer, state, reference) in enumerate(zip(layers, states, references)):
        torch.testing.assert_close(layer["pred_logits"], theirs.class_embed[i](state), rtol=0, atol=1e-4)
        moved = theirs.bbox_embed[i](state)
        moved[..., :reference.shape[-1]] += torch.logit(reference, eps=1e-5)
        torch.testing.assert_close(layer["pred_boxes"], moved.sigmoid(), rtol=0, atol=1e-4)
    if ours.two_stage:
        torch.testing.assert_close(out["enc_outputs"]["pred_logits"], expected.enc_outputs_class, rtol=0, atol=1e-4)
        torch.testing.assert_close(out["enc_outputs"]["pred_boxes"], expected.enc_outputs_coord_logits.sigmoid(), rtol=0,
                                   atol=1e-4)

    config = theirs.config
    config.auxiliary_loss = False
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    for name, layer in zip(("_0", "_1", ""), layers):
        _, their_losses, _ = DeformableDetrForObjectDetectionLoss(layer["pred_logits"], labels, torch.device("cpu"),
                                                                  layer["pred_boxes"], config)
        losses = criterion(out, targets)
        for own, their in (("loss_ce", "loss_ce"), ("loss_bbox", "loss_bbox"), ("loss_giou", "loss_giou")):
            torch.testing.assert_close(losses[own + name], their_losses[their], rtol=1e-4, atol=1e-5)
