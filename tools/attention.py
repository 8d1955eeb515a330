"""The attention weights of a detector while it looks at an image."""
import contextlib
import math
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.errors import InputError


class Attention(NamedTuple):
    """Weights for one image, each the mean over the heads of one layer; h x w is the size of the deepest feature map.

    decoder: [N, h, w], where each query looks in the image; sums to one over it.
    encoder: [h, w, h, w], how much each place (first two) takes from every other; None without an encoder layer.
    """

    decoder: Tensor
    encoder: Optional[Tensor]


@torch.no_grad()
def look(model: nn.Module, image: Tensor, *patches: Tensor, decoder_layer: Optional[int] = None,
         encoder_layer: Optional[int] = None) -> Tuple[Dict[str, Tensor], Attention]:
    """Detect objects in an image and keep what was attended to.

    Args:
        model: a `DETR`, with a mask head or without, or an `UPDETR`; in evaluation mode.
        image: [3, H, W], normalised, on the model's device; for an `UPDETR`, patches [k, 3, P, P] besides.
        decoder_layer, encoder_layer: 1 for the first layer; the last by default.

    Returns:
        the detector's outputs for a batch of one, without masks, and the attention, on the CPU.

    Raises:
        InputError: if there is no such layer.
    """
    detr = getattr(model, "detr", model)
    decoder = _layer(detr.transformer.decoder.layers, decoder_layer, "decoder")
    encoder = _layer(detr.transformer.encoder.layers, encoder_layer, "encoder")
    with contextlib.ExitStack() as stack:
        maps = stack.enter_context(_kept_outputs(detr.input_proj))
        # An attention with a hook also returns its weights [B, Q, K].
        crossed = stack.enter_context(_kept_outputs(decoder.multihead_attn))
        own = stack.enter_context(_kept_outputs(encoder.self_attn)) if encoder is not None else []
        outputs = detr(image[None], *(some[None] for some in patches))
    size = maps[0].shape[-2:]
    return outputs, Attention(crossed[0][1][0].unflatten(1, size).cpu(),
                              own[0][1][0].unflatten(1, size).unflatten(0, size).cpu() if own else None)


def _layer(layers: nn.ModuleList, number: Optional[int], kind: str) -> Optional[nn.Module]:
    if number is None:
        return layers[-1] if len(layers) else None
    if not 1 <= number <= len(layers):
        raise InputError(f"--{kind}_layer {number}: the model's {kind} has {len(layers)} layers")
    return layers[number - 1]


@contextlib.contextmanager
def _kept_outputs(module: nn.Module) -> Iterator[List]:
    """Within it, the list collects what the module returns."""
    kept: List = []
    handle = module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()


def stride_of(attention: Attention, image: Tensor) -> int:
    """How many pixels of the image [3, H, W] a place of the feature map spans; a power of two."""
    return 2 ** math.ceil(math.log2(max(image.shape[-2:]) / max(attention.decoder.shape[-2:])))


def enlarge(weights: Tensor, image: Tensor, stride: int) -> Tensor:
    """Weights [h, w] -> [H, W] over the image [3, H, W], interpolated, the largest scaled to 1."""
    larger = F.interpolate(weights[None, None], scale_factor=stride, mode="bilinear")[0, 0]
    larger = larger[:image.shape[-2], :image.shape[-1]]
    return larger / larger.max()
