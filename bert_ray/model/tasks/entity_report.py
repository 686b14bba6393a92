"""What the report of entities shows: figures by type, and texts with what was found rightly, wrongly and not at all.

Shapes: B rows, E entities of all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa

from bert_ray.model.tasks import entity_truth
from bert_ray.model.tasks.sections import MARKS, Case, Cases, Mark, Section, Table, excerpt, shown, strings_at
from bert_ray.model.tasks.spans import plain

# (start, end, type) of an entity, in code points of its row.
Span = tuple[int, int, str]


def entities_report(
    by_type: Mapping[str, Mapping[str, float]], annotations: pa.Array, truth: pa.Array, texts: pa.Array, most: int
) -> list[Section]:
    """Of entities.

    Args:
        by_type: type -> precision, recall, f1 and entities, as `entity_truth.scores` gives them.
        annotations: list<struct<start, end, label, …>> (B,).
        truth: list<struct<start, end, label>> (B,).
        texts: as the task reads them, (B,).
        most: rows with errors to show, those with the most first; and a quarter as many without.
    """
    said, so = _spans(annotations), _spans(truth)
    given = Counter(label for spans in said for _, _, label in spans)
    table = Table(
        key="types",
        title="By type",
        header=("type", "entities", "said", "precision", "recall", "F1"),
        rows=tuple(
            (name, int(item["entities"]), given[name], item["precision"], item["recall"], item["f1"])
            for name, item in sorted(by_type.items())
        ),
        note="An entity counts where start, end and type are all right.",
    )
    errors = [len(set(one) ^ set(other)) for one, other in zip(said, so, strict=True)]
    wrong = sorted((row for row, count in enumerate(errors) if count), key=lambda row: -errors[row])[:most]
    right = [row for row, count in enumerate(errors) if not count and so[row]][: -(-most // 4)]
    found: list[Section] = [table]
    for key, title, rows in (("mistakes", "Most errors in a row", wrong), ("right", "All found", right)):
        cases = tuple(
            _case(row, plain(text), said[row], so[row]) for row, text in zip(rows, strings_at(texts, rows), strict=True)
        )
        if cases:
            found.append(Cases(key=key, title=title, cases=cases, note=MARKS if key == "mistakes" else ""))
    return found


def _spans(lists: pa.Array) -> list[list[Span]]:
    found: list[list[Span]] = [[] for _ in range(len(lists))]
    flat = entity_truth.flat(lists)
    spans = zip(flat.row.tolist(), flat.start.tolist(), flat.end.tolist(), flat.label.to_pylist(), strict=True)
    for row, start, end, label in spans:
        found[row].append((start, end, label))
    return found


def _case(row: int, text: str, said: list[Span], so: list[Span]) -> Case:
    both, extra, missed = set(said) & set(so), set(said) - set(so), set(so) - set(said)
    marks = [Mark(start=start, end=end, kind="right", label=label) for start, end, label in both]
    marks += [Mark(start=start, end=end, kind="missed", label=label) for start, end, label in missed]
    taken = sorted((mark.start, mark.end) for mark in marks)
    # What was said wrongly may lie over what is so (other ends, another type): then only words tell it.
    for start, end, label in extra:
        if not any(start < last and first < end for first, last in taken):
            marks.append(Mark(start=start, end=end, kind="wrong", label=label))
    cut, kept = excerpt(text, sorted(marks, key=lambda mark: mark.start))

    def words(spans: set[Span]) -> str:
        return shown("; ".join(f"{text[start:end]} ({label})" for start, end, label in sorted(spans)), 300)

    return Case(
        row=row,
        texts=(("text", cut),),
        said=words(extra) or "nothing wrong",
        so=words(missed) or "nothing more",
        right=not extra and not missed,
        detail=f"{len(both)} found, {len(extra)} wrong, {len(missed)} missed",
        marks=kept,
    )
