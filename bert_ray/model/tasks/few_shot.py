"""Few-shot labels: one label of C for each text, learned from 8 to 64 examples a label in seconds on a CPU.

The encoder stays as it is; a logistic regression on its embeddings (the second step of Tunstall et al., Efficient
Few-Shot Learning Without Prompts, arXiv 2209.11055) is the head. The bundle is the base's files and `head.safetensors`:
weight float32 (C, D) and bias float32 (C,).

Output: struct<label: string, score: float32>, score being the label's probability; with scores also
scores: map<string, float32>, the probability of every label. A blank text has nothing to judge and gives null.

Shapes: N examples, B rows, P pieces, D hidden size, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model.tasks.base import Outputs
from bert_ray.model.tasks.classification import label_texts
from bert_ray.model.tasks.zero_shot import LabelsByEmbedding, figures
from bert_ray.model.tokenization import Pieces, as_strings, is_blank

if TYPE_CHECKING:
    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import Bundle

HEAD_FILE = "head.safetensors"

# Inverse strengths of the L2 penalty to choose from, as scikit-learn counts them; and what is taken untried where a
# label has a single example: vectors of unit length want less of a penalty than scikit-learn's 1.
_STRENGTHS, _UNTRIED_STRENGTH = (0.1, 1.0, 10.0, 100.0), 10.0
_MOST_FOLDS = 5
_MOST_ITERATIONS = 1000


@dataclass(kw_only=True, slots=True)
class Head:
    """A linear head.

    Attributes:
        weight: float32 (C, D).
        bias: float32 (C,).
        strength: scikit-learn's C that it was fitted with.
        folds: of the cross-validation that chose it; 0: there was none.
        metrics: by that cross-validation: each example judged by a head that has not seen it.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float = 0.0
    folds: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors (B, D) -> logits float32 (B, C)."""
        return vectors.astype(np.float32, copy=False) @ self.weight.T + self.bias

    def save(self, directory: Path) -> None:
        """Write `head.safetensors`."""
        from safetensors.numpy import save_file

        save_file({"weight": self.weight, "bias": self.bias}, directory / HEAD_FILE)

    @classmethod
    def load(cls, directory: Path, labels: int, width: int) -> Head:
        """Read it.

        Args:
            directory: the bundle's.
            labels: C of the card.
            width: D of the model.

        Raises:
            BundleError: there is none, or it is damaged or of another model.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = directory / HEAD_FILE
        if not path.exists():
            raise BundleError(
                f"{directory} has no {HEAD_FILE}: make a few-shot bundle with bert-ray train, task: few-shot"
            )
        try:
            found = load_file(path)
            head = cls(weight=found["weight"], bias=found["bias"])
        except (KeyError, OSError, SafetensorError) as error:
            raise BundleError(f"{path} cannot be read: {error}") from error
        if head.weight.shape != (labels, width) or head.bias.shape != (labels,):
            raise BundleError(
                f"{path} is for {head.weight.shape[0]} labels and vectors of {head.weight.shape[-1]}, the bundle has "
                f"{labels} labels and vectors of {width}"
            )
        return head


class FewShot(LabelsByEmbedding):
    """One label of those that a few examples show."""

    kind: ClassVar[str] = "few-shot"
    builds: ClassVar[tuple[str, ...]] = ("text", "label")
    least_labels: ClassVar[int] = 2

    _head: Head | None = None

    def prepare(self, annotator: Annotator) -> None:
        """Read the head."""
        super().prepare(annotator)
        self._head = Head.load(annotator.bundle.directory, len(self.names), annotator.bundle.config.hidden_size)

    def decode(self, outputs: Outputs, pieces: Pieces, inputs: Sequence[pa.Array]) -> pa.Array:
        """Vectors float32 (P, D) -> structs."""
        assert self._head is not None, "prepare comes first"
        return self.annotations(self._head(self.vectors(outputs, pieces)), inputs)

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """The distinct labels, as classification finds them."""
        return self.judge.labels_in(truth)

    def build(
        self, base: Bundle, columns: Mapping[str, pa.Array], output: Path, provenance: Mapping[str, Any]
    ) -> tuple[int, list[str]]:
        """Embed the examples, fit the head, and write the bundle; the card gets the cross-validated metrics.

        Args:
            base: any bundle with a supported encoder; an embedding model, to be of use.
            columns: text, label.
            output: the bundle's directory.
            provenance: for its card; `seed` decides the folds.

        Returns:
            examples used, and notes for the user.

        Raises:
            ColumnError: a column is missing or of the wrong type, or there is one label only, or an unknown one.
            JobError: no row can be used, or a label of the job has no example.
        """
        from bert_ray.model.annotator import Annotator, AnnotatorSpec
        from bert_ray.model.bundle import save_bundle

        texts, labels, notes = _examples(columns)
        found = self.labels_in([labels])
        self.card.labels = self.card.labels or found
        self.card.pooling, self.card.normalize = base.card.pooling, base.card.normalize
        indices = self.indices(labels)
        counts = np.bincount(indices, minlength=len(self.names))
        if not counts.all():
            without = [name for name, count in zip(self.names, counts, strict=True) if not count]
            raise JobError(f"labels: no row has {', '.join(map(repr, without[:5]))}; leave it out, or give examples")
        encoding = replace(self.card, task="embedding", labels=[], options={})
        # fp32: the examples are few, and the head should be the same wherever it is made.
        annotator = Annotator(replace(base, card=encoding), AnnotatorSpec(model=base.reference, dtype="fp32"))
        pieces = self.encode(self.tokenizer(base.tokenizer()), [texts])
        head = fit_head(
            self.vectors(annotator.outputs_of(pieces), pieces), indices, self.names, seed=int(provenance.get("seed", 0))
        )
        if head.folds:
            notes.append(f"{head.folds}-fold cross-validation chose C={head.strength:g} (inverse strength of L2)")
        else:
            alone = self.names[int(counts.argmin())]
            notes.append(f"label {alone!r} has one example: C={head.strength:g} is untried, and nothing was measured")
        card = replace(
            self.card,
            inputs=list(self.inputs),
            metrics=head.metrics,
            provenance={**provenance, "head": {"C": head.strength, "folds": head.folds}},
        )
        save_bundle(output, base.model(annotator.task), base.tokenizer(), card, add=head.save)
        return len(texts), notes


