"""The one bulk path: plan a run, hand its units to an engine, count what comes back.

    prepare(job) -> Plan: table, model and output checked, what is still to do
    engine.run_units(plan) -> outcomes, one per unit, from `work.annotate_unit` on a worker
    run(job) -> Summary: both, with progress

A run that is stopped by anything (Ctrl-C, a kill of any process, a full disk) is gone on with by the same command, on
the same engine or another: units with a receipt are not done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bert_ray import __version__
from bert_ray.errors import ColumnError, EngineError, JobError, LakeError, meant
from bert_ray.inference.job import AnnotateJob
from bert_ray.inference.spark_settings import without_secrets
from bert_ray.inference.work import Outcome, Work
from bert_ray.lake.files import printable
from bert_ray.lake.journal import FOLDER, Journal, output_errors, refuse_another_job
from bert_ray.lake.lock import exclusive
from bert_ray.lake.outputs import check_place, parts
from bert_ray.lake.progress import Progress
from bert_ray.lake.tables import Reader, open_table
from bert_ray.lake.units import Unit, partition_values

if TYPE_CHECKING:
    from bert_ray.model.annotator import Annotator

# Sessions that run.json remembers.
_SESSIONS = 100
# Failures that the summary shows; `runs failures` shows all.
_FAILURES_SHOWN = 3
# Units, and rows of each, that are looked at before a run for a language that the model cannot spell.
_JUDGED_UNITS, _JUDGED_ROWS = 8, 125


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run that may begin.

    Attributes:
        work: what every worker gets.
        units: all units of the table; `todo`: those without a receipt.
        warnings: what makes the annotations doubtful, for the user to read.
    """

    job: AnnotateJob
    work: Work
    units: list[Unit]
    todo: list[Unit]
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Summary:
    """How a run ended.

    Attributes:
        rows: rows annotated by this run, without those of earlier ones.
        units, done, skipped, failed, left: all units; of these done by this run, by earlier ones, failed, not tried.
        seconds: of the whole run; `startup_seconds`: of these until a worker with its model in memory began.
        stopped: why the run ended before its last unit, "" where it did not.
        failures: `unit`, `file`, `row_groups`, `error` of each unit that failed.
        warnings: see Plan.
    """

    engine: str
    output: str
    annotation: str
    rows: int = 0
    units: int = 0
    done: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0
    startup_seconds: float = 0.0
    stopped: str = ""
    failures: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.units - self.done - self.skipped - self.failed

    @property
    def rows_per_second(self) -> float:
        """Rows per second once started."""
        busy = self.seconds - self.startup_seconds
        return self.rows / busy if busy > 0 else 0.0

    @property
    def exit_status(self) -> int:
        """0: every unit of the table is done; 1: units failed or were left."""
        return int(bool(self.failed or self.left or self.stopped))

    def __str__(self) -> str:
        output = printable(self.output)
        quoted = shlex.quote(output)
        lines = [
            f"annotated {self.rows:,} rows in {self.done:,} units on {self.engine}: "
            f"{self.rows_per_second:,.1f} rows/s, {self.seconds:.1f} s of which {self.startup_seconds:.1f} s start-up",
            f"  table    {output} ({self.annotation})",
        ]
        lines += [f"  warning  {text}" for text in self.warnings]
        if self.skipped:
            lines.append(f"  skipped  {self.skipped:,} units that earlier runs have done")
        if self.failed:
            lines.append(f"  failed   {self.failed:,} units; all of them: bert-ray runs failures {quoted}")
            lines += [f"           {note['error']}" for note in self.failures[:_FAILURES_SHOWN]]
        if self.stopped:
            lines.append(f"  stopped  {self.stopped}")
        if self.left:
            lines.append(f"  left     {self.left:,} units; to go on: bert-ray runs resume {quoted}")
        return "\n".join(lines)


def run(job: AnnotateJob) -> Summary:
    """Annotate a table, or go on with annotating it; prints progress to standard error and a summary at the end.

    Raises:
        BertRayError: job, model or table is at fault, or another process works on the same output; nothing was started.
        KeyboardInterrupt: after the run was stopped cleanly and it was said how to go on.
    """
    began = time.monotonic(), time.time()
    engine = load_engine(job.engine)
    with _alone(job):
        return _run(job, engine, *began)


