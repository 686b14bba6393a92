"""Ragged token lists -> packed batches without padding, and back to row order.

A packed batch lays the tokens of many rows end to end; `cu_seqlens` says where each row starts, and attention is kept
within each row.

Shapes: B rows, T tokens of a packed batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from bert_ray.model.tokenization import Ragged


@dataclass(kw_only=True, slots=True)
class PackedBatch:
    """Rows laid end to end.

    Attributes:
        input_ids: int64 tensor (T,).
        position_ids: int64 tensor (T,), restarting at 0 with each row.
        token_type_ids: int64 tensor (T,), or None where every token is of type 0.
        lengths: tokens of each row, B numbers.
        cu_seqlens: int32 tensor (B + 1,), cumulated lengths from 0.
        rows: int64 array (B,), which rows of the source these are.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor | None
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    rows: np.ndarray

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        types = None if self.token_type_ids is None else self.token_type_ids.to(device, non_blocking=True)
        return PackedBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            token_type_ids=types,
            lengths=self.lengths,
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            rows=self.rows,
        )


def pack_rows(ragged: Ragged, rows: np.ndarray) -> PackedBatch:
    """Lay the given rows end to end, in the given order."""
    import torch

    rows = np.asarray(rows, np.int64)
    starts, lengths = ragged.offsets[rows], ragged.lengths[rows]
    ends = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    # Position of each token in its row; with the row's start it is also where the token lies in `ragged.ids`.
    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    take = positions + np.repeat(starts, lengths)
    types = None if ragged.types is None else torch.from_numpy(ragged.types[take].astype(np.int64))
    return PackedBatch(
        input_ids=torch.from_numpy(ragged.ids[take].astype(np.int64)),
        position_ids=torch.from_numpy(positions),
        token_type_ids=types,
        lengths=tuple(lengths.tolist()),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        rows=rows,
    )


def plan(lengths: np.ndarray, budget_tokens: int) -> list[np.ndarray]:
    """Split rows into packed batches of at most `budget_tokens` tokens; a longer row gets a batch of its own.

    Rows go longest first into the fullest batch that still has room for them (best fit decreasing: at most 11/9 of the fewest
    batches possible, and within a per cent of it on text; Johnson et al., SIAM J. Comput. 3(4), 1974). Rows inside a
    batch are sorted by length, longest first, so that rows of equal length stand side by side for attention.

    Returns:
        int64 arrays of row numbers, the fullest work first; every row exactly once.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[list[int]] = []
    # room[r]: batches with exactly r tokens left. The smallest sufficient r is found through a bit mask of the
    # non-empty ones, which keeps the whole plan linear in the number of rows.
    room: list[list[int]] = [[] for _ in range(budget_tokens + 1)]
    open_rooms = 0
    for row in order.tolist():
        length = int(lengths[row])
        fitting = open_rooms >> length if length <= budget_tokens else 0
        if fitting:
            left = length + ((fitting & -fitting).bit_length() - 1)
            batch = room[left].pop()
            if not room[left]:
                open_rooms ^= 1 << left
        else:
            batch, left = len(batches), max(budget_tokens, length)
            batches.append([])
        batches[batch].append(row)
        left -= length
        if 0 < left <= budget_tokens:
            room[left].append(batch)
            open_rooms |= 1 << left
    return [np.array(batch, np.int64) for batch in batches]
