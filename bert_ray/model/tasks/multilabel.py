"""Multi-label: of C labels those that a text has: none, one or several.

Output: list<struct<label: string, score: float32>>, the labels whose probability reaches the threshold, the likeliest
first; with scores every label, in the same type. A text with none of the labels has an empty list; a blank text has
nothing to judge and gives null.

Shapes: B rows, P pieces, C labels, S samples of a training batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from bert_ray.errors import ColumnError, JobError
from bert_ray.model.examples import Examples, Targets
from bert_ray.model.tasks.base import Learning, Options, Outputs
from bert_ray.model.tasks.classification import Classification, label_indices, labels_of
from bert_ray.model.tasks.heads import SequenceOptions, SequenceTask, by_row, by_sample, weights_of
from bert_ray.model.tasks.label_report import SCORED_LABELS, label_sets_report
from bert_ray.model.tokenization import is_list, is_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tasks.sections import Section
    from bert_ray.model.tokenization import Pieces

# More distinct labels than this, and most of them in one list alone: free text, not labels.
_MANY_LABELS = 50


@dataclass(kw_only=True, frozen=True, slots=True)
class MultiLabelOptions(SequenceOptions):
    """What may be chosen per call.

    Attributes:
        threshold: the probability that a label has to reach. Unless the training job gives one, training sets it to
            what has the best micro F1 on the validation rows.
        scores: give every label, whatever the threshold.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if not 0.0 <= self.threshold <= 1.0:
            raise JobError(f"options.threshold is {self.threshold}; give a probability from 0 to 1")


