"""The mask head against independent computations of the same, its symmetries, and what it leaves alone."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from models.segmentation import DETRsegm, MaskHeadSmallConv, MHAttentionMap
from util.misc import NestedTensor, nested_tensor_from_tensor_list


@pytest.fixture
def segm(tiny_args):
    """Tiny models with masks in evaluation mode, by changed flags."""

    def make(**changes):
        torch.manual_seed(2)
        return build_model(tiny_args(masks=True, **changes))[0].eval()

    return make


@pytest.fixture
def attention_inputs():
    """Queries, memory, and a mask that hides the last column of the first image."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, :, 3] = True
    return torch.randn(2, 5, 16, generator=generator), torch.randn(2, 16, 3, 4, generator=generator), mask


def head_inputs(num_queries=12, batch=2, seed=0):
    """Projected map, attention maps and three finer maps, as from a backbone with 64 channels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((32, 5, 7), (16, 10, 13), (8, 20, 26))
    maps = [torch.randn(batch, *size, generator=generator) for size in sizes]
    projected = torch.randn(batch, 16, 3, 4, generator=generator)
    return projected, torch.rand(batch, num_queries, 4, 3, 4, generator=generator), maps


def small_head():
    torch.manual_seed(1)
    return MaskHeadSmallConv(20, (32, 16, 8), 16)


# Attention maps.


def test_maps_per_head_are_those_of_torchs_attention(attention_inputs):
    queries, memory, mask = attention_inputs
    attention = MHAttentionMap(16, 16, 4, softmax_per_head=True)
    peer = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        for i, linear in enumerate((attention.q_linear, attention.k_linear)):
            linear.bias.normal_()
            peer.in_proj_weight[16 * i:16 * i + 16] = linear.weight
            peer.in_proj_bias[16 * i:16 * i + 16] = linear.bias
    tokens = memory.flatten(2).transpose(1, 2)
    expected = peer(queries, tokens, tokens, mask.flatten(1), average_attn_weights=False)[1]
    torch.testing.assert_close(attention(queries, memory, mask), expected.transpose(1, 2).unflatten(-1, (3, 4)))


def test_joint_maps_share_one_sum_among_the_heads(attention_inputs):
    torch.manual_seed(0)
    joint, per_head = MHAttentionMap(16, 16, 4), MHAttentionMap(16, 16, 4, softmax_per_head=True)
    per_head.load_state_dict(joint.state_dict())
    one, each = joint(*attention_inputs), per_head(*attention_inputs)
    torch.testing.assert_close(one.sum((2, 3, 4)), torch.ones(2, 5))
    torch.testing.assert_close(each.sum((3, 4)), torch.ones(2, 5, 4))
    shares = one.sum((3, 4), keepdim=True)
    assert shares.std() > 0.01
    torch.testing.assert_close(one / shares, each)


@pytest.mark.parametrize("per_head", [False, True])
def test_padding_gets_no_attention(attention_inputs, per_head):
    queries, memory, mask = attention_inputs
    attention = MHAttentionMap(16, 16, 4, softmax_per_head=per_head)
    maps = attention(queries, memory, mask)
    assert (maps[0, :, :, :, 3] == 0).all() and (maps[1] > 0).all()
    torch.testing.assert_close(maps[:1, ..., :3], attention(queries[:1], memory[:1, :, :, :3]), msg="as if cut off")
    torch.testing.assert_close(maps, attention(queries, memory.masked_fill(mask[:, None], 99.0), mask))


# The convolutional head.


@torch.no_grad()
def test_the_first_convolution_sees_projected_map_and_attention_together():
    """Every step written out for each query on its own, the first one on the concatenated maps."""
    head = small_head()
    for norm in (head.gn1, head.gn2, head.gn3, head.gn4, head.gn5):
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    head.lay1.bias.normal_()
    projected, attention, maps = head_inputs()
    masks = head.eval()(projected, attention, maps)
    assert masks.shape == (24, 1, 20, 26)
    masks = masks[:, 0].unflatten(0, (2, 12))
    for image in range(2):
        for query in range(12):
            x = torch.cat([projected[image], attention[image, query]])[None]
            x = head.gn2(head.lay2(head.gn1(head.lay1(x)).relu())).relu()
            for adapter, layer, norm, fine in ((head.adapter1, head.lay3, head.gn3, maps[0]),
                                               (head.adapter2, head.lay4, head.gn4, maps[1]),
                                               (head.adapter3, head.lay5, head.gn5, maps[2])):
                x = adapter(fine[image:image + 1]) + F.interpolate(x, fine.shape[-2:], mode="nearest")
                x = norm(layer(x)).relu()
            torch.testing.assert_close(masks[image, query], head.out_lay(x)[0, 0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_masks_made_in_parts_equal_masks_made_at_once():
    head = small_head()
    inputs = head_inputs(num_queries=23)
    together = head.train()(*inputs)
    for masks_at_once in (1, 10, 23, 100):
        head.masks_at_once = masks_at_once
        torch.testing.assert_close(head.eval()(*inputs), together, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_order_of_queries_and_images_does_not_matter():
    head = small_head().eval()
    projected, attention, maps = head_inputs()
    masks = head(projected, attention, maps).unflatten(0, (2, 12))
    queries = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = head(projected, attention[:, queries], maps).unflatten(0, (2, 12))
    torch.testing.assert_close(shuffled, masks[:, queries], rtol=1e-4, atol=1e-5)
    swapped = head(projected.flip(0), attention.flip(0), [fine.flip(0) for fine in maps]).unflatten(0, (2, 12))
    torch.testing.assert_close(swapped, masks.flip(0), rtol=1e-4, atol=1e-5)


def test_too_narrow_a_head_is_refused():
    with pytest.raises(ValueError, match=r"a mask head needs a width of at least 16 \(--hidden_dim\), got 8"):
        MaskHeadSmallConv(12, (32, 16, 8), 8)


def test_groups_fit_every_width():
    """Eight in the published head; always a number that divides the channels."""

    def groups(head):
        return [norm.num_groups for norm in head.modules() if isinstance(norm, nn.GroupNorm)]

    assert groups(MaskHeadSmallConv(264, (1024, 512, 256), 256)) == [8] * 5
    assert groups(MaskHeadSmallConv(68, (128, 64, 32), 64)) == [4, 8, 8, 8, 4], "of 68, 32, 16, 8 and 4 channels"


# The whole model.


@torch.no_grad()
def test_detections_are_those_of_the_detector_alone(segm, tiny_args, images):
    model = segm()
    detector = build_model(tiny_args())[0].eval()
    detector.load_state_dict(model.detr.state_dict())
    out, expected = model(images), detector(images)
    assert out["pred_masks"].shape == (2, 12, 24, 24) and out["pred_masks"].dtype == torch.float32
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(out[name], expected[name])
        torch.testing.assert_close(out["aux_outputs"][0][name], expected["aux_outputs"][0][name])
    assert "pred_masks" not in out["aux_outputs"][0]


@pytest.mark.parametrize("flags", [dict(backbone_last_layer="layer3"), dict(backbone="resnet50", dilation=True),
                                   dict(hidden_dim=64, nheads=8, pre_norm=True)], ids=str)
def test_every_backbone_gives_masks_of_stride_four(segm, images, flags):
    with torch.no_grad():
        masks = segm(**flags)(images)["pred_masks"]
    assert masks.shape == (2, 12, 24, 24) and masks.std() > 0


def test_learned_positions_are_needed_for_the_deepest_map_only(segm):
    """Its table has 50 rows; the map of stride 4 of this image has 60."""
    with torch.no_grad():
        assert segm(position_embedding="learned")(torch.zeros(1, 3, 240, 240))["pred_masks"].shape[-1] == 60


@torch.no_grad()
def test_images_of_a_batch_do_not_influence_each_other(segm, images):
    """Given the same padding, which the normalisation over each map does see."""
    model = segm()
    batch = nested_tensor_from_tensor_list(images)
    together = model(batch)["pred_masks"]
    for i in range(2):
        alone = model(NestedTensor(batch.tensors[i:i + 1], batch.mask[i:i + 1]))["pred_masks"]
        torch.testing.assert_close(together[i:i + 1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_masks_of_unsure_queries_can_be_left_out(segm, images):
    model = segm()
    whole = model(images)
    scores = whole["pred_logits"].softmax(-1)[..., :-1].amax(-1)
    model.min_score = float(scores.median())
    out, sure = model(images), scores >= model.min_score
    assert 0 < sure.sum() < sure.numel()
    torch.testing.assert_close(out["pred_masks"][sure], whole["pred_masks"][sure], rtol=1e-4, atol=1e-5)
    assert (out["pred_masks"][~sure] < -1000).all() and out["pred_masks"].isfinite().all()
    model.min_score = 1.0
    assert (model(images)["pred_masks"] < -1000).all()
    assert (model.train()(images)["pred_masks"] > -1000).all(), "training needs all"


class Encode(nn.Module):
    """Scripted models take tensors from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, tensors: torch.Tensor, mask: torch.Tensor):
        return self.module(NestedTensor(tensors, mask))


