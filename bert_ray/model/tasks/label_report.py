"""What the reports of tasks with labels show: confusions, figures by label, precision over recall, sure mistakes.

Shapes: B rows, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.model.tasks.sections import (
    MATRIX_LABELS,
    Case,
    Cases,
    Confusion,
    Constant,
    Curve,
    Line,
    Section,
    Table,
    shown,
    texts_at,
    thinned,
)

# With so many labels or fewer, all scores of a row are asked for; more would be as much memory as the texts.
SCORED_LABELS = 32
# As many lines as can be told apart: with more labels, the whole between the best and the worst.
_LINES = 3


def one_label_report(
    names: Sequence[str],
    annotations: pa.Array,
    so: np.ndarray,
    columns: Sequence[str],
    inputs: Sequence[pa.Array],
    most: int,
) -> list[Section]:
    """Of one label a row.

    Args:
        names: C labels.
        annotations: struct<label, score[, scores]> (B,); null where no label was said.
        so: integer (B,), positions in `names`.
        columns: names of the inputs.
        inputs: text columns, (B,) each.
        most: mistakes to show, the surest first.
    """
    from sklearn.metrics import precision_recall_fscore_support

    labels = pc.index_in(pc.struct_field(annotations, "label"), pa.array(names, pa.string()))
    said = pc.fill_null(labels, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    surest = pc.fill_null(pc.struct_field(annotations, "score"), 0.0).to_numpy(zero_copy_only=False)
    every = list(range(len(names)))
    measured = precision_recall_fscore_support(so, said, labels=every, zero_division=0.0)
    counts = _taken_for(so, said, len(names))
    silent = int((said < 0).sum())
    scores = label_scores(annotations, said, surest, len(names))
    held = np.eye(len(names), dtype=bool)[so] if scores is not None else None
    found: list[Section] = [
        Confusion(
            key="confusion",
            title="Confusion matrix",
            labels=tuple(names),
            counts=counts,
            note=f"{silent:,} rows got no label and are in no column." if silent else "",
        ),
        _by_label(names, measured, np.bincount(said[said >= 0], minlength=len(names)), held, scores),
    ]
    if scores is not None and held is not None:
        # Of two labels one says it all: the second, which f1 is of; or the first where it is rare, and so what is
        # looked for.
        rows = np.bincount(so, minlength=len(names))
        chosen = [int(2 * rows[0] >= rows[1])] if len(names) == 2 else every
        found += _curve(names, held, scores, chosen)
    wrong = np.flatnonzero(said != so)
    wrong = wrong[np.argsort(-surest[wrong], kind="stable")][:most]
    cases = tuple(
        Case(
            row=row,
            texts=texts,
            said=names[said[row]] if said[row] >= 0 else "no label",
            so=names[so[row]],
            right=False,
            detail=f"{surest[row]:.1%}".replace("%", " %") if said[row] >= 0 else "",
        )
        for row, texts in zip(wrong.tolist(), texts_at(columns, inputs, wrong.tolist()), strict=True)
    )
    return [*found, _mistakes(cases)]


def _taken_for(so: np.ndarray, said: np.ndarray, names: int) -> Any:
    """How often each label was taken for each, int64 (C, C); of more labels than a matrix is shown for, sparse."""
    from scipy.sparse import coo_array

    told = said >= 0
    counts = coo_array((np.ones(told.sum(), np.int64), (so[told], said[told])), shape=(names, names)).tocsr()
    return counts.toarray() if names <= MATRIX_LABELS else counts


def label_sets_report(
    names: Sequence[str],
    so: np.ndarray,
    said: np.ndarray,
    scores: np.ndarray | None,
    columns: Sequence[str],
    inputs: Sequence[pa.Array],
    most: int,
) -> list[Section]:
    """Of none, one or several labels a row.

    Args:
        names: C labels.
        so: 0 or 1 (B, C), the labels that rows have.
        said: 0 or 1 (B, C), those that the model gave them.
        scores: float (B, C), of every label; None where only those that were said have one.
        columns: names of the inputs.
        inputs: text columns, (B,) each.
        most: mistakes to show, the surest first.
    """
    from sklearn.metrics import precision_recall_fscore_support

    every = list(range(len(names)))
    if len(names) > 1:
        measured = precision_recall_fscore_support(so, said, labels=every, zero_division=0.0)
    else:  # scikit-learn takes one column for a question of two answers.
        measured = precision_recall_fscore_support(so[:, 0], said[:, 0], labels=[1], zero_division=0.0)
    found: list[Section] = [_by_label(names, measured, said.sum(axis=0, dtype=np.int64), so, scores)]
    if scores is not None:
        found += _curve(names, so.astype(bool), scores, every)
    # How wrong the surest error of a row is: its score where the label is not so, what is missing to 1 where it is.
    wrong = so != said
    error = wrong.sum(axis=1).astype(float)
    if scores is not None:
        error = np.where(wrong, np.abs(scores - so), 0.0).max(axis=1)
    rows = np.flatnonzero(wrong.any(axis=1))
    rows = rows[np.argsort(-error[rows], kind="stable")][:most]

    def words(held: np.ndarray) -> str:
        return shown(", ".join(names[label] for label in np.flatnonzero(held).tolist()) or "none", 200)

    cases = tuple(
        Case(row=row, texts=texts, said=words(said[row]), so=words(so[row]), right=False)
        for row, texts in zip(rows.tolist(), texts_at(columns, inputs, rows.tolist()), strict=True)
    )
    return [*found, _mistakes(cases)]


def majority(names: Sequence[str], so: np.ndarray) -> Constant:
    """Saying the most frequent label always: its accuracy and macro F1.

    Args:
        names: C labels.
        so: integer (B,), at least one row.
    """
    rows = np.bincount(so, minlength=len(names))
    most = int(rows.argmax())
    share = float(rows[most] / len(so))
    # Of that label all rows are found, and `share` of what is said is right; the others have an F1 of 0.
    return Constant(
        name="majority",
        says=names[most],
        figures={"accuracy": share, "macro_f1": 2 * share / (1 + share) / len(names)},
    )


def label_scores(annotations: pa.Array, said: np.ndarray, surest: np.ndarray, labels: int) -> np.ndarray | None:
    """Every label's score, float (B, C), 0 for rows without an annotation; None where they are not to be had.

    Args:
        annotations: struct<label, score[, scores]> (B,), `scores` in the order of the labels.
        said: integer (B,), the label that was said; -1: none.
        surest: float (B,), its score.
        labels: C.
    """
    known = said >= 0
    found = np.zeros((len(said), labels))
    names = [annotations.type.field(place).name for place in range(annotations.type.num_fields)]
    if "scores" in names:
        maps = pc.struct_field(annotations, "scores").drop_null()
        if len(maps):
            start, end = maps.offsets[0].as_py(), maps.offsets[len(maps)].as_py()
            found[known] = maps.items[start:end].to_numpy(zero_copy_only=False).reshape(len(maps), labels)
        return found
    if labels != 2:
        return None
    found[known, said[known]] = surest[known]
    found[known, 1 - said[known]] = 1.0 - surest[known]
    return found


def _by_label(
    names: Sequence[str],
    measured: Sequence[np.ndarray],
    said: np.ndarray,
    held: np.ndarray | None,
    scores: np.ndarray | None,
) -> Table:
    """Figures by label.

    Args:
        names: C labels.
        measured: precision, recall, F1 and rows, (C,) each.
        said: integer (C,), rows that each label was said of.
        held: 0 or 1 (B, C), rows that have it; None: without average precision.
        scores: float (B, C), the same.
    """
    precision, recall, f1, rows = measured
    header = ["label", "rows", "said", "precision", "recall", "F1"]
    cells: list[list[str | int | float]] = [
        [
            names[label],
            int(rows[label]),
            int(said[label]),
            float(precision[label]),
            float(recall[label]),
            float(f1[label]),
        ]
        for label in range(len(names))
    ]
    if held is not None and scores is not None:
        header.append("average precision")
        for label, row in enumerate(cells):
            row.append(_average_precision(held[:, label], scores[:, label]))
    return Table(key="labels", title="By label", header=tuple(header), rows=tuple(tuple(row) for row in cells))


def _average_precision(held: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(held, scores)) if held.any() else 0.0


def _curve(names: Sequence[str], held: np.ndarray, scores: np.ndarray, chosen: Sequence[int]) -> list[Section]:
    """Precision over recall: of the chosen labels, or of all together, the best and the worst where they are many."""
    from sklearn.metrics import precision_recall_curve

    # A label that no row has, or every row, has no curve.
    chosen = [label for label in chosen if held[:, label].any() and not held[:, label].all()]
    if not chosen:
        return []
    sets = [(names[label], held[:, label], scores[:, label]) for label in chosen]
    note = ""
    if len(sets) > _LINES:
        ranked = sorted(sets, key=lambda item: _average_precision(item[1], item[2]))
        together = ("all labels", held[:, chosen].reshape(-1), scores[:, chosen].reshape(-1))
        sets = [together, ranked[-1], ranked[0]]
        note = f"All {len(chosen)} labels together (every pair of row and label), the best one and the worst one."

    def line(name: str, so: np.ndarray, score: np.ndarray) -> Line:
        precision, recall, _ = precision_recall_curve(so, score)
        recall, precision = thinned(recall[::-1], precision[::-1])
        return Line(name=f"{shown(name, 24)} {_average_precision(so, score):.2f}", x=recall, y=precision)

    explained = "The number after a name is the average precision, the area under its line."
    return [
        Curve(
            key="precision-recall",
            title="Precision over recall",
            x="recall",
            y="precision",
            lines=tuple(starmap(line, sets)),
            note=f"{note} {explained}".strip(),
        )
    ]


def _mistakes(cases: tuple[Case, ...]) -> Cases:
    note = "Rows where the model was surest and the table says otherwise. Some of them may be the table’s mistakes."
    return Cases(key="mistakes", title="Most confident mistakes", cases=cases, note=note)
