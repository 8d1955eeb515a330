"""Deformable DETR as a whole: refinement and two stages traced by hand, its laws, and where it has to run."""
import math

import pytest
import torch
from torch import nn

from main import has_idle_heads
from models import build_model
from models.deformable_detr import MapNorm, PostProcessFocal
from models.deformable_transformer import Encoded, _centres, _in_each_map, _valid_ratio, move_boxes
from models.ms_deform_attn import make_levels
from util.box_ops import box_cxcywh_to_xyxy
from util.misc import NestedTensor, nested_tensor_from_tensor_list

LN3 = math.log(3)  # the logit of 0.75, and less the one of 0.25
VARIANTS = {"plain": {}, "refined": {"with_box_refine": True}, "two stages": {"two_stage": True},
            "both": {"with_box_refine": True, "two_stage": True}}


@pytest.fixture
def build(tiny_args):
    """A tiny Deformable DETR of random weights and its criterion, in evaluation mode."""

    def make(**changes):
        torch.manual_seed(0)
        args = tiny_args(model="deformable_detr", **changes)
        model, criterion, _ = build_model(args)
        for name, parameter in model.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name or "bbox_embed" in name:
                nn.init.normal_(parameter, std=0.3)  # else all queries look, and see, alike
        return model.eval(), criterion, args

    return make


def total(criterion, losses):
    return sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)


# Feature maps.


@pytest.mark.parametrize("changes, shapes", [
    ({}, [(12, 16), (6, 8), (3, 4), (2, 2)]), ({"num_feature_levels": 1}, [(3, 4)]),
    ({"num_feature_levels": 2}, [(6, 8), (3, 4)]),
    ({"num_feature_levels": 5}, [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]),
    ({"num_feature_levels": 1, "dilation": True, "backbone": "resnet50"}, [(6, 8)]),
    ({"backbone_last_layer": "layer3", "num_feature_levels": 3}, [(12, 16), (6, 8), (3, 4)])])
def test_levels_end_with_the_deepest_map_and_go_on_from_it(build, changes, shapes):
    """Strides 8, 16, 32 of the backbone, then a half each; fewer levels are the deepest ones, and DC5's has stride 16."""
    model, _, _ = build(**changes)
    batch = nested_tensor_from_tensor_list([torch.randn(3, 96, 128), torch.randn(3, 96, 64)])
    maps, masks, positions = model.feature_maps(batch)
    assert [tuple(x.shape) for x in maps] == [(2, 32, *shape) for shape in shapes]
    assert [tuple(x.shape) for x in positions] == [(2, 32, *shape) for shape in shapes]
    for mask, (height, width) in zip(masks, shapes):
        assert not mask[0].any() and mask[1, :, (width + 1) // 2:].all() and not mask[1, :, :width // 2].any()


def test_a_map_of_one_value_in_each_group_becomes_the_bias():
    norm = MapNorm(4, 4)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(torch.randn(1, 4, 1, 1)).flatten(), norm.bias, atol=1e-4, rtol=0)
    x = torch.randn(2, 4, 3, 5)
    assert torch.equal(norm(x), nn.functional.group_norm(x, 4, norm.weight, norm.bias))


def test_shares_of_padding_and_centres_by_hand():
    """A map of 2 x 4 pixels whose two right columns are padding."""
    mask = torch.tensor([[[False, False, True, True]] * 2])
    ratio = _valid_ratio(mask)
    assert ratio.tolist() == [[0.5, 1.0]]
    assert _centres((2, 4), ratio)[0].tolist() == [[0.25, 0.25], [0.75, 0.25], [1.25, 0.25], [1.75, 0.25],
                                                   [0.25, 0.75], [0.75, 0.75], [1.25, 0.75], [1.75, 0.75]]
    ratios = torch.tensor([[[0.5, 1.0], [0.25, 1.0]]])
    point, box = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.5, 0.5, 0.2, 0.4]]])
    assert _in_each_map(point, ratios).tolist() == [[[[0.25, 0.5], [0.125, 0.5]]]]
    torch.testing.assert_close(_in_each_map(box, ratios),
                               torch.tensor([[[[0.25, 0.5, 0.1, 0.4], [0.125, 0.5, 0.05, 0.4]]]]))


