"""ResNet backbones with frozen batch normalisation, and their pairing with a position encoding."""
import argparse
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from models.fused import FrozenBatchNorm2d, can_fuse, resnet_maps
from models.position_encoding import build_position_encoding
from util import recipes
from util.checkpoint import load_checkpoint
from util.distributed import local_main_first, print_main
from util.errors import InputError
from util.misc import NestedTensor
from util.unwrap import find_weights

__all__ = ["LAYERS", "SUPERVISED_URLS", "SWAV_URL", "Backbone", "BackboneBase", "FrozenBatchNorm2d", "Joiner", "ResNetBody",
           "backbone_state_dict", "build_backbone", "load_backbone_weights"]

SWAV_URL = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"

# torchvision's first ImageNet weights: the ones that the published detectors were trained from.
SUPERVISED_URLS = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "resnet152": "https://download.pytorch.org/models/resnet152-394f9c45.pth",
    "resnext50_32x4d": "https://download.pytorch.org/models/resnext50_32x4d-7cdf4587.pth",
    "resnext101_32x8d": "https://download.pytorch.org/models/resnext101_32x8d-8ba56ff5.pth",
    "resnext101_64x4d": "https://download.pytorch.org/models/resnext101_64x4d-173b62eb.pth",
    "wide_resnet50_2": "https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth",
    "wide_resnet101_2": "https://download.pytorch.org/models/wide_resnet101_2-32ee1156.pth",
}
BASIC_BLOCKS = ("resnet18", "resnet34")  # the others have bottlenecks, which alone can be dilated
LAYERS = ("layer1", "layer2", "layer3", "layer4")


class ResNetBody(nn.Module):
    """The convolutional part of a torchvision ResNet, up to `last_layer`; parameter names are torchvision's.

    forward: images [B, 3, H, W] -> the maps of the last `num_maps` residual layers, keyed "0", "1", … from the shallowest.
    """

    def __init__(self, resnet: nn.Module, last_layer: str, num_maps: int) -> None:
        super().__init__()
        self.conv1 = resnet.conv1
        self.bn1 = resnet.bn1
        self.relu = resnet.relu
        self.maxpool = resnet.maxpool
        self.layer1 = resnet.layer1
        self.layer2 = resnet.layer2
        self.layer3 = resnet.layer3
        self.layer4 = resnet.layer4 if last_layer == "layer4" else nn.Identity()
        self.has_layer4 = last_layer == "layer4"
        self.num_maps = num_maps

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        if not torch.jit.is_scripting():
            if can_fuse(self):
                fused_maps = resnet_maps(self, LAYERS if self.has_layer4 else LAYERS[:3], x)
                return {str(i): fused_map for i, fused_map in enumerate(fused_maps[-self.num_maps:])}
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = [self.layer1(x)]
        maps.append(self.layer2(maps[-1]))
        maps.append(self.layer3(maps[-1]))
        if self.has_layer4:
            maps.append(self.layer4(maps[-1]))
        out: Dict[str, Tensor] = {}
        for i, feature in enumerate(maps[len(maps) - self.num_maps:]):
            out[str(i)] = feature
        return out


