"""The encoder-decoder transformer of DETR (Carion et al., 2020, sec. 3.2 and A.3).

All sequences inside are batch first. Position encodings are added to queries and keys at every attention, never to values.
"""
import argparse
import copy
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dropout import Dropout, dropout
from util import recipes


class MultiheadAttention(nn.MultiheadAttention):
    """Attention with torch's parameter names, through `scaled_dot_product_attention`.

    Attention weights take time and memory, so they are formed only where somebody can see them: where the module, or
    every module, has a forward hook, where `keep_weights` is set to True on it, or where a call asks for them. The
    output [B, Q, d] is the same number for number.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout=dropout, batch_first=True)
        self.keep_weights = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Optional[Tensor] = None,
                need_weights: Optional[bool] = None) -> Tuple[Tensor, Optional[Tensor]]:
        """Attend from query [B, Q, d] to key and value [B, K, d].

        Args:
            allowed: bool, broadcastable to [B, heads, Q, K], True where a query may look at a key; None for everywhere.
            need_weights: return the weights; by default, if there is a hook or `keep_weights`.

        Returns:
            [B, Q, d] and the weights averaged over heads, before dropout [B, Q, K] (None unless needed).
        """
        d = self.embed_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = self._split_heads(F.linear(query, weight[:d], bias[:d]))
        k = self._split_heads(F.linear(key, weight[d:2 * d], bias[d:2 * d]))
        v = self._split_heads(F.linear(value, weight[2 * d:], bias[2 * d:]))
        p = self.dropout if self.training else 0.0
        # On a CPU torch, too, forms the weights where there is dropout.
        if p > 0 and q.device.type == "cpu":
            attention = self._attention(q, k, allowed)
            out = dropout(attention, p, self.training) @ v
        else:
            attention = None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)
        weights: Optional[Tensor] = None
        if self._weights_are_seen() if need_weights is None else need_weights:
            weights = (self._attention(q, k, allowed) if attention is None else attention).mean(dim=1)
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights

    def _attention(self, q: Tensor, k: Tensor, allowed: Optional[Tensor]) -> Tensor:
        """Attention weights of each head [B, heads, Q, K]."""
        scores = (q * self.head_dim ** -0.5) @ k.transpose(-2, -1)
        if allowed is not None:
            scores = scores.masked_fill_(~allowed, float("-inf"))
        return scores.softmax(dim=-1)

    def _weights_are_seen(self) -> bool:
        if self.keep_weights or torch.jit.is_scripting():
            return self.keep_weights
        return self._has_hooks()

    @torch.jit.unused
    def _has_hooks(self) -> bool:
        return bool(self._forward_hooks or nn.modules.module._global_forward_hooks)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, [self.num_heads, self.head_dim]).transpose(1, 2)


class FeedForward(nn.Module):
    """Base of both layer kinds: holds the feed-forward parameters under DETR's names and applies them."""

    def _add_feed_forward(self, d_model: int, dim_feedforward: int, dropout: float, activation: str) -> None:
        # Called after the attentions are made: saved optimizers know parameters by their order, which is DETR's.
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.activation = _get_activation_fn(activation)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerEncoderLayer(FeedForward):
    """Self-attention and feed-forward, each with a residual; norms come before them if `normalize_before`, else after."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: str = "relu", normalize_before: bool = False) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self._add_feed_forward(d_model, dim_feedforward, dropout, activation)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.normalize_before = normalize_before

    def forward(self, src: Tensor, pos: Tensor, allowed: Optional[Tensor] = None) -> Tensor:
        """src, pos [B, S, d]; allowed as in `MultiheadAttention` -> [B, S, d]."""
        if self.normalize_before:
            src = src + self.dropout1(self._attend(self.norm1(src), pos, allowed))
            return src + self.dropout2(self.feed_forward(self.norm2(src)))
        src = self.norm1(src + self.dropout1(self._attend(src, pos, allowed)))
        return self.norm2(src + self.dropout2(self.feed_forward(src)))

    def _attend(self, x: Tensor, pos: Tensor, allowed: Optional[Tensor]) -> Tensor:
        located = x + pos
        return self.self_attn(located, located, x, allowed)[0]


class TransformerDecoderLayer(FeedForward):
    """Self-attention among queries, attention to the encoder's memory, feed-forward."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: str = "relu", normalize_before: bool = False) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout)
        self._add_feed_forward(d_model, dim_feedforward, dropout, activation)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.dropout3 = Dropout(dropout)
        self.normalize_before = normalize_before

    def forward(self, tgt: Tensor, memory: Tensor, located_memory: Tensor, query_pos: Tensor,
                memory_allowed: Optional[Tensor] = None, query_allowed: Optional[Tensor] = None) -> Tensor:
        """tgt, query_pos [B, N, d]; memory [B, S, d] and the same with its positions added -> [B, N, d]."""
        if self.normalize_before:
            tgt = tgt + self.dropout1(self._attend_queries(self.norm1(tgt), query_pos, query_allowed))
            query = self.norm2(tgt) + query_pos
            tgt = tgt + self.dropout2(self.multihead_attn(query, located_memory, memory, memory_allowed)[0])
            return tgt + self.dropout3(self.feed_forward(self.norm3(tgt)))
        tgt = self.norm1(tgt + self.dropout1(self._attend_queries(tgt, query_pos, query_allowed)))
        attended = self.multihead_attn(tgt + query_pos, located_memory, memory, memory_allowed)[0]
        tgt = self.norm2(tgt + self.dropout2(attended))
        return self.norm3(tgt + self.dropout3(self.feed_forward(tgt)))

    def _attend_queries(self, x: Tensor, query_pos: Tensor, allowed: Optional[Tensor]) -> Tensor:
        located = x + query_pos
        return self.self_attn(located, located, x, allowed)[0]


