"""Ragged token lists -> packed batches without padding, and back to row order.

A packed batch lays the tokens of many rows end to end; `cu_seqlens` says where each row starts, and attention is kept
within each row.

Shapes: B rows, T tokens of a packed batch, R tokens of them whose hidden states are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        samples: int64 tensor (B,), which sample of a training batch each row belongs to; None where each is one.
        read: int64 tensor (R,), ascending, the tokens whose hidden states anyone reads, at least one of each row: the
            encoder gives these alone, (R, D). None: it gives all, (T, D).
        read_lengths: how many of each row those are, B numbers; None where `read` is.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor | None
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    rows: np.ndarray
    samples: torch.Tensor | None = None
    read: torch.Tensor | None = None
    read_lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return PackedBatch(
            input_ids=on_device(self.input_ids, device),
            position_ids=on_device(self.position_ids, device),
            token_type_ids=None if self.token_type_ids is None else on_device(self.token_type_ids, device),
            lengths=self.lengths,
            cu_seqlens=on_device(self.cu_seqlens, device),
            rows=self.rows,
            samples=None if self.samples is None else on_device(self.samples, device),
            read=None if self.read is None else on_device(self.read, device),
            read_lengths=self.read_lengths,
        )

    def reading(self, read: torch.Tensor) -> PackedBatch:
        """The same batch, of whose tokens only some are read in the end; see `read`. On the CPU.

        Raises:
            ValueError: of a row none is.
        """
        ends = self.cu_seqlens.numpy()
        counts = np.diff(np.searchsorted(read.numpy(), ends))
        if not counts.all():
            raise ValueError(f"no token of row {int(counts.argmin())} is read; name one of each row")
        return replace(self, read=read, read_lengths=tuple(counts.tolist()))

    @property
    def first_tokens(self) -> torch.Tensor:
        """The first token of each row, int64 (B,)."""
        return self.cu_seqlens[:-1].long()


def on_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of this process's memory on `device`; a GPU fetches it when it comes to it, and nobody waits for that.

    From memory that is not pinned the copy would wait until the GPU has done all that was asked of it before, and the
    next batch be made only then (CUDA runtime API, "API synchronization behavior").
    """
    if str(device).startswith("cuda") and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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


# A row is short when this many of its length fit a batch: what the last one leaves empty is then a small share.
_SHORT_SHARE = 8


def plan(lengths: np.ndarray, budget_tokens: int) -> list[np.ndarray]:
    """Split rows into packed batches of at most `budget_tokens` tokens; a longer row gets a batch of its own.

    Long rows are placed best fit decreasing: longest first, each into the fullest batch that has room for it (at most
    11/9 of the fewest batches possible, Johnson et al., SIAM J. Comput. 3(4), 1974; within a few per cent on text).
    Short rows then fill the rest in order of length, batch by batch, so that rows of one length stay side by side and
    attention can take them together. Inside a batch rows stand longest first.

    Returns:
        int64 arrays of row numbers; every row exactly once.
    """
    order = np.argsort(-lengths, kind="stable")
    is_long = lengths[order] > budget_tokens // _SHORT_SHARE
    batches, room = _best_fit(order[is_long], lengths, budget_tokens)
    # Batches with the most room first: each takes a stretch of equal lengths as long as can be.
    waiting = sorted(range(len(batches)), key=room.__getitem__)
    current = waiting.pop() if waiting else None
    for row in order[~is_long].tolist():
        length = int(lengths[row])
        while current is not None and room[current] < length:
            current = waiting.pop() if waiting else None
        if current is None:
            current = len(batches)
            batches.append([])
            room.append(budget_tokens)
        batches[current].append(row)
        room[current] -= length
    return [np.array(batch, np.int64) for batch in batches]


def _best_fit(order: np.ndarray, lengths: np.ndarray, budget: int) -> tuple[list[list[int]], list[int]]:
    """Place each row, longest first, into the fullest batch with room; returns the batches and each one's room."""
    batches: list[list[int]] = []
    room: list[int] = []
    # with_room[r]: batches with exactly r tokens left; bit r of `open_rooms` says that there are any. Shifting the
    # mask finds the smallest sufficient room, which keeps the plan linear in the number of rows.
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]
    open_rooms = 0
    for row in order.tolist():
        length = int(lengths[row])
        fitting = open_rooms >> length
        if fitting:
            left = length + ((fitting & -fitting).bit_length() - 1)
            batch = with_room[left].pop()
            if not with_room[left]:
                open_rooms ^= 1 << left
        else:
            batch = len(batches)
            batches.append([])
            room.append(max(budget, length))
        batches[batch].append(row)
        room[batch] -= length
        if room[batch]:
            with_room[room[batch]].append(batch)
            open_rooms |= 1 << room[batch]
    return batches, room
