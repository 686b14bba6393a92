"""Metrics of a classification, by scikit-learn, and the baseline that a model has to beat.

Shapes: N rows, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelScores:
    """One label's figures.

    Attributes:
        label: its name.
        rows: rows that have it.
        predicted: rows that the model gave it to.
        precision: share of `predicted` that is right; 0 where nothing was predicted.
        recall: share of `rows` that was found; 0 where there are none.
        f1: their harmonic mean.
    """

    label: str
    rows: int
    predicted: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """A model's figures on a labelled table.

    Attributes:
        rows: N.
        accuracy: share of rows whose label was said.
        macro_f1: unweighted mean of the labels' F1, every label of the model counted.
        majority_label: the table's most frequent label.
        majority_accuracy: accuracy of saying that label always.
        majority_macro_f1: macro F1 of saying it always.
        labels: per label, in the model's order.
        confusion: int64 (C, C): rows of label i that were said to be j.
    """

    rows: int
    accuracy: float
    macro_f1: float
    majority_label: str
    majority_accuracy: float
    majority_macro_f1: float
    labels: tuple[LabelScores, ...]
    confusion: np.ndarray

    def figures(self) -> dict[str, float]:
        """Name -> value of the metrics, the baseline's among them."""
        names = ("accuracy", "macro_f1", "majority_accuracy", "majority_macro_f1")
        return {name: float(getattr(self, name)) for name in names}


def score(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray) -> Scores:
    """Compare what a model said with what is so.

    Args:
        labels: C label names.
        truth: integer (N,), positions in `labels`.
        predicted: integer (N,), positions in `labels`.

    Raises:
        ValueError: no rows, or arrays of different lengths.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

    if not len(truth) or len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} labels and {len(predicted)} predictions: give one or more of each, in pairs")
    every = list(range(len(labels)))
    most = int(np.bincount(truth, minlength=len(labels)).argmax())
    baseline = np.full_like(truth, most)
    options = {"labels": every, "zero_division": 0.0}
    precision, recall, f1, rows = precision_recall_fscore_support(truth, predicted, **options)
    confusion = confusion_matrix(truth, predicted, labels=every)
    return Scores(
        rows=len(truth),
        accuracy=float(accuracy_score(truth, predicted)),
        macro_f1=float(np.mean(f1)),
        majority_label=labels[most],
        majority_accuracy=float(accuracy_score(truth, baseline)),
        majority_macro_f1=float(f1_score(truth, baseline, average="macro", **options)),
        labels=tuple(
            LabelScores(
                label=name,
                rows=int(rows[index]),
                predicted=int(confusion[:, index].sum()),
                precision=float(precision[index]),
                recall=float(recall[index]),
                f1=float(f1[index]),
            )
            for index, name in enumerate(labels)
        ),
        confusion=confusion,
    )
