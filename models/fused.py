"""Frozen batch normalisation, and ResNets that take a convolution, its normalisation, a residual and a ReLU in one step.

The numbers are the same up to rounding. Normalisation by constants is a scale and a shift of each channel. The scale goes
into the convolution's weights and the shift becomes its bias; on a CPU oneDNN then adds the residual while the result is
still in the processor's registers. What is left out is memory traffic: on a CPU the separate steps
cost up to three times as much as a 1×1 convolution itself. Where it is faster, `winograd` takes 3×3 convolutions.

Rounding can be told from outside: a scripted model would no longer equal its original. So it is done within `steps()` alone,
where the loops of `engine` and the tools run; a model that is called by other code computes step by step. `enable(False)` turns
all of it off, and modules that are compiled, scripted, traced, transformed or watched are never run this way.

Weights are folded at each call. Those of constant 3×3 convolutions for `winograd`, which take longer, are kept with
copies of what they are made of, and made anew where any number differs: no change can be missed. They take five times
the memory of these weights, 180 MB for ResNet-50. NaN and infinity stay visible: see `ALMOST_ZERO`.
"""
import contextlib
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torchvision.models.resnet import BasicBlock, Bottleneck

from models import winograd

# What a network is made of that may be run by `resnet_maps`. Only its own code knows what to do with anything else.
_KNOWN = (BasicBlock, Bottleneck, nn.Sequential, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Linear, nn.Identity)
_STAGES = ("layer1", "layer2", "layer3", "layer4")
_enabled = True
ALMOST_ZERO = 1e-20  # slope below 0 of oneDNN's ReLU, which with a slope of 0 turns NaN into 0


class _Kept(NamedTuple):
    """Weight and bias for `winograd` of a convolution, and copies of all that they are made of."""
    sources: List[Tensor]
    eps: float
    weight: Tensor
    bias: Tensor


_kept: "WeakKeyDictionary[nn.Module, _Kept]" = WeakKeyDictionary()  # by convolution
_inside = False  # `steps()`
_counted = False  # `steps(counted=True)`


def enable(on: bool) -> None:
    """Turn fused steps on or off, for the whole process; where they are on, `steps` says when they are taken."""
    global _enabled
    _enabled = on


@contextlib.contextmanager
def steps(counted: bool = False) -> Iterator[None]:
    """Take fused steps within, equal up to rounding to separate ones; a context or a decorator.

    Args:
        counted: also where a mode of torch sees every operator, to count what fused steps do; also in `steps()` within.
    """
    global _inside, _counted
    before = _inside, _counted
    _inside, _counted = True, _counted or counted
    try:
        yield
    finally:
        _inside, _counted = before


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine parameters are constants (buffers), as in fine-tuned detectors."""

    def __init__(self, n: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # an ordinary BatchNorm2d has it
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, n, H, W] channel by channel."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def can_fuse(resnet: nn.Module) -> bool:
    """Say if `resnet_maps` may run this network: within `steps`, torchvision's own blocks, frozen norms, nobody watching."""
    if not (_enabled and _inside) or _watched():
        return False
    for module in resnet.modules():
        if module is not resnet and type(module) not in (*_KNOWN, FrozenBatchNorm2d):
            return False
        if "forward" in vars(module) or isinstance(module, nn.Conv2d) and not _plain(module):
            return False
        if isinstance(module, (BasicBlock, Bottleneck)) and not _standard(module):
            return False
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
    stages = [getattr(resnet, name) for name in _STAGES if hasattr(resnet, name)]
    return _are_steps(resnet, ("conv1", "bn1", "relu")) and all(
        isinstance(block, (BasicBlock, Bottleneck)) for stage in stages for block in stage.children())


def _standard(block: Union[BasicBlock, Bottleneck]) -> bool:
    """Say if a block still consists of what its class has put into it: a part may have been exchanged for another."""
    names = ("conv1", "bn1", "conv2", "bn2", "relu") + (("conv3", "bn3") if isinstance(block, Bottleneck) else ())
    shortcut = block.downsample
    return _are_steps(block, names) and (shortcut is None or type(shortcut) is nn.Sequential and
                                         [type(part) for part in shortcut] == [nn.Conv2d, FrozenBatchNorm2d])


