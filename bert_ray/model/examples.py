"""What a task learns from: pieces of tokens, gathered to samples, with their targets.

Shapes: N rows of the table, P pieces, S samples, T tokens of all pieces together.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from bert_ray.model.tokenization import Pieces


@dataclass(kw_only=True, slots=True)
class Targets:
    """What the loss compares with, for each sample one entry or several.

    Attributes:
        values: (S, …) one entry a sample; or with `offsets` (M, …), the entries of all samples end to end.
        offsets: int64 (S + 1,); sample s has `values[offsets[s]:offsets[s + 1]]`.
    """

    values: np.ndarray
    offsets: np.ndarray | None = None

    def take(self, samples: np.ndarray) -> np.ndarray:
        """The entries of the given samples, end to end in the given order."""
        if self.offsets is None:
            return self.values[samples]
        return self.values[ranges(self.offsets[samples], self.offsets[samples + 1])]


@dataclass(kw_only=True, slots=True)
class Examples:
    """Tokenised samples with their targets; a step takes samples whole.

    Attributes:
        pieces: what the model sees.
        targets: what it should say, by sample.
        starts: int64 (S + 1,), sample s is pieces `starts[s]:starts[s + 1]`; None where each piece is a sample.
        weights: float64 (S,), how much each sample counts in the mean loss (its labelled words, say); None: one each.
        inputs: the task's inputs, N rows each: with `truth`, what metrics compare.
        truth: the columns that hold what is so, N rows each.
    """

    pieces: Pieces
    targets: Targets
    starts: np.ndarray | None = None
    weights: np.ndarray | None = None
    inputs: Sequence[pa.Array] = ()
    truth: Sequence[pa.Array] = ()

    def __len__(self) -> int:
        return len(self.pieces) if self.starts is None else len(self.starts) - 1

    @property
    def rows(self) -> int:
        """N, rows of the table."""
        return len(self.inputs[0]) if self.inputs else len(self)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 (S,)."""
        offsets = self.pieces.tokens.offsets
        return np.diff(offsets if self.starts is None else offsets[self.starts])

    @property
    def squares(self) -> np.ndarray:
        """Squared lengths of each sample's pieces, summed up, int64 (S,): attention stays within a piece."""
        sums = np.concatenate([[0], np.cumsum(self.pieces.tokens.lengths.astype(np.int64) ** 2)])
        return np.diff(sums if self.starts is None else sums[self.starts])

    def weigh(self, samples: np.ndarray) -> float:
        """What the given samples count for together."""
        return float(len(samples) if self.weights is None else self.weights[samples].sum())

    def pieces_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The pieces of samples, longest first, and for each the position of its sample in `samples`.

        Where each piece is a sample, they come in the order given, without positions.
        """
        if self.starts is None:
            return samples, None
        first, last = self.starts[samples], self.starts[samples + 1]
        pieces, owners = ranges(first, last), np.repeat(np.arange(len(samples)), last - first)
        order = np.argsort(-self.pieces.tokens.lengths[pieces], kind="stable")
        return pieces[order], owners[order]

    def digest(self) -> str:
        """Sha256 over token ids, offsets and targets: what a run has learned from."""
        parts = (self.pieces.tokens.ids, self.pieces.tokens.offsets, self.targets.values)
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The numbers of the half-open ranges [first[i], last[i]), end to end, int64."""
    sizes = last - first
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - (ends - sizes), sizes)
