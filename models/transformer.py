"""The encoder-decoder transformer of DETR (Carion et al., 2020, sec. 3.2 and A.3).

Position encodings are added to queries and keys at every attention, never to values. As published, the parts take
and return sequences [length, B, d]; these are views of [B, length, d], in which all is computed.
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
    """Attention with torch's parameter names and arguments, through `scaled_dot_product_attention`.

    Attention weights take time and memory, so they are formed only where somebody can see them: where the module, or
    every module, has a forward hook, or where a call asks for them. The other output is the same number for number.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout=dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Optional[Tensor] = None,
                need_weights: Optional[bool] = None, attn_mask: Optional[Tensor] = None,
                average_attn_weights: bool = True) -> Tuple[Tensor, Optional[Tensor]]:
        """Attend from query [Q, B, d] to key and value [K, B, d].

        Args:
            key_padding_mask: bool [B, K], True where a key is padding; None for nowhere.
            need_weights: return the weights; by default, if there is a hook.
            attn_mask: [Q, K] or [B * heads, Q, K]; bool, True where a query may not look at a key, or numbers that
                are added to the scores.
            average_attn_weights: return the weights' mean over the heads instead of each head's.

        Returns:
            [Q, B, d] and the weights before dropout, [B, Q, K] or [B, heads, Q, K] (None unless needed).
        """
        d = self.embed_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = self._split_heads(F.linear(query.transpose(0, 1), weight[:d], bias[:d]))
        k = self._split_heads(F.linear(key.transpose(0, 1), weight[d:2 * d], bias[d:2 * d]))
        v = self._split_heads(F.linear(value.transpose(0, 1), weight[2 * d:], bias[2 * d:]))
        mask = self._mask(key_padding_mask, attn_mask)
        p = self.dropout if self.training else 0.0
        # On a CPU torch, too, forms the weights where there is dropout.
        if p > 0 and q.device.type == "cpu":
            attention = self._attention(q, k, mask)
            out = dropout(attention, p, self.training) @ v
        else:
            attention = None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        weights: Optional[Tensor] = None
        if self._weights_are_seen() if need_weights is None else need_weights:
            weights = self._attention(q, k, mask) if attention is None else attention
            if average_attn_weights:
                weights = weights.mean(dim=1)
        return self.out_proj(out.transpose(1, 2).flatten(2)).transpose(0, 1), weights

    def _mask(self, key_padding_mask: Optional[Tensor], attn_mask: Optional[Tensor]) -> Optional[Tensor]:
        """One mask that fits [B, heads, Q, K]: bool, True where a query may look, or numbers to add."""
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, [-1, self.num_heads])
        if key_padding_mask is None:
            return ~attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
        padding = key_padding_mask[:, None, None, :]
        if attn_mask is None:
            return ~padding
        if attn_mask.dtype == torch.bool:
            return ~(attn_mask | padding)
        return attn_mask.masked_fill(padding, float("-inf"))

    def _attention(self, q: Tensor, k: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Attention weights of each head [B, heads, Q, K]."""
        scores = (q * self.head_dim ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)

    def _weights_are_seen(self) -> bool:
        if torch.jit.is_scripting():
            return False
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


class TransformerLayer(FeedForward):
    """Base of DETR's layers: attention among the tokens of one sequence."""

    def with_pos_embed(self, tensor: Tensor, pos: Optional[Tensor]) -> Tensor:
        """The sum, or the tensor alone without positions."""
        return tensor if pos is None else tensor + pos

    def _attend(self, x: Tensor, pos: Optional[Tensor], mask: Optional[Tensor],
                padding: Optional[Tensor]) -> Tensor:
        located = self.with_pos_embed(x, pos).transpose(0, 1)
        return self.self_attn(located, located, x.transpose(0, 1), attn_mask=mask,
                              key_padding_mask=padding)[0].transpose(0, 1)


class TransformerEncoderLayer(TransformerLayer):
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

    def forward(self, src: Tensor, src_mask: Optional[Tensor] = None,
                src_key_padding_mask: Optional[Tensor] = None, pos: Optional[Tensor] = None) -> Tensor:
        """src, pos [S, B, d], masks as `MultiheadAttention`'s `attn_mask` and `key_padding_mask` -> [S, B, d]."""
        x, located = src.transpose(0, 1), pos if pos is None else pos.transpose(0, 1)
        if self.normalize_before:
            x = x + self.dropout1(self._attend(self.norm1(x), located, src_mask, src_key_padding_mask))
            return (x + self.dropout2(self.feed_forward(self.norm2(x)))).transpose(0, 1)
        x = self.norm1(x + self.dropout1(self._attend(x, located, src_mask, src_key_padding_mask)))
        return self.norm2(x + self.dropout2(self.feed_forward(x))).transpose(0, 1)


class TransformerDecoderLayer(TransformerLayer):
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

    def forward(self, tgt: Tensor, memory: Tensor, tgt_mask: Optional[Tensor] = None,
                memory_mask: Optional[Tensor] = None, tgt_key_padding_mask: Optional[Tensor] = None,
                memory_key_padding_mask: Optional[Tensor] = None, pos: Optional[Tensor] = None,
                query_pos: Optional[Tensor] = None) -> Tensor:
        """tgt, query_pos [N, B, d], memory, pos [S, B, d], masks as `TransformerEncoderLayer`'s -> [N, B, d]."""
        x, query_pos = tgt.transpose(0, 1), query_pos if query_pos is None else query_pos.transpose(0, 1)
        place = pos if pos is None else pos.transpose(0, 1)
        key = self.with_pos_embed(memory.transpose(0, 1), place).transpose(0, 1)
        if self.normalize_before:
            x = x + self.dropout1(self._attend(self.norm1(x), query_pos, tgt_mask, tgt_key_padding_mask))
            query = self.with_pos_embed(self.norm2(x), query_pos).transpose(0, 1)
            attended = self.multihead_attn(query, key, memory, attn_mask=memory_mask,
                                           key_padding_mask=memory_key_padding_mask)[0]
            x = x + self.dropout2(attended.transpose(0, 1))
            return (x + self.dropout3(self.feed_forward(self.norm3(x)))).transpose(0, 1)
        x = self.norm1(x + self.dropout1(self._attend(x, query_pos, tgt_mask, tgt_key_padding_mask)))
        query = self.with_pos_embed(x, query_pos).transpose(0, 1)
        attended = self.multihead_attn(query, key, memory, attn_mask=memory_mask,
                                       key_padding_mask=memory_key_padding_mask)[0]
        x = self.norm2(x + self.dropout2(attended.transpose(0, 1)))
        return self.norm3(x + self.dropout3(self.feed_forward(x))).transpose(0, 1)


class TransformerEncoder(nn.Module):
    """A stack of encoder layers and, in the pre-norm variant, a last norm."""

    def __init__(self, encoder_layer: TransformerEncoderLayer, num_layers: int, norm: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.layers = _get_clones(encoder_layer, num_layers)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, src: Tensor, mask: Optional[Tensor] = None,
                src_key_padding_mask: Optional[Tensor] = None, pos: Optional[Tensor] = None) -> Tensor:
        """As `TransformerEncoderLayer.forward`."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, pos=pos)
        return self.norm(src.transpose(0, 1)).transpose(0, 1)


class TransformerDecoder(nn.Module):
    """A stack of decoder layers; every returned layer output passes the one last norm.

    forward returns [L, N, B, d]: all layers with `return_intermediate`, else the last alone (L = 1).
    """

    def __init__(self, decoder_layer: TransformerDecoderLayer, num_layers: int,
                 norm: Optional[nn.Module] = None, return_intermediate: bool = False) -> None:
        super().__init__()
        self.layers = _get_clones(decoder_layer, num_layers)
        self.norm = nn.Identity() if norm is None else norm
        self.return_intermediate = return_intermediate

    def forward(self, tgt: Tensor, memory: Tensor, tgt_mask: Optional[Tensor] = None,
                memory_mask: Optional[Tensor] = None, tgt_key_padding_mask: Optional[Tensor] = None,
                memory_key_padding_mask: Optional[Tensor] = None, pos: Optional[Tensor] = None,
                query_pos: Optional[Tensor] = None) -> Tensor:
        """Arguments as for `TransformerDecoderLayer.forward`."""
        outputs: List[Tensor] = []
        for layer in self.layers:
            tgt = layer(tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                        tgt_key_padding_mask=tgt_key_padding_mask,
                        memory_key_padding_mask=memory_key_padding_mask, pos=pos, query_pos=query_pos)
            outputs.append(tgt.transpose(0, 1))
        if not self.return_intermediate:
            outputs = outputs[-1:]
        return self.norm(torch.stack(outputs)).transpose(1, 2)


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
                decoder_mask: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """Encode a feature map and decode the queries.

        Args:
            src: projected features [B, d, h, w].
            mask: bool [B, h, w], True on padding; None for no padding.
            query_embed: the queries, [N, d] shared by all images or [B, N, d] for each.
            pos_embed: [B, d, h, w].
            decoder_mask: [N, N], `attn_mask` of the decoder's self-attention (see `MultiheadAttention`).

        Returns:
            decoder outputs [L, B, N, d] and the encoder's memory [B, d, h, w].
        """
        batch, height, width = src.shape[0], src.shape[2], src.shape[3]
        tokens = src.flatten(2).permute(2, 0, 1)
        pos = pos_embed.flatten(2).permute(2, 0, 1)
        padding: Optional[Tensor] = None
        if mask is not None:
            padding = mask.flatten(1)
        query_pos = query_embed if query_embed.dim() == 3 else query_embed.unsqueeze(0).expand(batch, -1, -1)
        memory = self.encoder(tokens, src_key_padding_mask=padding, pos=pos)
        decoded = self.decoder(torch.zeros_like(query_pos).transpose(0, 1), memory, tgt_mask=decoder_mask,
                               memory_key_padding_mask=padding, pos=pos, query_pos=query_pos.transpose(0, 1))
        return decoded.transpose(1, 2), memory.permute(1, 2, 0).unflatten(2, [height, width])


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