def _are_steps(owner: nn.Module, names: Sequence[str]) -> bool:
    types = {"c": nn.Conv2d, "b": FrozenBatchNorm2d, "r": nn.ReLU}
    return all(type(getattr(owner, name)) is types[name[0]] for name in names)


def _watched() -> bool:
    """Say if torch compiles, traces or transforms what runs now, or if a mode or a hook sees every operator or module."""
    hooks = nn.modules.module
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing()
                or not _counted and (torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())
                or torch._C._functorch.peek_interpreter_stack() is not None
                or torch.autograd.forward_ad._current_level >= 0
                or hooks._global_forward_hooks or hooks._global_forward_pre_hooks
                or hooks._global_backward_hooks or hooks._global_backward_pre_hooks)


def _plain(conv: nn.Conv2d) -> bool:
    return (type(conv.weight) in (nn.Parameter, Tensor) and conv.bias is None
            and conv.padding_mode == "zeros" and not isinstance(conv.padding, str))


def resnet_maps(resnet: nn.Module, layers: Sequence[str], x: Tensor) -> List[Tensor]:
    """Images [B, 3, H, W] -> the maps after each of the named layers, which are a ResNet's first ones."""
    x = x.contiguous(memory_format=memory_format(x))
    x = resnet.maxpool(convolve(x, resnet.conv1, resnet.bn1))
    maps = []
    for layer in layers:
        for block in getattr(resnet, layer):
            x = _residual_block(block, x)
        maps.append(x)
    return maps


def _residual_block(block: Union[BasicBlock, Bottleneck], x: Tensor) -> Tensor:
    steps = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if isinstance(block, Bottleneck):
        steps.append((block.conv3, block.bn3))
    residual = x if block.downsample is None else convolve(x, *block.downsample, relu=False)
    for conv, norm in steps[:-1]:
        x = convolve(x, conv, norm)
    return convolve(x, *steps[-1], residual=residual)


def convolve(x: Tensor, conv: nn.Conv2d, norm: nn.Module, relu: bool = True, residual: Optional[Tensor] = None) -> Tensor:
    """relu(norm(conv(x)) + residual).

    Args:
        x: [B, C, H, W].
        conv: a convolution without bias and with zero padding; norm: a `FrozenBatchNorm2d`.
        relu: False leaves the ReLU out.
        residual: of the result's shape, or None.

    Under autocast it computes in autocast's type, and returns that type.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    x = x.to(dtype)
    residual = None if residual is None else residual.to(dtype)
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    if torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad
                                    or residual is not None and residual.requires_grad):
        scale, shift = _scale_and_shift(norm)
        return _TrainedConvolution.apply(x, conv.weight, scale, shift, residual, relu, geometry)
    with torch.no_grad():
        if winograd.suits(x, conv.weight, geometry):
            return winograd.convolve(x, *_at_points(conv, norm, x), residual, relu)
        scale, shift = _scale_and_shift(norm)
        return _apply(x, _fold(conv.weight, scale, x), shift.to(x.dtype), residual, relu, geometry)


class _TrainedConvolution(torch.autograd.Function):
    """`convolve` with gradients to x, the convolution's weight and the residual. Keeps its input and its output alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Optional[Tensor], relu: bool,
                geometry: winograd.Geometry) -> Tensor:
        folded, shift = _fold(weight, scale, x), shift.to(x.dtype)
        ctx.winograd = winograd.suits(x, weight, geometry, trained=True)
        if ctx.winograd:
            out = winograd.convolve(x, winograd.at_points(folded), shift, residual, relu)
        else:
            out = _apply(x, folded, shift, residual, relu, geometry)
        ctx.save_for_backward(x, folded, scale, out if relu else None)
        ctx.geometry, ctx.weight_dtype = geometry, weight.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, folded, scale, out = ctx.saved_tensors
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)  # no gradient where the ReLU gave 0
        wanted = ctx.needs_input_grad[:2]
        if ctx.winograd:
            grad_x = winograd.input_gradient(grad, folded) if wanted[0] else None
            grad_weight = winograd.weight_gradient(grad, x) if wanted[1] else None
        else:
            grad_x, grad_weight = _direct_gradients(grad, x, folded, ctx.geometry, wanted)
        if grad_weight is not None:
            grad_weight = (grad_weight.to(ctx.weight_dtype) * scale[:, None, None, None]).contiguous()
        return grad_x, grad_weight, None, None, grad if ctx.needs_input_grad[4] else None, None, None