# Refinement.


def test_boxes_move_in_logits():
    delta = torch.tensor([LN3, 0.0, -LN3, 0.0])
    torch.testing.assert_close(move_boxes(torch.tensor([0.5, 0.75]), delta), torch.tensor([0.75, 0.75, 0.25, 0.5]))
    moved = move_boxes(torch.tensor([0.25, 0.75, 0.75, 0.5]), delta)
    torch.testing.assert_close(moved, torch.tensor([0.5, 0.75, 0.5, 0.5]))
    assert move_boxes(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.zeros(4)).isfinite().all()


def heads_that_move_by(model, deltas):
    """Make the box head of each layer add the same to every query's box."""
    for head, delta in zip(model.bbox_embed, deltas):
        nn.init.zeros_(head.layers[-1].weight)
        head.layers[-1].bias.data = torch.tensor(delta)


DELTAS = [[LN3, 0.0, -LN3, LN3], [-LN3, LN3, LN3, 0.0], [0.0, 0.0, LN3, -2 * LN3]]


def test_refinement_by_hand(build, images):
    """Every layer moves the box of the one before it, and looks around it; the first looks around a point."""
    model, _, _ = build(with_box_refine=True, dec_layers=3)
    heads_that_move_by(model, DELTAS)
    nn.init.zeros_(model.transformer.reference_points.weight)  # all queries start in the middle
    looked = []
    for layer in model.transformer.decoder.layers:
        layer.cross_attn.register_forward_pre_hook(lambda module, inputs: looked.append(inputs[1]))
    out = model(images)
    boxes = [[0.75, 0.5, 0.25, 0.75], [0.5, 0.75, 0.5, 0.75], [0.5, 0.75, 0.75, 0.25]]
    for layer, box in zip([*out["aux_outputs"], out], boxes):
        torch.testing.assert_close(layer["pred_boxes"], torch.tensor(box).expand(2, 12, 4), rtol=0, atol=1e-5)
    # The batch is 96 x 96; the first image fills its upper 64 rows, the second its left 64 columns.
    for given, reference in zip(looked, ([0.5, 0.5], *boxes[:2])):
        for image, (x, y) in enumerate(((1, 2 / 3), (2 / 3, 1))):
            expected = torch.tensor(reference) * torch.tensor([x, y, x, y][:len(reference)])
            torch.testing.assert_close(given[image, :, 0], expected.expand(12, -1), rtol=0, atol=1e-5)


def test_without_refinement_every_layer_starts_from_the_same_points(build, images):
    model, _, _ = build(dec_layers=3)
    heads_that_move_by(model, [[LN3, 0.0, -LN3, LN3]])
    nn.init.zeros_(model.transformer.reference_points.weight)
    out = model(images)
    for layer in [*out["aux_outputs"], out]:
        expected = torch.tensor([0.75, 0.5, 0.25, 0.75]).expand(2, 12, 4)
        torch.testing.assert_close(layer["pred_boxes"], expected, rtol=0, atol=1e-5)


def test_boxes_of_a_layer_train_its_own_head_alone(build, images):
    """A layer's box has no gradient through the reference it moves, nor through where later layers look."""
    model, _, _ = build(with_box_refine=True, dec_layers=3)
    model(images)["pred_boxes"].sum().backward()
    trained = [any(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())
               for head in model.bbox_embed]
    assert trained == [False, False, True]


# Two stages.


def encoded_by_hand(masks, memory=None):
    """What the encoder hands on for maps with these masks, each [B, h, w]."""
    shapes = [tuple(mask.shape[1:]) for mask in masks]
    ratios = torch.stack([_valid_ratio(mask) for mask in masks], dim=1)
    centres = torch.cat([_centres(shape, ratios[:, i]) for i, shape in enumerate(shapes)], dim=1)
    padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
    memory = torch.randn(*padding.shape, 32) if memory is None else memory
    return Encoded(memory, padding, make_levels(shapes, torch.device("cpu")), ratios, centres)


