"""The encoder-decoder transformer of Deformable DETR (Zhu et al., 2021, sec. 4 and A.4).

The encoder's tokens look at a few points around their own place in every feature map, the decoder's queries at a few points
around their reference: a point, or a box where boxes are refined from layer to layer or proposed by the encoder.
"""
import argparse
import math
from typing import List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dropout import Dropout
from models.heads import HeadLinear
from models.ms_deform_attn import Levels, MSDeformAttn, make_levels
from models.transformer import FeedForward, MultiheadAttention, _get_clones
from util import recipes
from util.misc import inverse_sigmoid


class Encoded(NamedTuple):
    """What the encoder made of a batch.

    memory: [B, S, d]; padding: bool [B, S], True on padding; levels: where each map lies in S; valid_ratios: [B, L, 2], how
    much of each map's width and height is image; centres: [B, S, 2], x and y of each token's centre as shares of the image.
    """

    memory: Tensor
    padding: Tensor
    levels: Levels
    valid_ratios: Tensor
    centres: Tensor


class DeformableTransformerEncoderLayer(FeedForward):
    """Deformable self-attention and feed-forward, each with a residual that is normalised."""

    def __init__(self, d_model: int = 256, d_ffn: int = 1024, dropout: float = 0.1, activation: str = "relu",
                 n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(d_model)
        self._add_feed_forward(d_model, d_ffn, dropout, activation)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)

    def forward(self, src: Tensor, pos: Tensor, reference: Tensor, levels: Levels, padding: Tensor) -> Tensor:
        """src, pos [B, S, d]; reference [B, S, L, 2] -> [B, S, d]."""
        src = self.norm1(src + self.dropout1(self.self_attn(src + pos, reference, src, levels, padding)))
        return self.norm2(src + self.dropout2(self.feed_forward(src)))


class DeformableTransformerDecoderLayer(FeedForward):
    """Self-attention among queries, deformable attention to the encoder's memory, feed-forward."""

    def __init__(self, d_model: int = 256, d_ffn: int = 1024, dropout: float = 0.1, activation: str = "relu",
                 n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = MultiheadAttention(d_model, n_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self._add_feed_forward(d_model, d_ffn, dropout, activation)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.dropout3 = Dropout(dropout)

    def forward(self, tgt: Tensor, query_pos: Tensor, reference: Tensor, encoded: Encoded) -> Tensor:
        """tgt, query_pos [B, N, d]; reference [B, N, L, 2 or 4] -> [B, N, d]."""
        located = (tgt + query_pos).transpose(0, 1)
        own = self.self_attn(located, located, tgt.transpose(0, 1))[0].transpose(0, 1)
        tgt = self.norm2(tgt + self.dropout2(own))
        attended = self.cross_attn(tgt + query_pos, reference, encoded.memory, encoded.levels, encoded.padding)
        tgt = self.norm1(tgt + self.dropout1(attended))
        return self.norm3(tgt + self.dropout3(self.feed_forward(tgt)))


class DeformableTransformerEncoder(nn.Module):
    """A stack of encoder layers: copies of one, or those of a list."""

    def __init__(self, encoder_layer: Union[nn.Module, List[nn.Module]], num_layers: Optional[int] = None) -> None:
        super().__init__()
        self.layers = _stack(encoder_layer, num_layers)

    def forward(self, src: Tensor, pos: Tensor, reference: Tensor, levels: Levels, padding: Tensor) -> Tensor:
        for layer in self.layers:
            src = layer(src, pos, reference, levels, padding)
        return src


class DeformableTransformerDecoder(nn.Module):
    """A stack of decoder layers: copies of one, or those of a list.

    bbox_embed: the detector's box heads, one for each layer, if each layer's boxes are the next one's references; None if
        all layers look from the same reference. class_embed: its class heads, under which published two-stage models hold
        them a second time.
    """

    def __init__(self, decoder_layer: Union[nn.Module, List[nn.Module]], num_layers: Optional[int] = None,
                 return_intermediate: bool = True) -> None:
        super().__init__()
        self.layers = _stack(decoder_layer, num_layers)
        self.return_intermediate = return_intermediate
        self.bbox_embed: Optional[nn.ModuleList] = None
        self.class_embed: Optional[nn.ModuleList] = None

    def forward(self, tgt: Tensor, query_pos: Tensor, reference: Tensor, encoded: Encoded) -> Tuple[Tensor, List[Tensor]]:
        """Decode queries.

        Args:
            tgt, query_pos: [B, N, d]; reference: [B, N, 2] points or [B, N, 4] boxes cxcywh, in 0..1 of the image.

        Returns:
            outputs [layers, B, N, d], and for each layer the reference that it looked from; of the last layer alone
            without `return_intermediate`.
        """
        outputs: List[Tensor] = []
        references: List[Tensor] = []
        for i, layer in enumerate(self.layers):
            references.append(reference)
            tgt = layer(tgt, query_pos, _in_each_map(reference, encoded.valid_ratios), encoded)
            outputs.append(tgt)
            if i < len(self.layers) - 1:
                reference = self._refined(i, tgt, reference)
        if not self.return_intermediate:
            outputs, references = outputs[-1:], references[-1:]
        return torch.stack(outputs), references

    def _refined(self, layer: int, tgt: Tensor, reference: Tensor) -> Tensor:
        """The next layer's reference, without a gradient: that of a layer's boxes ends at the reference it was given."""
        if self.bbox_embed is not None:
            for i, head in enumerate(self.bbox_embed):  # TorchScript takes no variable index
                if i == layer:
                    # Not under no_grad: autocast keeps the weights that it rounds there, and the head's own use of them
                    # later would then have no gradient (torch 2.4).
                    reference = move_boxes(reference, head(tgt)).detach()
        return reference


def _stack(layer: Union[nn.Module, List[nn.Module]], num_layers: Optional[int]) -> nn.ModuleList:
    return nn.ModuleList(layer) if num_layers is None else _get_clones(layer, num_layers)


def _in_each_map(reference: Tensor, valid_ratios: Tensor) -> Tensor:
    """[B, N, 2 or 4] in 0..1 of the image -> [B, N, L, 2 or 4] in 0..1 of each map with its padding."""
    ratios = valid_ratios if reference.shape[-1] == 2 else torch.cat([valid_ratios, valid_ratios], dim=-1)
    return reference[:, :, None] * ratios[:, None]


def move_boxes(reference: Tensor, delta: Tensor) -> Tensor:
    """Boxes cxcywh in 0..1, [..., 4], that lie `delta` (in logits) from a reference [..., 2 or 4]; a point moves the centre
    only (sec. 4.1 and A.4)."""
    return (delta + F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))).sigmoid()


