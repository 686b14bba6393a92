"""What tasks share that say numbers: reading them, how well they agree with the truth, and what a report shows.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.errors import ColumnError
from bert_ray.model.tasks.sections import SCATTER_POINTS, Case, Cases, Scatter, Section, Table, shown_number, texts_at

# Stretches of the scale that errors are told for.
_BINS = 5


def numbers(column: pa.Array | pa.ChunkedArray, task: str) -> pa.Array:
    """A column of numbers as float64; whole numbers beyond 2**53 are rounded.

    Raises:
        ColumnError: it is something else.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    known = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    if not any(is_so(kind) for is_so in known):
        raise ColumnError(f"the label column is {kind}; task {task} goes by numbers: cast it, or name another")
    return pc.cast(column, pa.float64(), safe=False)


def narrow(column: pa.Array) -> np.ndarray:
    """float64 numbers as float32, (B,); too large ones become infinite."""
    with np.errstate(over="ignore"):
        return column.to_numpy(zero_copy_only=False).astype(np.float32)


def not_finite(column: pa.Array) -> dict[str, np.ndarray]:
    """Rows whose number is none to go by, as `Task.faults` has it: NaN, infinity, and what is infinite in float32."""
    return {"a label that is NaN or infinite": ~np.isfinite(narrow(column))}


def correlations(said: np.ndarray, so: pa.Array) -> dict[str, float]:
    """Spearman's and Pearson's correlation, float (B,) each.

    0 where it is not defined: fewer than two rows, or the same number in all of them.
    """
    from scipy.stats import pearsonr, spearmanr

    truth = so.to_numpy(zero_copy_only=False).astype(float)
    defined = len(truth) > 1 and all(np.isfinite(values).all() and np.ptp(values) > 0 for values in (said, truth))
    return {
        "spearman": float(spearmanr(said, truth).statistic) if defined else 0.0,
        "pearson": float(pearsonr(said, truth).statistic) if defined else 0.0,
    }


def numbers_report(
    annotations: pa.Array,
    truth: pa.Array,
    columns: Sequence[str],
    inputs: Sequence[pa.Array],
    most: int,
    *,
    same_units: bool,
) -> list[Section]:
    """Said over so, errors along the scale, the largest errors.

    Args:
        annotations: numbers (B,).
        truth: float64 (B,).
        columns: names of the inputs.
        inputs: text columns, (B,) each.
        most: errors to show, the largest first.
        same_units: whether what is said should equal what is so; else the two orders of the rows alone are compared.
    """
    from scipy.stats import rankdata

    said = annotations.cast(pa.float64()).to_numpy(zero_copy_only=False)
    so = truth.to_numpy(zero_copy_only=False).astype(float)
    rows = len(so)
    # The same points in every run: seeded, and none left out where there are few.
    drawn = np.sort(np.random.default_rng(0).permutation(rows)[:SCATTER_POINTS])
    scatter = Scatter(
        key="scatter",
        title="Said over so",
        so=so[drawn],
        said=said[drawn],
        same_units=same_units,
        note=f"{len(drawn):,} of {rows:,} rows." if len(drawn) < rows else "",
    )
    places = [rankdata(values) / rows for values in (said, so)]
    error = np.abs(said - so) if same_units else np.abs(places[0] - places[1])
    order = np.argsort(-error, kind="stable")[:most].tolist()
    cases = tuple(
        Case(
            row=row,
            texts=texts,
            said=shown_number(said[row]),
            so=shown_number(so[row]),
            right=False,
            detail="" if same_units else f"rank {places[0][row]:.0%} for {places[1][row]:.0%}".replace("%", "\u00a0%"),
        )
        for row, texts in zip(order, texts_at(columns, inputs, order), strict=True)
    )
    note = "" if same_units else "Rows whose rank among all rows, by what was said, is farthest from the right one."
    return [
        scatter,
        _along(said, so, same_units),
        Cases(key="mistakes", title="Largest errors", cases=cases, note=note),
    ]


def _told_apart(values: np.ndarray) -> list[str]:
    """Different numbers, with as many digits as it takes to tell them apart, three at least; 2000, not 2e+03."""
    for digits in range(3, 18):
        names = [f"{float(f'{value:.{digits}g}'):.15g}" for value in values]
        if len(set(names)) == len(names):
            break
    return names


def _along(said: np.ndarray, so: np.ndarray, same_units: bool) -> Table:
    """Means along the scale: by value where these are few, else by stretches of equal width."""
    values = np.unique(so)
    if len(values) <= _BINS + 1:
        names, which = _told_apart(values), np.searchsorted(values, so)
    else:
        edges = np.linspace(so.min(), so.max(), _BINS + 1)
        names = [f"{low} to {high}" for low, high in pairwise(_told_apart(edges))]
        which = np.clip(np.searchsorted(edges, so, side="right") - 1, 0, _BINS - 1)
    header = ["what is so", "rows", "mean so", "mean said", "deviation of said"]
    if same_units:
        header.append("mean absolute error")
    cells: list[tuple[str | int | float, ...]] = []
    for place, name in enumerate(names):
        held = which == place
        if not held.any():
            continue
        row: list[str | int | float] = [
            name,
            int(held.sum()),
            float(so[held].mean()),
            float(said[held].mean()),
            float(said[held].std()),
        ]
        if same_units:
            row.append(float(np.abs(said[held] - so[held]).mean()))
        cells.append(tuple(row))
    return Table(key="scale", title="Along the scale", header=tuple(header), rows=tuple(cells), shares=False)
