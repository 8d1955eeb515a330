"""DETReg: pre-train a whole detector to find regions and to predict what is in them (Bar et al., 2022, sec. 3).

The detector, a DETR or a Deformable DETR, gets one head more, which predicts an embedding of each region. What it
should predict is said by a network that never trains: `RegionEmbedder`.
"""
import argparse
from typing import Dict, List

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from models.backbone import LAYERS, SUPERVISED_URLS, FrozenBatchNorm2d, load_backbone_weights
from models.deformable_detr import DeformableDETR
from models.detr import DETR, MLP
from models.fused import can_fuse, resnet_maps
from util.errors import InputError

# Of a region's crop, what is predicted: the average-pooled map of layer2, or SwAV's projection of layer4's.
HEADS = ("intermediate", "head")
PROJECTION_HIDDEN, PROJECTION_DIM = 2048, 128  # of the projection that SwAV published


class DETRegDETR(DETR):
    """A DETR that also predicts an embedding of what each query finds.

    Args:
        backbone, transformer, num_classes, num_queries, aux_loss: as for `DETR`.
        embedding_dim: numbers of an embedding, E.

    forward: as `DETR`'s, and `pred_features` [B, N, E] of the last decoder layer.
    """

    def __init__(self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int, aux_loss: bool,
                 embedding_dim: int) -> None:
        super().__init__(backbone, transformer, num_classes, num_queries, aux_loss)
        self.feature_embed = _embedding_head(transformer.d_model, embedding_dim)

    def predictions(self, decoded: Tensor) -> Dict[str, Tensor]:
        """Apply the heads to decoder outputs [L, B, N, d]; returns the dict that `forward` describes."""
        return {**super().predictions(decoded), "pred_features": self.feature_embed(decoded[-1])}


class DETRegDeformableDETR(DeformableDETR):
    """A Deformable DETR that also predicts an embedding of what each query finds; see `DETRegDETR`.

    Args:
        backbone, transformer, num_classes, num_queries, num_feature_levels, aux_loss, with_box_refine, two_stage: as
            for `DeformableDETR`.
        embedding_dim: numbers of an embedding, E.
    """

    def __init__(self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int,
                 num_feature_levels: int, aux_loss: bool, with_box_refine: bool, two_stage: bool,
                 embedding_dim: int) -> None:
        super().__init__(backbone, transformer, num_classes, num_queries, num_feature_levels, aux_loss, with_box_refine,
                         two_stage)
        self.feature_embed = _embedding_head(transformer.d_model, embedding_dim)

    def predictions(self, decoded: Tensor, references: List[Tensor]) -> Dict[str, Tensor]:
        """Apply the heads to decoder outputs [L, B, N, d]; returns the dict that `forward` describes."""
        return {**super().predictions(decoded, references), "pred_features": self.feature_embed(decoded[-1])}


def _embedding_head(hidden_dim: int, embedding_dim: int) -> MLP:
    return MLP(hidden_dim, hidden_dim, embedding_dim, 2)


class RegionNetwork(nn.Module):
    """The part of a ResNet that makes a crop's embedding; parameter names are torchvision's and SwAV's.

    forward: crops [T, 3, P, P], normalised like the images -> embeddings [T, dim]. SwAV's projections have length 1.

    Args:
        name: one of `SUPERVISED_URLS`, "resnet50" for example.
        head: one of `HEADS`.

    Raises:
        InputError: for another name.
    """

    def __init__(self, name: str, head: str) -> None:
        super().__init__()
        if name not in SUPERVISED_URLS:
            raise InputError(f"--backbone {name!r} is not one of {', '.join(SUPERVISED_URLS)}")
        resnet = getattr(torchvision.models, name)(weights=None, norm_layer=FrozenBatchNorm2d)
        layers = LAYERS[:2] if head == "intermediate" else LAYERS
        self.stem, self.layers = ("conv1", "bn1", "relu", "maxpool"), layers
        for stage in (*self.stem, *layers):
            setattr(self, stage, getattr(resnet, stage))
        channels = resnet.fc.in_features
        self.dim = channels // 4
        self.projects = head == "head"
        if self.projects:
            self.dim = PROJECTION_DIM
            # Frozen normalisation works on vectors as on maps.
            self.projection_head = nn.Sequential(
                nn.Linear(channels, PROJECTION_HIDDEN), FrozenBatchNorm2d(PROJECTION_HIDDEN), nn.ReLU(),
                nn.Linear(PROJECTION_HIDDEN, PROJECTION_DIM))

    def forward(self, crops: Tensor) -> Tensor:
        if can_fuse(self):
            x = resnet_maps(self, self.layers, crops)[-1]
        else:
            x = crops
            for stage in (*self.stem, *self.layers):
                x = getattr(self, stage)(x)
        x = x.mean((2, 3))
        return F.normalize(self.projection_head(x), dim=1) if self.projects else x


class RegionEmbedder:
    """Says what the embedding of each region should be.

    It is no module: whoever holds it doesn't count it among its parts, so that it is in no state_dict, optimizer or
    gradient reduction, and no `train()` reaches it.

    Args:
        network: `RegionNetwork`, or another module from crops [T, 3, P, P] to embeddings [T, dim] that has `dim`.
        device: where it is to run.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network.to(device).requires_grad_(False).eval()
        self.dim: int = network.dim

    @torch.no_grad()
    def __call__(self, crops: Tensor) -> Tensor:
        """Crops [T, 3, P, P] of all images of a batch -> embeddings [T, dim], in one go; T may be 0."""
        if not len(crops):
            return crops.new_zeros(0, self.dim)
        with torch.autocast(crops.device.type, enabled=False):  # what a loss is made of
            return self.network(crops.to(next(self.network.parameters(), crops).dtype))


def build_embedder(args: argparse.Namespace) -> RegionEmbedder:
    """The frozen network that `--load_embedding` names: SwAV's ResNet-50, or a network like `--backbone`."""
    name = "resnet50" if args.load_embedding == "swav" else args.backbone
    network = RegionNetwork(name, args.obj_embedding_head)
    load_backbone_weights(network, args.load_embedding, name, flag="--load_embedding")
    return RegionEmbedder(network, torch.device(args.device))