class DeformableTransformer(nn.Module):
    """Deformable encoder over several feature maps and deformable decoder; see the module's text.

    Args:
        d_model: width; nhead: attention heads; activation: "relu" or "gelu".
        return_intermediate_dec: taken as published; the outputs of all decoder layers are returned in any case.
        num_feature_levels: number of feature maps.
        dec_n_points, enc_n_points: points that a head samples in each map.
        two_stage: the encoder's tokens propose boxes, of which the queries are made (sec. 4.2).
        two_stage_num_proposals: how many of them; as many as the detector has queries if not given.
    """

    def __init__(self, d_model: int = 256, nhead: int = 8, num_encoder_layers: int = 6, num_decoder_layers: int = 6,
                 dim_feedforward: int = 1024, dropout: float = 0.1, activation: str = "relu",
                 return_intermediate_dec: bool = False, num_feature_levels: int = 4, dec_n_points: int = 4,
                 enc_n_points: int = 4, two_stage: bool = False, two_stage_num_proposals: Optional[int] = None) -> None:
        super().__init__()
        common = (d_model, dim_feedforward, dropout, activation, num_feature_levels, nhead)
        self.encoder = DeformableTransformerEncoder(
            [DeformableTransformerEncoderLayer(*common, enc_n_points) for _ in range(num_encoder_layers)])
        self.decoder = DeformableTransformerDecoder(
            [DeformableTransformerDecoderLayer(*common, dec_n_points) for _ in range(num_decoder_layers)])
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        self.d_model, self.nhead, self.two_stage = d_model, nhead, two_stage
        self.two_stage_num_proposals = two_stage_num_proposals
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
            self.pos_trans = nn.Linear(2 * d_model, 2 * d_model)
            self.pos_trans_norm = nn.LayerNorm(2 * d_model)
        else:
            self.reference_points = HeadLinear(d_model, 2)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def encode(self, maps: List[Tensor], masks: List[Tensor], positions: List[Tensor]) -> Encoded:
        """Encode feature maps [B, d, h, w] with masks [B, h, w] (True on padding) and position encodings [B, d, h, w]."""
        shapes: List[Tuple[int, int]] = [(x.shape[2], x.shape[3]) for x in maps]
        levels = make_levels(shapes, maps[0].device)
        located = [pos + self.level_embed[i][:, None, None] for i, pos in enumerate(positions)]
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        valid_ratios = torch.stack([_valid_ratio(mask) for mask in masks], dim=1)
        centres = torch.cat([_centres(shape, valid_ratios[:, i]) for i, shape in enumerate(shapes)], dim=1)
        memory = self.encoder(_tokens(maps), _tokens(located), _in_each_map(centres, valid_ratios), levels, padding)
        return Encoded(memory, padding, levels, valid_ratios, centres)

    def propose(self, encoded: Encoded) -> Tuple[Tensor, Tensor]:
        """What the first stage's heads are applied to, for every token.

        Returns:
            features [B, S, d], and the logits of a box around each token [B, S, 4], infinite for tokens on padding and for
            those whose box comes within a hundredth of 0 or 1 with one of its numbers.
        """
        finest_side, margin = 0.05, 0.01  # shares of the image; sides double with each coarser map
        sides: List[Tensor] = []
        for i, (height, width) in enumerate(encoded.levels.shapes):
            sides.append(torch.full([height * width, 2], finest_side * 2 ** i, device=encoded.centres.device))
        boxes = torch.cat([encoded.centres, torch.cat(sides).expand(encoded.centres.shape[0], -1, -1)], dim=-1)
        inside = ((boxes > margin) & (boxes < 1 - margin)).all(-1, keepdim=True)
        left_out = encoded.padding[:, :, None] | ~inside
        features = self.enc_output_norm(self.enc_output(encoded.memory.masked_fill(left_out, 0.0)))
        return features, torch.log(boxes / (1 - boxes)).masked_fill(left_out, float("inf"))

    def queries_at(self, box_logits: Tensor) -> Tuple[Tensor, Tensor]:
        """Queries for proposed boxes [B, N, 4] (in logits): contents and positions, [B, N, d] each."""
        encoding = _box_encoding(box_logits.sigmoid(), self.d_model // 2)
        position, content = self.pos_trans_norm(self.pos_trans(encoding.to(self.pos_trans.weight.dtype))).chunk(2, dim=-1)
        return content, position

    def decode(self, encoded: Encoded, tgt: Tensor, query_pos: Tensor, reference: Tensor) -> Tuple[Tensor, List[Tensor]]:
        """Decode queries; see `DeformableTransformerDecoder`."""
        return self.decoder(tgt, query_pos, reference, encoded)


def _tokens(maps: List[Tensor]) -> Tensor:
    """Maps [B, d, h, w] -> [B, S, d]."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)


def _valid_ratio(mask: Tensor) -> Tensor:
    """Share of the width and of the height of [B, h, w] that isn't padding, [B, 2]."""
    inside = (~mask).float()
    return torch.stack([inside[:, 0, :].mean(1), inside[:, :, 0].mean(1)], dim=1)


def _centres(shape: Tuple[int, int], valid_ratio: Tensor) -> Tensor:
    """Pixel centres of a map as x and y in shares of each image's valid part, row by row: [B, h * w, 2]."""
    height, width = shape
    y = (torch.arange(height, device=valid_ratio.device) + 0.5) / height
    x = (torch.arange(width, device=valid_ratio.device) + 0.5) / width
    grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
    return grid.flatten(0, 1) / valid_ratio[:, None]


def _box_encoding(boxes: Tensor, num_feats: int) -> Tensor:
    """Sines and cosines of each number of boxes [B, N, 4] in 0..1 -> [B, N, 4 * num_feats]."""
    channel = torch.arange(num_feats, dtype=torch.float32, device=boxes.device)
    wavelength = 10000 ** (2 * torch.div(channel, 2, rounding_mode="floor") / num_feats)
    phase = boxes[..., None] * (2 * math.pi) / wavelength
    return torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1).flatten(2)


def build_deformable_transformer(args: argparse.Namespace) -> DeformableTransformer:
    """The transformer that the flags describe."""
    args = recipes.settled(args)
    return DeformableTransformer(
        d_model=args.hidden_dim, nhead=args.nheads, num_encoder_layers=args.enc_layers, num_decoder_layers=args.dec_layers,
        dim_feedforward=args.dim_feedforward, dropout=args.dropout, num_feature_levels=args.num_feature_levels,
        dec_n_points=args.dec_n_points, enc_n_points=args.enc_n_points, two_stage=args.two_stage)


build_deforamble_transformer = build_deformable_transformer  # its published name
