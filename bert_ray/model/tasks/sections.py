"""What a task's report shows, said without a page: tables, confusions, curves, scatters, examples beside the truth.

A task's `report` gives some of these; whoever draws them (`evaluation/report.py` as HTML) needs to know these kinds
alone, and no task. Texts are plain here: escaping is up to the page.

Shapes: B rows that were compared, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from bert_ray.model.tokenization import to_python_strings

# A matrix of more labels is too wide to read: then what occurs in it is listed.
MATRIX_LABELS = 16
# A text is shown up to here: enough to judge by, and the report stays small.
SHOWN_CHARACTERS = 700
# What a page draws marks as, for the notes of sections that have them.
MARKS = (
    "In the texts, what was found rightly is green, what was said wrongly is red, what was missed has a dashed line."
)
# Points of a line or a scatter: the eye sees no more, and a drawing of so many stays under 100 kB.
LINE_POINTS, SCATTER_POINTS = 200, 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Figures in rows.

    Attributes:
        key: unique in a report; names the table in metrics.json.
        title: heading.
        header: names of the columns; the first column names the rows.
        rows: a cell per column: text, a count, or a number.
        shares: whether numbers with a fraction are shares, to be shown as per cent; else they have units of their own.
        note: a sentence under it.
    """

    key: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]
    shares: bool = True
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusion:
    """How often each label was taken for each.

    Attributes:
        key, title, note: as of Table.
        labels: C names.
        counts: int64 (C, C): rows of label i that were said to be j; sparse, of SciPy's, above MATRIX_LABELS labels.
    """

    key: str
    title: str
    labels: tuple[str, ...]
    counts: Any
    note: str = ""

    def cells(self) -> list[tuple[str, str, int]]:
        """(label, said, count) of each pair that occurs, the label rightly said among them, in the matrix's order."""
        return [
            (self.labels[row], self.labels[column], int(self.counts[row, column]))
            for row, column in sorted(zip(*(places.tolist() for places in self.counts.nonzero()), strict=True))
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a Curve: its name, and its points, float (N,) each."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Lines over shares, both axes from 0 to 1; three lines at most are told apart.

    Attributes:
        key, title, note: as of Table.
        x, y: names of the axes.
        lines: what is drawn.
    """

    key: str
    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scatter:
    """What was said over what is so, a point a row.

    Attributes:
        key, title, note: as of Table.
        so, said: float (N,) each.
        same_units: whether said should equal so, so that the diagonal is where all points would lie.
    """

    key: str
    title: str
    so: np.ndarray
    said: np.ndarray
    same_units: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A stretch of a case's last text, in code points, end exclusive: found, said without being so, or not found."""

    start: int
    end: int
    kind: Literal["right", "wrong", "missed"]
    label: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A row, what was said of it, and what is so.

    Attributes:
        row: its place among the rows that were compared.
        texts: (input, text) pairs, cut.
        said, so: in words.
        right: whether they agree.
        detail: what else is to be known, such as the score.
        marks: stretches of the last text, in its order and apart.
    """

    row: int
    texts: tuple[tuple[str, str], ...]
    said: str
    so: str
    right: bool
    detail: str = ""
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Cases:
    """Examples beside the truth.

    Attributes:
        key, title, note: as of Table; the note stands above them.
        cases: in the order to show them.
        long: whether said and so are texts of their own (answers, translations), to be shown under one another.
    """

    key: str
    title: str
    cases: tuple[Case, ...]
    long: bool = False
    note: str = ""


Section = Table | Confusion | Curve | Scatter | Cases


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """The best answer that is always the same: what a model has to beat.

    Attributes:
        figures: metric -> its value.
        says: that answer; empty where it has no short name.
        name: what such a baseline is called.
    """

    figures: dict[str, float]
    says: str = ""
    name: str = "baseline"


def shown(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """A text, cut where it is long."""
    return text if len(text) <= most else text[:most] + " …"


def shown_number(value: float) -> str:
    """A number of four digits, or of as many as stand before its point and one more."""
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def texts_at(
    names: Sequence[str], inputs: Sequence[pa.Array], rows: Sequence[int]
) -> list[tuple[tuple[str, str], ...]]:
    """The inputs of some rows, cut, as Case has them."""
    columns = [strings_at(array, rows) for array in inputs]
    return [
        tuple((name, shown(text)) for name, text in zip(names, row, strict=True)) for row in zip(*columns, strict=True)
    ]


def strings_at(array: pa.Array, rows: Sequence[int]) -> list[str]:
    """Some rows of a text column, a null as an empty text; bytes that are no UTF-8 as the model saw them."""
    return [text or "" for text in to_python_strings(array.take(pa.array(list(rows), pa.int64())))]


def excerpt(text: str, marks: Sequence[Mark], most: int = SHOWN_CHARACTERS) -> tuple[str, tuple[Mark, ...]]:
    """A text cut to a stretch that begins shortly before its first mark; marks that reach outside are left out."""
    if len(text) <= most:
        return text, tuple(marks)
    first = min((mark.start for mark in marks), default=0)
    # A third of the room stands before it.
    start = max(0, min(first - most // 3, len(text) - most))
    before = "… " if start else ""
    after = " …" if start + most < len(text) else ""
    moved = len(before) - start
    kept = [
        Mark(start=mark.start + moved, end=mark.end + moved, kind=mark.kind, label=mark.label)
        for mark in marks
        if start <= mark.start and mark.end <= start + most
    ]
    return before + text[start : start + most] + after, tuple(kept)


def text_cases(
    names: Sequence[str],
    inputs: Sequence[pa.Array],
    said: Sequence[str],
    so: Sequence[str],
    values: Sequence[float],
    most: int,
    measure: str,
) -> list[Section]:
    """Texts beside reference texts: the worst by a measure of each row, and some of the best.

    Args:
        names: of the inputs.
        inputs: text columns, (B,) each.
        said: what the model wrote, B texts; empty where it wrote nothing.
        so: the references, B texts.
        values: of each row, higher is better; 1 or more: nothing to better.
        most: how many of the worst to show, and a quarter as many of the best.
        measure: what the values are called.
    """
    order = np.argsort(np.asarray(values, float), kind="stable")
    worst = [row for row in order.tolist() if values[row] < 1][:most]
    chosen = set(worst)
    best = [row for row in order[::-1].tolist() if row not in chosen][: -(-most // 4)]
    found: list[Section] = []
    for key, title, rows in (("mistakes", f"Lowest {measure}", worst), ("right", f"Highest {measure}", best)):
        cases = tuple(
            Case(
                row=row,
                texts=texts,
                said=shown(said[row]),
                so=shown(so[row]),
                right=key == "right",
                detail=f"{measure} {values[row]:.2f}",
            )
            for row, texts in zip(rows, texts_at(names, inputs, rows), strict=True)
        )
        if cases:
            found.append(Cases(key=key, title=title, cases=cases, long=True))
    return found


def thinned(x: np.ndarray, y: np.ndarray, most: int = LINE_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points of a line, its ends among them."""
    if len(x) <= most:
        return x, y
    places = np.unique(np.linspace(0, len(x) - 1, most).round().astype(np.int64))
    return x[places], y[places]


def as_data(section: Section) -> Any:
    """A section's figures for metrics.json; None for what shows rows of the table or is only drawn."""
    if isinstance(section, Table):
        names = [name.lower().replace(" ", "_") for name in section.header]
        return [dict(zip(names, row, strict=True)) for row in section.rows]
    if not isinstance(section, Confusion):
        return None
    if len(section.labels) <= MATRIX_LABELS:
        return section.counts.tolist()
    return [{"label": label, "said": said, "count": count} for label, said, count in section.cells()]
