"""Answers as spans of tokens: where one stands in each window, and the best one of all windows of a row.

Shapes: B rows, P pieces (windows), T tokens of all pieces together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bert_ray.model.examples import ranges
from bert_ray.model.tokenization import Pieces, Ragged

# The context is the second input of a pair.
_CONTEXT = 1


@dataclass(kw_only=True, slots=True)
class Spans:
    """The best span of each row.

    Attributes:
        first: int64 (B,), its first token, a number among all T.
        last: int64 (B,), its last token.
        score: float64 (B,), log of its probability; -inf where no window has a token of the context.
        null: float64 (B,), log of the probability that there is none, of the window that is least sure of it.
    """

    first: np.ndarray
    last: np.ndarray
    score: np.ndarray
    null: np.ndarray


def best_spans(values: np.ndarray, pieces: Pieces, max_tokens: int) -> Spans:
    """The most probable span of at most `max_tokens` tokens of the context, over all windows of each row.

    A window's start and end logits are each normalised over its context and its first token, which stands for "no
    answer here"; a span's probability is the product of its start's and its end's, as in transformers' pipeline
    (`select_starts_ends`). Of equal spans the first wins.

    Args:
        values: float32 (T, 2), start and end logits.
        pieces: the windows, with `sources`.
        max_tokens: longest span.
    """
    assert pieces.sources is not None
    offsets, lengths = pieces.tokens.offsets, pieces.tokens.lengths
    begins, total, numbers = offsets[:-1], len(values), np.arange(len(values))
    context = pieces.sources == _CONTEXT
    logs = values.astype(np.float64)
    allowed = context.copy()
    allowed[begins] = True
    logs[~allowed] = -np.inf
    logs -= np.repeat(_log_sums(logs, begins, lengths), lengths, axis=0)
    nulls = logs[begins].sum(axis=1)
    logs[begins] = -np.inf
    starts, ends = np.ascontiguousarray(logs[:, 0]), np.ascontiguousarray(logs[:, 1])
    # One past the last token of the context in each token's own window: no span runs on into the next one.
    limits = np.repeat(np.maximum.reduceat(np.where(context, numbers + 1, 0), begins), lengths)
    best, more = np.full(total, -np.inf), np.zeros(total, np.int64)
    for extra in range(min(max_tokens, int(lengths.max()))):
        size = total - extra
        sums = starts[:size] + ends[extra:]
        sums[numbers[extra:] >= limits[:size]] = -np.inf
        better = np.flatnonzero(sums > best[:size])
        best[better], more[better] = sums[better], extra
    row_pieces = pieces.starts[:-1]
    row_begins = begins[row_pieces]
    score = np.maximum.reduceat(best, row_begins)
    rows = np.repeat(np.arange(len(row_begins)), np.diff(row_begins, append=total))
    winners = np.flatnonzero(best == score[rows])
    first = winners[np.unique(rows[winners], return_index=True)[1]]
    return Spans(first=first, last=first + more[first], score=score, null=np.minimum.reduceat(nulls, row_pieces))


def _log_sums(logs: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials over each piece: (T, 2) -> (P, 2)."""
    highest = np.maximum.reduceat(logs, begins)
    return highest + np.log(np.add.reduceat(np.exp(logs - np.repeat(highest, lengths, axis=0)), begins))


def window_targets(pieces: Pieces, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where the answer stands in each window: its first and last token, counted from the window's own first.

    (0, 0), the first token, for windows that do not hold it whole, as in Devlin et al., arXiv 1810.04805, section 4.3,
    and in transformers' run_qa.py.

    Args:
        pieces: the windows, with `spans` and `sources`.
        starts: int64 (B,), the answer's first code point in the context; -1 without an answer.
        ends: int64 (B,), one past its last.

    Returns:
        int64 (P, 2).
    """
    assert pieces.spans is not None and pieces.sources is not None
    begins, lengths = pieces.tokens.offsets[:-1], pieces.tokens.lengths
    context = pieces.sources == _CONTEXT
    start, end = starts[pieces.rows], ends[pieces.rows]

    def count(where: np.ndarray) -> np.ndarray:
        return np.add.reduceat((context & where).astype(np.int64), begins)

    held = count(np.ones(len(context), bool))
    # Spans ascend: the answer begins in the last token that begins no later, and ends in the first that ends no sooner.
    begun = count(pieces.spans[:, 0] <= np.repeat(start, lengths))
    ended = count(pieces.spans[:, 1] < np.repeat(end, lengths))
    places = np.arange(len(context)) - np.repeat(begins, lengths)
    lead = np.minimum.reduceat(np.where(context, places, len(context)), begins)
    first, last = lead + begun - 1, lead + ended
    inside = (start >= 0) & (begun > 0) & (ended < held) & (first <= last)
    return np.where(inside[:, None], np.stack([first, last], axis=1), 0)


def thinned(pieces: Pieces, targets: np.ndarray, share: float) -> np.ndarray:
    """The windows to train on: all that hold the answer, and about `share` of the others.

    Which others is a function of their tokens alone. A row keeps one window at least.

    Args:
        pieces: the windows.
        targets: int64 (P, 2), of `window_targets`.
        share: from 0 to 1.

    Returns:
        int64, ascending numbers of pieces.
    """
    offsets = pieces.tokens.offsets
    marks = np.zeros(len(pieces), np.uint64)
    for piece in np.flatnonzero(targets[:, 1] == 0).tolist():
        tokens = pieces.tokens.ids[offsets[piece] : offsets[piece + 1]].tobytes()
        marks[piece] = int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "big")
    # Windows with the answer have mark 0, the lowest: each row's lowest stays.
    lowest = np.minimum.reduceat(marks, pieces.starts[:-1])[pieces.rows]
    return np.flatnonzero((marks < np.uint64(min(share * 2.0**64, 2**64 - 1))) | (marks == lowest))


def take_pieces(pieces: Pieces, which: np.ndarray) -> Pieces:
    """Some of the pieces, ascending; at least one of each row."""
    offsets, lengths = pieces.tokens.offsets, pieces.tokens.lengths[which]
    tokens = ranges(offsets[which], offsets[which + 1])
    types = pieces.tokens.types
    return Pieces(
        tokens=Ragged(
            ids=pieces.tokens.ids[tokens],
            types=None if types is None else types[tokens],
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
        ),
        rows=pieces.rows[which],
        spans=None if pieces.spans is None else pieces.spans[tokens],
        sources=None if pieces.sources is None else pieces.sources[tokens],
    )


def join_pieces(parts: Sequence[Pieces]) -> Pieces:
    """The pieces of consecutive stretches of rows, pairs with spans, as one."""
    sizes = [len(part.starts) - 1 for part in parts]
    before = np.cumsum([0, *sizes[:-1]])
    lengths = np.concatenate([part.tokens.lengths for part in parts])
    return Pieces(
        tokens=Ragged(
            ids=np.concatenate([part.tokens.ids for part in parts]),
            types=np.concatenate([part.tokens.types for part in parts]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
        ),
        rows=np.concatenate([part.rows + first for part, first in zip(parts, before, strict=True)]),
        spans=np.concatenate([part.spans for part in parts]),
        sources=np.concatenate([part.sources for part in parts]),
    )
