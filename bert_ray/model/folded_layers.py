"""The layers of an encoder for a forward pass alone in fp32 on a CPU: the same maths, arranged for it once.

A packed batch is one tile of at most TILE_TOKENS tokens that walks through all layers while its activations stay in
cache, and four things are arranged when the model loads:

- queries, keys and values come from one product, the 1/√d_k of the attention formula inside its weights;
- constants that softmax and the residual stream pass through move out of the way: a bias of the keys adds the same to
  every score of a query, which softmax ignores; a bias of the values is averaged with weights that sum to 1, so it is
  a bias of the next linear layer; the bias of a feed-forward layer's second half goes into the shift of the layer
  norm before it (and out of its first half's bias again);
- weights are packed for the library that multiplies fastest on this machine: oneDNN (which applies GELU on the way) or
  MKL, whose packed product serves tiles of TILE_TOKENS rows alone;
- attention works in buffers that are kept, the scores' small enough for the cache; each thread has its own.

Shapes: T tokens of a packed batch, L length of a row, D hidden size, F width of the feed-forward layer, H heads,
d_k width of a head.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from torch.nn import functional as F

from bert_ray.model.encoder import Encoder, Layer
from bert_ray.model.linear import TILE_TOKENS, Linear

# Attention scores held at a time, in fp32 numbers: 1 MiB, within the second-level cache of current server cores.
_SCORES = 2**18
# Rows shorter than this are computed together with those of their length beside them; the copies that costs are less
# than the calls it saves. Longer rows are computed in place, each by itself.
_LONG_ROW = 64


class FoldedLayers:
    """All layers of an encoder."""

    batch_tokens = TILE_TOKENS

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._layers = [_Folded.of(layer, encoder.heads) for layer in encoder.layers]
        self._own = threading.local()

    def __call__(self, hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Embeddings (T, D) of rows that lie end to end -> hidden states (T, D)."""
        tokens = len(hidden)
        # MKL's packed weights serve tiles of one size; filling up the last few rows is cheaper than the other way.
        if self._layers[0].up.library == "mkl" and TILE_TOKENS * 3 // 4 < tokens < TILE_TOKENS:
            hidden = torch.cat((hidden, hidden.new_zeros(TILE_TOKENS - tokens, hidden.shape[1])))
        mixed = torch.zeros_like(hidden)
        for layer in self._layers:
            hidden = self._layer(layer, hidden, mixed, lengths)
        return hidden[:tokens]

    def _layer(self, layer: _Folded, hidden: torch.Tensor, mixed: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        width = hidden.shape[1]
        qkv = layer.qkv(hidden)
        qkv[:, :width] += layer.query_bias
        self._attend(qkv, mixed, lengths)
        total = layer.mix(mixed)
        total += hidden
        hidden = F.layer_norm(total, (width,), layer.mix_norm.weight, layer.mix_shift, layer.mix_norm.eps)
        wide = layer.up.gelu(hidden) if self._encoder.is_gelu else self._encoder.activation(layer.up(hidden))
        total = layer.down(wide)
        total += hidden  # The shift of `hidden` holds the bias of `down`.
        return layer.down_norm(total)

    def _attend(self, qkv: torch.Tensor, mixed: torch.Tensor, lengths: Sequence[int]) -> None:
        """softmax(Q Kᵀ) V of every row over itself, into `mixed` (T, D); the scale is inside Q."""
        heads, width = self._encoder.heads, mixed.shape[1]
        tokens, d_k = mixed.shape[0], width // heads
        # One head's tokens side by side: the products are worth more than the copies cost.
        parts = self._buffer("parts", 3, heads, tokens, d_k)
        parts.copy_(qkv.view(tokens, 3, heads, d_k).permute(1, 2, 0, 3))
        out = self._buffer("out", heads, tokens, d_k)
        q, k, v = parts
        start = 0
        for length, run in groupby(lengths):
            rows = sum(1 for _ in run)
            stop = start + rows * length
            if length >= _LONG_ROW or rows == 1:
                for first in range(start, stop, length):
                    row = slice(first, first + length)
                    self._softmax_product(q[:, row], k[:, row], v[:, row], out[:, row])
            else:
                # (3, H, rows * L, d_k) -> (3, H * rows, L, d_k)
                q_rows, k_rows, v_rows = parts[:, :, start:stop].reshape(3, heads * rows, length, d_k)
                result = torch.empty_like(q_rows)
                self._softmax_product(q_rows, k_rows, v_rows, result)
                out[:, start:stop].copy_(result.view(heads, rows * length, d_k))
            start = stop
        mixed[:start].view(start, heads, d_k).copy_(out[:, :start].transpose(0, 1))

    def _softmax_product(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        """For N matrices (N, L, d_k), a few at a time, so that their scores stay in cache."""
        count, length, _ = q.shape
        step = max(1, _SCORES // (length * length))
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            scores = self._buffer("scores", part.stop - first, length, length)
            torch.bmm(q[part], k[part].transpose(1, 2), out=scores)
            torch._softmax(scores, -1, False, out=scores)
            torch.bmm(scores, v[part], out=out[part])

    def _buffer(self, name: str, *shape: int) -> torch.Tensor:
        """Memory of the calling thread's own that is kept from call to call; what is in it is anything."""
        size = math.prod(shape)
        kept: torch.Tensor | None = getattr(self._own, name, None)
        if kept is None or kept.numel() < size:
            kept = torch.empty(size)
            setattr(self._own, name, kept)
        return kept[:size].view(shape)


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
    def of(cls, layer: Layer, heads: int) -> _Folded:
        scale = (layer.query.out_features // heads) ** -0.5
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