def test_proposals_by_hand(build):
    """Boxes of 0.05 of the image around the finest map's pixels, of 0.1 around the next one's; none on padding."""
    model, _, _ = build(two_stage=True)
    right_half = torch.tensor([[[False, False, True, True]] * 2])
    encoded = encoded_by_hand([right_half, right_half[:, :1, 1:3]])
    features, anchors = model.transformer.propose(encoded)
    boxes, left_out = anchors.sigmoid()[0], anchors.isinf().all(-1)[0]
    assert left_out.tolist() == [False, False, True, True] * 2 + [False, True]
    assert (anchors.isinf().any(-1)[0] == left_out).all(), "a box is left out as a whole"
    kept = torch.tensor([[0.25, 0.25, 0.05, 0.05], [0.75, 0.25, 0.05, 0.05], [0.25, 0.75, 0.05, 0.05],
                         [0.75, 0.75, 0.05, 0.05], [0.5, 0.5, 0.1, 0.1]])
    torch.testing.assert_close(boxes[~left_out], kept, rtol=0, atol=1e-6)
    transformer = model.transformer
    torch.testing.assert_close(features[0, ~left_out],
                               transformer.enc_output_norm(transformer.enc_output(encoded.memory))[0, ~left_out])
    nothing = transformer.enc_output_norm(transformer.enc_output.bias)
    torch.testing.assert_close(features[0, left_out], nothing.expand(5, -1))


def test_proposals_at_the_very_edge_are_left_out(build):
    """Of a map of 100 pixels in a row, the outermost centres lie half a hundredth from the edge."""
    model, _, _ = build(two_stage=True)
    _, anchors = model.transformer.propose(encoded_by_hand([torch.zeros(1, 1, 100, dtype=torch.bool)]))
    assert anchors.isinf().all(-1)[0].nonzero().flatten().tolist() == [0, 99]


def test_two_stages_by_hand(build):
    """The proposals of class 0's highest logits become, best first, the boxes that the decoder starts from."""
    model, _, _ = build(two_stage=True, with_box_refine=True, num_queries=2, num_feature_levels=1)
    heads_that_move_by(model, [*DELTAS[:2], [LN3, 0.0, 0.0, 0.0]])  # the last one is the proposals'
    encoded = encoded_by_hand([torch.zeros(1, 2, 2, dtype=torch.bool)])
    logits, box_logits = model.proposals(encoded)
    moved = torch.tensor([[0.5, 0.25, 0.05, 0.05], [0.9, 0.25, 0.05, 0.05], [0.5, 0.75, 0.05, 0.05],
                          [0.9, 0.75, 0.05, 0.05]])
    torch.testing.assert_close(box_logits.sigmoid()[0], moved, rtol=0, atol=1e-6)
    logits = torch.zeros_like(logits)
    logits[0, :, 0] = torch.tensor([-1.0, 3.0, 1.0, 2.0])
    logits[0, 0, 1] = 9.0  # another class doesn't count
    decoded, references = model.decode_proposals(encoded, logits, box_logits.requires_grad_())
    torch.testing.assert_close(references[0], moved[None, [1, 3]], rtol=0, atol=1e-6)
    torch.testing.assert_close(references[1], move_boxes(moved[None, [1, 3]], torch.tensor(DELTAS[0])), rtol=0, atol=1e-5)
    assert not any(reference.requires_grad for reference in references), "the first stage isn't trained through the second"
    boxes = model.predictions(decoded, references)["pred_boxes"]
    torch.testing.assert_close(boxes, move_boxes(references[1], torch.tensor(DELTAS[1])))