@contextlib.contextmanager
def _alone(job: AnnotateJob) -> Iterator[None]:
    """Hold the output's lock; of what is made for it nothing stays where the run does not begin."""
    output = check_place(job.output, job.input)
    folder = output / FOLDER
    made = [place for place in (folder, output, *output.parents) if not place.exists()]
    try:
        with contextlib.ExitStack() as held:
            with output_errors(output):
                folder.mkdir(parents=True, exist_ok=True)
                # Without locks two runs at once would do units twice, of which one file and one receipt stay.
                held.enter_context(exclusive(folder / "lock", f"the table {printable(output)}"))
            yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # It is not empty: the run has begun.
                place.rmdir()


def _run(job: AnnotateJob, engine: ModuleType, began: float, began_wall: float) -> Summary:
    """`run`, while no other works on the same output."""
    plan = prepare(job)
    summary = Summary(
        engine=job.engine,
        output=plan.work.output,
        annotation=f"column {plan.work.field.name}: {plan.work.field.type}",
        units=len(plan.units),
        skipped=len(plan.units) - len(plan.todo),
        warnings=plan.warnings,
    )
    for text in plan.warnings:  # At once, too: a long run may not be worth its time.
        print(f"warning: {text}", file=sys.stderr, flush=True)
    rows = [unit.rows for unit in plan.todo if unit.rows is not None]
    first, told = None, set()
    try:
        with Progress(what=f"annotate on {job.engine}", units=len(plan.todo), rows=sum(rows)) as progress:
            try:
                for outcome in _outcomes(engine, plan, progress.watch):
                    if outcome.state == "left":
                        continue
                    _count(outcome, plan, summary, progress)
                    told.add(outcome.unit)
                    if outcome.state == "done":
                        first = min(first or outcome.began, outcome.began)
                        continue
                    if outcome.lasting or job.on_error == "fail":
                        summary.stopped = outcome.error
                        break
            except EngineError as error:
                summary.stopped = str(error)
            if summary.stopped:
                for outcome in _untold(plan, told):
                    _count(outcome, plan, summary, progress)
    except KeyboardInterrupt:
        # Units may have ended that the engine had no time to tell of.
        finished = len(Journal(plan.work.output).receipts())
        print(
            f"\nstopped by Ctrl-C: {finished:,} of {summary.units:,} units are done and stay done; "
            f"to go on: bert-ray runs resume {shlex.quote(printable(summary.output))}",
            file=sys.stderr,
            flush=True,
        )
        raise
    summary.seconds = time.monotonic() - began
    summary.startup_seconds = min(summary.seconds, max(0.0, first - began_wall)) if first else 0.0
    print(summary, flush=True)
    return summary


def _count(outcome: Outcome, plan: Plan, summary: Summary, progress: Progress) -> None:
    """Take a unit that ended into summary and progress."""
    summary.rows += outcome.rows
    if outcome.state != "failed":
        summary.done += 1
        progress.ended(outcome.rows, outcome.seconds, failed=False)
        return
    unit = next(unit for unit in plan.todo if unit.id == outcome.unit)
    summary.failed += 1
    summary.failures.append({"unit": unit.id, "file": unit.path, "row_groups": unit.row_groups, "error": outcome.error})
    progress.ended(outcome.rows, outcome.seconds, failed=True, lost=unit.rows or 0)


def _untold(plan: Plan, told: set[str]) -> Iterator[Outcome]:
    """Outcomes of units that ended while the engine was stopped, when nobody listened any more."""
    journal = Journal(plan.work.output)
    for unit_id in sorted({unit.id for unit in plan.todo} & (journal.receipts() | journal.failed()) - told):
        if ended := Outcome.from_journal(journal, unit_id, plan.work.session):
            yield ended


def _outcomes(engine: ModuleType, plan: Plan, watch: Callable[[int], None]) -> Iterator[Outcome]:
    """The engine's outcomes, each unit once. Leaving the loop stops the engine."""
    if not plan.todo:
        return
    seen = set()
    with contextlib.closing(engine.run_units(plan, watch)) as outcomes:
        for outcome in outcomes:
            if outcome.unit not in seen:
                seen.add(outcome.unit)
                yield outcome


