"""Word embeddings whose gradient costs what the batch's tokens cost, not what the vocabulary does.

torch's own lookup makes a gradient of the whole table at each step: for MiniLM 47 MB of zeros around 400 rows, a tenth
of a small training step. Here the zeros are made once; a later step clears the rows of the one before it.

Shapes: V vocabulary, D hidden size, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from bert_ray.model.gradients import gathered, owned

# Weight -> its gradient's storage (V, D), zero but for the rows of the ids (T,) beside it.
_buffers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def lookup(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a table: weight (V, D), ids int64 (T,) -> (T, D)."""
    # With several workers the others' rows come into the gradient too, and no one here knows which to clear.
    return _Lookup.apply(weight, ids) if owned(weight) and torch.is_grad_enabled() else F.embedding(ids, weight)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, d_rows: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        weight, ids = ctx.saved_tensors
        buffer, last = _buffers.get(weight, (None, None))
        if (before := gathered(weight)) is not None:
            # Of an earlier pass of the same step; the buffer may be what it lies in.
            if buffer is not None:
                _buffers[weight] = (buffer, torch.cat((last, ids)))
            before.index_add_(0, ids, d_rows)
            return None, None
        # A gradient clipped by a norm that is no number is spoilt in every row.
        if buffer is None or not buffer[0, 0].isfinite():
            buffer = torch.zeros_like(weight)
        else:
            buffer.index_fill_(0, last, 0.0)
        buffer.index_add_(0, ids, d_rows)
        _buffers[weight] = (buffer, ids)
        # Another tensor on the same storage: autograd takes over, uncopied, a gradient that nobody else refers to.
        return buffer.detach(), None
