"""A bundle over a labelled table: what it says beside what is so.

    evaluation = evaluate(EvaluateJob(model="models/sentiment", table="test.parquet"))
    print(evaluation.text())

The rows go through the same `Annotator` that annotates a lake, so the figures are those of the product.
Shapes: N rows with a text and a label, C labels.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from bert_ray.errors import BundleError, ColumnError, LakeError
from bert_ray.evaluation.metrics import Scores, score
from bert_ray.model.tasks.base import Task
from bert_ray.model.tasks.classification import Classification

if TYPE_CHECKING:
    from bert_ray.evaluation.job import EvaluateJob
    from bert_ray.model.annotator import Annotator

# Rows read and annotated at a time: enough for the packing to find equal lengths, little enough for memory.
_BATCH_ROWS = 4_096
# A mistake's text is shown up to here: enough to judge by, and the report stays small.
_SHOWN_CHARACTERS = 700
# The annotation's name while measuring: one that no column of a real table has.
_COLUMN = "bert_ray evaluation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A row whose label was not said.

    Attributes:
        row: its number in the table, from 0.
        text: the task's inputs, cut at some hundred characters.
        label: what is so.
        said: what the model said.
        score: the probability it gave that.
    """

    row: int
    text: str
    label: str
    said: str
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What came out.

    Attributes:
        scores: the figures.
        mistakes: the most confident ones, surest first.
        without_label: rows whose label is null; they are not counted.
        without_text: rows with a label whose text is null or blank, which get no annotation; they are not counted.
        seconds: time to read and annotate, without loading the model.
        report: path of report.html.
        metrics: path of metrics.json.
    """

    scores: Scores
    mistakes: tuple[Mistake, ...]
    without_label: int
    without_text: int
    seconds: float
    report: Path
    metrics: Path

    def text(self) -> str:
        """What `bert-ray evaluate` prints: `name value`, one a line, and the confusion matrix."""
        values = {name: f"{value:.4f}" for name, value in self.scores.figures().items()}
        values |= {
            "majority_label": self.scores.majority_label,
            "rows": str(self.scores.rows),
            "rows_without_label": str(self.without_label),
            "rows_without_text": str(self.without_text),
        }
        lines = [f"{name} {value}" for name, value in values.items()]
        lines += ["", "confusion matrix (a row: the label; a column: what the model said)"]
        return "\n".join([*lines, *_matrix(self.scores), "", f"report {self.report}", f"metrics {self.metrics}"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What came out for a task that is not classification: its own metrics.

    Attributes:
        figures: name -> value, as the task gives them.
        rows: rows compared.
        notes: rows that were left out, and why.
        seconds: time to annotate, without loading the model.
        metrics: path of metrics.json.
    """

    figures: dict[str, float]
    rows: int
    notes: tuple[str, ...]
    seconds: float
    metrics: Path

    def text(self) -> str:
        """What `bert-ray evaluate` prints: `name value`, one a line."""
        lines = [f"{name} {value:.4f}" for name, value in self.figures.items()]
        return "\n".join([*lines, f"rows {self.rows}", *self.notes, "", f"metrics {self.metrics}"])


def evaluate(job: EvaluateJob) -> Evaluation | Measured:
    """Annotate a labelled table, compare, and write metrics.json; for classification also report.html.

    Raises:
        BundleError: the model cannot be loaded, or its task has no labels.
        ColumnError: a column is missing or of the wrong type, or a label is none of the model's.
        LakeError: the table cannot be read, or no row of it has a text and a label.
    """
    from bert_ray.evaluation.report import write_report

    table = _open(job.table)
    annotator = _annotator(job)
    if not (isinstance(annotator.task, Classification) and pa.types.is_struct(annotator.output_field.type)):
        return _measure(annotator, job)
    labels = annotator.bundle.card.labels
    annotator.check(table.schema)
    truth = _truth(annotator, table, job)
    started = time.perf_counter()
    predicted, mistakes = _annotate(annotator, table, truth, job)
    seconds = time.perf_counter() - started
    counted = (truth >= 0) & (predicted >= 0)
    if not counted.any():
        raise LakeError(f"{job.table}: none of its {len(truth):,} rows has both a text and a label; nothing to measure")
    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(
        scores=score(labels, truth[counted], predicted[counted]),
        mistakes=tuple(mistakes),
        without_label=int((truth < 0).sum()),
        without_text=int(((truth >= 0) & (predicted < 0)).sum()),
        seconds=seconds,
        report=output / "report.html",
        metrics=output / "metrics.json",
    )
    evaluation.metrics.write_text(json.dumps(_as_json(evaluation, annotator, job), indent=2, ensure_ascii=False) + "\n")
    write_report(evaluation, annotator.bundle, job.table)
    return evaluation


