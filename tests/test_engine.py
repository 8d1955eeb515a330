"""The loops as a notebook calls them."""
import math

import pytest
import torch
from pycocotools.coco import COCO
from torch import nn

from engine import as_tensors, evaluate, train_one_epoch
from models import build_model
from models.detr import DETR
from util.misc import collate_fn, nested_tensor_from_tensor_list


def test_a_device_may_be_a_string_and_a_loss_term_a_number(tiny_args, targets):
    model, criterion, _ = build_model(tiny_args())
    forward = criterion.forward
    criterion.forward = lambda outputs, expected: {**forward(outputs, expected), "loss_none": 0.0}
    criterion.weight_dict["loss_none"] = 1.0
    batch = collate_fn([(torch.rand(3, 64, 64), target) for target in targets])
    stats = train_one_epoch(model, criterion, [batch], torch.optim.SGD(model.parameters(), lr=0.0), "cpu", 0, 0.1)
    assert stats["loss_none"] == 0.0 and stats["loss"] > 0


def test_numbers_become_tensors_and_tensors_stay():
    value = torch.tensor(2.0, requires_grad=True)
    made = as_tensors({"a": value, "b": 3}, torch.device("cpu"))
    assert made["a"] is value and made["b"].item() == 3.0


class Loader(list):
    """Batches, as of a DataLoader."""

    dataset = None


class FromBoxes(nn.Module):
    """In the place of a transformer: hidden states whose first numbers are the batch's boxes, in logits, and one class."""

    d_model, nhead = 9, 1

    def forward(self, src, mask, queries, positions):
        hidden = torch.zeros(2, len(self.boxes), self.boxes.shape[1], 9)
        hidden[..., :4], hidden[..., 4:8], hidden[..., 8] = self.boxes.logit(), -self.boxes.logit(), 1
        return hidden, src


def whole_numbers_detector(boxes):
    """A DETR that predicts `boxes` [B, N, 4] as class 1: its box head passes logits on, its class head is sure."""
    backbone = nn.Module()
    backbone.num_channels = 3
    backbone.forward = lambda samples: ([samples], [None])
    detector = DETR(backbone, FromBoxes(), 2, boxes.shape[1])
    detector.transformer.boxes = boxes
    with torch.no_grad():
        for layer in detector.bbox_embed.layers:
            layer.bias.zero_()
            layer.weight.zero_()
        for layer in detector.bbox_embed.layers[:2]:  # relu(x) and relu(-x) go through
            layer.weight[:8, :8] = torch.eye(8)
        detector.bbox_embed.layers[2].weight[:, :4] = torch.eye(4)
        detector.bbox_embed.layers[2].weight[:, 4:8] = -torch.eye(4)
        detector.class_embed.weight.zero_()
        detector.class_embed.bias.copy_(torch.tensor([-9.0, 9.0, -9.0]))
    return detector


def coco_of(boxes, width, height):
    """COCO's ground truth of boxes [B, N, 4], cxcywh in 0..1, in images of one size."""
    coco = COCO()
    annotations = []
    for image, of_image in enumerate(boxes.double() * torch.tensor([width, height] * 2)):
        for x, y, w, h in of_image.tolist():
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": 1, "iscrowd": 0,
                                "bbox": [x - w / 2, y - h / 2, w, h], "area": w * h})
    coco.dataset = {"images": [{"id": i, "width": width, "height": height} for i in range(len(boxes))],
                    "categories": [{"id": 1, "name": "thing"}], "annotations": annotations}
    coco.createIndex()
    return coco


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_the_ground_truth_as_prediction_has_an_ap_of_one_also_in_bfloat16(tiny_args, amp_dtype):
    size = torch.empty(2, 40, 2).uniform_(0.01, 0.1)
    boxes = torch.cat([torch.empty(2, 40, 2).uniform_(0.1, 0.9), size], dim=2)
    targets = [{"image_id": torch.tensor(i), "labels": torch.ones(40, dtype=torch.int64), "boxes": boxes[i],
                "orig_size": torch.tensor([800, 1333]), "size": torch.tensor([32, 48])} for i in range(2)]
    criterion, postprocessors = build_model(tiny_args(num_classes=2))[1:]
    loader = Loader([(nested_tensor_from_tensor_list(list(torch.randn(2, 3, 32, 48))), targets)])
    stats = evaluate(whole_numbers_detector(boxes), criterion, postprocessors, loader, coco_of(boxes, 1333, 800),
                     torch.device("cpu"), amp_dtype=amp_dtype)[0]
    assert stats["coco_eval_bbox"][0] >= 0.995