@pytest.mark.parametrize("flags, min_score", [({}, 0.0), ({"mask_softmax": "per_head"}, 0.2)], ids=str)
def test_it_scripts(segm, images, flags, min_score, tmp_path):
    """All masks, and those of sure queries only; on images of two sizes; after a way over the disk."""
    model = segm(aux_loss=False, **flags)
    model.min_score = min_score
    torch.jit.save(torch.jit.script(Encode(model)), str(tmp_path / "model.pt"))
    scripted = torch.jit.load(str(tmp_path / "model.pt"))
    for sizes in (images, [torch.randn(3, 70, 50)]):
        batch = nested_tensor_from_tensor_list(sizes)
        with torch.no_grad():
            out, expected = scripted(batch.tensors, batch.mask), model(batch)
        assert set(out) == {"pred_logits", "pred_boxes", "pred_masks"}
        for name in out:
            assert torch.equal(out[name], expected[name])


def test_a_frozen_detector_keeps_its_dropout_in_training(segm, images):
    model = segm(frozen_weights="box.pth", dropout=0.3).train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"bbox_attention", "mask_head"}
    first, second = model(images), model(images)
    assert not torch.equal(first["pred_logits"], second["pred_logits"])
    assert not first["pred_logits"].requires_grad and first["pred_masks"].requires_grad


