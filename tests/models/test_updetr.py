"""UP-DETR's laws: a patch belongs to its group of queries and to nothing else."""
import pytest
import torch

from models import build_model
from models.updetr import UPDETR


@pytest.fixture
def updetr(tiny_args):
    """Build a tiny UP-DETR whose predictions depend visibly on its queries."""

    def make(num_queries=12, num_patches=3, **changes):
        torch.manual_seed(0)
        model = build_model(tiny_args(pretraining=True, num_queries=num_queries, num_patches=num_patches, **changes))[0]
        with torch.no_grad():
            model.bbox_embed.layers[-1].weight.normal_(0, 1)
        return model.eval()

    return make


@pytest.fixture
def patches():
    """Three patches for each of two images."""
    return torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def all_predictions(out):
    """Every tensor of an output that is ordered by query."""
    layers = [out, *out.get("aux_outputs", [])]
    return [layer[name] for layer in layers for name in ("pred_logits", "pred_boxes", "pred_feature") if name in layer]


@torch.no_grad()
def predict(model, images, patches):
    return all_predictions(model(images, patches))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_patch_changes_its_own_predictions_only(updetr, images, patches, pre_norm):
    model = updetr(pre_norm=pre_norm)
    other = patches.clone()
    other[1, 1] = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(6))
    for before, after in zip(predict(model, images, patches), predict(model, images, other)):
        torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[1, :4], before[1, :4], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[1, 8:], before[1, 8:], rtol=1e-5, atol=1e-5)
        change = (after[1, 4:8] - before[1, 4:8]).abs().amax(-1)
        assert change.min() > 1e-4, "each query of the group must notice its patch"


@pytest.mark.parametrize("pre_norm", [True, False])
def test_without_the_attention_mask_each_prediction_depends_on_all_patches(updetr, images, patches, pre_norm):
    model = updetr(pre_norm=pre_norm, no_attention_mask=True)
    other = patches.clone()
    other[1, 1] = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():  # of the last layer: what the first layer's self-attention adds up is zero as yet
        before, after = (model(images, shown)["pred_boxes"] for shown in (patches, other))
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-5)  # another image's stay
    assert (after[1] - before[1]).abs().amax(-1).min() > 1e-6
    assert model.state_dict().keys() == updetr(pre_norm=pre_norm).state_dict().keys()


def test_patches_are_also_independent_in_the_gradient(updetr, images, patches):
    model = updetr(lr_backbone=1e-4)
    patches.requires_grad_()
    model(images, patches)["pred_boxes"][0, :4].sum().backward()
    assert patches.grad[0, 0].abs().sum() > 0
    assert patches.grad[0, 1:].abs().sum() == 0 and patches.grad[1].abs().sum() == 0