class PerfectMasks(nn.Module):
    """Predicts the masks that it was given, in a batch's padded size."""

    def __init__(self, masks):
        super().__init__()
        self.out = {"pred_logits": torch.tensor([[[-9.0, 9, -9]]] * 2), "pred_boxes": torch.full((2, 1, 4), 0.5),
                    "pred_masks": 40.0 * masks.float() - 20}

    def forward(self, samples):
        return self.out


def test_masks_are_compared_within_the_batch_also_where_it_pads(tiny_args):
    masks = torch.zeros(2, 1, 32, 48, dtype=torch.bool)
    masks[0, 0, 8:24, 8:24] = masks[1, 0, 4:20, 4:40] = True
    sizes = [(32, 32), (24, 48)]
    targets = [{"image_id": torch.tensor(i), "labels": torch.ones(1, dtype=torch.int64), "boxes": torch.full((1, 4), 0.5),
                "orig_size": torch.tensor(size), "size": torch.tensor(size), "masks": masks[i, :, :size[0], :size[1]]}
               for i, size in enumerate(sizes)]
    criterion, postprocessors = build_model(tiny_args(num_classes=2, masks=True))[1:]
    loader = Loader([(nested_tensor_from_tensor_list([torch.randn(3, *size) for size in sizes]), targets)])
    stats = evaluate(PerfectMasks(masks), criterion, {"bbox": postprocessors["bbox"]}, loader,
                     coco_of(torch.full((2, 1, 4), 0.5), 48, 32), torch.device("cpu"))[0]
    assert stats["loss_mask"] < 1e-6 and stats["loss_dice"] < 1e-6


def small_batch(**changed):
    """Two images, one of them without objects; `changed` is what the other's target has otherwise."""
    def target(number, count, **other):
        return {"labels": torch.ones(count, dtype=torch.int64), "boxes": torch.full((count, 4), 0.4),
                "image_id": torch.tensor([number]), "orig_size": torch.tensor([64, 64]),
                "size": torch.tensor([64, 64]), **other}
    targets = [target(1, 1, **changed), target(2, 0)]
    return [torch.rand(3, 64, 64) for _ in targets], targets


def empty_as_of_a_list():
    images, targets = small_batch()
    targets[1].update(labels=torch.tensor([]), boxes=torch.tensor([]))
    return images, targets


def without_length(batch):
    yield batch


@pytest.mark.parametrize("make_loader", [
    lambda: [small_batch()], lambda: [small_batch(file_name="a.jpg", more={"x": 1}, image_id=1, size=[64, 64])],
    lambda: [small_batch(labels=torch.ones(1, dtype=torch.uint8))], lambda: [empty_as_of_a_list()],
    lambda: without_length(small_batch())])
def test_loops_take_what_programs_of_ones_own_hand_them(tiny_args, make_loader):
    model, criterion, postprocessors = build_model(tiny_args(num_classes=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = train_one_epoch(model, criterion, make_loader(), optimizer, "cpu", 0, None)
    assert math.isfinite(stats["loss"])
    truth = coco_of(torch.full((3, 1, 4), 0.4), 64, 64)
    stats, _ = evaluate(model, criterion, postprocessors, make_loader(), truth, "cpu")
    assert math.isfinite(stats["loss"])


def test_a_loader_without_length_has_no_last_batch_to_accumulate_for(tiny_args):
    model, criterion, _ = build_model(tiny_args(num_classes=3))
    with pytest.raises(ValueError, match="accumulate_steps needs a data_loader with a length"):
        train_one_epoch(model, criterion, without_length(small_batch()), torch.optim.SGD(model.parameters(), lr=0.0), "cpu", 0,
                        accumulate_steps=2)


def test_a_criterion_without_classes(tiny_args):
    model, criterion, _ = build_model(tiny_args(num_classes=3))
    criterion.losses = ["boxes"]
    stats = train_one_epoch(model, criterion, [small_batch()], torch.optim.SGD(model.parameters(), lr=0.0), "cpu", 0)
    assert math.isnan(stats["class_error"]) and math.isfinite(stats["loss_bbox"])


def test_detections_that_are_not_finite_end_an_evaluation_also_where_there_is_no_object(tiny_args):
    model, criterion, postprocessors = build_model(tiny_args(num_classes=3))
    images, targets = small_batch()
    images[1][0, 5, 5] = math.nan
    truth = coco_of(torch.full((3, 1, 4), 0.4), 64, 64)
    with pytest.raises(FloatingPointError, match="for image id 2"):
        evaluate(model, criterion, postprocessors, [(images, targets)], truth, "cpu")