def fit_head(vectors: np.ndarray, indices: np.ndarray, names: Sequence[str], *, seed: int = 0) -> Head:
    """Fit scikit-learn's logistic regression, its penalty chosen by the accuracy on held-out examples.

    Of equals the strongest: on news with 16 and 64 examples a label, choosing by log-loss instead prefers weak
    penalties, whose scores are surer and whose labels are wrong one to two times more in a hundred.

    Args:
        vectors: float32 (N, D).
        indices: label of each, int64 (N,); every one of 0 … C - 1 occurs.
        names: C labels.
        seed: of the folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    vectors = vectors.astype(np.float64)

    def regression(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=_MOST_ITERATIONS)

    strength = _UNTRIED_STRENGTH
    metrics: dict[str, float] = {}
    folds = min(_MOST_FOLDS, int(np.bincount(indices).min()))
    if folds < 2:
        folds = 0
    else:
        split = StratifiedKFold(folds, shuffle=True, random_state=seed)
        said = {
            strength: cross_val_predict(regression(strength), vectors, indices, cv=split, method="predict_proba")
            for strength in _STRENGTHS
        }
        found = {strength: figures(indices, values.argmax(axis=1), names) for strength, values in said.items()}
        strength = max(found, key=lambda strength: (found[strength]["accuracy"], -strength))
        metrics = found[strength]
    fitted = regression(strength).fit(vectors, indices)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(names) == 2:  # One row, the second label's logit against 0.
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.append(0.0, bias)
    # C order: safetensors writes the bytes as they lie, and scikit-learn's may lie the other way.
    weight, bias = (np.ascontiguousarray(values, np.float32) for values in (weight, bias))
    return Head(weight=weight, bias=bias, strength=strength, folds=folds, metrics=metrics)


def _examples(columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> tuple[pa.Array, pa.Array, list[str]]:
    """Texts and labels of the rows that have both, and notes on the others."""
    for name in ("text", "label"):
        if name not in columns:
            raise ColumnError(f"there is no column {name!r}; name it with data.columns.{name}")
    texts, labels = as_strings(columns["text"], "text"), columns["label"]
    if isinstance(labels, pa.ChunkedArray):
        labels = labels.combine_chunks()
    if pa.types.is_null(labels.type) or labels.null_count == len(labels):
        raise JobError(f"the label is null in all {len(labels)} rows; name another column with data.columns.label")
    label_texts(labels.slice(0, 0))
    if labels.type in (pa.string(), pa.large_string()) and labels.cast(pa.large_string()).equals(texts):
        raise JobError("text and label are the same in every row; a model cannot learn a column from itself")
    blank, nameless = pc.fill_null(is_blank(texts), True), pc.is_null(labels)
    keep = pc.invert(pc.or_(blank, nameless))
    texts, labels = texts.filter(keep), labels.filter(keep)
    if not len(texts):
        raise JobError(f"none of the {len(keep)} rows has a text and a label: there is nothing to learn from")
    notes = []
    if len(texts) < len(keep):
        notes.append(f"{len(keep) - len(texts)} of {len(keep)} rows left out: without a text or a label")
    return texts, labels, notes