def _measure(annotator: Annotator, job: EvaluateJob) -> Measured:
    """Annotate the rows that the task can be compared on, and let it compare."""
    from bert_ray.training.data import read_labelled

    task = annotator.task
    columns = dict(job.columns or {})
    if job.column is not None:
        columns[task.inputs[0]] = job.column
    if job.label != "label" and "label" in task.truths:
        columns["label"] = job.label
    found = read_labelled(job.table, task, columns)
    started = time.perf_counter()
    annotations = annotator.annotate(found.inputs)
    seconds = time.perf_counter() - started
    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    measured = Measured(
        figures=task.metrics(annotations, found.inputs, found.truth),
        rows=len(annotations),
        notes=tuple(found.notes),
        seconds=seconds,
        metrics=output / "metrics.json",
    )
    value = {"model": job.model, "fingerprint": annotator.fingerprint, "table": job.table, **measured.figures}
    value |= {"rows": measured.rows, "notes": list(measured.notes), "seconds": round(seconds, 3)}
    measured.metrics.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    return measured


def _open(path: str) -> pads.Dataset:
    if not Path(path).exists():
        raise LakeError(f"no table at {path}: give a Parquet file or a directory of them")
    try:
        table = pads.dataset(path, format="parquet", partitioning="hive")
    except (pa.ArrowInvalid, OSError) as error:
        raise LakeError(f"{path} cannot be read as Parquet: {error}") from error
    if not table.files:
        raise LakeError(f"no Parquet file in {path}")
    return table


def _annotator(job: EvaluateJob) -> Annotator:
    from bert_ray.model.annotator import AnnotatorSpec
    from bert_ray.model.bundle import load_bundle

    bundle = load_bundle(job.model)
    asked = AnnotatorSpec(model=job.model, task=job.task, options=job.options)
    task = asked.task_of(bundle)
    if not task.truths or type(task).metrics is Task.metrics:
        raise BundleError(f"{job.model} annotates with {task.kind}, which has nothing to measure it by")
    columns = tuple((name, column) for name, column in (job.columns or {}).items() if name in task.inputs)
    if job.column is not None:
        if len(task.inputs) > 1:
            raise ColumnError(f"{task.kind} has the inputs {', '.join(task.inputs)}: name each with --columns.INPUT")
        columns = ((task.inputs[0], job.column),)
    return AnnotatorSpec(
        model=job.model,
        columns=columns,
        name=_COLUMN,
        task=job.task,
        options=job.options,
        batch_tokens=job.batch_tokens,
        threads=job.threads,
        device=job.device,
        dtype=job.dtype,
    ).build()


