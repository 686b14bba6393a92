"""Where the rows of a step come from. A source decides which samples a step takes, as a function of seed and step.

Shapes: S samples of one step, over all workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from bert_ray.model.packing import pack_rows
from bert_ray.training.order import epoch_order

if TYPE_CHECKING:
    from bert_ray.model.examples import Examples
    from bert_ray.model.packing import PackedBatch
    from bert_ray.training.augmentation import Augmentation


class Source(Protocol):
    """Samples to learn from, or to be judged by.

    Attributes:
        round_steps: steps between two evaluations.
        steps: of the whole run.
        tokens: of the whole run; where steps are filled up with rows, about.
        examples: of a labelled table; None where the samples stem from somewhere else.
    """

    round_steps: int
    steps: int
    tokens: int
    examples: Examples | None

    def __len__(self) -> int:
        """How many samples there are; an evaluation takes 0, 1, … below that."""

    def select(self, step: int) -> np.ndarray:
        """The samples of a step, counted from 0, int64 (S,)."""

    def lengths_of(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of the given samples, int64 (S,)."""

    def squares_of(self, samples: np.ndarray) -> np.ndarray:
        """What their attention costs: squared lengths of the rows that a sample is seen in, summed up, int64 (S,)."""

    def weigh(self, samples: np.ndarray) -> float:
        """What the given samples count for together in the mean loss."""

    def batch(self, samples: np.ndarray, step: int | None = None) -> tuple[PackedBatch, torch.Tensor]:
        """The given samples and what they should say, on the CPU.

        Args:
            samples: longest first.
            step: whose they are; None: to be judged by, so nothing about them is left to chance.
        """

    def where(self, samples: np.ndarray) -> str:
        """Where to look for the given samples, for a message: "rows 5, 8, 13", say."""


class TableSource:
    """Samples of a labelled table, in epochs: each sample once, in an order of the epoch's own."""

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int = 1,
        epochs: int = 1,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        """Set up.

        Args:
            examples: the samples.
            batch_size: samples of a step.
            epochs: of the run.
            seed: of the order.
            augmentation: distorts what is trained on; never what is judged by.
        """
        self.examples: Examples | None = examples
        self.round_steps = -(-len(examples) // batch_size)
        self.steps = self.round_steps * epochs
        self._examples, self._batch_size, self._seed, self._augmentation = examples, batch_size, seed, augmentation
        self._lengths, self._squares = examples.lengths, examples.squares
        self.tokens = epochs * int(self._lengths.sum())
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self._examples)

    def select(self, step: int) -> np.ndarray:
        """See Source."""
        epoch, index = divmod(step, self.round_steps)
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self), self._seed, epoch)
        return self._order[1][index * self._batch_size : (index + 1) * self._batch_size]

    def lengths_of(self, samples: np.ndarray) -> np.ndarray:
        """See Source."""
        return self._lengths[samples]

    def squares_of(self, samples: np.ndarray) -> np.ndarray:
        """See Source."""
        return self._squares[samples]

    def weigh(self, samples: np.ndarray) -> float:
        """See Source."""
        return self._examples.weigh(samples)

    def batch(self, samples: np.ndarray, step: int | None = None) -> tuple[PackedBatch, torch.Tensor]:
        """See Source."""
        examples = self._examples
        pieces, owners = examples.pieces_of(samples)
        if step is not None and self._augmentation is not None:
            tokens = self._augmentation(examples.pieces.tokens, pieces, step // self.round_steps)
            batch = pack_rows(tokens, np.arange(len(pieces)))
            batch.rows = pieces
        else:
            batch = pack_rows(examples.pieces.tokens, pieces)
        batch.samples = None if owners is None else torch.from_numpy(owners)
        return batch, torch.from_numpy(examples.targets.take(samples))

    def where(self, samples: np.ndarray) -> str:
        """See Source."""
        shown = ", ".join(map(str, sorted(samples.tolist())[:8]))
        return f"samples {shown}" + (", …" if len(samples) > 8 else "")
