"""Parity with the DETR of Hugging Face's `transformers`, an implementation that shares no code with ours: the same
random weights must give the same predictions, and the same predictions the same losses."""
import re

import pytest
import torch
from hugging_face import DETR, copy_weights, randomise_batch_norm
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, DetrForSegmentation, ResNetConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss, ImageLoss
from transformers.loss.loss_for_object_detection import HungarianMatcher as TheirMatcher

from models import build_model
from util.misc import nested_tensor_from_tensor_list


def hugging_face_detr(args):
    layers = {"resnet18": ("basic", [64, 128, 256, 512], [2, 2, 2, 2]),
              "resnet50": ("bottleneck", [256, 512, 1024, 2048], [3, 4, 6, 3])}
    layer_type, widths, depths = layers[args.backbone]
    backbone = ResNetConfig(embedding_size=64, hidden_sizes=widths, depths=depths, layer_type=layer_type,
                            out_features=["stage4"])
    return DetrForObjectDetection(DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        d_model=args.hidden_dim, encoder_layers=args.enc_layers, decoder_layers=args.dec_layers,
        encoder_ffn_dim=args.dim_feedforward, decoder_ffn_dim=args.dim_feedforward, encoder_attention_heads=args.nheads,
        decoder_attention_heads=args.nheads, num_queries=args.num_queries, num_labels=args.num_classes,
        position_embedding_type=args.position_embedding, dropout=0.0))


@torch.no_grad()
def randomise(model, images):
    """Weights that make predictions of all queries and layers differ, and batch norms that do something."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if hasattr(module, "running_var"):
            randomise_batch_norm(module, generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
        elif isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            for name, parameter in module.named_parameters(recurse=False):
                if "bias" in name:
                    parameter.data.normal_(0, 0.3, generator=generator)
                else:
                    parameter.data *= 5 if isinstance(module, nn.MultiheadAttention) else 2.5
    model.query_embed.weight *= 3
    features = model.backbone(nested_tensor_from_tensor_list(images))[0][-1].tensors
    model.input_proj.weight /= model.input_proj(features).std()  # else the image drowns the queries


@pytest.fixture(params=[("resnet18", "sine"), ("resnet50", "sine"), ("resnet18", "learned")], ids="-".join)
def pair(request, tiny_args, images):
    """Our model, and theirs with the same weights."""
    backbone, position_embedding = request.param
    torch.manual_seed(0)
    args = tiny_args(backbone=backbone, position_embedding=position_embedding, dec_layers=3)
    model = build_model(args)[0]
    randomise(model, images)
    theirs = hugging_face_detr(args)
    copy_weights(model, theirs, DETR)
    return model.eval(), theirs.eval()


def test_predictions_of_every_layer(pair, images):
    ours, theirs = pair
    batch = nested_tensor_from_tensor_list(images)
    with torch.no_grad():
        out = ours(batch)
        expected = theirs(batch.tensors, pixel_mask=(~batch.mask).long(), output_hidden_states=True)
        # With `auxiliary_loss` theirs would feed each decoder layer the *final norm* of the one before, which the
        # published detector doesn't; so earlier layers' predictions are taken from the layers' own outputs.
        earlier = [theirs.model.decoder.layernorm(state) for state in expected.decoder_hidden_states[1:-1]]
        expected_logits = [theirs.class_labels_classifier(state) for state in earlier] + [expected.logits]
        expected_boxes = [theirs.bbox_predictor(state).sigmoid() for state in earlier] + [expected.pred_boxes]

    assert out["pred_boxes"].std(1).mean() > 1e-3, "the queries' predictions must differ for this to mean anything"
    layers = [*out["aux_outputs"], out]
    assert len(layers) == len(expected_logits) == 3
    for layer, logits, boxes in zip(layers, expected_logits, expected_boxes):
        torch.testing.assert_close(layer["pred_logits"], logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer["pred_boxes"], boxes, rtol=0, atol=1e-4)


def test_position_encodings(pair, images):
    ours, theirs = pair
    collected = []
    encoder = next(module for module in theirs.modules() if "PositionEmbedding" in type(module).__name__)
    encoder.register_forward_hook(lambda module, inputs, output: collected.append(output))
    batch = nested_tensor_from_tensor_list(images)
    with torch.no_grad():
        theirs(batch.tensors, pixel_mask=(~batch.mask).long())
        features, positions = ours.backbone(batch)
    assert features[0].mask.any() and not features[0].mask.all()
    # Depending on the library's version theirs is [B, d, h, w] or [B, h * w, d].
    expected = collected[0] if collected[0].dim() == 3 else collected[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(positions[0].flatten(2).transpose(1, 2), expected.expand(2, -1, -1), rtol=0, atol=1e-5)


def test_losses_of_every_layer(tiny_args):
    """Twelve queries, up to four objects of five classes, three layers: matching, losses and their weighted sum."""
    args = tiny_args(dec_layers=3)
    criterion = build_model(args)[1].eval()
    config = hugging_face_detr(args).config
    config.auxiliary_loss = True
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(3, 4, 12, 6, generator=generator)
    boxes = 0.2 + 0.3 * torch.rand(3, 4, 12, 4, generator=generator)
    targets = [{"labels": torch.randint(0, 5, (n,), generator=generator),
                "boxes": 0.1 + 0.4 * torch.rand(n, 4, generator=generator)} for n in (2, 4, 0, 3)]

    losses = criterion({"pred_logits": logits[2], "pred_boxes": boxes[2],
                        "aux_outputs": [{"pred_logits": logits[i], "pred_boxes": boxes[i]} for i in range(2)]}, targets)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    total, expected, _ = ForObjectDetectionLoss(logits[2], labels, torch.device("cpu"), boxes[2], config,
                                                outputs_class=logits, outputs_coord=boxes)
    assert set(losses) - {"class_error"} == set(expected)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(losses[name] * weight for name, weight in criterion.weight_dict.items()), total)


# Masks.

MASKS_RENAMED = [
    (r"^mask_head\.lay([12])\.", r"mask_head.conv\1.conv."),
    (r"^mask_head\.gn([12])\.", r"mask_head.conv\1.norm."),
    (r"^mask_head\.lay([345])\.", lambda m: f"mask_head.fpn_stages.{int(m[1]) - 3}.refine.conv."),
    (r"^mask_head\.gn([345])\.", lambda m: f"mask_head.fpn_stages.{int(m[1]) - 3}.refine.norm."),
    (r"^mask_head\.adapter(\d)\.", lambda m: f"mask_head.fpn_stages.{int(m[1]) - 1}.fpn_adapter."),
    (r"^mask_head\.out_lay\.", "mask_head.output_conv."),
    (r"^bbox_attention\.([qk])_linear\.", r"bbox_attention.\1_proj."),
]
# Before version 5 their mask head had our names for most layers.
OLD_NAMES = [(r"^mask_head\.", "mask_head."), (r"^bbox_attention\.", "bbox_attention.")]


@torch.no_grad()
def randomise_masks(model, images):
    """Attention that differs between queries and is seen in the masks beside what the backbone's maps bring in."""
    generator = torch.Generator().manual_seed(4)
    head, attention = model.mask_head, model.bbox_attention
    for module in head.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
    features = model.detr.backbone(nested_tensor_from_tensor_list(images))[0]
    for adapter, feature in zip((head.adapter1, head.adapter2, head.adapter3), features[-2::-1]):
        adapter.weight *= 0.1 / adapter(feature.tensors).std()
    attention.q_linear.weight *= 6
    head.lay1.weight[:, head.context_dim:] *= 200


