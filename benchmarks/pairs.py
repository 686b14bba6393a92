"""Pairs of texts told apart by the cosine of their embeddings: where it is cut, and how often that is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa


def cut_accuracy(cosines: Callable[[pa.Table], np.ndarray], held_out: pa.Table, test: pa.Table) -> float:
    """Accuracy on `test` of a cut where a logistic regression on pairs held out says one half.

    The cut that is right most often there is decided by a few pairs, and hits or misses.

    Args:
        cosines: of a table's pairs, float (B,).
        held_out: pairs that were not trained on, with `label`.
        test: likewise, to be measured by.
    """
    from sklearn.linear_model import LogisticRegression

    def scored(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(cosines(table))[:, None], table["label"].to_numpy()

    # All but unregularised.
    return float(LogisticRegression(C=1e4).fit(*scored(held_out)).score(*scored(test)))


def model_accuracy(model: str, rest: pa.Table, test: pa.Table, threads: int | None, dtype: str = "auto") -> float:
    """The same by the embeddings of a bundle."""
    from bert_ray.model.annotator import AnnotatorSpec

    annotator = AnnotatorSpec(model=model, task="similarity", threads=threads, dtype=dtype).build()
    return cut_accuracy(lambda table: annotator.annotate([table["text"], table["text_pair"]]), rest, test)


def held_out(train: pa.Table) -> tuple[pa.Table, pa.Table]:
    """A tenth of the rows to cut by, and the others."""
    tenth = len(train) // 10
    return train.slice(0, tenth), train.slice(tenth)
