"""The encoder as the annotator runs it: the same maths as `encoder.encode`, arranged for a forward pass alone.

On a GPU it is `encoder.encode_with`. On a CPU a packed batch is a tile that walks through all layers while its
activations stay in cache: `folded_layers` in fp32, `half_layers` in bf16 and fp16.

Shapes: T tokens of a packed batch, R of them that are read, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn import functional as F

from bert_ray.model.encoder import encode_with, encoder_of
from bert_ray.model.folded_layers import FoldedLayers
from bert_ray.model.half_layers import HalfLayers
from bert_ray.model.linear import TILE_TOKENS
from bert_ray.model.memory import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from bert_ray.model.packing import PackedBatch

Batch = TypeVar("Batch")

# Tokens of a packed batch on a GPU: enough to fill one, little enough for the smallest in use (BERT-large: 2 GiB).
GPU_BATCH_TOKENS = 16384


class InferenceEncoder:
    """Packed forward without dropout.

    Attributes:
        batch_tokens: the tokens a packed batch should have.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._encoder = encoder_of(model)
        weight = self._encoder.words.weight
        self._layers: FoldedLayers | HalfLayers | None = None
        self.batch_tokens = GPU_BATCH_TOKENS
        if weight.device.type == "cpu":
            keep_freed_memory()
            with torch.inference_mode():
                kind = FoldedLayers if weight.dtype == torch.float32 else HalfLayers
                self._layers = kind(self._encoder)
            self.batch_tokens = self._layers.batch_tokens

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states of a packed batch, (T, D), or of its tokens that are read, (R, D)."""
        if self._layers is None:
            return encode_with(self._encoder, batch, training=False)
        return self._layers(self._embed(batch), batch)

    def even(self, tokens: int, batch_tokens: int) -> int:
        """Tokens of a packed batch, at most `batch_tokens`, such that on a CPU the threads have as many batches each.

        Batches of several tiles are few, and one more or less on a thread is felt.
        """
        threads = torch.get_num_threads()
        if self._layers is None or batch_tokens <= TILE_TOKENS or threads == 1:
            return batch_tokens
        rounds = max(1, -(-tokens // (threads * batch_tokens)))
        # A sixteenth more than the mean: batches are not filled to the last token.
        return min(batch_tokens, max(TILE_TOKENS, -(-tokens * 17 // (rounds * threads * 16))))

    def map(self, function: Callable[[Batch], torch.Tensor], batches: Sequence[Batch]) -> list[torch.Tensor]:
        """`function`, which calls this encoder, of every batch, in their order.

        On a CPU each of torch's threads takes a batch of its own: threads that share one wait for each other after
        every product, some hundred times a batch.
        """
        threads = torch.get_num_threads()
        if self._layers is None or threads == 1 or len(batches) < threads:
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
            types = batch.token_type_ids if encoder.types.num_embeddings > 1 else None
            hidden += encoder.types.weight[0] if types is None else F.embedding(types, encoder.types.weight)
        return encoder.norm(hidden)
