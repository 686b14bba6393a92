"""The encoder as the annotator runs it: the same maths as `encoder.encode`, arranged for a forward pass alone.

On a GPU it is `encoder.encode_with`. On a CPU in fp32 a packed batch is one tile of at most TILE_TOKENS tokens that
walks through all layers while its activations stay in cache, and four things are arranged once, when the model loads:

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from bert_ray.model.encoder import Layer, encode_with, encoder_of
from bert_ray.model.linear import TILE_TOKENS, Linear
from bert_ray.model.memory import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from bert_ray.model.packing import PackedBatch

Batch = TypeVar("Batch")

# Tokens of a packed batch on a GPU: enough to fill one, little enough for the smallest in use (BERT-large: 2 GiB).
GPU_BATCH_TOKENS = 16384
# Attention scores held at a time, in fp32 numbers: 1 MiB, within the second-level cache of current server cores.
_SCORES = 2**18
# Rows shorter than this are computed together with those of their length beside them; the copies that costs are less
# than the calls it saves. Longer rows are computed in place, each by itself.
_LONG_ROW = 64


class InferenceEncoder:
    """Packed forward without dropout.

    Attributes:
        batch_tokens: the tokens a packed batch should have.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._encoder = encoder_of(model)
        weight = self._encoder.words.weight
        self._tiled = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.batch_tokens = TILE_TOKENS if self._tiled else GPU_BATCH_TOKENS
        if self._tiled:
            keep_freed_memory()
            with torch.inference_mode():
                self._layers = [_Folded.of(layer, self._encoder.heads) for layer in self._encoder.layers]
            self._own = threading.local()

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states of a packed batch, (T, D)."""
        if not self._tiled:
            return encode_with(self._encoder, batch, training=False)
        tokens = len(batch.input_ids)
        hidden = self._embed(batch)
        # MKL's packed weights serve tiles of one size; filling up the last few rows is cheaper than the other way.
        if self._layers[0].up.library == "mkl" and TILE_TOKENS * 3 // 4 < tokens < TILE_TOKENS:
            hidden = torch.cat((hidden, hidden.new_zeros(TILE_TOKENS - tokens, hidden.shape[1])))
        mixed = torch.zeros_like(hidden)
        for layer in self._layers:
            hidden = self._layer(layer, hidden, mixed, batch.lengths)
        return hidden[:tokens]

    def map(self, function: Callable[[Batch], torch.Tensor], batches: Sequence[Batch]) -> list[torch.Tensor]:
        """`function`, which calls this encoder, of every batch, in their order.

        On a CPU each of torch's threads takes a batch of its own: threads that share one wait for each other after
        every product, some hundred times a batch.
        """
        threads = torch.get_num_threads()
        if not self._tiled or threads == 1 or len(batches) < threads:
            return [function(batch) for batch in batches]

        def alone(batch: Batch) -> torch.Tensor:
            with torch.inference_mode():
                return function(batch)

        # MKL's number of threads is one for all of the process, OpenMP's one for each thread: were either left as it
        # is, the threads would each start others, and all spin for two cores.
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads, "annotator", initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(alone, batches))
        finally:
            torch.set_num_threads(threads)

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        encoder = self._encoder
        hidden = F.embedding(batch.input_ids, encoder.words.weight)
        hidden += F.embedding(batch.position_ids + encoder.first_position, encoder.positions.weight)
        if encoder.types is not None:
            types = batch.token_type_ids
            hidden += encoder.types.weight[0] if types is None else F.embedding(types, encoder.types.weight)
        return encoder.norm(hidden)

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
