"""Matchers and losses of one's own, which see one decoder layer at a time: the same numbers as all layers at once."""
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from models import deformable_detr
from models.classification import FocalClassification
from models.criterion import SetCriterion
from models.matcher import HungarianMatcher
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou

NUM_CLASSES = 4
SIZES = (2, 0, 5)


class SlowMatcher(nn.Module):
    """The matching of a softmax's classes, written for one layer and one image at a time; counts its calls."""

    calls = 0

    @torch.no_grad()
    def forward(self, outputs, targets):
        self.calls += 1
        assert set(outputs) <= {"pred_logits", "pred_boxes", "pred_masks", "pred_feature", "pred_features", "gt_feature"}
        indices = []
        for logits, boxes, target in zip(outputs["pred_logits"], outputs["pred_boxes"], targets):
            cost = -logits.softmax(-1)[:, target["labels"]] + 5 * torch.cdist(boxes, target["boxes"], p=1)
            cost -= 2 * generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target["boxes"]))
            indices.append(tuple(torch.as_tensor(part, dtype=torch.int64) for part in linear_sum_assignment(cost)))
        return indices


def make_batch(channels=NUM_CLASSES + 1, proposals=False, dtype=torch.float64):
    """Outputs of three layers with everything a loss may ask for, and targets of images of several sizes."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    def layer(queries=6):
        return {"pred_logits": random(3, queries, channels),
                "pred_boxes": (random(3, queries, 4).detach().sigmoid() * 0.4 + 0.1).requires_grad_()}

    layers = [{**layer(), "pred_feature": random(3, 6, 7)} for _ in range(3)]
    outputs = {**layers[-1], "pred_masks": random(3, 6, 5, 5), "pred_features": random(3, 6, 3),
               "gt_feature": random(3, 5, 7).detach(), "aux_outputs": layers[:-1]}
    if proposals:
        outputs["enc_outputs"] = layer(queries=15)
    targets = [{"labels": torch.randint(0, NUM_CLASSES, (n,), generator=generator),
                "boxes": torch.rand(n, 4, generator=generator, dtype=dtype) * 0.4 + 0.1,
                "masks": torch.rand(n, 16 + i, 20 - i, generator=generator) > 0.5,
                "patches": torch.rand(n, 3, 4, 4, generator=generator, dtype=dtype)} for i, n in enumerate(SIZES)]
    return outputs, targets


def gradients(outputs):
    """A list of the gradients of all outputs, which are then cleared."""
    found = []
    for layer in (outputs, *outputs["aux_outputs"], outputs.get("enc_outputs", {})):
        for value in layer.values():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found.append(torch.zeros_like(value) if value.grad is None else value.grad)
                value.grad = None
    return found


def assert_same(criterion, other, batch):
    """Both criteria give the same figures and gradients in float64."""
    outputs, targets = batch
    results = []
    for each in (criterion, other):
        losses = each.double()(outputs, targets)
        generator = torch.Generator().manual_seed(8)
        weights = {name: torch.rand((), generator=generator).item() for name in sorted(losses)}
        sum(weights[name] * value for name, value in losses.items() if value.requires_grad).backward()
        results.append((losses, gradients(outputs)))
    (losses, grads), (other_losses, other_grads) = results
    assert set(losses) == set(other_losses)
    for name, value in losses.items():
        assert other_losses[name].shape == value.shape == ()
        torch.testing.assert_close(other_losses[name], value, rtol=1e-12, atol=1e-12)
    assert any(grad.any() for grad in grads)
    for grad, other_grad in zip(grads, other_grads):
        torch.testing.assert_close(other_grad, grad, rtol=1e-12, atol=1e-12)


LOSSES = ("labels", "boxes", "cardinality", "masks", "feature")


def make_criterion(matcher, kind=SetCriterion, losses=LOSSES):
    return kind(NUM_CLASSES, matcher, {}, 0.1, losses).double()


def test_a_matcher_of_ones_own_gives_the_same_numbers_and_is_called_once_a_layer():
    matcher = SlowMatcher()
    assert_same(make_criterion(HungarianMatcher(1, 5, 2)), make_criterion(matcher), make_batch())
    assert matcher.calls == 3
    assert_same(make_criterion(HungarianMatcher(1, 5, 2)), make_criterion(SlowMatcher().forward), make_batch())


def test_a_matcher_that_overrides_ours_is_called():
    class Reversed(HungarianMatcher):
        def forward(self, outputs, targets):
            return [(query.flip(0), target.flip(0)) for query, target in super().forward(outputs, targets)]

    assert_same(make_criterion(HungarianMatcher(1, 5, 2)), make_criterion(Reversed(1, 5, 2)), make_batch())
    hooked, calls = HungarianMatcher(1, 5, 2), []
    hooked.register_forward_hook(lambda module, inputs, output: calls.append(output))
    assert_same(make_criterion(HungarianMatcher(1, 5, 2)), make_criterion(hooked), make_batch())
    assert len(calls) == 3


def test_indices_of_other_matchers_count_as_they_are():
    """Two queries may find one target: what the matcher says is what is compared."""
    def one_target_twice(outputs, targets):
        return [(torch.tensor([1, 4]), torch.tensor([0, 0])) if len(target["labels"]) else
                (torch.tensor([], dtype=torch.int64),) * 2 for target in targets]

    outputs, targets = make_batch()
    losses = make_criterion(one_target_twice, losses=("boxes",))(outputs, targets)
    expected = sum((outputs["pred_boxes"][i, query] - targets[i]["boxes"][0]).abs().sum()
                   for i in (0, 2) for query in (1, 4)) / sum(SIZES)
    torch.testing.assert_close(losses["loss_bbox"], expected)


def highest_label(targets):
    return max(torch.cat([target["labels"] for target in targets]).tolist())


class CountsLayers(SetCriterion):
    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def loss_labels(self, outputs, targets, indices, num_boxes, log=True):
        self.seen.append((outputs["pred_logits"].shape[1], log, highest_label(targets)))
        return super().loss_labels(outputs, targets, indices, num_boxes, log)


def test_a_replaced_loss_is_used_for_every_layer_and_the_proposals():
    matcher = HungarianMatcher(2, 5, 2, classification=FocalClassification())
    losses = ("labels", "boxes", "cardinality")
    counting = make_criterion(matcher, CountsLayers, losses)
    batch = make_batch(channels=NUM_CLASSES, proposals=True)
    assert_same(make_criterion(matcher, losses=losses), counting, batch)
    best = highest_label(batch[1])
    assert counting.seen == [(6, True, best), (6, False, best), (6, False, best), (15, False, 0)]


def test_a_loss_replaced_on_the_instance_is_used():
    criterion = make_criterion(HungarianMatcher(1, 5, 2))
    criterion.loss_boxes = lambda outputs, targets, indices, num_boxes: {"loss_bbox": outputs["pred_boxes"].sum()}
    outputs, targets = make_batch()
    losses = criterion(outputs, targets)
    assert losses["loss_bbox"] == outputs["pred_boxes"].sum() and "loss_giou" not in losses
    assert losses["loss_bbox_1"] == outputs["aux_outputs"][1]["pred_boxes"].sum()


class WithSizes(SetCriterion):
    """Adds a loss as published programs do, by a map of names."""

    def loss_sizes(self, outputs, targets, indices, num_boxes):
        index = self._get_src_permutation_idx(indices)
        expected = torch.cat([target["boxes"][j] for target, (_, j) in zip(targets, indices)])
        area = outputs["pred_boxes"][index][:, 2:].prod(1)
        return {"loss_size": (area - expected[:, 2:].prod(1)).abs().sum() / num_boxes}

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
        losses = {"labels": self.loss_labels, "boxes": self.loss_boxes, "area": self.loss_sizes}
        return losses[loss](outputs, targets, indices, num_boxes, **kwargs)


class WithSizesByName(WithSizes):
    get_loss = SetCriterion.get_loss


@pytest.mark.parametrize("kind, name", [(WithSizes, "area"), (WithSizesByName, "sizes")])
def test_a_subclass_adds_a_loss(kind, name):
    outputs, targets = make_batch()
    losses = make_criterion(HungarianMatcher(1, 5, 2), kind, ("labels", "boxes", name))(outputs, targets)
    plain = make_criterion(HungarianMatcher(1, 5, 2), losses=("labels", "boxes"))
    assert set(losses) == set(plain(outputs, targets)) | {"loss_size", "loss_size_0", "loss_size_1"}
    expected = 0
    for i, (query, target) in enumerate(plain.matcher(outputs, targets)):
        for q, t in zip(query.tolist(), target.tolist()):
            (_, _, w, h), (_, _, width, height) = outputs["pred_boxes"][i, q].tolist(), targets[i]["boxes"][t].tolist()
            expected += abs(w * h - width * height) / sum(SIZES)
    assert losses["loss_size"].item() == pytest.approx(expected)


def test_permutation_indices_by_hand():
    criterion = make_criterion(HungarianMatcher())
    indices = [(torch.tensor([1, 3]), torch.tensor([1, 0])), (torch.tensor([], dtype=torch.int64),) * 2,
               (torch.tensor([2]), torch.tensor([4]))]
    assert [part.tolist() for part in criterion._get_src_permutation_idx(indices)] == [[0, 0, 2], [1, 3, 2]]
    assert [part.tolist() for part in criterion._get_tgt_permutation_idx(indices)] == [[0, 0, 2], [1, 0, 4]]


def test_replaced_permutations_are_used():
    class FirstQuery(SetCriterion):
        def _get_src_permutation_idx(self, indices):
            image, query = super()._get_src_permutation_idx(indices)
            return image, torch.zeros_like(query)

    outputs, targets = make_batch()
    losses = make_criterion(HungarianMatcher(1, 5, 2), FirstQuery, ("boxes",))(outputs, targets)
    expected = sum((outputs["pred_boxes"][i, 0] - box).abs().sum()
                   for i, target in enumerate(targets) for box in target["boxes"]) / sum(SIZES)
    torch.testing.assert_close(losses["loss_bbox"], expected)


def test_get_loss_refuses_a_name_that_nobody_knows():
    criterion = make_criterion(HungarianMatcher())
    outputs, targets = make_batch()
    with pytest.raises(ValueError, match="^unknown loss 'sizes'; known are labels, boxes, cardinality, masks, feature"):
        criterion.get_loss("sizes", outputs, targets, criterion.matcher(outputs, targets), 7.0)


def test_a_program_that_calls_each_loss_itself():
    """As the published `forward` does: an int or float for the number of boxes, outputs with the earlier layers'."""
    criterion = make_criterion(HungarianMatcher(1, 5, 2)).double()
    outputs, targets = make_batch()
    expected = criterion(outputs, targets)
    indices = criterion.matcher(outputs, targets)
    for name in LOSSES:
        for figure, value in criterion.get_loss(name, outputs, targets, indices, float(sum(SIZES))).items():
            torch.testing.assert_close(value, expected[figure], rtol=1e-12, atol=1e-12)
    assert set(criterion.loss_labels(outputs, targets, indices, 7, log=False)) == {"loss_ce"}
    only_boxes = {"pred_boxes": outputs["pred_boxes"]}
    torch.testing.assert_close(criterion.loss_boxes(only_boxes, targets, indices, 7)["loss_giou"], expected["loss_giou"])


