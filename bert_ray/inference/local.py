"""Annotating in this process: a table in memory, or the units of a run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bert_ray.inference.specs import annotator_of
from bert_ray.inference.work import Outcome, annotate_unit

if TYPE_CHECKING:
    import pyarrow as pa

    from bert_ray.inference.bulk import Plan


def annotate(
    table: pa.Table | pa.RecordBatch,
    model: str,
    column: str | None = None,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> pa.Table | pa.RecordBatch:
    """Append a model's annotation to a table.

    Args:
        table: an Arrow table or record batch.
        model: a bundle reference.
        column: the text column, for a task of one input; default: the input's name, `text`.
        columns: table columns by task input, for a task of several.
        **options: `name`, `scores`, `task`, `options`, `batch_tokens`, `threads`, `device`, `dtype` (see
            `AnnotatorSpec`).

    Returns:
        The same rows in the same order with one more column; null text has a null annotation.

    Raises:
        BundleError: the model cannot be used.
        ColumnError: the table lacks the column, has it in another type, or has the annotation's name already.
    """
    _, annotator = annotator_of(model, column=column, columns=columns, elsewhere=False, **options)
    return annotator(table)


def run_units(plan: Plan, watch: Callable[[int], None]) -> Iterator[Outcome]:
    """Annotate the plan's units in this process."""
    for unit in plan.todo:
        yield annotate_unit(plan.work, unit, watch)
