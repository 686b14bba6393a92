"""The layers of an encoder for a forward pass alone in fp32 on a CPU: the same maths, arranged for it once.

A packed batch is one tile of at most TILE_TOKENS tokens that walks through all layers while its activations stay in
cache, and three things are arranged when the model loads:

- queries, keys and values come from one product, the 1/√d_k of the attention formula inside its weights;
- constants that softmax and the residual stream pass through move out of the way: a bias of the keys adds the same to
  every score of a query, which softmax ignores; a bias of the values is averaged with weights that sum to 1, so it is
  a bias of the next linear layer; the bias of a feed-forward layer's second half goes into the shift of the layer
  norm before it (and out of its first half's bias again);
- weights are packed for the library that multiplies fastest on this machine: oneDNN (which applies GELU on the way) or
  MKL, whose packed product serves tiles of TILE_TOKENS rows alone.

The last layer has its queries apart: where only some tokens are read they are computed for these alone.

Shapes: T tokens of a packed batch, R of them that are read, D hidden size, F width of the feed-forward layer, d_k width
of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from bert_ray.model.attention import attend
from bert_ray.model.encoder import Encoder, Layer, key_value_of
from bert_ray.model.linear import TILE_TOKENS, Linear
from bert_ray.model.ragged_attention import RaggedAttention

if TYPE_CHECKING:
    from bert_ray.model.packing import PackedBatch


class FoldedLayers:
    """All layers of an encoder."""

    batch_tokens = TILE_TOKENS

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._layers = [_Folded.of(layer, _scale(encoder)) for layer in encoder.layers]
        last = encoder.layers[-1]
        self._query = Linear(last.query.weight * _scale(encoder), None)
        self._key_value = Linear(key_value_of(last)[0], None)

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """A batch's embeddings (T, D) -> hidden states (T, D), or (R, D) of its tokens that are read."""
        tokens = len(hidden)
        # MKL's packed weights serve tiles of one size; filling up the last few rows is cheaper than the other way.
        if self._layers[0].up.library == "mkl" and TILE_TOKENS * 3 // 4 < tokens < TILE_TOKENS:
            hidden = torch.cat((hidden, hidden.new_zeros(TILE_TOKENS - tokens, hidden.shape[1])))
        *lower, last = self._layers
        for layer in lower:
            hidden = self._layer(layer, hidden, batch)
        return self._layer(last, hidden, batch)[:tokens] if batch.read is None else self._read(last, hidden, batch)

    def _layer(self, layer: _Folded, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        width = hidden.shape[1]
        qkv = layer.qkv(hidden)
        qkv[:, :width] += layer.query_bias
        return self._behind_attention(layer, hidden, attend(qkv, batch.lengths, self._encoder.heads, scale=1.0))

    def _read(self, layer: _Folded, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The last layer, of the tokens that are read: (T, D) -> (R, D)."""
        assert batch.read is not None and batch.read_lengths is not None
        key, value = self._key_value(hidden).chunk(2, dim=1)
        hidden = hidden.index_select(0, batch.read)
        query = self._query(hidden)
        query += layer.query_bias
        attention = RaggedAttention(batch.read_lengths, batch.lengths)
        mixed = attention(query, key, value, self._encoder.heads, scale=1.0)
        return self._behind_attention(layer, hidden, mixed)

    def _behind_attention(self, layer: _Folded, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        width = hidden.shape[1]
        total = layer.mix(mixed)
        total += hidden
        hidden = F.layer_norm(total, (width,), layer.mix_norm.weight, layer.mix_shift, layer.mix_norm.eps)
        wide = layer.up.gelu(hidden) if self._encoder.is_gelu else self._encoder.activation(layer.up(hidden))
        total = layer.down(wide)
        total += hidden  # The shift of `hidden` holds the bias of `down`.
        return layer.down_norm(total)


@dataclass(kw_only=True, slots=True)
class _Folded:
    """A layer with its constants moved as the module's first lines say."""

    qkv: Linear
    query_bias: torch.Tensor
    mix: Linear
    mix_norm: nn.LayerNorm
    mix_shift: torch.Tensor
    up: Linear
    down: Linear
    down_norm: nn.LayerNorm

    @classmethod
    def of(cls, layer: Layer, scale: float) -> _Folded:
        down_bias = layer.down.bias.detach()
        return cls(
            qkv=Linear(torch.cat((layer.query.weight * scale, layer.key.weight, layer.value.weight)), None),
            query_bias=layer.query.bias.detach() * scale,
            mix=Linear(
                layer.mix.weight, layer.mix.bias.detach() + layer.mix.weight.detach() @ layer.value.bias.detach()
            ),
            mix_norm=layer.mix_norm,
            mix_shift=layer.mix_norm.bias.detach() + down_bias,
            up=Linear(layer.up.weight, layer.up.bias.detach() - layer.up.weight.detach() @ down_bias),
            down=Linear(layer.down.weight, None),
            down_norm=layer.down_norm,
        )


def _scale(encoder: Encoder) -> float:
    """1 / √d_k."""
    return float((encoder.layers[0].query.out_features // encoder.heads) ** -0.5)