def test_queries_of_a_proposal_by_hand(build):
    """128 numbers for each of a box's four in a published model, 16 here: sines and cosines of growing wavelengths."""
    transformer = build(two_stage=True)[0].transformer
    seen = []
    transformer.pos_trans.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    box = torch.tensor([0.5, 0.25, 0.1, 0.2])
    content, position = transformer.queries_at(box.logit()[None, None])
    expected = [wave(2 * math.pi * number / 10000 ** (2 * pair / 16))
                for number in box.tolist() for pair in range(8) for wave in (math.sin, math.cos)]
    torch.testing.assert_close(seen[0][0, 0], torch.tensor(expected), rtol=0, atol=1e-5)
    together = transformer.pos_trans_norm(transformer.pos_trans(seen[0]))
    assert torch.equal(position, together[..., :32]) and torch.equal(content, together[..., 32:])


def test_no_more_queries_than_tokens(build):
    model, criterion, _ = build(two_stage=True, num_queries=300, num_feature_levels=1)
    out = model([torch.randn(3, 64, 96)])
    assert out["pred_boxes"].shape == out["enc_outputs"]["pred_boxes"].shape == (1, 6, 4)


# Laws.


@pytest.fixture(params=VARIANTS)
def variant(request, build):
    return build(**VARIANTS[request.param])


def test_what_the_model_takes_and_gives(variant, images):
    model, _, args = variant
    nested = model(nested_tensor_from_tensor_list(images))
    listed = model(images)
    assert nested["pred_logits"].shape == (2, 12, 5) and nested["pred_boxes"].shape == (2, 12, 4)
    assert len(nested["aux_outputs"]) == 1 and ("enc_outputs" in nested) == args.two_stage
    assert ((nested["pred_boxes"] > 0) & (nested["pred_boxes"] < 1)).all()
    one, tensor = model([images[0]]), model(images[0][None])
    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(nested[name], listed[name])
        torch.testing.assert_close(one[name], tensor[name])


