"""Losses against numbers worked out by hand, normalisers and gradients, and all layers at once against one by one."""
import math

import pytest
import torch

from models.classification import FocalClassification
from models.criterion import SetCriterion, weights_for_layers
from models.matcher import HungarianMatcher, Matching
from util.box_ops import aligned_generalized_iou, box_cxcywh_to_xyxy


def make_criterion(num_classes=2, eos_coef=0.5, losses=("labels", "boxes", "cardinality"), num_layers=1, matcher=None):
    matcher = matcher or HungarianMatcher(1, 5, 2)
    weights = weights_for_layers({"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}, num_layers)
    return SetCriterion(num_classes, matcher, weights, eos_coef, losses)


def outputs_of(probabilities, boxes):
    """Outputs whose softmax is `probabilities` [B][N][C + 1]."""
    return {"pred_logits": torch.tensor(probabilities).log().requires_grad_(),
            "pred_boxes": torch.tensor(boxes).requires_grad_()}


def target_of(labels, boxes):
    return {"image_id": torch.tensor([1]), "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": torch.tensor(boxes).reshape(-1, 4)}


def one_image():
    """Query 0 lies inside the target's box and prefers its class 0; query 1 is far away and prefers "no object"."""
    outputs = outputs_of([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]], [[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    return outputs, [target_of([0], [[0.5, 0.5, 0.4, 0.4]])]


def value(loss):
    return pytest.approx(loss, rel=1e-5, abs=1e-7)


def test_one_image_by_hand():
    losses = make_criterion()(*one_image())
    # Weighted mean: the object's query has weight 1, the other 0.5, and their sum divides.
    assert losses["loss_ce"].item() == value((math.log(2) + 0.5 * -math.log(0.6)) / 1.5)
    # Width and height differ by 0.2 each.
    assert losses["loss_bbox"].item() == value(0.4)
    # The smaller box (0.04) lies inside the larger (0.16), which is also the hull: GIoU = IoU = 0.25.
    assert losses["loss_giou"].item() == value(0.75)
    # One query isn't "no object", and there is one object.
    assert losses["cardinality_error"].item() == 0
    assert losses["class_error"].item() == 0


def test_two_images_one_of_them_empty_by_hand():
    outputs = outputs_of([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], [[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]],
                         [[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]], [[0.5, 0.5, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]]])
    targets = [target_of([1, 1], [[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]]), target_of([], [])]
    losses = make_criterion(eos_coef=0.1)(outputs, targets)
    # Image 1: both queries are matched, to class 1 (p = 0.25, 0.2).
    # Image 2: both should say "no object" (p = 0.1, 0.4).
    expected = (-math.log(0.25) - math.log(0.2) - 0.1 * math.log(0.1) - 0.1 * math.log(0.4)) / (1 + 1 + 0.1 + 0.1)
    assert losses["loss_ce"].item() == value(expected)
    assert losses["loss_bbox"].item() == value(0.4 / 2), "two objects"
    assert losses["loss_giou"].item() == value(0.75 / 2)
    # Image 1: one query isn't "no object", there are two objects: 1 off. Image 2: one and none: 1 off.
    assert losses["cardinality_error"].item() == 1
    # Best classes of the matched queries are 0 and 2: both wrong.
    assert losses["class_error"].item() == 100


def test_disjoint_boxes_by_hand():
    # [0, 0.2]² and [0.6, 1]²: no overlap, union 0.04 + 0.16, hull 1: GIoU = 0 - (1 - 0.2) / 1.
    outputs = outputs_of([[[0.9, 0.05, 0.05]]], [[[0.1, 0.1, 0.2, 0.2]]])
    losses = make_criterion()(outputs, [target_of([0], [[0.8, 0.8, 0.4, 0.4]])])
    assert losses["loss_giou"].item() == value(1.8)
    assert losses["loss_bbox"].item() == value(0.7 + 0.7 + 0.2 + 0.2)


@pytest.mark.parametrize("training", [True, False])
def test_batch_without_any_object(training):
    outputs = outputs_of([[[0.3, 0.3, 0.4]], [[0.1, 0.1, 0.8]]], [[[0.5, 0.5, 0.2, 0.2]], [[0.5, 0.5, 0.1, 0.1]]])
    losses = make_criterion().train(training)(outputs, [target_of([], []), target_of([], [])])
    assert losses["class_error"].item() == 100
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
    # All weights are the no-object weight, which the weighted mean cancels.
    assert losses["loss_ce"].item() == value((-math.log(0.4) - math.log(0.8)) / 2)
    (losses["loss_bbox"] + losses["loss_giou"] + losses["loss_ce"]).backward()
    assert torch.equal(outputs["pred_boxes"].grad, torch.zeros(2, 1, 4)), "present, for DDP, and zero"
    assert outputs["pred_logits"].grad.abs().sum() > 0


def random_layers(num_layers, sizes, num_queries=6, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = [{"pred_logits": torch.randn(len(sizes), num_queries, num_classes + 1, generator=generator),
               "pred_boxes": torch.rand(len(sizes), num_queries, 4, generator=generator) * 0.4 + 0.1}
              for _ in range(num_layers)]
    targets = [{"labels": torch.randint(0, num_classes, (n,), generator=generator),
                "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.1} for n in sizes]
    return layers, targets


@pytest.mark.parametrize("sizes", [[2, 0, 5], [0, 0], [7, 1]], ids=str)
def test_all_layers_at_once_equal_each_layer_alone(sizes):
    layers, targets = random_layers(4, sizes)
    criterion = make_criterion(num_classes=4, eos_coef=0.1)
    together = criterion({**layers[-1], "aux_outputs": layers[:-1]}, targets)
    for i, layer in enumerate(layers):
        suffix = "" if i == len(layers) - 1 else f"_{i}"
        alone = criterion(layer, targets)
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(together[name + suffix], alone[name])
    torch.testing.assert_close(together["class_error"], criterion(layers[-1], targets)["class_error"])
    assert "class_error_0" not in together


def test_order_of_images_does_not_matter():
    layers, targets = random_layers(2, [2, 0, 5])
    order = [2, 0, 1]
    criterion = make_criterion(num_classes=4)
    shuffled = [{name: tensor[order] for name, tensor in layer.items()} for layer in layers]
    first = criterion({**layers[1], "aux_outputs": layers[:1]}, targets)
    second = criterion({**shuffled[1], "aux_outputs": shuffled[:1]}, [targets[i] for i in order])
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_auxiliary_weights_are_the_same_for_every_layer():
    assert weights_for_layers({"loss_ce": 1, "loss_bbox": 5}, 3) == {
        "loss_ce": 1, "loss_bbox": 5, "loss_ce_0": 1, "loss_bbox_0": 5, "loss_ce_1": 1, "loss_bbox_1": 5}
    assert weights_for_layers({"loss_ce": 1}, 1) == {"loss_ce": 1}


def test_losses_wait_for_the_device_only_at_the_matching(host_reads):
    layers, targets = random_layers(6, [2, 0, 5])
    criterion = make_criterion(num_classes=4)
    with host_reads:
        criterion({**layers[-1], "aux_outputs": layers[:-1]}, targets)
    assert not host_reads.waited


def test_feature_loss_by_hand():
    """One image, two patches, three queries; query 2 finds patch 0 and query 0 finds patch 1."""
    criterion = make_criterion(losses=("labels", "boxes", "feature"))
    boxes = [[0.8, 0.8, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]]
    outputs = outputs_of([[[0.1, 0.8, 0.1]] * 3], [boxes])
    outputs["pred_feature"] = torch.tensor([[[2.0, 0.0], [5.0, 5.0], [3.0, 4.0]]]).requires_grad_()
    outputs["gt_feature"] = torch.tensor([[[1.0, 0.0], [7.0, 0.0]]])
    losses = criterion(outputs, [target_of([1, 1], [boxes[2], boxes[0]])])
    # Patch 0: (3, 4) / 5 = (0.6, 0.8) against (1, 0): 0.4² + 0.8² = 0.8.
    # Patch 1: (2, 0) and (7, 0) have one direction: 0.
    assert losses["loss_feature"].item() == value(0.8 / 2)
    losses["loss_feature"].backward()
    assert torch.equal(outputs["pred_feature"].grad[0, 1], torch.zeros(2)), "an unmatched query reconstructs nothing"
    assert outputs["pred_feature"].grad[0, 2].abs().sum() > 0


def test_feature_loss_takes_each_image_and_layer_its_own():
    generator = torch.Generator().manual_seed(5)
    layers, _ = random_layers(3, [2, 2], num_classes=2)
    for layer in layers:
        layer["pred_feature"] = torch.randn(2, 6, 8, generator=generator)
    gt_feature = torch.randn(2, 2, 8, generator=generator)
    targets = [{"labels": torch.ones(2, dtype=torch.int64), "boxes": torch.rand(2, 4, generator=generator) * 0.4 + 0.1}
               for _ in range(2)]
    criterion = make_criterion(losses=("feature",))
    losses = criterion({**layers[2], "aux_outputs": layers[:2], "gt_feature": gt_feature}, targets)
    for layer, name in zip(layers, ("loss_feature_0", "loss_feature_1", "loss_feature")):
        total = 0.0
        for image, (query, target) in enumerate(criterion.matcher(layer, targets)):
            # |a - b|² = 2 - 2 cos for unit vectors.
            cosine = torch.cosine_similarity(layer["pred_feature"][image, query], gt_feature[image, target], dim=-1)
            total += (2 - 2 * cosine).sum().item()
        assert losses[name].item() == value(total / 4)


def mask_outputs(masks, boxes):
    """Outputs with mask logits [N][h][w]; all queries are as sure of class 0, so that boxes decide the matching."""
    outputs = outputs_of([[[0.8, 0.1, 0.1]] * len(boxes)], [boxes])
    outputs["pred_masks"] = torch.tensor([masks]).requires_grad_()
    return outputs


def with_masks(target, masks):
    return {**target, "masks": torch.tensor(masks, dtype=torch.bool)}


NEAR, FAR = [0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]


def test_mask_losses_by_hand():
    """Logits of 0 or log 3 on 2 x 2 pixels: probabilities 1/2 and 3/4. The target covers the upper row."""
    sure = math.log(3)
    outputs = mask_outputs([[[9.0, 9.0], [9.0, 9.0]], [[sure, 0.0], [0.0, -sure]]], [FAR, NEAR])
    target = with_masks(target_of([0], [NEAR]), [[[1, 1], [0, 0]]])
    losses = make_criterion(losses=("masks",))(outputs, [target])
    # Inside with p = 3/4 and 1/2: 0.25 (1 - p)² (-log p). Outside with p = 1/2 and 1/4: 0.75 p² (-log(1 - p)).
    focal = [0.25 * 0.25 ** 2 * -math.log(0.75), 0.25 * 0.5 ** 2 * math.log(2),
             0.75 * 0.5 ** 2 * math.log(2), 0.75 * 0.25 ** 2 * -math.log(0.75)]
    assert losses["loss_mask"].item() == value(sum(focal) / 4)
    # Overlap 3/4 + 1/2; areas 2 of both, and 1 is added above and below.
    assert losses["loss_dice"].item() == value(1 - (2 * 1.25 + 1) / (2 + 2 + 1))
    losses["loss_dice"].backward()
    assert (outputs["pred_masks"].grad[0, 0] == 0).all(), "an unmatched query's mask is nobody's"
    assert (outputs["pred_masks"].grad[0, 1] != 0).all()


def test_masks_are_enlarged_to_the_padded_batch():
    """Two images of 4 x 2 and 2 x 4 pixels in a batch of 4 x 4; what lies in the padding counts as background."""
    outputs = mask_outputs([[[2.0, -3.0], [1.0, 0.5]]], [NEAR])
    outputs = {name: torch.cat([tensor, tensor]).detach() for name, tensor in outputs.items()}
    tall, wide = [[[1, 1], [1, 1], [1, 0], [0, 0]]], [[[1, 1, 1, 1], [0, 0, 0, 1]]]
    targets = [with_masks(target_of([0], [NEAR]), mask) for mask in (tall, wide)]
    losses = make_criterion(losses=("masks",))(outputs, targets)
    larger = torch.nn.functional.interpolate(outputs["pred_masks"][:1], size=(4, 4), mode="bilinear")[0, 0].flatten()
    dice = entropy = 0.0
    for row in ([1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]):
        for logit, inside in zip(larger.tolist(), row):
            p = 1 / (1 + math.exp(-logit))
            p, weight = (p, 0.25) if inside else (1 - p, 0.75)
            entropy += weight * (1 - p) ** 2 * -math.log(p) / 16
        overlap = sum(p for p, inside in zip(larger.sigmoid().tolist(), row) if inside)
        dice += 1 - (2 * overlap + 1) / (larger.sigmoid().sum().item() + sum(row) + 1)
    assert losses["loss_mask"].item() == value(entropy / 2), "two objects"
    assert losses["loss_dice"].item() == value(dice / 2)


def test_masks_of_a_batch_without_any_object():
    outputs = mask_outputs([[[1.0, 2.0], [3.0, 4.0]]], [NEAR])
    target = {**target_of([], []), "masks": torch.zeros(0, 7, 5, dtype=torch.bool)}
    losses = make_criterion(losses=("labels", "boxes", "masks"))(outputs, [target])
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert (outputs["pred_masks"].grad == 0).all(), "present, for DDP, and zero"


def mask_layers(num_layers=3, sizes=(2, 0, 5)):
    """Random outputs of several layers, masks with the last of them, and targets of images of several sizes."""
    layers, targets = random_layers(num_layers, sizes)
    generator = torch.Generator().manual_seed(9)
    for i, target in enumerate(targets):
        target["masks"] = torch.rand(sizes[i], 16 + i, 20 - i, generator=generator) > 0.5
    masks = 4 * torch.randn(len(sizes), 6, 5, 5, generator=generator)
    return {**layers[-1], "pred_masks": masks, "aux_outputs": layers[:-1]}, targets


def test_masks_are_compared_for_the_last_layer_only():
    outputs, targets = mask_layers()
    losses = make_criterion(num_classes=4, losses=("labels", "masks"))(outputs, targets)
    assert {name for name in losses if "mask" in name or "dice" in name} == {"loss_mask", "loss_dice"}
    del outputs["aux_outputs"]
    alone = make_criterion(num_classes=4, losses=("labels", "masks"))(outputs, targets)
    torch.testing.assert_close(losses["loss_mask"], alone["loss_mask"])


def test_mask_losses_wait_for_the_device_only_at_the_matching(host_reads):
    outputs, targets = mask_layers()
    with host_reads:
        make_criterion(num_classes=4, losses=("labels", "boxes", "masks"))(outputs, targets)
    assert not host_reads.waited


def test_mask_losses_are_float32_under_autocast():
    outputs, targets = mask_layers(num_layers=1)
    halves = {name: tensor.bfloat16() for name, tensor in outputs.items() if name != "aux_outputs"}
    criterion = make_criterion(num_classes=4, losses=("masks",))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion(halves, targets)
    expected = criterion({name: tensor.float() for name, tensor in halves.items()}, targets)
    for name in ("loss_mask", "loss_dice"):
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], expected[name])


def test_box_losses_pass_gradcheck():
    """Numerical against analytic derivatives in float64, for overlapping, nested and disjoint boxes."""
    criterion = make_criterion()
    predicted = torch.tensor([[[[0.42, 0.51, 0.31, 0.22], [0.5, 0.5, 0.1, 0.1], [0.15, 0.2, 0.11, 0.13]]]],
                             dtype=torch.float64)
    targets = [{"labels": torch.zeros(3, dtype=torch.int64),
                "boxes": torch.tensor([[0.5, 0.45, 0.3, 0.25], [0.51, 0.52, 0.6, 0.7], [0.8, 0.75, 0.2, 0.3]])}]
    index = torch.tensor([[0, 1, 2]])
    matching = Matching(image=torch.zeros_like(index), query=index, target=index)

    def losses_of(boxes):
        losses = criterion._box_losses({"pred_boxes": boxes}, targets, matching, num_boxes=torch.tensor(3.0))
        return losses["loss_bbox"], losses["loss_giou"]

    assert torch.autograd.gradcheck(losses_of, predicted.requires_grad_())


def test_generalized_iou_passes_gradcheck():
    generator = torch.Generator().manual_seed(2)
    boxes = torch.rand(2, 30, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.1
    assert torch.autograd.gradcheck(lambda a, b: aligned_generalized_iou(box_cxcywh_to_xyxy(a), box_cxcywh_to_xyxy(b)),
                                    (boxes[0].requires_grad_(), boxes[1].clone().requires_grad_()))


def test_losses_are_float32_under_autocast():
    outputs, targets = one_image()
    halves = {name: tensor.detach().bfloat16() for name, tensor in outputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = make_criterion()(halves, targets)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    expected = make_criterion()({name: tensor.float() for name, tensor in halves.items()}, targets)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])


# Sigmoid focal classification, and the proposals of two stages.


def focal_criterion(num_classes=2, num_layers=1):
    matcher = HungarianMatcher(2, 5, 2, classification=FocalClassification(0.25))
    weights = weights_for_layers({"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}, num_layers)
    return SetCriterion(num_classes, matcher, weights, None, ["labels", "boxes", "cardinality"])


def focal_outputs_of(probabilities, boxes):
    """Outputs whose sigmoid is `probabilities` [B][N][C]."""
    return {"pred_logits": torch.tensor(probabilities).logit().requires_grad_(),
            "pred_boxes": torch.tensor(boxes).requires_grad_()}


def focal(probability, wanted):
    """Focal loss of one class of one query, alpha 0.25, gamma 2."""
    if wanted:
        return -0.25 * (1 - probability) ** 2 * math.log(probability)
    return -0.75 * probability ** 2 * math.log(1 - probability)


def test_focal_loss_of_two_images_by_hand():
    """Query 0 finds image 1's object of class 1; in image 2 there is nothing to find."""
    outputs = focal_outputs_of([[[0.2, 0.6], [0.1, 0.1]], [[0.7, 0.2], [0.1, 0.3]]],
                               [[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]], [[0.5, 0.5, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]]])
    targets = [target_of([1], [[0.5, 0.5, 0.4, 0.4]]), target_of([], [])]
    criterion = focal_criterion()
    losses = criterion(outputs, targets)
    expected = focal(0.6, True) + sum(focal(p, False) for p in (0.2, 0.1, 0.1, 0.7, 0.2, 0.1, 0.3))
    assert losses["loss_ce"].item() == value(expected), "summed over queries and classes, per object: there is one"
    assert losses["loss_bbox"].item() == value(0.4) and losses["loss_giou"].item() == value(0.75)
    # One query of each image is more sure of a class than not: right in image 1, one too many in image 2.
    assert losses["cardinality_error"].item() == value(0.5)
    assert losses["class_error"].item() == 0
    assert not criterion.state_dict(), "no class weights"


def test_focal_loss_without_any_object():
    outputs = focal_outputs_of([[[0.2, 0.6]]], [[[0.5, 0.5, 0.2, 0.2]]])
    losses = focal_criterion()(outputs, [target_of([], [])])
    assert losses["loss_ce"].item() == value(focal(0.2, False) + focal(0.6, False)), "divided by one, not by none"
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0 and losses["class_error"].item() == 100
    (losses["loss_ce"] + losses["loss_bbox"]).backward()
    assert outputs["pred_logits"].grad.abs().sum() > 0 and torch.equal(outputs["pred_boxes"].grad, torch.zeros(1, 1, 4))


def test_proposals_are_compared_as_one_more_detector_of_class_0():
    layers, targets = random_layers(3, [2, 0, 4])
    proposals, _ = random_layers(1, [2, 0, 4], num_queries=15, seed=9)
    criterion = focal_criterion(num_classes=5, num_layers=3)
    together = criterion({**layers[2], "aux_outputs": layers[:2], "enc_outputs": proposals[0]}, targets)
    objects = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
    alone = criterion(proposals[0], objects)
    decoder = criterion({**layers[2], "aux_outputs": layers[:2]}, targets)
    del alone["class_error"]
    assert set(together) == set(decoder) | {f"{name}_enc" for name in alone}
    for name in alone:
        torch.testing.assert_close(together[f"{name}_enc"], alone[name])
    for name in decoder:
        torch.testing.assert_close(together[name], decoder[name])


def test_losses_of_two_stages_wait_for_the_device_only_at_the_matching(host_reads):
    layers, targets = random_layers(6, [2, 0, 5])
    criterion = focal_criterion(num_classes=5)
    with host_reads:
        criterion({**layers[-1], "aux_outputs": layers[:-1], "enc_outputs": layers[0]}, targets)
    assert not host_reads.waited


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="unknown losses dice; known are labels, boxes, cardinality, masks, feature"):
        make_criterion(losses=("labels", "dice"))
