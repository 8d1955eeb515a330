"""Box arithmetic against numbers worked out by hand and laws."""
import pytest
import torch

from util.box_ops import (aligned_generalized_iou, aligned_iou, box_area, box_cxcywh_to_xyxy, box_iou,
                          box_xyxy_to_cxcywh, generalized_box_iou, masks_to_boxes)


def random_boxes(n, seed=0):
    """xyxy boxes in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(n, 2, 2, generator=generator, dtype=torch.float64)
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def test_conversions_by_hand():
    assert box_cxcywh_to_xyxy(torch.tensor([5.0, 4.0, 2.0, 6.0])).tolist() == [4, 1, 6, 7]
    assert box_xyxy_to_cxcywh(torch.tensor([4.0, 1.0, 6.0, 7.0])).tolist() == [5, 4, 2, 6]
    boxes = random_boxes(24).view(2, 3, 4, 4)
    torch.testing.assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(boxes)), boxes)
    assert box_cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)


def test_iou_by_hand():
    # 2 x 2 at the origin; 2 x 2 shifted by (1, 1): overlap 1, union 7, hull 3 x 3.
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0], [3.0, 0.0, 4.0, 2.0]])
    iou, union = box_iou(a, b)
    torch.testing.assert_close(iou, torch.tensor([[1 / 7, 1, 0, 0]]))
    assert union.tolist() == [[7, 4, 8, 6]]
    # Touching boxes fill their hull: 0. With a gap of 1 x 2 in a hull of 4 x 2: -2 / 8.
    torch.testing.assert_close(generalized_box_iou(a, b), torch.tensor([[1 / 7 - 2 / 9, 1, 0, -0.25]]))


def test_pairwise_and_aligned_agree():
    a, b = random_boxes(5), random_boxes(7, seed=1)
    iou, union = box_iou(a, b)
    generalized = generalized_box_iou(a, b)
    assert iou.shape == union.shape == generalized.shape == (5, 7)
    for i in range(5):
        for j in range(7):
            one, area = aligned_iou(a[i], b[j])
            assert one == iou[i, j] and area == union[i, j]
            assert aligned_generalized_iou(a[i], b[j]) == generalized[i, j]


def test_laws_of_generalized_iou():
    a, b = random_boxes(50), random_boxes(50, seed=1)
    iou, _ = box_iou(a, b)
    generalized = generalized_box_iou(a, b)
    assert (generalized <= iou + 1e-12).all() and (generalized > -1).all()
    torch.testing.assert_close(generalized, generalized_box_iou(b, a).T)
    torch.testing.assert_close(generalized_box_iou(a, a).diagonal(), torch.ones(50, dtype=torch.float64))
    scaled = generalized_box_iou(7 * a + 3, 7 * b + 3)
    torch.testing.assert_close(scaled, generalized)
    shares = aligned_iou(a, (a + b) / 2)[0]
    assert ((shares >= 0) & (shares <= 1)).all()


def test_boxes_without_area_give_numbers():
    point, line, box = [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 3.0, 1.0], [0.0, 0.0, 2.0, 2.0]
    boxes = torch.tensor([point, line, box])
    assert box_area(boxes).tolist() == [0, 0, 4]
    iou, _ = box_iou(boxes, boxes)
    assert iou[0].tolist() == [0, 0, 0] and iou[1].tolist() == [0, 0, 0]
    assert generalized_box_iou(boxes, boxes).isfinite().all()
    boxes.requires_grad_()
    aligned_generalized_iou(boxes, boxes.detach().flip(0)).sum().backward()
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("name, position", [("boxes1", 0), ("boxes2", 1)])
def test_boxes_with_swapped_corners_are_refused(name, position):
    arguments = [torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])]
    arguments[position] = torch.tensor([[0.0, 2.0, 1.0, 1.0]])
    with pytest.raises(ValueError, match=f"^{name} holds a box that is not"):
        generalized_box_iou(*arguments)


def test_no_boxes():
    none, some = torch.zeros(0, 4), random_boxes(3)
    assert generalized_box_iou(none, some.float()).shape == (0, 3) and box_iou(some.float(), none)[0].shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_boxes_of_masks_by_hand(dtype):
    masks = torch.zeros(4, 5, 7, dtype=dtype)
    masks[0, 1:4, 2:6] = 1  # rows 1..3, columns 2..5
    masks[1, 4, 0] = 1  # one pixel
    masks[1, 0, 6] = 1  # and one in the opposite corner
    masks[3, 2, 3] = 1
    assert masks_to_boxes(masks).tolist() == [[2, 1, 5, 3], [0, 0, 6, 4], [0, 0, 0, 0], [3, 2, 3, 2]]
    assert masks_to_boxes(torch.zeros(0, 5, 7, dtype=dtype)).shape == (0, 4)