def load_engine(name: str) -> ModuleType:
    """The adapter of an engine.

    Raises:
        JobError: what the engine needs is not installed.
    """
    module = {"local": "local", "ray": "ray_data", "spark": "spark"}[name]
    try:
        return importlib.import_module(f"bert_ray.inference.{module}")
    except ImportError as error:
        if (error.name or "").startswith("bert_ray"):
            raise
        raise JobError(f"engine {name} needs {error.name}: pip install 'bert_ray[{name}]'") from error


def prepare(job: AnnotateJob) -> Plan:
    """Check table, model and output, and find what there is to do. Writes OUT/_bert_ray/run.json and no more.

    Raises:
        BertRayError: something is at fault that would fail every unit, or the output holds a run of another job.
    """
    from bert_ray.inference.specs import annotator_of

    output = check_place(job.output, job.input)
    journal = Journal(output)
    earlier = journal.read_run()
    table = open_table(job.input)
    schema = table.schema
    spec, annotator = annotator_of(
        job.model,
        column=job.column,
        columns=job.columns,
        name=job.name,
        scores=job.scores,
        task=job.task,
        options=job.options,
        batch_tokens=job.batch_tokens,
        threads=job.threads,
        device=job.device,
        dtype=_precision(job, journal),
        elsewhere=job.engine != "local",
    )
    keep = _kept(job, schema, table.partitions)
    annotator.check(_checked(schema, annotator.input_columns, (*keep, *table.partitions)))
    units = table.units(job.unit_rows)
    _check_directories(units, annotator.output_field.name)
    session = uuid.uuid4().hex[:12]
    work = Work(
        session=session,
        engine=job.engine,
        output=str(output),
        reader=table.reader(),
        annotator=spec,
        keep=keep,
        field=annotator.output_field,
        task=annotator.task.kind,
    )
    settings = {
        "input": table.name,
        "model's fingerprint": annotator.fingerprint,
        "columns": dict(zip(annotator.task.inputs, annotator.input_columns, strict=True)),
        "unit_rows": job.unit_rows,
        "dtype": job.dtype,
        "partitions": list(table.partitions),
        "output columns": {field.name: str(field.type) for field in work.schema},
        "task": annotator.task.kind,
        # As they come back from run.json.
        "options": json.loads(json.dumps(dataclasses.asdict(annotator.task.options))),
    }
    # A run whose engine could not begin has done nothing that another would be mixed with.
    if earlier and (journal.receipts() or journal.failed() or journal.started()):
        # Earlier versions did not note the task and its options, nor those options that they did not have.
        known = {"task": settings["task"]} | earlier["settings"]
        known["options"] = settings["options"] | known.get("options", {})
        refuse_another_job(output, known, settings)
    if earlier:
        _reconcile(journal, units)
    done = journal.receipts()
    note = {
        "session": session,
        "engine": job.engine,
        "cluster": job.cluster(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    journal.write_run(
        {
            "version": __version__,
            "job": _noted(job) | {"input": table.name, "model": spec.model, "output": str(output)},
            "task": annotator.task.kind,
            "settings": settings,
            "units": len(units),
            "rows": sum(unit.rows or 0 for unit in units),
            "sessions": [*earlier.get("sessions", []), note][-_SESSIONS:],
        }
    )
    # Those that were cut off come last: one of which its process dies would else keep the others from being done.
    begun = journal.started()
    todo = sorted((unit for unit in units if unit.id not in done), key=lambda unit: unit.id in begun)
    return Plan(job=job, work=work, units=units, todo=todo, warnings=_warnings(annotator, work.reader, todo))


def _noted(job: AnnotateJob) -> dict[str, Any]:
    """A job as its journal has it, which stands with the table and is read by whoever reads that."""
    noted = dataclasses.asdict(job)
    noted["spark"]["config"] = without_secrets(job.spark.config)
    return noted


def _precision(job: AnnotateJob, journal: Journal) -> str:
    """What the model is to compute in: where that is left open, what it did in the units that are done."""
    if job.dtype != "auto":
        return job.dtype
    # Earlier versions did not note it.
    noted = (journal.receipt(unit).get("dtype") for unit in sorted(journal.receipts()))
    return next(filter(None, noted), "auto")


def _warnings(annotator: Annotator, reader: Reader, units: list[Unit]) -> list[str]:
    """Where the model's vocabulary cannot spell the language of an input, by some rows from all over the table."""
    batches = []
    for unit in units[:: max(1, -(-len(units) // _JUDGED_UNITS))]:
        # What is wrong with a file its own unit will tell.
        with contextlib.suppress(LakeError):
            columns = list(dict.fromkeys(annotator.input_columns))  # Two inputs may be one column.
            rows = reader.read(unit, columns, required=annotator.input_columns)
            with contextlib.closing(rows):
                batches += [batch.slice(0, _JUDGED_ROWS) for batch in itertools.islice(rows, 1)]
    found = []
    for task_input, column in zip(annotator.task.inputs, annotator.input_columns, strict=True):
        texts = [annotator.task.read(task_input, batch.column(column), column) for batch in batches]
        if texts and (note := annotator.tokenizer.unknown_note(pa.concat_arrays(texts))):
            found.append(f"column {column!r}: {note}")
    return found


def _kept(job: AnnotateJob, schema: pa.Schema, partitions: tuple[str, ...]) -> tuple[str, ...]:
    if job.keep is None:
        return tuple(name for name in schema.names if name not in partitions)
    for name in job.keep:
        if name not in schema.names:
            raise ColumnError(f"keep: the table has no column {name!r}; {meant(name, schema.names)}")
    # The directories keep the partition columns; the files do not repeat them.
    return tuple(name for name in job.keep if name not in partitions)


def _checked(schema: pa.Schema, inputs: tuple[str, ...], kept: tuple[str, ...]) -> pa.Schema:
    """The schema to hold the annotator to: what is read and written. Where an input is missing, all there is, so that
    the error can name what is near.
    """
    if not set(inputs) <= set(schema.names):
        return schema
    return pa.schema([schema.field(name) for name in dict.fromkeys((*kept, *inputs))])


def _check_directories(units: list[Unit], annotation: str) -> None:
    """A directory of the output must not spell a column of the annotation's name."""
    for directory in {unit.partition_directory for unit in units}:
        for name in partition_values(f"{directory}/"):
            if name.casefold() == annotation.casefold():
                raise ColumnError(
                    f"the directories are partitioned by {name!r}, as those of the output will be; give the annotation "
                    f"another name than {annotation!r} with --name (name: in a job file)"
                )


def _reconcile(journal: Journal, units: list[Unit]) -> None:
    """Bring the journal of earlier runs in line with the table as it is now.

    New files are new units. A file that failed and was mended is done anew, with those of its units that had not
    failed. A file that was changed or removed after it was annotated is an error: its rows stand in the output, and
    whether they should go is not for a re-run to decide.
    """
    journal.sweep()
    # Killed between receipt and clearing away what was noted before it.
    for unit_id in filter(journal.has_receipt, journal.failed() | journal.started()):
        journal.clear(unit_id)
    planned = {unit.id for unit in units}
    present = {unit.path for unit in units}
    failures = journal.failures()
    tried = {note.get("file") for note in failures}
    receipts = {unit_id: journal.receipt(unit_id).get("file") for unit_id in journal.receipts() - planned}
    if lost := sorted({file for file in receipts.values() if file and not (file in tried and file in present)}):
        how = "changed" if lost[0] in present else "gone"
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise JobError(
            f"the input's file {printable(lost[0])}{more} is {how} since {journal.output} has its rows: "
            "restore it as it was, with its time (cp -p, rsync -t), or choose another output"
        )
    for unit_id in receipts:
        journal.discard(unit_id)
    for unit_id in (journal.failed() | journal.started()) - planned:
        journal.clear(unit_id)
    # In this order: a worker that outlived an earlier driver may commit a unit in between, which then stands.
    done, standing = journal.receipts(), parts(journal.output)
    for unit_id, path in standing.items():
        # Cut off between rename and receipt, and the file was changed since: no unit would ever replace it.
        if unit_id not in planned and unit_id not in done:
            path.unlink(missing_ok=True)
    for unit_id in done - standing.keys():
        journal.discard(unit_id)
