"""Regions that may hold an object, whatever it is: a detector's boxes without their classes, and selective search's."""
from typing import Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor

from datasets.image_io import read_image
from datasets.selective_search import GRID, selective_search
from models import fused
from models.deformable_detr import PostProcessFocal
from models.detr import PostProcess
from tools.loading import Loaded
from util.misc import NestedTensor


@torch.no_grad()
@fused.steps()
def find_objects(loaded: Loaded, samples: NestedTensor, sizes: Tensor) -> List[Tuple[Tensor, Tensor]]:
    """What a detector finds, of any class, the box of each query once.

    Args:
        samples: B images as the model sees them, on its device.
        sizes: int64 [B, 2], (height, width) of the images in whose pixels boxes are wanted.

    Returns:
        for each image xyxy boxes [N, 4] and scores [N] in 0..1, the best first, on the CPU.
    """
    sigmoid = loaded.args.model == "deformable_detr"
    outputs = (loaded.model.detr if loaded.args.masks else loaded.model)(samples)
    postprocess = PostProcessFocal(outputs["pred_boxes"].shape[1]) if sigmoid else PostProcess()
    found = []
    for result in postprocess(without_classes(outputs, sigmoid), sizes):
        order = result["scores"].argsort(descending=True)
        found.append((result["boxes"][order].cpu(), result["scores"][order].cpu()))
    return found


def without_classes(outputs: Dict[str, Tensor], sigmoid: bool) -> Dict[str, Tensor]:
    """Outputs of a detector as those of one that knows a single class, "object".

    Args:
        outputs: `pred_logits` [B, N, C] for sigmoid classification, [B, N, C + 1] with "no object" for softmax;
            `pred_boxes`.

    Returns:
        the same boxes with logits [B, N, 1], whose sigmoid is the most probable class's probability, or [B, N, 2],
        whose softmax is the probability of all classes together and that of "no object".
    """
    logits = outputs["pred_logits"].float()
    if sigmoid:
        logits = logits.amax(-1, keepdim=True)
    else:
        logits = torch.cat([logits[..., :-1].logsumexp(-1, keepdim=True), logits[..., -1:]], dim=-1)
    return {"pred_logits": logits, "pred_boxes": outputs["pred_boxes"]}


def search_regions(path: str, apply_exif: bool = False) -> np.ndarray:
    """Selective search's proposals in an image file, the best first: xyxy boxes float64 [n, 4] in its pixels.

    Args:
        path: the file.
        apply_exif: turn the image as its EXIF orientation says.

    Raises:
        UnreadableImage: if it can't be read.
    """
    image, (height, width) = read_image(path, apply_exif=apply_exif)
    return selective_search(image) * np.array([width, height, width, height]) / GRID
