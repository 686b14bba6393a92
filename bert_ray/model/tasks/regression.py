"""Regression: a number for two texts together (how similar they are, say), or for one text.

Output: float32, the model's output as it is, in the units of the numbers that it learned from. A blank text has
nothing to judge and gives null.

Shapes: B rows, P pieces, S samples of a training batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model.examples import Targets
from bert_ray.model.tasks.base import Learning, Outputs
from bert_ray.model.tasks.heads import SequenceTask, by_row, by_sample
from bert_ray.model.tasks.numbers import correlations, narrow, not_finite, numbers, numbers_report

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks.sections import Section
    from bert_ray.model.tokenization import Pieces


class Regression(SequenceTask):
    """A number for two texts, or for one."""

    kind: ClassVar[str] = "regression"
    inputs: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    metric: ClassVar[str] = "spearman"
    headline: ClassVar[str] = "puts rows in order with a rank correlation of {spearman:.3f}"
    plain_metrics: ClassVar[tuple[str, ...]] = ("spearman", "pearson", "mse")

    @classmethod
    def fits(cls, config: PretrainedConfig) -> bool:
        """Where the configuration says so; a single output is a number unless it says something else."""
        return config.problem_type == "regression" or (
            config.num_labels == 1 and config.problem_type != "multi_label_classification"
        )

    def output_type(self) -> pa.DataType:
        """float32."""
        return pa.float32()

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """The base's encoder and pooler with a fresh head of one output."""
        return self.fresh_model(base, problem_type="regression", dropout=dropout, attention_dropout=attention_dropout)

    def prepare(self, annotator: Annotator) -> None:
        """Check that there is one number.

        Raises:
            BundleError: there are several, as of a model that was trained elsewhere.
        """
        super().prepare(annotator)
        if (several := annotator.bundle.config.num_labels) > 1:
            raise BundleError(
                f"{annotator.bundle.reference} gives {several} numbers for a text, of which task regression makes no "
                "annotation; another model can be trained from it"
            )

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Outputs float32 (P, 1) -> numbers; of a text in windows the mean counts."""
        return pa.array(by_row(outputs, pieces)[:, 0])

    # Training and evaluation.

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """The label column as float64.

        Raises:
            ColumnError: it holds no numbers.
        """
        return [numbers(truth[0], self.kind)], super().read_truth(truth, inputs)[1]

    def faults(self, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, np.ndarray]:
        """NaN, infinity, and numbers that are infinite in float32."""
        return not_finite(truth[0])

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """None; but the numbers must differ.

        Raises:
            ColumnError: they are all the same.
            JobError: the job lists labels.
        """
        if self.card.labels:
            raise JobError("labels: task regression learns numbers and has no labels; leave them out")
        values = narrow(truth[0])
        if (values == values[0]).all():
            raise ColumnError(
                f"it is {values[0]:g} in all {len(values)} rows; a model needs numbers that differ to learn from"
            )
        return []

    def targets(self, pieces: Pieces, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Targets:
        """The numbers, float32 (S,)."""
        return Targets(values=narrow(truth[0]))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Squared error of each sample, (S,); outputs (P, 1), targets float32 (S,)."""
        return (by_sample(outputs, batch, len(targets)).squeeze(1) - targets).square()

    def learning_for(
        self, label_smoothing: float, class_weights: str | Mapping[str, float], truth: Sequence[pa.Array]
    ) -> Learning:
        """Neither smoothing nor weights: there are no labels.

        Raises:
            JobError: the job asks for either.
        """
        if label_smoothing:
            raise JobError("label_smoothing: task regression has no labels to smooth; leave it out")
        return super().learning_for(label_smoothing, class_weights, truth)

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """Spearman's and Pearson's correlation, and the mean squared error."""
        said, so = (numbers(array, self.kind).to_numpy(zero_copy_only=False) for array in (annotations, truth[0]))
        return correlations(said, truth[0]) | {"mse": float(np.square(said - so).mean()) if len(so) else 0.0}

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """What was said over what is so, the errors along the scale, the largest ones."""
        return numbers_report(annotations, truth[0], self.inputs, inputs, most, same_units=True)
