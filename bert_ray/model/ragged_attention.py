"""Attention of rows over the rows of another packed batch, or of some tokens over what stands in their own row.

    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k + M) V

(Vaswani et al., arXiv 1706.03762, equation 1, and section 3.2.3 for the two uses in a decoder), for each head and each
pair of rows by itself; M is -∞ where a query must not look, else 0. An encoder's last layer looks so, too, where only
some tokens are read. `attention.py` has the faster form for its other layers, whose rows look at all of themselves.

On a GPU in half precision that is one variable-length kernel. Elsewhere pairs of rows of similar lengths are filled up
to rectangles, for the scores alone.

Shapes: B pairs of rows, Tq and Tk tokens of the two batches, Lq and Lk lengths of a row, H heads, d_k width of a head,
D = H * d_k; N pairs of a rectangle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bert_ray.model.attention import filled_up, flash_serves
from bert_ray.model.packing import on_device

# The scores of a rectangle are at most so many times those of its pairs; filled-up ones are computed in vain.
_MOST_FILLED = 2.0
# Rectangles of so few scores are never split further: a call costs more than they do.
_SMALL_SCORES = 4096


@dataclass(kw_only=True, slots=True)
class _Rectangle:
    """Pairs of rows that are taken together.

    Attributes:
        pairs: N.
        queries, keys: the token of each place, int64 (N * Lq,) and (N * Lk,); a filled-up place repeats its row's last.
        real: int64, which places of the queries are tokens.
        bias: M, (N, 1, Lq or 1, Lk).
    """

    pairs: int
    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor
    bias: torch.Tensor


class RaggedAttention:
    """Attention over pairs of rows whose lengths are given once, for all layers of a decoder."""

    def __init__(
        self,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
        *,
        causal: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Lay the pairs out.

        Args:
            query_lengths: tokens of each row that looks, B numbers, none 0.
            key_lengths: tokens of each row that is looked at.
            causal: a query looks at no key behind its own position; both rows are the same then.
            device: where it will run.
        """
        self.causal = causal
        self._query_lengths = torch.tensor(query_lengths, dtype=torch.int64)
        self._key_lengths = torch.tensor(key_lengths, dtype=torch.int64)
        self._device = device
        self._rectangles: list[_Rectangle] | None = None
        self._cumulated: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            q: (Tq, D).
            k: (Tk, D).
            v: (Tk, D).
            heads: H.
            dropout: probability with which an attention weight is dropped (training only).
            scale: of the scores; None: 1 / √d_k.

        Returns:
            (Tq, D), the heads side by side.
        """
        if dropout == 0.0 and scale is None and flash_serves(q, q.shape[1] // heads):
            return self._variable_length(q, k, v, heads)
        if self._rectangles is None:
            self._rectangles = self._lay_out()
        parts = []
        for item in self._rectangles:
            mixed = F.scaled_dot_product_attention(
                _heads(q, item.queries, item.pairs, heads),
                _heads(k, item.keys, item.pairs, heads),
                _heads(v, item.keys, item.pairs, heads),
                attn_mask=item.bias.to(q.dtype),
                dropout_p=dropout,
                scale=scale,
            )
            parts.append(mixed.transpose(1, 2).reshape(len(item.queries), -1)[item.real])
        return torch.cat(parts)

    def _variable_length(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if self._cumulated is None:
            self._cumulated = tuple(  # type: ignore[assignment]
                on_device(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), q.device)
                for lengths in (self._query_lengths, self._key_lengths)
            )
        assert self._cumulated is not None
        longest = int(self._query_lengths.max()), int(self._key_lengths.max())
        # Uncopied: the kernel asks that a head's numbers stand side by side, and no more.
        split = (part.view(part.shape[0], heads, -1) for part in (q, k, v))
        window = (-1, 0) if self.causal else (-1, -1)
        return varlen_attn(*split, *self._cumulated, *longest, window_size=window).reshape(q.shape[0], -1)

    def _lay_out(self) -> list[_Rectangle]:
        """Neighbouring pairs, as many together as the filled-up scores allow."""
        rectangles, first = [], 0
        q_starts = (self._query_lengths.cumsum(0) - self._query_lengths).tolist()
        k_starts = (self._key_lengths.cumsum(0) - self._key_lengths).tolist()
        q_lengths, k_lengths = self._query_lengths.tolist(), self._key_lengths.tolist()
        while first < len(q_lengths):
            longest_q, longest_k, real, last = 0, 0, 0, first
            while last < len(q_lengths):
                wide, high = max(longest_k, k_lengths[last]), max(longest_q, q_lengths[last])
                scores, own = wide * high * (last + 1 - first), real + q_lengths[last] * k_lengths[last]
                if last > first and scores > max(_SMALL_SCORES, _MOST_FILLED * own):
                    break
                longest_q, longest_k, real, last = high, wide, own, last + 1
            rectangles.append(
                self._rectangle(slice(first, last), q_starts[first], k_starts[first], longest_q, longest_k)
            )
            first = last
        return rectangles

    def _rectangle(self, rows: slice, q_start: int, k_start: int, longest_q: int, longest_k: int) -> _Rectangle:
        q_lengths, k_lengths = self._query_lengths[rows], self._key_lengths[rows]
        queries, real, _ = filled_up(q_lengths, longest_q)
        keys, _, bias = filled_up(k_lengths, longest_k)
        if self.causal:
            bias = bias + torch.full((longest_q, longest_k), -torch.inf).triu(1)
        return _Rectangle(
            pairs=len(q_lengths),
            queries=(queries + q_start).to(self._device),
            keys=(keys + k_start).to(self._device),
            real=real.view(-1).nonzero()[:, 0].to(self._device),
            bias=bias.to(self._device),
        )


def _heads(packed: torch.Tensor, places: torch.Tensor, rows: int, heads: int) -> torch.Tensor:
    """(T, D) -> (N, H, L, d_k)."""
    return packed[places].view(rows, len(places) // rows, heads, -1).transpose(1, 2)
