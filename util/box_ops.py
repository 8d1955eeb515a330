"""Arithmetic of axis-aligned boxes. All functions take and return float tensors whose last dimension is 4."""
from typing import Tuple

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turn (centre x, centre y, width, height) into (left, top, right, bottom); any leading shape, [..., 4]."""
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    return torch.cat([centre - half, centre + half], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Turn (left, top, right, bottom) into (centre x, centre y, width, height); any leading shape, [..., 4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) * 0.5, high - low], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of xyxy boxes [..., 4] -> [...], in squared units of the input."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def aligned_iou(boxes1: Tensor, boxes2: Tensor) -> Tuple[Tensor, Tensor]:
    """IoU of corresponding xyxy boxes.

    Args:
        boxes1, boxes2: [..., 4] with leading shapes that broadcast against each other.

    Returns:
        iou in 0..1 and the area of the union, both of the broadcast leading shape. Two boxes without area give IoU 0.
    """
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    overlap = (high - low).clamp(min=0).prod(dim=-1)
    union = box_area(boxes1) + box_area(boxes2) - overlap
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny), union


def aligned_generalized_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., 2019, eq. 1-3) of corresponding xyxy boxes; shapes as in `aligned_iou`.

    Returns:
        values in -1..1 of the broadcast leading shape.
    """
    iou, union = aligned_iou(boxes1, boxes2)
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    high = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    hull = (high - low).clamp(min=0).prod(dim=-1)
    return iou - (hull - union) / hull.clamp(min=torch.finfo(hull.dtype).tiny)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tuple[Tensor, Tensor]:
    """IoU and union of every box of boxes1 [N, 4] with every box of boxes2 [M, 4] (xyxy) -> two tensors [N, M]."""
    return aligned_iou(boxes1[:, None], boxes2[None])


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of every box of boxes1 [N, 4] with every box of boxes2 [M, 4] -> [N, M] in -1..1.

    Raises:
        ValueError: if a box has its right edge left of its left edge, or its bottom above its top.
    """
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if not (boxes[:, 2:] >= boxes[:, :2]).all():
            raise ValueError(f"{name} holds a box that is not (left, top, right, bottom) with right >= left, bottom >= top")
    return aligned_generalized_iou(boxes1[:, None], boxes2[None])


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Tightest box around each mask.

    Args:
        masks: [N, H, W], non-zero inside.

    Returns:
        float [N, 4], xyxy of the outermost pixel indices; zeros for an empty mask.
    """
    inside = masks != 0
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    if masks.numel() == 0:
        return boxes
    for first, occupied in ((0, inside.any(dim=1)), (1, inside.any(dim=2))):
        size = occupied.shape[1]
        position = torch.arange(size, device=masks.device)
        boxes[:, first] = torch.where(occupied, position, size).amin(dim=1).float()
        boxes[:, first + 2] = torch.where(occupied, position, -1).amax(dim=1).float()
    return torch.where(inside.flatten(1).any(dim=1, keepdim=True), boxes, torch.zeros_like(boxes))
