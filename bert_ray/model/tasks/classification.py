"""Classification: one label of C for each text, or for each pair of texts. Sentiment is this task with two labels,
negative and positive.

Output: struct<label: string, score: float32>, score being the label's probability; with scores also
scores: map<string, float32>, the probability of every label. A blank text has nothing to judge and gives null.

Shapes: B rows, P pieces, C labels, S samples of a training batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from bert_ray.errors import ColumnError
from bert_ray.model.examples import Targets
from bert_ray.model.tasks.base import Learning, Outputs
from bert_ray.model.tasks.heads import SequenceTask, by_row, by_sample, weights_of
from bert_ray.model.tasks.label_report import SCORED_LABELS, majority, one_label_report

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bert_ray.model.bundle import Bundle
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks.sections import Constant, Section
    from bert_ray.model.tokenization import Pieces

# More distinct labels than this, and most rows with one of their own: the column is an id or a text, not a label.
_MANY_LABELS = 50


class Classification(SequenceTask):
    """One label of C for each text, or for each pair of texts."""

    kind: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    least_labels: ClassVar[int] = 2
    headline: ClassVar[str] = "says the right label for {accuracy:.1%} of rows"

    @classmethod
    def fits(cls, config: PretrainedConfig) -> bool:
        """Not a model of several labels a text, nor of a number: transformers takes a single output for one."""
        return config.problem_type not in ("multi_label_classification", "regression") and config.num_labels > 1

    @classmethod
    def labels_of(cls, config: PretrainedConfig) -> list[str]:
        """The names in the configuration, in the order of the logits."""
        return [config.id2label[index] for index in range(config.num_labels)]

    def output_type(self) -> pa.DataType:
        """See the module's first lines."""
        fields = [pa.field("label", pa.string()), pa.field("score", pa.float32())]
        if self.options.scores:
            fields.append(pa.field("scores", pa.map_(pa.string(), pa.float32())))
        return pa.struct(fields)

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """The base's encoder and pooler with a fresh classifier; its configuration carries the labels."""
        return self.fresh_model(
            base,
            problem_type="single_label_classification",
            labels=self.card.labels,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Cross-entropy of each sample (S,), times the weight of its label; outputs (P, C), targets int64 (S,).

        Not by the weights of torch's function, which count for what smoothing spreads too: with one label in a hundred
        rows, balanced, a tenth spread would make that label the likeliest for all rows.
        """
        losses = F.cross_entropy(
            by_sample(outputs, batch, len(targets)),
            targets,
            label_smoothing=self.learning.label_smoothing,
            reduction="none",
        )
        weights = self.learning.label_weights
        return losses if weights is None else losses * losses.new_tensor(weights)[targets]

    def learning_for(
        self, label_smoothing: float, class_weights: str | Mapping[str, float], truth: Sequence[pa.Array]
    ) -> Learning:
        """Smoothing and weights; balanced ones are N / (C * rows of the label), as scikit-learn's class_weight has it.

        Raises:
            JobError: a weight for a label that there is not.
        """
        labels = self.card.labels
        counts = np.bincount(self.indices(truth[0]), minlength=len(labels))
        # A label of the job that no row has is weighed in no loss.
        balanced = np.where(counts > 0, counts.sum() / (len(labels) * np.maximum(counts, 1)), 1.0)
        return Learning(label_smoothing=label_smoothing, label_weights=weights_of(class_weights, labels, balanced))

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """The distinct labels.

        Raises:
            ColumnError: one label alone, or so many that the column cannot be a label.
        """
        found = labels_of(truth[0])
        if len(found) < 2:
            raise ColumnError(
                f"it has one label only ({found[0]!r}) in all {len(truth[0])} rows; a model needs rows of at least two "
                "to tell apart"
            )
        if not self.card.labels and len(found) > _MANY_LABELS and 2 * len(found) > len(truth[0]):
            raise ColumnError(
                f"it has {len(found)} different values in {len(truth[0])} rows, which looks like no label; name "
                "another column, or list the labels in `labels`"
            )
        return ["negative", "positive"] if self.name == "sentiment" and found == ["0", "1"] else found

    def targets(self, pieces: Pieces, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Targets:
        """Indices of the labels, int64 (S,)."""
        return Targets(values=self.indices(truth[0]))

    def indices(self, labels: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Labels -> their indices, int64; see `label_indices`."""
        return label_indices(labels, self.card.labels)

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Logits float32 (P, C) -> structs; of a text in windows the mean of their logits counts."""
        logits = by_row(outputs, pieces)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        probabilities = (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
        names = pa.array(self.card.labels, pa.string())
        best = probabilities.argmax(axis=1)
        columns = [names.take(pa.array(best)), pa.array(probabilities[np.arange(len(best)), best])]
        if self.options.scores:
            rows, count = probabilities.shape
            keys = names.take(pa.array(np.tile(np.arange(count), rows)))
            offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * count)
            columns.append(pa.MapArray.from_arrays(offsets, keys, pa.array(probabilities.reshape(-1))))
        return pa.StructArray.from_arrays(columns, fields=list(self.output_type()))

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """Accuracy and macro F1 (the unweighted mean over labels); of two labels also those of the second."""
        from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

        said = self.indices(annotations.field("label"))
        so = self.indices(truth[0])
        present = list(range(len(self.card.labels)))
        found = {
            "accuracy": float(accuracy_score(so, said)),
            "macro_f1": float(f1_score(so, said, average="macro", labels=present, zero_division=0.0)),
        }
        if len(present) == 2:
            for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
                found[name] = float(score(so, said, pos_label=1, zero_division=0.0))
        return found

    def baseline(self, train: Sequence[pa.Array], truth: Sequence[pa.Array]) -> float | None:
        """Accuracy of always saying the most frequent training label."""
        return float((self.indices(truth[0]) == np.bincount(self.indices(train[0])).argmax()).mean())

    def check_truth(self, truth: Sequence[pa.Array]) -> None:
        """The labels are the model's."""
        self.indices(truth[0])

    def measuring(self) -> dict[str, Any]:
        """With every label's score, for curves and average precision."""
        return {"scores": True} if len(self.card.labels) <= SCORED_LABELS else {}

    def constant(self, truth: Sequence[pa.Array]) -> Constant | None:
        """Always the most frequent label."""
        if self.baseline(truth, truth) is None:
            return None
        return majority(self.card.labels, self.indices(truth[0]))

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """Confusions, figures by label, precision over recall, the surest mistakes."""
        if not pa.types.is_struct(annotations.type):  # A task built on this one that says something else.
            return super().report(annotations, inputs, truth, most)
        so = self.indices(truth[0])
        return one_label_report(self.card.labels, annotations, so, self.inputs, inputs, most)


def label_indices(labels: pa.Array | pa.ChunkedArray, known: Sequence[str], *, by_position: bool = True) -> np.ndarray:
    """Labels -> their indices in `known`, int64.

    Args:
        labels: names; `by_position`: or integers or booleans that are indices, where none of them is a name, nor a
            name a number.
        known: the model's labels.
        by_position: whether they may be.

    Raises:
        ColumnError: a null, or a value that is none of the labels.
    """
    if isinstance(labels, pa.ChunkedArray):
        labels = labels.combine_chunks()
    if labels.null_count:
        raise ColumnError(f"the label column has {labels.null_count} nulls; remove or fill those rows")
    texts = label_texts(labels)
    indices = pc.index_in(texts, pa.array(known, pa.string()))
    if by_position and indices.null_count == len(texts) and not any(name.lstrip("-").isdecimal() for name in known):
        indices = pc.index_in(texts, pa.array([str(index) for index in range(len(known))], pa.string()))
    if indices.null_count:
        strange = pc.unique(texts.filter(pc.is_null(indices))).to_pylist()[:5]
        raise ColumnError(f"unknown labels {strange}; the model's labels are {list(known)}")
    return indices.to_numpy(zero_copy_only=False).astype(np.int64)


def label_texts(labels: pa.Array) -> pa.Array:
    """A label column of strings, integers or booleans as strings ("0", "1" for booleans)."""
    kind = labels.type
    if pa.types.is_boolean(kind):
        labels = labels.cast(pa.int8())
    elif pa.types.is_floating(kind) or pa.types.is_nested(kind) or pa.types.is_temporal(kind):
        other = "; lists are for task multi-label" if pa.types.is_nested(kind) else ""
        other = "; numbers are for task regression" if pa.types.is_floating(kind) else other
        raise ColumnError(f"the label column is {kind}; labels are strings, integers or booleans{other}")
    try:
        texts = labels.cast(pa.string())
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ColumnError(f"the label column has bytes that are no UTF-8: {error}") from None
    return texts


def labels_of(labels: pa.Array | pa.ChunkedArray) -> list[str]:
    """The distinct labels of a column in a stable order: integers by value, strings by code point; nulls left out."""
    if isinstance(labels, pa.ChunkedArray):
        labels = labels.combine_chunks()
    label_texts(labels.slice(0, 0))  # Refuses a type that Arrow finds no distinct values of.
    distinct = pc.unique(labels).drop_null()
    if pa.types.is_integer(distinct.type):
        distinct = distinct.take(pc.sort_indices(distinct))
        return label_texts(distinct).to_pylist()
    return sorted(label_texts(distinct).to_pylist())
