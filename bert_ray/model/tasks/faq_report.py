"""What the report of FAQ answers shows: what a threshold would do, and wrong answers beside the right ones.

Shapes: B rows.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.model.tasks.sections import Case, Cases, Curve, Line, Section, Table, shown, strings_at, thinned

# Thresholds that the table names.
_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def faq_report(
    annotations: pa.Array, right: np.ndarray, answers: pa.Array, questions: pa.Array, most: int
) -> list[Section]:
    """Of FAQ answers.

    Args:
        annotations: struct<answer, score, id, question> (B,), null where none was given.
        right: bool (B,), where the right pair was given.
        answers: the right answers, string (B,).
        questions: as they were asked, (B,).
        most: wrong answers to show, the surest first; and a quarter as many right ones.
    """
    scores = pc.fill_null(pc.struct_field(annotations, "score"), -np.inf).to_numpy(zero_copy_only=False)
    found: list[Section] = _thresholds(scores, right)
    said = [pc.struct_field(annotations, name) for name in ("answer", "question")]
    for key, title, chosen, count in (
        ("mistakes", "Surest wrong answers", np.flatnonzero(~right), most),
        ("right", "Right answers", np.flatnonzero(right), -(-most // 4)),
    ):
        rows = chosen[np.argsort(-scores[chosen], kind="stable")][:count].tolist()
        asked, so, answer, question = (strings_at(array, rows) for array in (questions, answers, *said))
        cases = tuple(
            Case(
                row=row,
                texts=(("question", shown(asked[place])),),
                said=shown(answer[place]) if np.isfinite(scores[row]) else "no answer",
                so=shown(so[place]),
                right=key == "right",
                detail=f"score {scores[row]:.2f}, as to “{shown(question[place], 120)}”"
                if np.isfinite(scores[row])
                else "",
            )
            for place, row in enumerate(rows)
        )
        if cases:
            found.append(Cases(key=key, title=title, cases=cases, long=True))
    return found


def _thresholds(scores: np.ndarray, right: np.ndarray) -> list[Section]:
    """How many questions would be answered from which score on, and how many of these rightly."""
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    if not len(order):
        return []
    answered = np.arange(1, len(order) + 1)
    x, y = thinned(answered / len(scores), right[order].cumsum() / answered)
    rows = []
    for threshold in _THRESHOLDS:
        held = scores >= threshold
        if held.any():
            rows.append((f"{threshold:g}", int(held.sum()), float(held.mean()), float(right[held].mean())))
    curve = Curve(
        key="threshold-curve",
        title="Fewer answers, more of them right",
        x="share of questions answered",
        y="share of these right",
        lines=(Line(name="", x=x, y=y),),
        note="From left to right the threshold falls.",
    )
    table = Table(
        key="thresholds",
        title="What a threshold would do",
        header=("threshold", "answered", "share answered", "of these right"),
        rows=tuple(rows),
        note="The option threshold: questions whose best pair scores lower get no answer.",
    )
    return [curve, table] if rows else [curve]
