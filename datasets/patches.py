"""Cutting the patches of an image and augmenting them, as one batch of tensors.

This is the hot path of pre-training: done by Pillow or by general-purpose transforms, the ten patches of an image cost
many times more than decoding it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["PatchAugmentation", "PatchParameters", "augment_patches", "cut_patches", "normalize_patches"]

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, with torchvision's digits
_LUMA_TENSOR = torch.tensor(_LUMA)
_HUE_CENTRES, _HUE_SIGNS, _HUE_OFFSETS = (torch.tensor(values).view(3, 1, 1) for values in (
    (3.0, 2.0, 4.0), (1.0, -1.0, -1.0), (-1.0, 2.0, 2.0)))
_MEAN = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
_INVERSE_STD = 1 / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def cut_patches(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cuts boxes out of an image and resizes each to a square (antialiased bilinear, on bytes).

    Args:
        image: uint8 [3, H, W].
        boxes: int64 [M, 4], x0, y0, x1, y1 in pixels, the right and lower ends exclusive; M may be 0.
        size: side P of the patches in pixels.

    Returns:
        uint8 [M, 3, P, P]; a box of P×P pixels is copied exactly.
    """
    if not len(boxes):
        return image.new_zeros(0, 3, size, size)
    regions = [image[None, :, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes.tolist()]
    resized = [F.interpolate(region, size=(size, size), mode="bilinear", antialias=True) for region in regions]
    return torch.cat(resized).contiguous()


def normalize_patches(patches: Tensor) -> Tensor:
    """Normalises, in place, float patches [..., 3, P, P] in 0..1 with ImageNet's mean and deviation."""
    return patches.sub_(_MEAN).mul_(_INVERSE_STD)


@dataclass
class PatchParameters:
    """What happens to each of M patches.

    Attributes:
        jitter: bool [M], whether colours are jittered.
        order: int [M, 4], the order of brightness (0), contrast (1), saturation (2) and hue (3) changes.
        factors: float32 [M, 4], the factors of these four (the last a shift in turns of the colour circle).
        grey: bool [M], whether the patch becomes grey.
        sigma: float32 [M], deviation of the Gaussian blur in pixels; 0 for none.
    """

    jitter: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    grey: np.ndarray
    sigma: np.ndarray


@dataclass(frozen=True)
class PatchAugmentation:
    """Draws the augmentation of patches (UP-DETR, section 3.1; the policy of SimCLR and SwAV without flip and crop).

    Attributes:
        brightness: largest relative change of brightness; likewise `contrast` and `saturation`.
        hue: largest shift of the hue, in turns of the colour circle.
        jitter_p: probability of changing the colours.
        grey_p: probability of becoming grey.
        blur_p: probability of being blurred.
        sigma: range of the blur's deviation in pixels.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)

    def draw(self, num_patches: int, rng: np.random.Generator) -> PatchParameters:
        """Draws the parameters of `num_patches` patches from `rng`."""
        coins = rng.random((3, num_patches))
        spread = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        factors = np.array([1, 1, 1, 0]) + spread * rng.uniform(-1, 1, (num_patches, 4))
        sigma = rng.uniform(*self.sigma, num_patches)
        return PatchParameters(
            jitter=coins[0] < self.jitter_p,
            order=rng.permuted(np.tile(np.arange(4), (num_patches, 1)), axis=1),
            factors=factors.astype(np.float32),
            grey=coins[1] < self.grey_p,
            sigma=np.where(coins[2] < self.blur_p, sigma, 0).astype(np.float32),
        )


def augment_patches(patches: Tensor, parameters: PatchParameters, normalize: bool = False) -> Tensor:
    """Augments a batch of patches: colour jitter, then grey, then blur, each patch by its own parameters.

    Everything happens to one patch before the next one's turn. Its planes and their intermediates then stay in the
    processor's cache; the same operations on all patches at once take more than twice as long.

    Args:
        patches: uint8 [M, 3, P, P].
        parameters: what to do to each patch.
        normalize: whether to call `normalize_patches` in the end.

    Returns:
        float32 [M, 3, P, P], in 0..1 unless normalised.
    """
    changes = (_adjust_brightness, _adjust_contrast, _adjust_saturation, _shift_hue)
    augmented = torch.empty(patches.shape)
    for index, patch in enumerate(augmented):
        patch.copy_(patches[index]).mul_(1 / 255)
        if parameters.jitter[index]:
            for kind in parameters.order[index].tolist():
                changes[kind](patch, float(parameters.factors[index, kind]))
        if parameters.grey[index]:
            patch.copy_(_grey(patch))
        if parameters.sigma[index] > 0:
            _blur(patch, float(parameters.sigma[index]))
        if normalize:
            normalize_patches(patch)
    return augmented


# Each of these changes one patch, float [3, P, P] in 0..1, in place. A factor up to 1 can't lead out of this range.


def _adjust_brightness(patch: Tensor, factor: float) -> None:
    patch.mul_(factor)
    if factor > 1:
        patch.clamp_(max=1)


def _adjust_contrast(patch: Tensor, factor: float) -> None:
    _blend(patch, patch.mean((1, 2)) @ _LUMA_TENSOR, factor)


def _adjust_saturation(patch: Tensor, factor: float) -> None:
    _blend(patch, _grey(patch), factor)


def _blend(patch: Tensor, base: Tensor, factor: float) -> None:
    """Goes from `base` to the patch and, with a factor above 1, beyond it."""
    torch.lerp(base, patch, factor, out=patch)
    if factor > 1:
        patch.clamp_(0, 1)


def _shift_hue(patch: Tensor, turns: float) -> None:
    """Turns the hue at equal largest and smallest channel, without the detour over saturation that HSV takes.

    With hue h in 0..6, m the smallest and c = largest − smallest, red is m + c·t(|h − 3| − 1), green is
    m + c·t(2 − |h − 2|) and blue is m + c·t(2 − |h − 4|), where t clamps to 0..1.
    """
    red, green, blue = patch
    largest, smallest = patch.amax(0), patch.amin(0)
    chroma = largest - smallest
    # Selecting by sign (0 where the channel is the largest) and lerp: torch's comparisons and `where` are slow on CPU.
    not_red, not_green = (largest - red).sign_(), largest.sub_(green).sign_()
    if_green, hue = (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    torch.lerp(if_green, hue, not_green, out=hue)
    torch.lerp(torch.sub(green, blue, out=if_green), hue, not_red, out=hue)
    hue.div_(chroma.clamp_min(1e-8)).add_(6 * turns)
    hue.add_(torch.mul(hue, 1 / 6, out=not_red).floor_(), alpha=-6)
    torch.sub(hue, _HUE_CENTRES, out=patch).abs_().mul_(_HUE_SIGNS).add_(_HUE_OFFSETS).clamp_(0, 1)
    patch.mul_(chroma).add_(smallest)


def _blur(patch: Tensor, sigma: float) -> None:
    """Blurs a patch with a Gaussian of deviation `sigma` in pixels, reflecting at the borders."""
    size = patch.shape[-1]
    # Three deviations hold 99.7 % of a Gaussian; a border cannot be reflected further than the patch is wide.
    radius = min(max(round(3 * sigma), 1), size - 1)
    kernel = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(radius + 1)]
    total = 2 * sum(kernel) - kernel[0]
    padded = F.pad(patch, [radius] * 4, mode="reflect")
    rows = torch.empty(len(patch), size + 2 * radius, size)
    # Sums of shifted views: for kernels this short much cheaper than a grouped convolution.
    for source, result, axis in ((padded, rows, 2), (rows, patch, 1)):
        torch.mul(source.narrow(axis, radius, size), kernel[0] / total, out=result)
        for offset, weight in enumerate(kernel[1:], start=1):
            pair = source.narrow(axis, radius - offset, size) + source.narrow(axis, radius + offset, size)
            result.add_(pair, alpha=weight / total)


def _grey(patch: Tensor) -> Tensor:
    """Returns the luma [P, P] of a patch [3, P, P]."""
    red, green, blue = patch
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