class BackboneBase(nn.Module):
    """Runs a body over a NestedTensor and carries the padding mask along.

    Args:
        backbone: a ResNet with torchvision's attribute names.
        train_backbone: whether layer2 and deeper train; the stem and layer1 never do.
        num_channels: channels of the deepest map.
        return_interm_layers: return the maps of all four layers instead of the deepest alone.
        last_layer: "layer4", or "layer3" for a shallower backbone of stride 16.
        num_maps: return that many of the deepest maps; one, or all with `return_interm_layers`, if not given.
    """

    def __init__(self, backbone: nn.Module, train_backbone: bool, num_channels: int, return_interm_layers: bool,
                 last_layer: str = "layer4", num_maps: Optional[int] = None) -> None:
        super().__init__()
        for name, parameter in backbone.named_parameters():
            if not train_backbone or not name.startswith(LAYERS[1:]):
                parameter.requires_grad_(False)
        depth = LAYERS.index(last_layer) + 1
        num_maps = num_maps or (depth if return_interm_layers else 1)
        self.body = ResNetBody(backbone, last_layer, num_maps)
        self.num_channels = num_channels
        self.map_channels = [num_channels // 2 ** i for i in reversed(range(num_maps))]  # of each returned map
        # Of layer3, layer2, layer1, each half of the next deeper one's: what a mask head refines its masks with.
        self.finer_channels = [num_channels // 2 ** (depth - level) for level in (3, 2, 1)]

    def forward(self, tensor_list: NestedTensor) -> Dict[str, NestedTensor]:
        """Images [B, 3, H, W] with mask -> feature maps with masks, keyed "0", "1", … from the shallowest returned."""
        mask = tensor_list.mask
        assert mask is not None
        out: Dict[str, NestedTensor] = {}
        for name, feature in self.body(tensor_list.tensors).items():
            small_mask = F.interpolate(mask[None].float(), size=feature.shape[-2:])[0].to(torch.bool)
            out[name] = NestedTensor(feature, small_mask)
        return out


class Backbone(BackboneBase):
    """A ResNet of torchvision's with `FrozenBatchNorm2d`; weights start at random (see `load_backbone_weights`).

    Args:
        name: one of `SUPERVISED_URLS`, "resnet50" for example.
        train_backbone, return_interm_layers, last_layer, num_maps: see `BackboneBase`.
        dilation: keep layer4 at stride 16 by dilating its convolutions (DC5), for networks of bottlenecks.

    Raises:
        InputError: for another name, or DC5 with a network that has no bottleneck blocks or no layer4.
    """

    def __init__(self, name: str, train_backbone: bool, return_interm_layers: bool, dilation: bool,
                 last_layer: str = "layer4", num_maps: Optional[int] = None) -> None:
        if name not in SUPERVISED_URLS:
            raise InputError(f"--backbone {name!r} is not one of {', '.join(SUPERVISED_URLS)}")
        if last_layer not in LAYERS[2:]:
            raise InputError(f"--backbone_last_layer {last_layer} is not one of {', '.join(LAYERS[2:])}")
        basic_blocks = name in BASIC_BLOCKS
        if dilation and basic_blocks:
            raise InputError(f"--dilation needs a network of bottlenecks, which --backbone {name!r} is not; "
                             "resnet50 is one")
        if dilation and last_layer != "layer4":
            raise InputError(f"--dilation needs layer4, not --backbone_last_layer {last_layer!r}")
        resnet = getattr(torchvision.models, name)(weights=None, norm_layer=FrozenBatchNorm2d,
                                                   replace_stride_with_dilation=[False, False, dilation])
        num_channels = (512 if basic_blocks else 2048) // (1 if last_layer == "layer4" else 2)
        super().__init__(resnet, train_backbone, num_channels, return_interm_layers, last_layer, num_maps)


class Joiner(nn.Sequential):
    """Backbone and position encoding in a row; `num_channels` and `map_channels` are the backbone's."""

    def __init__(self, backbone: nn.Module, position_embedding: nn.Module) -> None:
        super().__init__(backbone, position_embedding)
        self.num_channels: int = getattr(backbone, "num_channels", 0)
        self.map_channels: List[int] = getattr(backbone, "map_channels", [self.num_channels])

    def forward(self, tensor_list: NestedTensor) -> Tuple[List[NestedTensor], List[Tensor]]:
        """Images -> feature maps with masks, shallowest first, and the position encoding [B, d, h, w] of each."""
        features: List[NestedTensor] = []
        positions: List[Tensor] = []
        for feature in self[0](tensor_list).values():
            features.append(feature)
            positions.append(self[1](feature).to(feature.tensors.dtype))
        return features, positions


def backbone_state_dict(checkpoint: Dict[str, Tensor], also: Tuple[str, ...] = ()) -> Dict[str, Tensor]:
    """The ResNet part of a classification, SwAV or detector checkpoint, under torchvision's names.

    Unwraps what `util.unwrap` does, strips the prefixes of detectors, and drops classification and
    projection heads but for tensors whose names begin with one of `also`.
    """
    prefixes = ("detr.", "backbone.0.", "body.", "backbone.")
    tensors = {}
    for name, value in find_weights(checkpoint).items():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if name.startswith(("conv1.", "bn1.", *(layer + "." for layer in LAYERS), *also)):
            tensors[name] = value
    return tensors


def load_backbone_weights(body: nn.Module, source: str, name: str, flag: str = "--load_backbone") -> None:
    """Fill the body from `--load_backbone`: "supervised", "swav", "none", a file or a URL.

    Args:
        body: a `ResNetBody`, or another module with names of torchvision's ResNets, and of SwAV's projection head.
        source: the flag's value.
        name: the architecture, "resnet18", …
        flag: how the user named the source, used in messages.

    Raises:
        InputError: if the source has no weights for this architecture, or isn't a ResNet checkpoint of the same kind.
    """
    if source == "none":
        return
    if source == "swav" and name != "resnet50":
        raise InputError(f"{flag} swav: SwAV published a resnet50 only, not {name}; "
                         f"pass {flag} FILE, supervised or none")
    location = {"supervised": SUPERVISED_URLS[name], "swav": SWAV_URL}.get(source, source)
    with local_main_first():
        checkpoint = load_checkpoint(location, flag=flag)
    tensors = backbone_state_dict(checkpoint, also=("projection_head.",))
    wanted = body.state_dict()
    other_shape = sorted(key for key in wanted if key in tensors and tensors[key].shape != wanted[key].shape)
    missing = sorted(key for key in wanted if key not in tensors)
    if missing or other_shape:
        raise InputError(f"{flag} {source} doesn't fit {name}: {len(missing)} tensors are missing and "
                         f"{len(other_shape)} have another shape, first {(missing + other_shape)[0]}")
    body.load_state_dict({key: tensors[key] for key in wanted})
    print_main(f"{flag.removeprefix('--load_')}: {len(wanted)} tensors of {name} from {location}")


def build_backbone(args: argparse.Namespace) -> Joiner:
    """Backbone, its weights and the position encoding, as the flags say.

    With `--masks` it returns the maps of all layers, for Deformable DETR those of stride 8 and more, as many as its levels
    at most. Its weights are not looked for when a checkpoint that holds them is about to be loaded.
    """
    args = recipes.settled(args)
    last_layer = args.backbone_last_layer
    num_maps = min(args.num_feature_levels, LAYERS.index(last_layer)) if args.model == "deformable_detr" else None
    backbone = Backbone(args.backbone, train_backbone=args.lr_backbone > 0, return_interm_layers=bool(args.masks),
                        dilation=args.dilation, last_layer=last_layer, num_maps=num_maps)
    if not (args.resume or args.pretrain or args.frozen_weights):
        load_backbone_weights(backbone.body, args.load_backbone, args.backbone)
    return Joiner(backbone, build_position_encoding(args))