def _direct_gradients(grad: Tensor, x: Tensor, weight: Tensor, geometry: winograd.Geometry,
                      wanted: Sequence[bool]) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """A convolution's gradients to its input and to its weight, those that are wanted."""
    stride, padding, dilation, groups = geometry
    rows = x.device.type == "cpu" and weight.shape[2:] == (1, 1) and stride == [1, 1] and padding == [0, 0]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        _rows(grad) if rows else grad, _rows(x) if rows else x, weight, None, stride, padding, dilation, False, [0, 0],
        groups, [*wanted, False])
    if rows and grad_x is not None:
        grad_x = grad_x.permute(0, 2, 3, 1).reshape(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return grad_x, grad_weight


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W], channels last -> the same memory as [B * H, C, 1, W].

    A 1×1 convolution doesn't care, but with one thread torch leaves small batches of them to slower code than oneDNN's.
    """
    return x.permute(0, 2, 3, 1).reshape(-1, 1, x.shape[3], x.shape[1]).permute(0, 3, 1, 2)


def _apply(x: Tensor, weight: Tensor, bias: Tensor, residual: Optional[Tensor], relu: bool,
           geometry: winograd.Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    if _onednn_takes(x):
        one_dnn = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            act = ("leaky_relu", [ALMOST_ZERO]) if relu else ("none", [])
            return one_dnn(x, weight, bias, padding, stride, dilation, groups, *act, "")
        out = one_dnn.binary(x, residual, weight, bias, padding, stride, dilation, groups, "add", 1.0, None, [], None)
    else:
        out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        if residual is not None:
            out += residual
    return out.relu_() if relu else out


def _onednn_takes(x: Tensor) -> bool:
    """Whether oneDNN's fused convolution, an operator that torch keeps for its own compiler, is there for this input."""
    return (x.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
            and (x.dtype == torch.float32
                 or x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _scale_and_shift(norm: nn.Module) -> Tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _fold(weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    return (weight * scale[:, None, None, None]).to(x.dtype, memory_format=memory_format(x))


def _at_points(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tuple[Tensor, Tensor]:
    """Folded weight and bias for x as `winograd.convolve` takes them, kept until a number that they are made of changes."""
    sources = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    kept = _kept.get(conv)
    if kept is None or kept.eps != norm.eps or not all(map(_same, kept.sources, sources)):
        scale, shift = _scale_and_shift(norm)
        copies = [source.detach().clone() for source in sources]
        at_points = winograd.at_points(_fold(conv.weight, scale, x)).contiguous()
        kept = _kept[conv] = _Kept(copies, norm.eps, at_points, shift.to(x.dtype))
    return kept.weight, kept.bias


def _same(a: Tensor, b: Tensor) -> bool:
    # These tensors lie on the host: a count of what a GPU would be waited for must not see them.
    with _disable_current_modes():
        return a.dtype == b.dtype and torch.equal(a, b)


def memory_format(x: Tensor) -> torch.memory_format:
    """Layout in which convolutions of x are fastest: channels last, but for float32 on GPUs outside their tensor cores."""
    plain = x.is_cuda and x.dtype == torch.float32 and not _allows_tf32()
    return torch.contiguous_format if plain else torch.channels_last


def _allows_tf32() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # which torch raises where its newer switches, `fp32_precision`, are used
        return torch.backends.cudnn.conv.fp32_precision == "tf32"