def test_exchanging_two_patches_and_their_queries_exchanges_predictions(updetr, images, patches):
    model = updetr()
    before = predict(model, images, patches)
    with torch.no_grad():
        model.query_embed.weight.copy_(model.query_embed.weight.view(3, 4, -1)[[1, 0, 2]].flatten(0, 1))
    for a, b in zip(before, predict(model, images, patches[:, [1, 0, 2]])):
        torch.testing.assert_close(b.unflatten(1, (3, 4))[:, [1, 0, 2]].flatten(1, 2), a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_patches_use_the_first_groups(updetr, images, patches, count):
    model = updetr()
    for some, every in zip(predict(model, images, patches[:, :count]), predict(model, images, patches)):
        assert some.shape[1] == 4 * count
        torch.testing.assert_close(some, every[:, :4 * count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_patches", [1, 2, 3, 4, 6, 12])
def test_every_divisor_of_the_queries_works(updetr, images, num_patches):
    """Twenty patches for a hundred queries gave NaN in the original, whose mask left queries without any key."""
    model, patches = updetr(num_patches=num_patches), torch.randn(2, num_patches, 3, 32, 32)
    size = 12 // num_patches
    for prediction in predict(model, images, patches):
        assert prediction.shape[1] == 12 and prediction.isfinite().all()
    model.train()
    for prediction in predict(model, images, patches):
        assert prediction.isfinite().all()
    # By enumeration: each query sees its group's queries, itself included, and no other.
    for query in range(12):
        seen = model.attention_mask[query].nonzero().flatten().tolist()
        assert seen == [query // size * size + i for i in range(size)]


def test_the_mask_is_no_part_of_a_checkpoint(updetr):
    assert not any("mask" in name for name in updetr().state_dict())


def test_queries_that_cannot_be_shared_out_are_refused(updetr):
    model = updetr()
    with pytest.raises(ValueError, match="12 queries can't be shared out evenly among 5 patches"):
        UPDETR(model.backbone, model.transformer, num_queries=12, num_patches=5)
    with pytest.raises(ValueError, match="among 0 patches"):
        UPDETR(model.backbone, model.transformer, num_queries=12, num_patches=0)


def test_arguments_in_the_published_order(updetr):
    """Backbone, transformer, classes, queries, auxiliary losses, patches, reconstruction, shuffle, share of zeroed patches."""
    parts = updetr()
    model = UPDETR(parts.backbone, parts.transformer, 2, 12, True, 3, True, False, 0.25)
    assert model.mask_ratio == 0.25 and model.num_patches == 3 and not model.query_shuffle
    assert model.attention_mask.sum() == 3 * 4 * 4  # the groups of three patches don't see each other


def test_more_patches_than_groups_are_refused(updetr, images):
    message = r"4 patches per image, but the model was built for at most 3 \(--num_patches\)"
    with pytest.raises(ValueError, match=message):
        updetr()(images, torch.randn(2, 4, 3, 32, 32))


def test_patches_must_come_with_their_images(updetr, images, patches):
    with pytest.raises(ValueError, match="patches of 1 images came with 2 images"):
        updetr()(images, patches[:1])


def test_order_of_images_in_the_batch_does_not_matter(updetr, images, patches):
    model = updetr()
    for a, b in zip(predict(model, images, patches), predict(model, images[::-1], patches.flip(0))):
        torch.testing.assert_close(b.flip(0), a, rtol=1e-5, atol=1e-5)


def patch_parts(model, features):
    """What remains of the queries when the query embedding is taken away: the embedded patches."""
    return model._queries(features) - model.query_embed.weight


def test_a_tenth_of_the_queries_lose_their_patch_in_training(updetr):
    model = updetr(num_queries=120).train()
    features = torch.randn(500, 3, 512)
    with torch.no_grad():
        part = patch_parts(model, features)
        whole = model.patch2query(features).repeat_interleave(40, dim=1)
    zeroed = (part.abs() < 1e-5).all(-1)
    # 60,000 draws of 10 %: a standard deviation is 0.12 %.
    assert 0.095 < zeroed.float().mean() < 0.105
    torch.testing.assert_close(part[~zeroed], whole[~zeroed], rtol=1e-5, atol=1e-5)  # what is kept isn't scaled up
    rate_by_query = zeroed.float().mean(0)
    rate_by_image = zeroed.float().mean(1)
    assert rate_by_query.max() < 0.2 and rate_by_image.max() < 0.3, "drawn for each query and image on its own"


def test_no_query_loses_its_patch_in_evaluation(updetr):
    model = updetr()
    features = torch.randn(50, 3, 512)
    with torch.no_grad():
        torch.testing.assert_close(patch_parts(model, features),
                                   model.patch2query(features).repeat_interleave(4, dim=1),
                                   rtol=1e-5, atol=1e-5)


def test_query_embeddings_are_shuffled_in_training_only(updetr):
    model = updetr(query_shuffle=True)
    model.mask_ratio = 0.0
    nothing = torch.zeros(1, 3, 512)
    with torch.no_grad():
        model.patch2query.bias.zero_()
        assert torch.equal(model._queries(nothing)[0], model.query_embed.weight)
        shuffled = model.train()._queries(nothing)[0]
    assert not torch.equal(shuffled, model.query_embed.weight)
    # The same embeddings, in another order.
    assert torch.equal(shuffled[shuffled[:, 0].argsort()],
                       model.query_embed.weight[model.query_embed.weight[:, 0].argsort()])
    plain = updetr(query_shuffle=False).train()
    plain.mask_ratio = 0.0
    with torch.no_grad():
        plain.patch2query.bias.zero_()
        assert torch.equal(plain._queries(nothing)[0], plain.query_embed.weight)


def test_patch_features_are_the_pooled_last_map(updetr, patches):
    model = updetr()
    with torch.no_grad():
        features = model.patch_features(patches)
        alone = model.backbone[0].body(patches[1, 2][None])["0"]
    assert features.shape == (2, 3, 512)
    torch.testing.assert_close(features[1, 2], alone[0].flatten(1).mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aux_loss", [True, False])
def test_reconstruction_runs_on_every_layer(updetr, images, patches, aux_loss):
    out = updetr(aux_loss=aux_loss)(images, patches)
    assert out["pred_feature"].shape == (2, 12, 512) and out["gt_feature"].shape == (2, 3, 512)
    assert not out["gt_feature"].requires_grad
    assert [layer["pred_feature"].shape for layer in out.get("aux_outputs", [])] == [(2, 12, 512)] * aux_loss
    assert sorted(updetr(feature_recon=False, aux_loss=False)(images, patches)) == ["pred_boxes", "pred_logits"]


def test_a_frozen_cnn_gets_no_gradient_and_everything_else_does(updetr, images, patches, tiny_args):
    args = tiny_args(pretraining=True, fre_cnn=True, lr_backbone=None)
    model, criterion, _ = build_model(args)
    losses = criterion(model.train()(images, patches),
                       [{"labels": torch.ones(3, dtype=torch.int64), "boxes": torch.rand(3, 4) * 0.3 + 0.3}] * 2)
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone."), name


def test_match_within_group_is_passed_on_to_the_matcher(tiny_args):
    assert build_model(tiny_args(pretraining=True))[1].matcher.queries_per_target is None
    assert build_model(tiny_args(pretraining=True, match_within_group=True))[1].matcher.queries_per_target == 4