@pytest.mark.parametrize("frozen", [None, "box.pth"])
def test_every_trained_parameter_gets_a_gradient(tiny_args, images, targets, frozen):
    """Also in a batch without any object: DistributedDataParallel waits for them all."""
    model, criterion, _ = build_model(tiny_args(masks=True, frozen_weights=frozen))
    for keep in (2, 0):
        targets = [{**target, "labels": target["labels"][:keep], "boxes": target["boxes"][:keep],
                    "masks": torch.ones(len(target["labels"][:keep]), *image.shape[1:], dtype=torch.bool)}
                   for target, image in zip(targets, images)]
        model.zero_grad()
        losses = criterion(model(images), targets)
        sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses).backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad
                    and (parameter.grad is None or not parameter.grad.isfinite().all())]
        used = sum(parameter.grad.abs().sum() for parameter in model.mask_head.parameters())
        assert used > 0 if keep else used == 0


def test_channels_of_the_maps_are_a_resnets_unless_given(segm):
    detector = segm().detr
    channels = [getattr(DETRsegm(detector).mask_head, f"adapter{i}").in_channels for i in (1, 2, 3)]
    assert channels == [256, 128, 64]
    assert DETRsegm(detector, map_channels=(7, 5, 3)).mask_head.adapter3.in_channels == 3
