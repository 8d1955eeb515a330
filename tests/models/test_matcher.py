"""The matching is the cheapest one-to-one assignment, whatever the batch holds, and costs one copy to the host."""
import itertools
import math

import pytest
import torch

from models.classification import FocalClassification
from models.matcher import HungarianMatcher, NonFinitePredictionError


def giou_of(a, b):
    """Generalised IoU of two cxcywh boxes, in plain numbers."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    overlap = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union - (hull - union) / hull


def cost_of(weights, logits, box, label, target_box):
    """Cost of one query for one target, in plain numbers."""
    exponentials = [math.exp(value) for value in logits]
    probability = exponentials[label] / sum(exponentials)
    distance = sum(abs(p - t) for p, t in zip(box, target_box))
    return -weights[0] * probability + weights[1] * distance - weights[2] * giou_of(box, target_box)


def best_by_trying_all(weights, logits, boxes, target, allowed=lambda query, target: True):
    """Every way to give each target a query of its own (or each query a target, where targets are more)."""
    labels, target_boxes = target["labels"].tolist(), target["boxes"].tolist()
    logits, boxes = logits.tolist(), boxes.tolist()
    cost = [[cost_of(weights, logits[q], boxes[q], labels[t], target_boxes[t]) for t in range(len(labels))]
            for q in range(len(logits))]
    if len(labels) <= len(logits):
        candidates = [list(zip(queries, range(len(labels))))
                      for queries in itertools.permutations(range(len(logits)), len(labels))]
    else:
        candidates = [list(zip(range(len(logits)), chosen))
                      for chosen in itertools.permutations(range(len(labels)), len(logits))]
    candidates = [pairs for pairs in candidates if all(allowed(q, t) for q, t in pairs)]
    return sorted(min(candidates, key=lambda pairs: sum(cost[q][t] for q, t in pairs)))


def random_boxes(n, generator):
    return torch.cat([0.2 + 0.6 * torch.rand(n, 2, generator=generator),
                      0.05 + 0.3 * torch.rand(n, 2, generator=generator)], 1)


def random_case(sizes, num_layers=3, num_queries=5, num_classes=8, seed=0):
    """Predictions and targets without ties: an image's labels all differ."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, len(sizes), num_queries)
    logits = 2 * torch.randn(*shape, num_classes + 1, generator=generator)
    boxes = random_boxes(math.prod(shape), generator).view(*shape, 4)
    targets = [{"image_id": torch.tensor([100 + i]), "labels": torch.randperm(num_classes, generator=generator)[:n],
                "boxes": random_boxes(n, generator)} for i, n in enumerate(sizes)]
    return logits, boxes, targets


def pairs_of(matching, layer, image, offset):
    here = matching.image[layer] == image
    return list(zip(matching.query[layer][here].tolist(), (matching.target[layer][here] - offset).tolist()))


