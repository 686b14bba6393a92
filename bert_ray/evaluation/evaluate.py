"""A bundle over a labelled table: what it says beside what is so.

    evaluation = evaluate(EvaluateJob(model="models/sentiment", table="test.parquet"))
    print(evaluation.text())

The rows go through the same `Annotator` that annotates a lake, so the figures are those of the product. What is
measured and shown is the task's to say (`Task.metrics`, `Task.report`); nothing here knows a task.

Shapes: B rows that can be compared, C labels.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bert_ray.errors import BundleError, ColumnError, JobError, harmless, why
from bert_ray.evaluation.leakage import MOST_BYTES, rows_also_trained_on
from bert_ray.evaluation.overfitting import CAVEAT, Fit, Levers, judge
from bert_ray.evaluation.rows import Rows, open_table, read_rows
from bert_ray.model.architectures import dropout_rates, encoder_config
from bert_ray.model.tasks import TRAINED_ONLY
from bert_ray.model.tasks.base import Task
from bert_ray.model.tasks.sections import MATRIX_LABELS, Cases, Confusion, Constant, Section, as_data

if TYPE_CHECKING:
    from bert_ray.evaluation.job import EvaluateJob
    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import Bundle

# Rows annotated at a time: enough for the packing to find equal lengths, few enough for the bar to move.
_BATCH_ROWS = 4_096
# The annotation's name while measuring: one that no column of a real table has.
_COLUMN = "bert_ray evaluation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What came out.

    Attributes:
        figures: metric -> value, as the task gives them.
        constant: the best answer that is always the same, on these rows; None where there is none.
        rows: rows compared.
        without_label: rows whose truth is null; they are not counted.
        without_text: rows with a truth whose text is null or blank, which get no annotation; they are not counted.
        faulty: reason -> further rows that are not counted.
        sections: what the report shows; rows of examples are numbers in the table, from 0.
        fit: whether the model overfits, by its training's history.
        warnings: what makes the figures doubtful.
        notes: what could not be looked at.
        seconds: time to annotate, without reading and loading the model.
        report: path of report.html.
        metrics: path of metrics.json.
    """

    figures: dict[str, float]
    constant: Constant | None
    rows: int
    without_label: int
    without_text: int
    faulty: dict[str, int]
    sections: tuple[Section, ...]
    fit: Fit
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float
    report: Path
    metrics: Path

    def section(self, key: str) -> Any:
        """A section of the report by its key.

        Raises:
            KeyError: there is no such.
        """
        for item in self.sections:
            if item.key == key:
                return item
        raise KeyError(key)

    def values(self) -> dict[str, float | str | int]:
        """Name -> value of all that is a figure: metrics, the baseline's, rows."""
        found: dict[str, float | str | int] = dict(self.figures)
        if self.constant is not None:
            found |= {f"{self.constant.name}_{name}": value for name, value in self.constant.figures.items()}
            if self.constant.says:
                found[f"{self.constant.name}_label"] = self.constant.says
        found |= {"rows": self.rows, "rows_without_label": self.without_label, "rows_without_text": self.without_text}
        if self.faulty:
            found["rows_left_out_for_faults"] = sum(self.faulty.values())
        return found

    def text(self) -> str:
        """What `bert-ray evaluate` prints: `name value`, one a line; then words; the report's path last."""
        lines = _lines(self.values())
        for item in self.sections:
            if isinstance(item, Confusion) and len(item.labels) <= MATRIX_LABELS:
                lines += ["", "confusion matrix (a row: the label; a column: what the model said)", *_matrix(item)]
        lines += ["", *_lines(self.fit.figures), self.fit.words]
        lines += [] if self.fit.verdict == "unknown" else [CAVEAT]
        lines += [line for warning in self.warnings for line in ("", f"warning: {warning}")]
        lines += [line for note in self.notes for line in ("", f"note: {note}")]
        return "\n".join([*lines, "", f"metrics {self.metrics}", f"report {self.report}"])