class TransformerEncoder(nn.Module):
    """A stack of encoder layers and, in the pre-norm variant, a last norm."""

    def __init__(self, encoder_layer: TransformerEncoderLayer, num_layers: int, norm: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.layers = _get_clones(encoder_layer, num_layers)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, src: Tensor, pos: Tensor, allowed: Optional[Tensor] = None) -> Tensor:
        for layer in self.layers:
            src = layer(src, pos, allowed)
        return self.norm(src)


class TransformerDecoder(nn.Module):
    """A stack of decoder layers; every returned layer output passes the one last norm.

    forward returns [L, B, N, d]: all layers with `return_intermediate`, else the last alone (L = 1).
    """

    def __init__(self, decoder_layer: TransformerDecoderLayer, num_layers: int, norm: nn.Module,
                 return_intermediate: bool = False) -> None:
        super().__init__()
        self.layers = _get_clones(decoder_layer, num_layers)
        self.norm = norm
        self.return_intermediate = return_intermediate

    def forward(self, tgt: Tensor, memory: Tensor, pos: Tensor, query_pos: Tensor,
                memory_allowed: Optional[Tensor] = None, query_allowed: Optional[Tensor] = None) -> Tensor:
        located_memory = memory + pos
        outputs: List[Tensor] = []
        for layer in self.layers:
            tgt = layer(tgt, memory, located_memory, query_pos, memory_allowed, query_allowed)
            outputs.append(tgt)
        if not self.return_intermediate:
            outputs = outputs[-1:]
        return self.norm(torch.stack(outputs))


class Transformer(nn.Module):
    """Encoder over the flattened feature map, decoder from object queries; see the module's text.

    Args:
        d_model: width; nhead: attention heads; activation: "relu" or "gelu".
        normalize_before: pre-norm residual blocks (`--pre_norm`).
        return_intermediate_dec: return the output of every decoder layer, for auxiliary losses.
    """

    def __init__(self, d_model: int = 512, nhead: int = 8, num_encoder_layers: int = 6, num_decoder_layers: int = 6,
                 dim_feedforward: int = 2048, dropout: float = 0.1, activation: str = "relu",
                 normalize_before: bool = False, return_intermediate_dec: bool = False) -> None:
        super().__init__()
        encoder_layer = TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, activation, normalize_before)
        self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers,
                                          nn.LayerNorm(d_model) if normalize_before else None)
        decoder_layer = TransformerDecoderLayer(d_model, nhead, dim_feedforward, dropout, activation, normalize_before)
        self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, nn.LayerNorm(d_model),
                                          return_intermediate_dec)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.d_model = d_model
        self.nhead = nhead

    def forward(self, src: Tensor, mask: Optional[Tensor], query_embed: Tensor, pos_embed: Tensor,
                query_allowed: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """Encode a feature map and decode the queries.

        Args:
            src: projected features [B, d, h, w].
            mask: bool [B, h, w], True on padding; None for no padding.
            query_embed: the queries, [N, d] shared by all images or [B, N, d] for each.
            pos_embed: [B, d, h, w].
            query_allowed: bool [N, N], True where a query may look at another in the decoder's self-attention.

        Returns:
            decoder outputs [L, B, N, d] and the encoder's memory [B, d, h, w].
        """
        batch, _, height, width = src.shape
        tokens = src.flatten(2).transpose(1, 2)
        pos = pos_embed.flatten(2).transpose(1, 2)
        inside: Optional[Tensor] = None
        if mask is not None:
            inside = ~mask.flatten(1)[:, None, None, :]
        query_pos = query_embed if query_embed.dim() == 3 else query_embed.unsqueeze(0).expand(batch, -1, -1)
        memory = self.encoder(tokens, pos, inside)
        decoded = self.decoder(torch.zeros_like(query_pos), memory, pos, query_pos, inside, query_allowed)
        return decoded, memory.transpose(1, 2).unflatten(2, [height, width])


def _get_clones(module: nn.Module, N: int) -> nn.ModuleList:
    return nn.ModuleList([copy.deepcopy(module) for _ in range(N)])


def _get_activation_fn(activation: str) -> nn.Module:
    activations = {"relu": nn.ReLU, "gelu": nn.GELU}
    if activation not in activations:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(activations)}")
    return activations[activation]()


def build_transformer(args: argparse.Namespace) -> Transformer:
    """The transformer that the flags describe, returning every decoder layer."""
    args = recipes.settled(args)
    return Transformer(d_model=args.hidden_dim, nhead=args.nheads, num_encoder_layers=args.enc_layers,
                       num_decoder_layers=args.dec_layers, dim_feedforward=args.dim_feedforward, dropout=args.dropout,
                       normalize_before=args.pre_norm, return_intermediate_dec=True)
