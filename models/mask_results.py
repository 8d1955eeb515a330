"""From mask logits to results in COCO's terms: a mask for each detection, or one panoptic map for each image."""
import io
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from util.misc import at_least_float32
from util.panoptic_ids import ids_to_rgb

RESIZED_AT_ONCE = 10  # masks that are enlarged at a time: at full resolution, as floats, they are what takes memory
SMALLEST_SEGMENT = 4  # segments of so many pixels, or fewer, are noise
Size = Tuple[int, int]  # height, width


class PostProcessSegm(nn.Module):
    """Adds the masks to what `PostProcess` found.

    Args:
        threshold: probability from which a pixel belongs to the object.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, results: List[Dict[str, Tensor]], outputs: Dict[str, Tensor], orig_target_sizes: Tensor,
                max_target_sizes: Tensor) -> List[Dict[str, Tensor]]:
        """Masks of every query, in pixels of the original image.

        Args:
            results: of `PostProcess`, for each image a dict; changed in place.
            outputs: `pred_masks` [B, N, h, w].
            orig_target_sizes: int64 [B, 2], (height, width) of the original images.
            max_target_sizes: int64 [B, 2], (height, width) of the images as they entered the batch, without padding.

        Returns:
            `results`, each with `masks` bool [N, 1, H, W] besides.
        """
        sizes, originals = _pairs(max_target_sizes), _pairs(orig_target_sizes)
        padded = _padded_size(sizes)
        for result, masks, size, original in zip(results, outputs["pred_masks"], sizes, originals):
            parts = [self._resize(part, padded, size, original) for part in at_least_float32(masks).split(RESIZED_AT_ONCE)]
            result["masks"] = torch.cat(parts)
        return results

    def _resize(self, masks: Tensor, padded: Size, size: Size, original: Size) -> Tensor:
        """Logits [k, h, w] -> bool [k, 1, H, W]: enlarge to the batch, cut the padding off, then to the original."""
        inside = _enlarge(masks, padded, size).sigmoid() > self.threshold
        return F.interpolate(inside[:, None].float(), size=original, mode="nearest").bool()


class PostProcessPanoptic(nn.Module):
    """One map for each image in which every pixel belongs to at most one segment (sec. 4.4 and A.4 of the paper).

    Queries that are sure of a class compete for each pixel. Then masks of one stuff class are merged, and tiny segments
    dropped, their pixels going to the next best. As in the published program, that second assignment does not merge
    again: a stuff mask that was merged into another owns no pixels, so it is dropped as tiny, and what it covered goes
    to the next best too.

    Args:
        is_thing_map: whether each class is a thing (countable) or stuff. Queries of other classes are passed over.
        threshold: queries need a higher probability of their class than this.
    """

    def __init__(self, is_thing_map: Dict[int, bool], threshold: float = 0.85) -> None:
        super().__init__()
        self.is_thing_map = is_thing_map
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, outputs: Dict[str, Tensor], processed_sizes: Sequence, target_sizes: Optional[Sequence] = None
                ) -> List[Dict[str, Any]]:
        """Panoptic maps.

        Args:
            outputs: `pred_logits` [B, N, C + 1], `pred_masks` [B, N, h, w].
            processed_sizes: (height, width) of each image as it entered the batch, without padding; pairs, or [B, 2].
            target_sizes: (height, width) of each map; by default `processed_sizes`.

        Returns:
            for each image `png_string`, the bytes of a PNG of segment ids in COCO's colours, and `segments_info`, for
            each segment a dict of `id` (from 0), `category_id`, `isthing` and `area` in pixels. Without any detection
            the list is empty and all pixels are 0.

        Raises:
            ValueError: if there aren't as many target sizes as processed sizes.
        """
        sizes = _pairs(processed_sizes)
        targets = sizes if target_sizes is None else _pairs(target_sizes)
        if len(targets) != len(sizes):
            raise ValueError(f"{len(targets)} target sizes came with {len(sizes)} processed sizes")
        probabilities, labels = at_least_float32(outputs["pred_logits"]).softmax(-1).max(-1)
        padded, no_object = _padded_size(sizes), outputs["pred_logits"].shape[-1] - 1
        results = []
        for i, (size, target) in enumerate(zip(sizes, targets)):
            known = torch.tensor([label in self.is_thing_map for label in labels[i].tolist()], dtype=torch.bool)
            kept = known.to(labels.device) & (probabilities[i] > self.threshold) & (labels[i] != no_object)
            masks = _enlarge(at_least_float32(outputs["pred_masks"][i, kept]), padded, size)
            results.append(self._panoptic(masks, labels[i, kept].tolist(), target))
        return results

    def _panoptic(self, masks: Tensor, labels: List[int], target: Size) -> Dict[str, Any]:
        """Masks [k, H, W] and their classes -> the result of one image."""
        ids, areas = _assign(masks, target, self._merged(labels))
        while labels:
            large = [area > SMALLEST_SEGMENT for area in areas]
            if all(large):
                break
            masks, labels = masks[large], [label for label, keep in zip(labels, large) if keep]
            ids, areas = _assign(masks, target, list(range(len(labels))))
        segments = [{"id": i, "isthing": self.is_thing_map[label], "category_id": label, "area": area}
                    for i, (label, area) in enumerate(zip(labels, areas))]
        png = io.BytesIO()
        Image.fromarray(ids_to_rgb(ids)).save(png, format="PNG")
        return {"png_string": png.getvalue(), "segments_info": segments}

    def _merged(self, labels: List[int]) -> List[int]:
        """The segment that each mask belongs to: of masks of one stuff class, the first one; things stay apart."""
        return [i if self.is_thing_map[label] else labels.index(label) for i, label in enumerate(labels)]


def _assign(masks: Tensor, target: Size, segments: List[int]) -> Tuple[np.ndarray, List[int]]:
    """Give each pixel to the segment whose mask is the strongest there.

    Args:
        masks: logits [k, H, W]; target: size of the map; segments: by mask, the segment it belongs to (0 … k - 1).

    Returns:
        ids int32 [target] and the area of each of k segments in pixels.
    """
    if not segments:
        return np.zeros(target, dtype=np.int32), []
    strongest = Image.fromarray(masks.argmax(0).to(torch.int32).cpu().numpy())
    # Pillow's and torch's notions of the nearest pixel differ; the published program used Pillow's.
    resized = np.asarray(strongest.resize((target[1], target[0]), Image.Resampling.NEAREST))
    ids = np.array(segments, dtype=np.int32)[resized]
    return ids, np.bincount(ids.ravel(), minlength=len(segments)).tolist()


def _enlarge(masks: Tensor, padded: Size, size: Size) -> Tensor:
    """Logits [k, h, w] of a padded image -> [k, H, W] of the image alone."""
    if len(masks) == 0:
        return masks.new_zeros((0, *size))
    larger = F.interpolate(masks[:, None], size=padded, mode="bilinear", align_corners=False)[:, 0]
    return larger[:, :size[0], :size[1]]


def _padded_size(sizes: Sequence[Size]) -> Size:
    """Size of the batch that holds images of these sizes."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _pairs(sizes: Any) -> List[Size]:
    """Sizes as a tensor [B, 2], or pairs of numbers, tensors or (height, width) tensors -> pairs of int."""
    pairs = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [(int(height), int(width)) for height, width in pairs]
