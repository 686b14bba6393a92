"""The layers of an encoder for a forward pass alone in bf16 or fp16 on a CPU.

With AMX a bf16 product takes an eighth of its time in fp32, so what stands around the products is arranged to move few
bytes: biases, GELU and the residual sum are applied by oneDNN while a product's result is still in registers (and
are rounded once), and attention is a kernel on queries, keys and values as they lie in their product.

Shapes: T tokens of a packed batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bert_ray.model.attention import attend
from bert_ray.model.encoder import Encoder, Layer
from bert_ray.model.linear import Linear, fill_rows


class HalfLayers:
    """All layers of an encoder."""

    # Measured beside 512 and 1,024 in benchmarks/LOG.md.
    batch_tokens = 2048

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._layers = [_Joined.of(layer) for layer in encoder.layers]

    def __call__(self, hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Embeddings (T, D) of rows that lie end to end -> hidden states (T, D)."""
        tokens = len(hidden)
        hidden = fill_rows(hidden)
        for layer in self._layers:
            mixed = attend(layer.qkv(hidden), lengths, self._encoder.heads)
            hidden = layer.mix_norm(layer.mix.plus(mixed, hidden))
            wide = layer.up.gelu(hidden) if self._encoder.is_gelu else self._encoder.activation(layer.up(hidden))
            hidden = layer.down_norm(layer.down.plus(wide, hidden))
        return hidden[:tokens]


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
