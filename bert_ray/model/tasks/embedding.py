"""Embedding: one vector of D numbers for each text.

Output: fixed_size_list<float32>[D]. Pooling as the card says: the mean over all tokens of a row, or its first token;
scaled to unit length where the card says so. A blank text has the vector of its special tokens alone, as in
sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import torch
from torch.nn import functional as F

from bert_ray.errors import BundleError
from bert_ray.model.tasks.base import Outputs, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tokenization import Pieces


class Embedding(Task):
    """One vector for each text."""

    kind: ClassVar[str] = "embedding"
    blank_is_null: ClassVar[bool] = False

    def output_type(self) -> pa.DataType:
        """fixed_size_list<float32>[D]."""
        if self.config is None:
            raise BundleError("the width of an embedding is known only with the model's configuration")
        return pa.list_(pa.float32(), self.config.hidden_size)

    def auto_class(self) -> Any:
        """AutoModel."""
        from transformers import AutoModel

        return AutoModel

    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Pooled vectors (B, D), fp32."""
        if self.card.pooling == "cls":
            pooled = hidden[batch.cu_seqlens[:-1].long()].float()
        else:
            lengths = torch.tensor(batch.lengths, device=hidden.device)
            pooled = torch.segment_reduce(hidden.float(), "mean", lengths=lengths)
        return F.normalize(pooled, dim=1) if self.card.normalize else pooled

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Vectors float32 (B, D) -> fixed-size lists."""
        return pa.FixedSizeListArray.from_arrays(pa.array(outputs.values.reshape(-1)), outputs.values.shape[1])
