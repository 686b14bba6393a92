"""What the report of answers shows: figures by whether there is an answer, and answers beside the truth.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.model.tasks.answer_metrics import exact_match, f1
from bert_ray.model.tasks.sections import MARKS, Case, Cases, Mark, Section, Table, excerpt, shown, strings_at
from bert_ray.model.tokenization import to_python_strings

_NOTHING = "no answer"


def answers_report(
    annotations: pa.Array, inputs: Sequence[pa.Array], truth: Sequence[pa.Array], most: int
) -> list[Section]:
    """Of answers.

    Args:
        annotations: struct<text, start, end, score> (B,), null where none was given.
        inputs: questions and contexts, (B,) each.
        truth: answers and where they start, (B,) each; null where there is none.
        most: wrong answers to show, the worst and of these the surest first; and a quarter as many right ones.
    """
    said, so = to_python_strings(pc.struct_field(annotations, "text")), to_python_strings(truth[0])
    pairs = list(zip(said, so, strict=True))
    overlap = np.array([f1(*pair) for pair in pairs])
    exact = np.array([exact_match(*pair) for pair in pairs])
    scores = pc.fill_null(pc.struct_field(annotations, "score"), 0.0).to_numpy(zero_copy_only=False)
    has, given = (np.array([text is not None for text in texts]) for texts in (so, said))
    rows = []
    for name, held in (("has an answer", has), ("has none", ~has), ("all", np.ones(len(has), bool))):
        if held.any():
            count = int(held.sum())
            rows.append((name, count, int(given[held].sum()), float(overlap[held].mean()), float(exact[held].mean())))
    table = Table(
        key="answers",
        title="By whether there is an answer",
        header=("the context", "rows", "answered", "F1", "exact match"),
        rows=tuple(rows),
        note="F1 over words and exact match as SQuAD has them; no answer is right where there is none.",
    )
    # 1 within what sums of floats make of it.
    wrong = np.flatnonzero(overlap < 1.0 - 1e-9)
    wrong = wrong[np.lexsort((-scores[wrong], overlap[wrong]))][:most]
    right = np.flatnonzero((overlap >= 1.0 - 1e-9) & has)[: -(-most // 4)]
    found: list[Section] = [table]
    for key, title, chosen in (("mistakes", "Worst answers", wrong), ("right", "Right answers", right)):
        order = chosen.tolist()
        texts = zip(strings_at(inputs[0], order), strings_at(inputs[1], order), strict=True)
        cases = tuple(
            _case(row, question, context, annotations[row].as_py(), so[row], truth[1][row].as_py(), float(overlap[row]))
            for row, (question, context) in zip(order, texts, strict=True)
        )
        if cases:
            found.append(Cases(key=key, title=title, cases=cases, long=True, note=MARKS if key == "mistakes" else ""))
    return found


def _case(
    row: int,
    question: str,
    context: str,
    said: dict[str, object] | None,
    so: str | None,
    start: int | None,
    overlap: float,
) -> Case:
    right = overlap >= 1.0 - 1e-9
    marks = []
    if so is not None and start is not None:
        marks.append(Mark(start=start, end=start + len(so), kind="right" if right else "missed"))
    if said is not None and not right:
        first, last = int(str(said["start"])), int(str(said["end"]))
        if not any(first < mark.end and mark.start < last for mark in marks):
            marks.append(Mark(start=first, end=last, kind="wrong"))
    text, kept = excerpt(context, sorted(marks, key=lambda mark: mark.start))
    return Case(
        row=row,
        texts=(("question", shown(question, 300)), ("context", text)),
        said=_NOTHING if said is None else shown(str(said["text"]), 300),
        so=_NOTHING if so is None else shown(so, 300),
        right=right,
        detail=f"F1 {overlap:.2f}" + ("" if said is None else f", score {said['score']:.2f}"),
        marks=kept,
    )
