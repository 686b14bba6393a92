"""What a worker does, on every engine: annotate one unit, write its part of the table, leave a receipt."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from bert_ray import __version__
from bert_ray.lake import attempts
from bert_ray.lake.files import as_text
from bert_ray.lake.journal import Journal, OutputError
from bert_ray.lake.outputs import part_path, writing

if TYPE_CHECKING:
    from bert_ray.lake.tables import Reader
    from bert_ray.lake.units import Unit
    from bert_ray.model.annotator import Annotator, AnnotatorSpec

# Sessions for which this process has met an error that every further unit would meet, and what it was.
_hopeless: dict[str, str] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all units of a run have in common: small, picklable, sent to every worker.

    Attributes:
        session: names one driver's try at the run.
        output: the output table's directory.
        keep: the input's columns to write; partition columns are not among them.
        field: the annotation's name and type.
    """

    session: str
    engine: str
    output: str
    reader: Reader
    annotator: AnnotatorSpec
    keep: tuple[str, ...]
    field: pa.Field
    task: str

    @property
    def schema(self) -> pa.Schema:
        """The schema of every part file."""
        source = self.reader.schema
        return pa.schema([*(source.field(name).with_nullable(True) for name in self.keep), self.field])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a unit ended.

    Attributes:
        state: "done"; "failed"; "left": not tried, because the run was ending.
        rows: rows written.
        began: when the first row was read, seconds since 1970; the model was in memory then.
        seconds: from then to the receipt.
        error: why it failed.
        lasting: every other unit would fail in the same way.
    """

    unit: str
    state: Literal["done", "failed", "left"]
    rows: int = 0
    began: float = 0.0
    seconds: float = 0.0
    error: str = ""
    lasting: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        return cls(**json.loads(text))

    @classmethod
    def from_journal(cls, journal: Journal, unit_id: str, session: str | None = None) -> Outcome | None:
        """The outcome as the journal tells it; None where the unit is neither done nor failed, or not in that session.

        A unit that failed in an earlier session has its note still, until this one ends it.
        """
        receipt = journal.receipt(unit_id)
        note = receipt or journal.failure(unit_id)
        if not note or (session is not None and note.get("session") != session):
            return None
        if receipt:
            return cls(unit=unit_id, state="done", rows=note["rows"], began=note["began"], seconds=note["seconds"])
        return cls(unit=unit_id, state="failed", error=note["error"], lasting=note["lasting"])


class _Lasting(Exception):
    """Wraps an error that every other unit would meet."""


def annotate_unit(work: Work, unit: Unit, watch: Callable[[int], None] | None = None) -> Outcome:
    """Annotate a unit and write its part of the table; whatever goes wrong with it is the outcome, not an exception.

    Args:
        work: what all units of the run have in common.
        unit: the unit.
        watch: told after each batch how many rows of the unit are annotated so far.
    """
    if work.session in _hopeless:
        return Outcome(unit=unit.id, state="left", error=_hopeless[work.session])
    journal = Journal(work.output)
    # Ended by an attempt that died before it could say so; what failed is told by then, and not tried twice.
    session = None if journal.has_receipt(unit.id) else work.session
    if known := Outcome.from_journal(journal, unit.id, session):
        return known
    try:
        remedy = "try fewer workers or fewer batch_tokens, and run again"
        attempts.begin(journal, unit.id, work, "it", remedy)
        return _annotate(work, unit, journal, watch)
    except Exception as error:
        return _failed(work, unit, journal, error)


def _annotate(work: Work, unit: Unit, journal: Journal, watch: Callable[[int], None] | None) -> Outcome:
    try:
        annotator = work.annotator.build()
    except Exception as error:
        raise _Lasting from error
    began, clock = time.time(), time.perf_counter()
    rows = 0
    if watch:
        watch(0)  # So that the first batch's time counts.
    destination = part_path(Path(work.output), unit)
    with journal.temporary(unit.id) as temporary:
        with writing(Path(work.output), temporary, work.schema, _metadata(work, unit)) as writer:
            for batch in _annotated(work, unit, annotator):
                writer.write(batch)
                rows += batch.num_rows
                if watch:
                    watch(rows)
        seconds = time.perf_counter() - clock
        receipt = {
            "unit": unit.id,
            "file": unit.path,
            "row_groups": unit.row_groups,
            "rows": rows,
            "dtype": annotator.precision,
            "began": began,
            "seconds": round(seconds, 3),
            **attempts.signature(work),
        }
        journal.commit(unit.id, temporary, destination, receipt)
    return Outcome(unit=unit.id, state="done", rows=rows, began=began, seconds=seconds)


def _annotated(work: Work, unit: Unit, annotator: Annotator) -> Iterator[pa.RecordBatch]:
    names = [field.name for field in work.schema]
    # A column that is read for the model alone does not reach the output.
    columns = list(dict.fromkeys((*work.keep, *annotator.input_columns)))
    for batch in work.reader.read(unit, columns, required=annotator.input_columns):
        yield annotator(batch).select(names)


def _metadata(work: Work, unit: Unit) -> dict[str, str]:
    return {
        "bert_ray.version": __version__,
        "bert_ray.task": work.task,
        "bert_ray.model": work.annotator.model,
        "bert_ray.fingerprint": work.annotator.fingerprint or "",
        "bert_ray.source": as_text(unit.path),
        "bert_ray.unit": unit.id,
    }


def _failed(work: Work, unit: Unit, journal: Journal, error: BaseException) -> Outcome:
    lasting = isinstance(error, _Lasting | OutputError)
    if isinstance(error, _Lasting) and error.__cause__ is not None:
        error = error.__cause__
    told = attempts.fail(journal, unit.id, unit, work, error, lasting=lasting)
    if lasting:
        _hopeless[work.session] = told
    return Outcome(unit=unit.id, state="failed", error=told, lasting=lasting)
