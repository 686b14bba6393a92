"""The layers of an encoder for a forward pass alone in bf16 or fp16 on a CPU.

With AMX a bf16 product takes an eighth of its time in fp32, so what stands around the products is arranged to move few
bytes: biases, GELU and the residual sum are applied by oneDNN while a product's result is still in registers (and
are rounded once), and attention is a kernel on queries, keys and values as they lie in their product.

Shapes: T tokens of a packed batch, R of them that are read, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from bert_ray.model.attention import attend
from bert_ray.model.encoder import Encoder, Layer, key_value_of
from bert_ray.model.linear import Linear, fill_rows
from bert_ray.model.ragged_attention import RaggedAttention

if TYPE_CHECKING:
    from bert_ray.model.packing import PackedBatch


class HalfLayers:
    """All layers of an encoder."""

    # Measured beside 512 and 1,024 in benchmarks/LOG.md.
    batch_tokens = 2048

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._layers = [_Joined.of(layer) for layer in encoder.layers]
        last = encoder.layers[-1]
        self._query, self._key_value = Linear(last.query.weight, last.query.bias), Linear(*key_value_of(last))

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """A batch's embeddings (T, D) -> hidden states (T, D), or (R, D) of its tokens that are read."""
        tokens = len(hidden)
        hidden = fill_rows(hidden)
        *lower, last = self._layers
        for layer in lower:
            hidden = self._layer(layer, hidden, batch)
        return self._layer(last, hidden, batch)[:tokens] if batch.read is None else self._read(last, hidden, batch)

    def _layer(self, layer: _Joined, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return self._behind_attention(layer, hidden, attend(layer.qkv(hidden), batch.lengths, self._encoder.heads))

    def _read(self, layer: _Joined, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The last layer, of the tokens that are read: (T, D) -> (R, D)."""
        assert batch.read is not None and batch.read_lengths is not None
        key, value = self._key_value(hidden).chunk(2, dim=1)
        count, hidden = len(batch.read), fill_rows(hidden.index_select(0, batch.read))
        attention = RaggedAttention(batch.read_lengths, batch.lengths)
        mixed = attention(self._query(hidden)[:count], key, value, self._encoder.heads)
        return self._behind_attention(layer, hidden, fill_rows(mixed))[:count]

    def _behind_attention(self, layer: _Joined, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        hidden = layer.mix_norm(layer.mix.plus(mixed, hidden))
        wide = layer.up.gelu(hidden) if self._encoder.is_gelu else self._encoder.activation(layer.up(hidden))
        return layer.down_norm(layer.down.plus(wide, hidden))


@dataclass(kw_only=True, slots=True)
class _Joined:
    """A layer whose queries, keys and values come from one product."""

    qkv: Linear
    mix: Linear
    mix_norm: nn.LayerNorm
    up: Linear
    down: Linear
    down_norm: nn.LayerNorm

    @classmethod
    def of(cls, layer: Layer) -> _Joined:
        three = (layer.query, layer.key, layer.value)
        return cls(
            qkv=Linear(torch.cat([part.weight for part in three]), torch.cat([part.bias for part in three])),
            mix=Linear(layer.mix.weight, layer.mix.bias),
            mix_norm=layer.mix_norm,
            up=Linear(layer.up.weight, layer.up.bias),
            down=Linear(layer.down.weight, layer.down.bias),
            down_norm=layer.down_norm,
        )
