"""UP-DETR: pre-train DETR's transformer to find random patches of an image (Dai et al., 2021, sec. 3)."""
from typing import Dict, List, Optional

import torch
from torch import Tensor, nn

from models.detr import DETR, MLP, build
from util.misc import NestedTensor, at_least_float32, nested_tensor_from_tensor_list

__all__ = ["UPDETR", "build"]


class UPDETR(DETR):
    """DETR whose object queries carry the features of image patches that it has to find.

    The N object queries fall into M groups of N / M; patch j is added to every query of group j. Unless told otherwise,
    queries of different groups don't see each other in the decoder's self-attention. Three classes as in the published
    weights: 0 is unused, 1 is "this query found its patch", 2 is "nothing".

    Args:
        backbone, transformer, num_classes, num_queries, aux_loss: as for `DETR`.
        num_patches: M.
        feature_recon: also reconstruct the patch features from the decoder's outputs (sec. 3.2, `feature_align`).
        query_shuffle: in training, give the query embeddings to the queries in random order.
        separate_groups: False lets the queries of all patches see each other (the ablation of sec. 3.3's attention mask).
        mask_ratio: share of queries whose patch feature is zeroed in training, drawn for each query and image.

    Raises:
        ValueError: if num_patches doesn't divide num_queries.
    """

    def __init__(self, backbone: nn.Module, transformer: nn.Module, num_classes: int = 2, num_queries: int = 100,
                 aux_loss: bool = False, num_patches: int = 10, feature_recon: bool = True, query_shuffle: bool = False,
                 mask_ratio: float = 0.1, *, separate_groups: bool = True) -> None:
        super().__init__(backbone, transformer, num_classes, num_queries, aux_loss)
        if num_patches < 1 or num_queries % num_patches:
            raise ValueError(f"{num_queries} queries can't be shared out evenly among {num_patches} patches")
        hidden_dim = transformer.d_model
        self.patch2query = nn.Linear(backbone.num_channels, hidden_dim)
        self.feature_align: Optional[nn.Module] = None
        if feature_recon:
            self.feature_align = MLP(hidden_dim, hidden_dim, backbone.num_channels, 2)
        self.num_patches = num_patches
        self.queries_per_patch = num_queries // num_patches
        self.query_shuffle = query_shuffle
        self.mask_ratio = mask_ratio
        group = torch.arange(num_queries) // (self.queries_per_patch if separate_groups else num_queries)
        self.register_buffer("attention_mask", group[:, None] == group[None, :], persistent=False)

    def forward(self, samples: NestedTensor, patches: Tensor) -> Dict[str, Tensor]:
        """Find patches in images.

        Args:
            samples: as for `DETR`.
            patches: [B, k, 3, P, P], normalised like the images, with k <= num_patches; the first k groups of queries are used.

        Returns:
            as `DETR`, for the k * N / M queries in use; with feature reconstruction `pred_feature` [B, k * N / M, C] (in
            `aux_outputs` too) and its aim `gt_feature` [B, k, C].

        Raises:
            ValueError: if there are more patches than groups, or not as many lists of patches as images.
        """
        if isinstance(samples, (list, Tensor)):
            samples = nested_tensor_from_tensor_list(samples)
        batch, count = patches.shape[:2]
        if count > self.num_patches:
            raise ValueError(f"{count} patches per image, but the model was built for at most {self.num_patches} "
                             "(--num_patches)")
        if batch != len(samples.tensors):
            raise ValueError(f"patches of {batch} images came with {len(samples.tensors)} images")
        patch_feature = self.patch_features(patches)
        used = count * self.queries_per_patch
        decoder_mask = ~self.attention_mask[:used, :used]
        features, positions = self.backbone(samples)
        src, mask = features[-1].decompose()
        queries = self._queries(patch_feature)
        decoded = self.transformer(self.input_proj(src), mask, queries, positions[-1], decoder_mask)[0]
        out = self.predictions(decoded)
        if self.feature_align is not None:
            self._add_reconstruction(out, decoded)
            out["gt_feature"] = patch_feature.detach()
        return out

    def patch_features(self, patches: Tensor) -> Tensor:
        """Patches [B, k, 3, P, P] -> globally average-pooled features of the backbone's last map [B, k, C]."""
        maps = self.backbone[0].body(patches.flatten(0, 1))
        feature = at_least_float32(list(maps.values())[-1]).mean((2, 3))  # which losses are made of
        return feature.unflatten(0, patches.shape[:2])

    def _queries(self, patch_feature: Tensor) -> Tensor:
        """Patch features [B, k, C] -> queries [B, k * N / M, d]: query embedding plus the embedded patch of its group."""
        embedding = self.query_embed.weight
        if self.training and self.query_shuffle:
            embedding = embedding[torch.randperm(len(embedding), device=embedding.device)]
        patch = self.patch2query(patch_feature.to(self.patch2query.weight.dtype)).repeat_interleave(self.queries_per_patch, dim=1)
        if self.training and self.mask_ratio > 0:
            kept = torch.rand(patch.shape[:2], device=patch.device) >= self.mask_ratio
            patch = patch * kept[:, :, None].to(patch.dtype)
        return embedding[: patch.shape[1]] + patch

    def _add_reconstruction(self, out: Dict, decoded: Tensor) -> None:
        if not self.aux_loss:
            decoded = decoded[-1:]
        features: List[Tensor] = list(self.feature_align(decoded))
        out["pred_feature"] = features[-1]
        for layer, feature in zip(out.get("aux_outputs", []), features):
            layer["pred_feature"] = feature
