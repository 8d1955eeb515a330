"""Detectron2's backbones as DETR's: `MODEL.BACKBONE` and `MODEL.RESNETS` keep their meaning."""
from typing import List

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import Tensor, nn

from models.backbone import BackboneBase
from util.errors import InputError


class FeatureList(nn.Module):
    """Runs a Detectron2 backbone; images [B, 3, H, W] -> its maps, in the order of the config's OUT_FEATURES."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.names = list(net.output_shape())

    def forward(self, x: Tensor) -> List[Tensor]:
        maps = self.net(x)
        return [maps[name] for name in self.names]


class DetectronBackbone(BackboneBase):
    """The backbone that a config describes, over a NestedTensor, with the padding mask carried along.

    `num_channels` is that of the last feature named, `finer_channels` those of the first three, deepest first, for a
    mask head. Which layers train is the config's MODEL.BACKBONE.FREEZE_AT.

    Raises:
        InputError: if masks are wanted and fewer than three maps are named.
    """

    def __init__(self, cfg: CfgNode) -> None:
        nn.Module.__init__(self)  # BackboneBase's own would take a torchvision ResNet apart
        net = build_backbone(cfg)
        if cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone" and cfg.MODEL.RESNETS.RES5_DILATION == 2:
            _dilate_as_torchvision(net.res5[0].conv2)
        self.body = FeatureList(net)
        channels = [shape.channels for shape in net.output_shape().values()]
        if cfg.MODEL.MASK_ON and len(channels) < 3:
            raise InputError("MODEL.MASK_ON needs the backbone's finer maps too: OUT_FEATURES should be "
                             f"['res2', 'res3', 'res4', 'res5'], not {self.body.names}")
        self.num_channels = channels[-1]
        self.finer_channels = channels[2::-1]


def _dilate_as_torchvision(first: nn.Module) -> None:
    """Undo the dilation of a dilated stage's first block: torchvision, and so DC5 weights, dilate those after it."""
    first.dilation, first.padding = (1, 1), (1, 1)