def _truth(annotator: Annotator, table: pads.Dataset, job: EvaluateJob) -> np.ndarray:
    """Every row's label as its position, -1 for null: int64.

    All of it is read first, so that a label which the model does not know is found before an hour of annotating.
    """
    if job.label not in table.schema.names:
        near = difflib.get_close_matches(job.label, table.schema.names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {table.schema.names}."
        raise ColumnError(f"{job.table} has no label column {job.label!r}; {hint} Name it with --label")
    chunks = [batch.column(0) for batch in _batches(table, [job.label], job.table)]
    column = pa.chunked_array(chunks, table.schema.field(job.label).type).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # Older versions keep the chunks of a column without rows.
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    truth = np.full(len(column), -1, np.int64)
    assert isinstance(annotator.task, Classification)
    if not pa.types.is_null(column.type):
        known = column.is_valid().to_numpy(zero_copy_only=False)
        truth[known] = annotator.task.indices(column.drop_null())
    return truth


def _annotate(
    annotator: Annotator, table: pads.Dataset, truth: np.ndarray, job: EvaluateJob
) -> tuple[np.ndarray, list[Mistake]]:
    """Every row's prediction as its position (-1: none), and the surest mistakes."""
    from tqdm import tqdm

    from bert_ray.model.tokenization import as_strings

    labels = annotator.bundle.card.labels
    predicted, scores = np.full(len(truth), -1, np.int64), np.zeros(len(truth), np.float32)
    mistakes: list[Mistake] = []
    start = 0
    # disable=None: no bar where nobody watches, in a log or a pipe.
    with tqdm(total=len(truth), desc="evaluate", unit=" rows", unit_scale=True, disable=None) as bar:
        for batch in _batches(table, list(annotator.input_columns), job.table):
            rows = slice(start, start + len(batch))
            # A row without a label is not worth a forward pass.
            labelled = np.flatnonzero(truth[rows] >= 0)
            inputs = [as_strings(batch.column(name), name).take(pa.array(labelled)) for name in annotator.input_columns]
            annotation = annotator.annotate(inputs)
            known = np.flatnonzero(annotation.is_valid().to_numpy(zero_copy_only=False))
            valid, at = annotation.drop_null(), start + labelled[known]
            said = pc.index_in(valid.field("label"), pa.array(labels, pa.string()))
            predicted[at] = said.to_numpy(zero_copy_only=False)
            scores[at] = valid.field("score").to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(predicted[at] != truth[at])
            for index in wrong[np.argsort(-scores[at[wrong]], kind="stable")][: job.mistakes]:
                row = int(at[index])
                mistakes.append(
                    Mistake(
                        row=row,
                        text=_shown([array[int(known[index])] for array in inputs]),
                        label=labels[truth[row]],
                        said=labels[predicted[row]],
                        score=float(scores[row]),
                    )
                )
            mistakes = sorted(mistakes, key=lambda mistake: -mistake.score)[: job.mistakes]
            start += len(batch)
            bar.update(len(batch))
    return predicted, mistakes


def _shown(inputs: list[pa.Scalar]) -> str:
    # Bytes that are no UTF-8 are shown as the model saw them, as U+FFFD.
    text = " | ".join(value.cast(pa.large_binary()).as_py().decode("utf-8", "replace") for value in inputs)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"


def _batches(table: pads.Dataset, columns: list[str], name: str) -> Iterator[pa.RecordBatch]:
    """Record batches in the table's order, so that two passes see the same rows at the same places."""
    try:
        yield from table.to_batches(columns=columns, batch_size=_BATCH_ROWS, fragment_readahead=1)
    except (pa.ArrowInvalid, OSError) as error:
        raise LakeError(f"{name} cannot be read: {error}") from error


def _matrix(scores: Scores) -> list[str]:
    names = [item.label for item in scores.labels]
    width = max(len(name) for name in names)
    cells = [[f"{count}" for count in row] for row in scores.confusion]
    widths = [max(len(name), *(len(row[index]) for row in cells)) for index, name in enumerate(names)]
    header = " " * width + "".join(f"  {name:>{wide}}" for name, wide in zip(names, widths, strict=True))
    body = [
        f"{name:<{width}}" + "".join(f"  {cell:>{wide}}" for cell, wide in zip(row, widths, strict=True))
        for name, row in zip(names, cells, strict=True)
    ]
    return [header, *body]


def _as_json(evaluation: Evaluation, annotator: Annotator, job: EvaluateJob) -> dict[str, object]:
    return {
        "model": job.model,
        "fingerprint": annotator.fingerprint,
        "table": job.table,
        **evaluation.scores.figures(),
        "majority_label": evaluation.scores.majority_label,
        "rows": evaluation.scores.rows,
        "rows_without_label": evaluation.without_label,
        "rows_without_text": evaluation.without_text,
        "seconds": round(evaluation.seconds, 3),
        "labels": [asdict(item) for item in evaluation.scores.labels],
        "confusion": evaluation.scores.confusion.tolist(),
    }