@pytest.fixture(params=["resnet18", "resnet50"])
def segmentation_pair(request, tiny_args, images):
    """Our model with masks, and theirs with the same weights."""
    torch.manual_seed(0)
    args = tiny_args(backbone=request.param, masks=True, nheads=8)
    model = build_model(args)[0]
    randomise(model.detr, images)
    randomise_masks(model, images)
    config = hugging_face_detr(args).config
    config.backbone_config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    theirs = DetrForSegmentation(config)
    copy_weights(model.detr, theirs.detr, DETR)
    head = {name: value for name, value in model.state_dict().items() if not name.startswith("detr.")}
    their_head = {name for name in theirs.state_dict() if not name.startswith("detr.")}
    renamed = MASKS_RENAMED if any("fpn_stages" in name for name in their_head) else OLD_NAMES
    for pattern, replacement in renamed:
        head = {re.sub(pattern, replacement, name): value for name, value in head.items()}
    assert set(head) == their_head
    theirs.load_state_dict(head, strict=False)
    return model.eval(), theirs.eval()


def test_masks(segmentation_pair, images):
    ours, theirs = (model.double() for model in segmentation_pair)  # the exaggerated weights blow up rounding, too
    batch = nested_tensor_from_tensor_list([image.double() for image in images])
    with torch.no_grad():
        out = ours(batch)
        expected = theirs(batch.tensors, pixel_mask=(~batch.mask).long())
    assert out["pred_masks"].std(1).mean() > 0.02, "the queries' masks must differ for this to mean anything"
    torch.testing.assert_close(out["pred_logits"], expected.logits, rtol=0, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(out["pred_masks"], expected.pred_masks, rtol=0, atol=1e-5, check_dtype=False)


def test_losses_of_masks(tiny_args):
    """Targets of two sizes and an image without objects; the losses of the last layer."""
    criterion = build_model(tiny_args(masks=True, dec_layers=3))[1].eval()
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(3, 3, 12, 6, generator=generator)
    boxes = 0.2 + 0.3 * torch.rand(3, 3, 12, 4, generator=generator)
    masks = 3 * torch.randn(3, 12, 6, 8, generator=generator)
    targets = [{"labels": torch.randint(0, 5, (n,), generator=generator),
                "boxes": 0.1 + 0.4 * torch.rand(n, 4, generator=generator),
                "masks": torch.rand(n, height, width, generator=generator) > 0.5}
               for n, height, width in ((2, 24, 20), (4, 16, 32), (0, 10, 10))]
    losses = criterion({"pred_logits": logits[2], "pred_boxes": boxes[2], "pred_masks": masks,
                        "aux_outputs": [{"pred_logits": logits[i], "pred_boxes": boxes[i]} for i in range(2)]}, targets)
    labels = [{"class_labels": target["labels"], **target} for target in targets]
    # Their loss function as a whole asks for masks of every layer, which even their model doesn't predict.
    criterion_of_theirs = ImageLoss(matcher=TheirMatcher(class_cost=1, bbox_cost=5, giou_cost=2), num_classes=5,
                                    eos_coef=0.1, losses=["labels", "boxes", "cardinality", "masks"])
    expected = criterion_of_theirs({"logits": logits[2], "pred_boxes": boxes[2], "pred_masks": masks}, labels)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=1e-5)
    assert {"loss_mask", "loss_dice"} <= set(expected)