@pytest.mark.parametrize("sizes", [[3], [2, 0, 4], [0, 1], [1, 0], [0, 5, 0, 3], [6, 7], [7, 0, 2]], ids=str)
@pytest.mark.parametrize("weights", [(1, 5, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_equals_brute_force_on_every_layer(sizes, weights):
    logits, boxes, targets = random_case(sizes)
    matching = HungarianMatcher(*weights).match_layers(logits, boxes, targets)
    for layer, image in itertools.product(range(3), range(len(sizes))):
        expected = best_by_trying_all(weights, logits[layer, image], boxes[layer, image], targets[image])
        assert pairs_of(matching, layer, image, offset=sum(sizes[:image])) == expected


def test_one_layer_gives_the_published_return_value():
    logits, boxes, targets = random_case([2, 0, 7], num_layers=1)
    result = HungarianMatcher(1, 5, 2)({"pred_logits": logits[0], "pred_boxes": boxes[0]}, targets)
    for image, (query, target) in enumerate(result):
        assert query.dtype == target.dtype == torch.int64
        assert list(zip(query.tolist(), target.tolist())) == best_by_trying_all(
            (1, 5, 2), logits[0, image], boxes[0, image], targets[image])
    assert [len(query) for query, _ in result] == [2, 0, 5]


def test_all_images_without_targets():
    logits, boxes, targets = random_case([0, 0, 0])
    matching = HungarianMatcher().match_layers(logits, boxes, targets)
    assert matching.image.shape == matching.query.shape == matching.target.shape == (3, 0)
    assert matching.query.dtype == torch.int64


def test_a_patch_is_matched_within_its_group():
    """Three targets, two queries each; only 2 ** 3 assignments remain."""
    logits, boxes, targets = random_case([3, 3], num_queries=6, seed=4)
    matching = HungarianMatcher(1, 5, 2, queries_per_target=2).match_layers(logits, boxes, targets)
    differs_from_free = False
    for layer, image in itertools.product(range(3), range(2)):
        arguments = (1, 5, 2), logits[layer, image], boxes[layer, image], targets[image]
        expected = best_by_trying_all(*arguments, allowed=lambda query, target: query // 2 == target)
        assert pairs_of(matching, layer, image, offset=3 * image) == expected
        differs_from_free |= expected != best_by_trying_all(*arguments)
    assert differs_from_free, "the case must tell grouped from free matching"


@pytest.fixture
def copies(monkeypatch):
    """Shapes of the tensors on which `.cpu()` was called."""
    seen = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu",
                        lambda self, *args, **kwargs: seen.append(tuple(self.shape)) or original(self))
    return seen


@pytest.mark.parametrize("num_layers", [1, 6])
def test_all_layers_take_one_copy_to_the_host(num_layers, copies, host_reads):
    logits, boxes, targets = random_case([2, 0, 3], num_layers=num_layers)
    with host_reads:
        HungarianMatcher().match_layers(logits, boxes, targets)
    assert copies == [(num_layers * 5 * 5,)]  # layers, targets of the batch, queries: not quadratic in the batch
    assert not host_reads.waited


def test_groups_of_layers_are_matched_as_if_alone_with_one_copy(copies, host_reads):
    """Groups may differ in layers, queries and labels, as decoder layers and proposals of one batch do."""
    first, second = random_case([2, 0, 3]), random_case([2, 0, 3], num_layers=1, num_queries=9, seed=3)
    matcher = HungarianMatcher(2, 5, 2)
    with host_reads:
        together = matcher.match_groups([first, second])
    assert copies == [(3 * 5 * 5 + 1 * 5 * 9,)] and not host_reads.waited
    for matching, case in zip(together, (first, second)):
        alone = matcher.match_layers(*case)
        assert all(torch.equal(getattr(matching, name), getattr(alone, name)) for name in ("image", "query", "target"))


def test_focal_cost_by_hand():
    """Of a target of class 2 with a query whose sigmoids are 0.5, 0.9, 0.2, and one whose are 0.5, 0.5, 0.5."""
    probabilities = torch.tensor([[0.5, 0.9, 0.2], [0.5, 0.5, 0.5]])
    logits = (probabilities / (1 - probabilities)).log()[None, None]
    boxes = torch.full((1, 1, 2, 4), 0.5)
    target = {"labels": torch.tensor([2]), "boxes": torch.full((1, 4), 0.5)}
    cost = HungarianMatcher(2, 0, 0, classification=FocalClassification(0.25)).costs(logits, boxes, [target])
    # 0.25 (1 - p)² (-log p) - 0.75 p² (-log(1 - p)), times 2.
    expected = [2 * (0.25 * 0.64 * -math.log(0.2) - 0.75 * 0.04 * -math.log(0.8)),
                2 * (0.25 * 0.25 * math.log(2) - 0.75 * 0.25 * math.log(2))]
    assert cost.shape == (1, 1, 2) and cost.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_non_finite_predictions_are_reported_by_image():
    for spoil in (float("nan"), float("inf")):
        logits, boxes, targets = random_case([2, 1, 3])
        boxes[1, 0, 3, 2] = spoil
        logits[2, 2, 0, 1] = spoil
        with pytest.raises(NonFinitePredictionError, match=r"for image id 100, 102$"):
            HungarianMatcher().match_layers(logits, boxes, targets)
    assert issubclass(NonFinitePredictionError, FloatingPointError)


def test_half_precision_is_matched_in_float32():
    logits, boxes, targets = random_case([3, 2])
    halves = logits.bfloat16(), boxes.bfloat16()
    matcher = HungarianMatcher(1, 5, 2)
    assert matcher.costs(*halves, targets).dtype == torch.float32
    torch.testing.assert_close(matcher.costs(*halves, targets),
                               matcher.costs(halves[0].float(), halves[1].float(), targets))


def test_all_costs_zero_is_refused():
    with pytest.raises(ValueError, match="cost_class, cost_bbox and cost_giou are all zero"):
        HungarianMatcher(0, 0, 0)