def evaluate(job: EvaluateJob) -> Evaluation:
    """Annotate a labelled table, compare, and write metrics.json and report.html.

    Raises:
        BundleError: the model cannot be loaded, or its task has nothing to measure it by.
        ColumnError: a column is missing or of the wrong type, or a label is none of the model's.
        JobError: the output cannot be written.
        LakeError: the table cannot be read, or no row of it can be compared.
    """
    from bert_ray.evaluation.report import write_report

    table = open_table(job.table)
    annotator = _annotator(job)
    task = annotator.task
    annotator.check(table.schema)
    rows = read_rows(table, job.table, task, _columns(job, task))
    warnings, notes = _warnings(annotator, rows, job)
    output = writable(job.output)
    started = time.perf_counter()
    annotations = _annotate(annotator, rows.inputs)
    seconds = time.perf_counter() - started
    figures = task.metrics(annotations, rows.inputs, rows.truth)
    sections = task.report(annotations, rows.inputs, rows.truth, job.mistakes)
    evaluation = Evaluation(
        figures=figures,
        constant=task.constant(rows.truth),
        rows=len(annotations),
        without_label=rows.without_label,
        without_text=rows.without_text,
        faulty=rows.faulty,
        sections=tuple(_in_table(section, rows) for section in sections),
        fit=_fit(annotator, figures, rows),
        warnings=tuple(warnings),
        notes=tuple(notes),
        seconds=seconds,
        report=output / "report.html",
        metrics=output / "metrics.json",
    )
    value = json.dumps(_as_json(evaluation, annotator, job), indent=2, ensure_ascii=False)
    try:
        evaluation.metrics.write_text(value + "\n", "utf-8")
        write_report(evaluation, annotator, job.table)
    except OSError as error:
        raise _unwritable(output, error) from error
    return evaluation


def writable(place: str) -> Path:
    """An output directory, made and found to be writable before an hour of work.

    Raises:
        JobError: it is not.
    """
    output = Path(place).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            return output
    except OSError as error:
        raise _unwritable(output, error) from error


def _unwritable(output: Path, error: OSError) -> JobError:
    return JobError(f"output {output} cannot be written: {why(error)}; name another directory with --output")


def _annotator(job: EvaluateJob) -> Annotator:
    from bert_ray.model.annotator import AnnotatorSpec
    from bert_ray.model.bundle import load_bundle

    task = AnnotatorSpec(model=job.model, task=job.task, options=job.options).task_of(load_bundle(job.model))
    if not task.truths or type(task).metrics is Task.metrics:
        other = f": measure it with --task {task.measured_as}" if task.measured_as else ""
        raise BundleError(f"{job.model} annotates with {task.kind}, which has nothing to measure it by{other}")
    columns = {name: column for name, column in (job.columns or {}).items() if name in task.inputs}
    if strange := sorted(set(job.columns or {}) - {*task.inputs, *task.truths}):
        known = ", ".join([*task.inputs, *task.truths])
        raise ColumnError(f"columns names {strange[0]!r}; task {task.kind} compares {known}")
    if job.column is not None:
        if len(task.inputs) > 1:
            raise ColumnError(f"{task.kind} has the inputs {', '.join(task.inputs)}: name each with --columns.INPUT")
        columns = {task.inputs[0]: job.column}
    return AnnotatorSpec(
        model=job.model,
        columns=tuple(columns.items()),
        name=_COLUMN,
        task=job.task,
        options={**task.measuring(), **job.options},
        batch_tokens=job.batch_tokens,
        threads=job.threads,
        device=job.device,
        dtype=job.dtype,
    ).build()


def _columns(job: EvaluateJob, task: Task) -> dict[str, str]:
    """The table's columns by the task's inputs and truths."""
    names = {name: name for name in (*task.inputs, *task.truths)} | (job.columns or {})
    if job.column is not None:
        names[task.inputs[0]] = job.column
    # `label` names the truth, however the task calls it, where there is but one.
    if job.label != "label":
        if len(task.truths) > 1 and "label" not in task.truths:
            asked = " and ".join(f"columns.{name}" for name in task.truths)
            raise JobError(
                f"label is {job.label!r}, but task {task.kind} has several truths: name their columns by {asked}"
            )
        names["label" if "label" in task.truths else task.truths[0]] = job.label
    return names


def _annotate(annotator: Annotator, inputs: Sequence[pa.Array]) -> pa.Array:
    """Annotations of B rows."""
    from tqdm import tqdm

    rows, found = len(inputs[0]), []
    # None: no bar where nobody watches, in a log or a pipe.
    with tqdm(total=rows, desc="evaluate", unit=" rows", unit_scale=True, disable=None) as bar:
        for start in range(0, rows, _BATCH_ROWS):
            found.append(annotator.annotate([array.slice(start, _BATCH_ROWS) for array in inputs]))
            bar.update(len(found[-1]))
    return pa.concat_arrays(found)


