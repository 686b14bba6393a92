"""The layers of an encoder for a forward pass alone in bf16 or fp16 on a CPU.

With AMX a bf16 product takes an eighth of its time in fp32, so what stands around the products is arranged to move few
bytes: biases, GELU and the residual sum are applied by oneDNN while a product's result is still in registers (and
are rounded once), and attention is torch's flash kernel on queries, keys and values as they lie in their product, with
sums in fp32.

Shapes: T tokens of a packed batch, L length of a row, N rows of that length, D hidden size, H heads, d_k width of a
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from torch.nn import functional as F

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
            mixed = self._attend(layer.qkv(hidden), lengths)
            hidden = layer.mix_norm(layer.mix.plus(mixed, hidden))
            wide = layer.up.gelu(hidden) if self._encoder.is_gelu else self._encoder.activation(layer.up(hidden))
            hidden = layer.down_norm(layer.down.plus(wide, hidden))
        return hidden[:tokens]

    def _attend(self, qkv: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Attention of every row over itself, (T, 3D) -> (T, D); rows of one length side by side are taken together.

        Below the rows' own tokens the result is 0.
        """
        d_k = qkv.shape[1] // (3 * self._encoder.heads)
        parts, start = [], 0
        for length, run in groupby(lengths):
            stop = start + length * sum(1 for _ in run)
            # (N, L, 3, H, d_k) -> (3, N, H, L, d_k), uncopied.
            q, k, v = qkv[start:stop].view(-1, length, 3, self._encoder.heads, d_k).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v)
            parts.append(mixed.transpose(1, 2).reshape(stop - start, -1))
            start = stop
        return torch.cat((*parts, qkv.new_zeros(len(qkv) - start, qkv.shape[1] // 3)))


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