@torch.no_grad()
def test_images_do_not_see_each_other_nor_what_lies_under_the_padding(variant, images):
    model, _, _ = variant
    batch = nested_tensor_from_tensor_list(images)
    out = model(batch)
    turned = model(NestedTensor(batch.tensors.flip(0), batch.mask.flip(0)))
    assert (out["pred_boxes"][0] - out["pred_boxes"][1]).abs().max() > 1e-3
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(turned[name].flip(0), out[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_order_of_queries_means_nothing(build, images):
    model, _, _ = build(with_box_refine=True)
    out = model(images)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    model.query_embed.weight.copy_(model.query_embed.weight[order])
    permuted = model(images)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(permuted[name], out[name][:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_how_it_starts(tiny_args, images, name):
    """Every class has a probability around 0.01, and boxes lie where the queries look, or are the proposals."""
    model = build_model(tiny_args(model="deformable_detr", **VARIANTS[name]))[0].eval()
    assert all(head.bias.sigmoid().allclose(torch.tensor(0.01)) for head in model.class_embed)
    out = model(images)
    if model.two_stage:
        proposals = out["enc_outputs"]["pred_boxes"]
        sides = proposals[..., 2:][proposals[..., 2:] < 1]
        assert all(min(abs(side - 0.05 * 2 ** level) for level in range(4)) < 1e-6 for side in sides.tolist())
    else:
        torch.testing.assert_close(out["aux_outputs"][0]["pred_boxes"][..., 2:].logit(), torch.full((2, 12, 2), -2.0))
        torch.testing.assert_close(out["pred_boxes"], out["aux_outputs"][0]["pred_boxes"])


@pytest.mark.parametrize("aux_loss", [True, False])
def test_what_learns_nothing_is_told(build, images, targets, aux_loss):
    """Two processes wait for the gradient of every parameter unless they are told that some have none."""
    for changes in VARIANTS.values():
        model, criterion, args = build(aux_loss=aux_loss, **changes)
        total(criterion, criterion(model(images), targets)).backward()
        idle = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
        assert bool(idle) == has_idle_heads(args), changes
        assert all("_embed." in name for name in idle)


# Where it runs.


def test_under_autocast_everything_learns(build, images, targets):
    """Sampling runs in float32 whatever the rest does, and box heads used twice still have gradients."""
    model, criterion, _ = build(with_box_refine=True, two_stage=True)
    expected = model(images)
    seen = []
    attention = model.transformer.decoder.layers[0].cross_attn
    attention.output_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images)
    assert seen == [torch.float32] and out["pred_logits"].dtype == torch.float32
    assert out["pred_boxes"].dtype == torch.float32
    torch.testing.assert_close(out["enc_outputs"]["pred_logits"].float(), expected["enc_outputs"]["pred_logits"], rtol=0,
                               atol=0.2)
    total(criterion, criterion(out, targets)).backward()
    without = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not without and all(value.grad.isfinite().all() for value in model.parameters() if value.requires_grad)


def test_torchscript_gives_the_same(build, images):
    model, _, _ = build(with_box_refine=True, two_stage=True, aux_loss=False)
    batch = nested_tensor_from_tensor_list(images)
    scripted, own = torch.jit.script(model)(batch), model(batch)
    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(scripted[name], own[name])


class Predictions(nn.Module):
    """Images [B, 3, H, W] with their padding [B, H, W] to logits and boxes: what is exported."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, mask):
        out = self.model(NestedTensor(images, mask))
        return out["pred_logits"], out["pred_boxes"]


def padded_batch(batch, height, width):
    """Random images, the last of which ends 20 rows above the others."""
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[-1, height - 20:] = True
    return torch.randn(batch, 3, height, width).masked_fill(mask[:, None], 0), mask


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch can't export programs of free sizes")
@torch.no_grad()
def test_exports_to_onnx_with_free_sizes(build, tmp_path):
    pytest.importorskip("onnxscript", reason="torch exports to ONNX with the package onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the exported program is run by onnxruntime")
    model, _, _ = build(with_box_refine=True, two_stage=True, aux_loss=False, enc_layers=1, dec_layers=1, num_feature_levels=2)
    whole, free = Predictions(model).eval(), torch.export.Dim.AUTO
    traced = torch.export.export(whole, padded_batch(2, 96, 128), strict=False,
                                 dynamic_shapes=({0: free, 2: free, 3: free}, {0: free, 1: free, 2: free}))
    torch.onnx.export(traced, (), input_names=["images", "mask"], dynamo=True, verbose=False,
                      optimize=False).save(str(tmp_path / "a.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    for size in ((2, 96, 128), (1, 160, 96), (3, 117, 203)):
        images, mask = padded_batch(*size)
        got = session.run(None, {"images": images.numpy(), "mask": mask.numpy()})
        for own, other in zip(whole(images, mask), got):
            torch.testing.assert_close(torch.from_numpy(other), own, rtol=1e-3, atol=1e-3)


# Detections.


def test_detections_by_hand():
    """The best of all queries times classes: a query may stand for two of them."""
    probabilities = torch.tensor([[[0.9, 0.2, 0.8], [0.1, 0.3, 0.7]], [[0.5, 0.1, 0.2], [0.6, 0.4, 0.3]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]] * 2)
    outputs = {"pred_logits": probabilities.logit(), "pred_boxes": boxes}
    first, second = PostProcessFocal(num_detections=3)(outputs, torch.tensor([[100, 200], [10, 10]]))
    assert first["labels"].tolist() == [0, 2, 2] and first["scores"].tolist() == pytest.approx([0.9, 0.8, 0.7])
    torch.testing.assert_close(first["boxes"], torch.tensor([[80.0, 30, 120, 70]] * 2 + [[0.0, 0, 100, 100]]))
    assert second["labels"].tolist() == [0, 0, 1] and second["scores"].tolist() == pytest.approx([0.6, 0.5, 0.4])
    torch.testing.assert_close(second["boxes"], box_cxcywh_to_xyxy(boxes[0][[1, 0, 1]]) * 10)
    assert len(PostProcessFocal()(outputs, torch.tensor([[1, 1], [1, 1]]))[0]["scores"]) == 6, "there are no more"
    with pytest.raises(ValueError, match=r"target_sizes must be \[2, 2\], got \[1, 2\]"):
        PostProcessFocal()(outputs, torch.tensor([[1, 1]]))