def _warnings(annotator: Annotator, rows: Rows, job: EvaluateJob) -> tuple[list[str], list[str]]:
    """What makes the figures doubtful, found before an hour of annotating; and what could not be looked at."""
    task, provenance = annotator.task, annotator.bundle.card.provenance
    found, notes = [], []
    total, learned = len(rows.numbers), (provenance.get("data") or {}).get("train")
    shared = rows_also_trained_on(rows.inputs, task, provenance)
    if shared:
        found.append(
            f"{shared:,} of the {total:,} rows also stand in the training data, {learned}: the "
            "figures flatter the model; measure it on rows that it has not seen"
        )
    elif shared is None and learned:
        notes.append(
            f"whether the model was trained on these rows is not known: the training data, {learned}, are not on this "
            f"machine, larger than {MOST_BYTES >> 20} MiB, or without these columns"
        )
    for name, array in zip(task.inputs, rows.inputs, strict=True):
        if note := annotator.tokenizer.unknown_note(array):
            found.append(f"{job.table}: {name}: {note}")
    return found, notes


def _fit(annotator: Annotator, figures: dict[str, float], rows: Rows) -> Fit:
    """What the card's history says; the metric on this table counts where it is that of the validation rows."""
    bundle = annotator.bundle
    provenance, own = bundle.card.provenance, bundle.task
    comparable = own.kind == annotator.task.kind and not own.metric_by_rows
    return judge(
        provenance.get("history") or [],
        provenance.get("best_epoch"),
        own.metric,
        levers_of(bundle, rows.truth),
        baseline=provenance.get("majority_baseline"),
        tested=figures.get(own.metric) if comparable else None,
        alike=not own.metric_by_rows,
    )


def levers_of(bundle: Bundle, truth: Sequence[pa.Array]) -> Levers:
    """What the bundle's training has set, and what it may set.

    Args:
        bundle: the model.
        truth: of any rows, to ask the bundle's task by whether it takes label smoothing.
    """
    job, task = bundle.card.provenance.get("job") or {}, bundle.task
    config = encoder_config(bundle.config)
    refused = set() if task.distortable else {"augmentation"}
    if (trained_as := TRAINED_ONLY.get(job.get("task", ""))) and trained_as.reads_corpus:
        refused |= {"augmentation", "label_smoothing"}  # There were no labelled rows.
    try:
        task.learning_for(0.1, "none", truth)
    except JobError:
        refused.add("label_smoothing")
    except ColumnError:  # The table was made for another task that runs on the bundle.
        pass
    # The configuration was saved with the rate that the job gave.
    rate, _ = dropout_rates(config)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    return Levers(job=job, refused=refused, dropout=rate, layers=layers)


def _in_table(section: Section, rows: Rows) -> Section:
    """A section whose examples bear the numbers of their rows in the table."""
    if not isinstance(section, Cases):
        return section
    return replace(section, cases=tuple(replace(case, row=int(rows.numbers[case.row])) for case in section.cases))


def _lines(values: dict[str, Any]) -> list[str]:
    return [
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {harmless(str(value), lines=False)}"
        for name, value in values.items()
    ]


def _matrix(confusion: Confusion) -> list[str]:
    names = [harmless(name, lines=False) for name in confusion.labels]
    width = max(len(name) for name in names)
    cells = [[f"{count}" for count in row] for row in confusion.counts]
    widths = [max(len(name), *(len(row[index]) for row in cells)) for index, name in enumerate(names)]
    header = " " * width + "".join(f"  {name:>{wide}}" for name, wide in zip(names, widths, strict=True))
    body = [
        f"{name:<{width}}" + "".join(f"  {cell:>{wide}}" for cell, wide in zip(row, widths, strict=True))
        for name, row in zip(names, cells, strict=True)
    ]
    return [header, *body]


def _as_json(evaluation: Evaluation, annotator: Annotator, job: EvaluateJob) -> dict[str, object]:
    fit = evaluation.fit
    return {
        "model": job.model,
        "fingerprint": annotator.fingerprint,
        "table": job.table,
        **evaluation.values(),
        "faults": evaluation.faulty,
        "seconds": round(evaluation.seconds, 3),
        "warnings": list(evaluation.warnings),
        "notes": list(evaluation.notes),
        "fit": {"verdict": fit.verdict, "words": fit.words, **fit.figures},
        **{section.key: data for section in evaluation.sections if (data := as_data(section)) is not None},
    }