def test_embeddings_of_the_last_layer_only():
    embedder = lambda crops: crops.mean((2, 3))  # noqa: E731
    both = [SetCriterion(NUM_CLASSES, matcher, {}, 0.1, ["labels", "object_embedding"], embedder).double()
            for matcher in (HungarianMatcher(1, 5, 2), SlowMatcher())]
    outputs, targets = make_batch()
    losses = both[1](outputs, targets)
    assert "loss_object_embedding" in losses and "loss_object_embedding_0" not in losses
    assert_same(*both, (outputs, targets))


def test_deformable_detrs_criterion_by_its_published_arguments():
    losses = ["labels", "boxes", "cardinality"]
    ours = make_criterion(HungarianMatcher(2, 5, 2, classification=FocalClassification(0.3)), losses=losses)
    theirs = deformable_detr.SetCriterion(NUM_CLASSES, HungarianMatcher(2, 5, 2), {}, losses, 0.3)
    assert_same(ours, theirs, make_batch(channels=NUM_CLASSES, proposals=True))
    foreign = HungarianMatcher(2, 5, 2, classification=FocalClassification(0.3))
    theirs = deformable_detr.SetCriterion(NUM_CLASSES, foreign.forward, {}, losses, focal_alpha=0.3)
    assert_same(ours, theirs, make_batch(channels=NUM_CLASSES, proposals=True))