class MultiLabel(SequenceTask):
    """Those of C labels that a text has."""

    kind: ClassVar[str] = "multi-label"
    metric: ClassVar[str] = "micro_f1"
    options_type: ClassVar[type[Options]] = MultiLabelOptions
    headline: ClassVar[str] = "finds the labels with a micro F1 of {micro_f1:.1%}"

    def __init__(
        self, card: Card, config: PretrainedConfig | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Bind to a card; see SequenceTask."""
        super().__init__(card, config, options)
        # A threshold that the job gives is not tuned.
        self._tunes = "threshold" not in card.options

    @classmethod
    def fits(cls, config: PretrainedConfig) -> bool:
        """Where the configuration says so."""
        return config.problem_type == "multi_label_classification"

    @classmethod
    def labels_of(cls, config: PretrainedConfig) -> list[str]:
        """The names in the configuration, in the order of the logits."""
        return Classification.labels_of(config)

    def output_type(self) -> pa.DataType:
        """See the module's first lines."""
        return pa.list_(pa.struct([pa.field("label", pa.string()), pa.field("score", pa.float32())]))

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """The base's encoder and pooler with a fresh classifier; its configuration carries the labels."""
        return self.fresh_model(
            base,
            problem_type="multi_label_classification",
            labels=self.card.labels,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Logits float32 (P, C) -> lists of structs; of a text in windows the mean of their logits counts."""
        scores = _probabilities(by_row(outputs, pieces))
        order = np.argsort(-scores, axis=1, kind="stable")
        ranked = np.take_along_axis(scores, order, axis=1)
        keep = np.ones_like(ranked, bool) if self.options.scores else ranked >= np.float32(self.options.threshold)
        offsets = np.zeros(len(scores) + 1, np.int32)
        np.cumsum(keep.sum(axis=1), out=offsets[1:])
        labels = pa.array(self.card.labels, pa.string()).take(pa.array(order[keep]))
        kind = self.output_type()
        values = pa.StructArray.from_arrays([labels, pa.array(ranked[keep])], fields=list(kind.value_type))
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)

    # Training and evaluation.

    def read_truth(
        self, truth: Sequence[pa.Array], inputs: Sequence[pa.Array]
    ) -> tuple[Sequence[pa.Array], Sequence[pa.Array]]:
        """The label column as list<string> or list<int64> (positions), whatever list type it came in.

        Raises:
            ColumnError: it holds no lists of labels.
        """
        return [_lists(truth[0])], super().read_truth(truth, inputs)[1]

    def faults(self, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, np.ndarray]:
        """Lists with a null in them."""
        found = np.zeros(len(truth[0]), bool)
        rows, flat = _flat(truth[0])
        found[rows[flat.is_null().to_numpy(zero_copy_only=False)]] = True
        return {"a null among its labels": found}

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """The distinct labels.

        Raises:
            ColumnError: no row has a label, all rows have all of them, or they are so many that they cannot be labels.
        """
        rows, flat = _flat(truth[0])
        found = labels_of(flat)
        if not found:
            raise ColumnError(f"all {len(truth[0])} lists are empty; a model needs rows with labels")
        names = self.card.labels or found
        known = label_indices(flat, names)
        if len(np.unique(rows * len(names) + known)) == len(truth[0]) * len(found):
            raise ColumnError(
                f"all {len(truth[0])} rows have the same labels ({', '.join(map(repr, found[:5]))}); a model needs "
                "rows that differ to tell apart"
            )
        if not self.card.labels and len(found) > _MANY_LABELS and 2 * len(found) > len(flat):
            raise ColumnError(
                f"it has {len(found)} different values in {len(flat)} places, which look like no labels; name another "
                "column, or list the labels in `labels`"
            )
        return found

    def targets(self, pieces: Pieces, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> Targets:
        """1 where the sample has the label, uint8 (S, C)."""
        return Targets(values=self.held(truth[0]))

    def held(self, lists: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Lists of labels -> uint8 (B, C), 1 where the label stands in the list; a null list holds none.

        Raises:
            ColumnError: a value that is none of the labels.
        """
        rows, flat = _flat(_lists(lists))
        found = np.zeros((len(lists), len(self.card.labels)), np.uint8)
        found[rows, label_indices(flat, self.card.labels)] = 1
        return found

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Mean binary cross-entropy over the labels of each sample, (S,); outputs (P, C), targets uint8 (S, C).

        Label smoothing moves a target from 0 or 1 towards one half. The weight of a label counts where a sample has
        it.
        """
        smoothing, weights = self.learning.label_smoothing, self.learning.label_weights
        losses = F.binary_cross_entropy_with_logits(
            by_sample(outputs, batch, len(targets)),
            targets.to(outputs.dtype) * (1.0 - smoothing) + 0.5 * smoothing,
            reduction="none",
        )
        if weights is not None:
            # Not by torch's `pos_weight`, which counts for the half that smoothing gives to what a sample has not.
            losses = losses * torch.where(targets.bool(), losses.new_tensor(weights), 1.0)
        return losses.mean(dim=1)

    def learning_for(
        self, label_smoothing: float, class_weights: str | Mapping[str, float], truth: Sequence[pa.Array]
    ) -> Learning:
        """Smoothing and weights; a balanced one is rows without the label / rows with it.

        That is scikit-learn's N / (2 * rows of the class) for having a label, over that for not having it.

        Raises:
            JobError: a weight for a label that there is not.
        """
        counts = self.held(truth[0]).sum(axis=0, dtype=np.int64)
        without = len(truth[0]) - counts
        # A label that all rows have, or none, has nothing to be balanced.
        balanced = np.where((counts > 0) & (without > 0), without / np.maximum(counts, 1), 1.0)
        weights = weights_of(class_weights, self.card.labels, balanced)
        return Learning(label_smoothing=label_smoothing, label_weights=weights)

    def metrics(self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> dict[str, float]:
        """Micro F1 (over all pairs of row and label), macro F1 (the mean over labels), and exact matches of lists."""
        from sklearn.metrics import f1_score

        so, said = self.held(truth[0]), self._said(annotations)
        macro = [f1_score(so[:, label], said[:, label], zero_division=0.0) for label in range(so.shape[1])]
        return {
            # Micro F1 is the F1 of the one question "has this row this label?", asked of all pairs.
            "micro_f1": float(f1_score(so.reshape(-1), said.reshape(-1), zero_division=0.0)),
            "macro_f1": float(np.mean(macro)),
            "exact_match": float((so == said).all(axis=1).mean()),
        }

    def _said(self, annotations: pa.Array) -> np.ndarray:
        """Annotations as uint8 (B, C); with scores they hold every label, of which those above the threshold count."""
        rows, flat = _flat(annotations)
        scores = pc.struct_field(flat, "score").to_numpy(zero_copy_only=False)
        labels = label_indices(pc.struct_field(flat, "label"), self.card.labels)
        over = scores >= np.float32(self.options.threshold)
        found = np.zeros((len(annotations), len(self.card.labels)), np.uint8)
        found[rows[over], labels[over]] = 1
        return found

    def check_truth(self, truth: Sequence[pa.Array]) -> None:
        """The labels are the model's."""
        self.held(truth[0])

    def measuring(self) -> dict[str, Any]:
        """With every label's score, for curves and average precision."""
        return {"scores": True} if len(self.card.labels) <= SCORED_LABELS else {}

    def report(
        self, annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int = 20
    ) -> list[Section]:
        """Figures by label, precision over recall, the surest mistakes."""
        so, said, scores = self.held(truth[0]), self._said(annotations), None
        if self.options.scores:
            rows, flat = _flat(annotations)
            scores = np.zeros(so.shape)
            labels = label_indices(pc.struct_field(flat, "label"), self.card.labels)
            scores[rows, labels] = pc.struct_field(flat, "score").to_numpy(zero_copy_only=False)
        return label_sets_report(self.card.labels, so, said, scores, self.inputs, inputs, most)

    def baseline(self, train: Sequence[pa.Array], truth: Sequence[pa.Array]) -> float | None:
        """Micro F1 of always saying the same labels: those with which that is best in training."""
        counts = self.held(train[0]).sum(axis=0, dtype=np.int64)
        order = np.argsort(-counts, kind="stable")
        sizes = np.arange(1, len(order) + 1)
        best = int(np.argmax(2 * counts[order].cumsum() / (sizes * len(train[0]) + counts.sum())))
        so, said = self.held(truth[0]), order[: best + 1]
        return float(2 * so[:, said].sum() / (said.size * len(so) + so.sum()))

    def tune(self, outputs: Outputs, examples: Examples) -> dict[str, Any]:
        """The threshold with the best micro F1, unless the job gave one or no validation row has a label."""
        so = self.held(examples.truth[0])
        if not self._tunes or not so.any():
            return {}
        return {"threshold": best_threshold(_probabilities(by_row(outputs, examples.pieces)), so)}


def best_threshold(scores: np.ndarray, so: np.ndarray) -> float:
    """The threshold at which saying the labels that reach it has the best micro F1.

    It lies half-way between the last score that it lets in and the next.

    Args:
        scores: float32 (B, C).
        so: 0 or 1 (B, C), not all 0.
    """
    order = np.argsort(-scores, axis=None, kind="stable")
    ranked, right = scores.reshape(-1)[order], so.reshape(-1)[order].astype(np.int64)
    f1 = 2 * right.cumsum() / (np.arange(1, len(right) + 1) + right.sum())
    # Equal scores are let in together: a cut may only follow the last of them.
    f1[:-1][ranked[1:] == ranked[:-1]] = -1.0
    best = int(f1.argmax())
    last = ranked[best]
    following = ranked[best + 1] if best + 1 < len(ranked) else np.float32(0.0)
    middle = np.float32((last + following) / 2)
    return float(middle if middle > following else last)  # Neighbouring floats have nothing between them.


def _probabilities(logits: np.ndarray) -> np.ndarray:
    """The logistic function, float32; by tanh, which does not overflow."""
    return (0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64))).astype(np.float32)


def _lists(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column of lists as list<string>, or list<int64>."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    if pa.types.is_null(kind):
        return column.cast(pa.list_(pa.string()))
    if not is_list(kind):
        raise ColumnError(
            f"the label column is {kind}; task multi-label learns from lists of labels (one label a row: task "
            "classification)"
        )
    whole = pa.types.is_integer(kind.value_type)
    if not whole and not is_text(kind.value_type):
        raise ColumnError(f"the label column is {kind}; give the labels of each row as strings, or as their positions")
    return column.cast(pa.list_(pa.int64() if whole else pa.string()))


def _flat(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """The entries of all lists end to end, and the row of each, int64."""
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.combine_chunks()
    sizes = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(lists)), sizes), pc.list_flatten(lists)
