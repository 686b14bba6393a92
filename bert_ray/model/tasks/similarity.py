"""Similarity: the cosine of two texts' embeddings, from -1 to 1.

Runs on any embedding bundle (`task: similarity`); nothing is trained. Output: float32. A blank text has the vector of
its special tokens alone, as in embedding. A model trained to score pairs is another task, `regression`.

Shapes: B rows, P pieces of the distinct texts among both inputs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from bert_ray.errors import JobError
from bert_ray.model.tasks.base import Outputs, Targets
from bert_ray.model.tasks.numbers import correlations, not_finite, numbers, numbers_report
from bert_ray.model.tasks.pooled import PooledTask, unit
from bert_ray.model.tokenization import Pieces, Tokenizer

if TYPE_CHECKING:
    from bert_ray.model.tasks.sections import Section


class Similarity(PooledTask):
    """The cosine of two texts' embeddings."""

    kind: ClassVar[str] = "similarity"
    inputs: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    truths: ClassVar[tuple[str, ...]] = ("label",)
    metric: ClassVar[str] = "spearman"
    headline: ClassVar[str] = "puts pairs in order with a rank correlation of {spearman:.3f}"
    plain_metrics: ClassVar[tuple[str, ...]] = ("spearman", "pearson")

    @property
    def name(self) -> str:
        """`similarity`: the card's name is that of its embedding."""
        return self.kind

    def output_type(self) -> pa.DataType:
        """float32."""
        return pa.float32()

    def encode(self, tokenize: Tokenizer, inputs: Sequence[pa.Array]) -> Pieces:
        """The distinct texts of both inputs: a text that stands in many pairs is read once."""
        # `decode` finds a row's texts again by the same encoding; `rows` therefore counts texts, not rows.
        return super().encode(tokenize, [pa.concat_arrays(list(inputs)).dictionary_encode().dictionary])

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Vectors float32 (P, D) -> cosines (B,)."""
        codes = pa.concat_arrays(list(inputs)).dictionary_encode().indices.to_numpy()
        vectors = unit(self.vectors(outputs, pieces))
        first, second = np.split(codes, 2)
        cosines = np.einsum("bd,bd->b", vectors[first], vectors[second]).astype(np.float32).clip(-1.0, 1.0)
        return pa.array(np.where(first == second, np.float32(1.0), cosines))  # Of one text: 1, whatever rounding says.

    def targets(self, pieces: Pieces, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Targets:
        """Refuses: what is trained is the embedding."""
        raise JobError(
            "task similarity has nothing to train: train task embedding on the pairs, with or without scores, and give "
            "its bundle to similarity; or train task regression, which reads both texts as one row"
        )

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """The scores as float64.

        Raises:
            ColumnError: they are no numbers.
        """
        return [numbers(truth[0], self.kind)], super().read_truth(truth, inputs)[1]

    def faults(self, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, np.ndarray]:
        """Scores that are no numbers to go by."""
        return not_finite(truth[0])

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """Rank and linear correlation with the scores in `label`, on any scale."""
        return correlations(annotations.to_numpy(zero_copy_only=False).astype(float), truth[0])

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """Cosines over scores, cosines along the scale, the pairs whose places in the two orders differ most."""
        return numbers_report(annotations, truth[0], self.inputs, inputs, most, same_units=False)
