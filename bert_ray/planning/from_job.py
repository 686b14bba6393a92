"""From a training job to what the plan computes with: the one place where the two meet.

Shapes: T tokens, L length of a row.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bert_ray.errors import JobError
from bert_ray.model.flops import Dims, dims_of, parameters
from bert_ray.planning.workload import Workload
from bert_ray.training.order import mean_batch, smallest_step

if TYPE_CHECKING:
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.tasks.base import Task
    from bert_ray.planning.hardware import Gpu
    from bert_ray.planning.job import PlanJob
    from bert_ray.training.job import TrainJob

# Rows of a table that are tokenised to learn how long its rows are.
_SAMPLE_ROWS = 2000
# BERT's own vocabulary (bert-base-uncased), where nothing says otherwise.
_VOCABULARY = 30_522
# transformers' defaults for a new BERT.
_DROPOUT = 0.1


@dataclass(kw_only=True, frozen=True, slots=True)
class Rows:
    """The rows to train on.

    Attributes:
        count: how many.
        tokens: mean L, windows of one text taken as rows of their own.
        squares: mean L².
        windows: of one row, on average.
        longest: the greatest L; 0: not known.
    """

    count: float
    tokens: float
    squares: float
    windows: float = 1.0
    longest: int = 0


class _Model(NamedTuple):
    dims: Dims
    dropout: float
    attention_dropout: float
    base: Bundle | None


def workload(job: TrainJob, asked: PlanJob, gpu: Gpu) -> tuple[Workload, list[str]]:
    """What a training job is for the plan, and what had to be assumed.

    Raises:
        JobError: a task that trains no encoder; or rows that neither data nor flags tell of.
        BundleError: the base cannot be used.
    """
    from bert_ray.model.tasks import TASKS, TRAINED_ONLY

    known = TASKS | TRAINED_ONLY
    notes: list[str] = []
    kind = known.get(job.task)
    if kind is None:
        raise JobError(f"there is no task {job.task!r}; there are {', '.join(sorted(known))}")
    if kind.builds:
        raise JobError(f"task {job.task} is made without training: there is nothing to plan")
    if kind.generates:
        raise JobError(f"task {job.task} trains a decoder too, which the plan does not count")
    model = _model(job, asked, notes)
    pretrains = kind.reads_corpus
    # A model that is asked about two parts has a head for that, over the first token.
    pairs = pretrains and job.pretraining.sentences != "none"
    if pretrains and job.data.replay is not None:
        notes.append("replayed rows are taken to be as long as the corpus's own")
    if job.freeze_layers:
        notes.append("layers that are frozen are planned as if they were trained: it takes less memory and time")
    if job.keep_base:
        notes.append("keep_base holds a copy of the base's encoder, 4 bytes a number, which is not counted")
    rows = _corpus_rows(job, asked, model, notes) if pretrains else _table_rows(job, asked, model, notes)
    if pretrains:
        step_tokens = float(job.batch_tokens)
        # Of every step a share is replayed, beside which the corpus is passed over (`CorpusSource`).
        own = 1.0 - job.data.replay_share if job.data.replay is not None else 1.0
        first = smallest_step(job.batch_tokens, rows.longest or math.ceil(rows.tokens), own)
        mean_tokens = step_tokens * mean_batch(job.batch_warmup, first / step_tokens)
        steps = job.steps or max(1, math.ceil(job.epochs * rows.count * rows.tokens / own / mean_tokens))
        tokens = steps * mean_tokens
    else:
        size = min(job.batch_size, rows.count)
        step_tokens = size * rows.windows * rows.tokens
        steps = math.ceil(rows.count / size) * job.epochs
        tokens = rows.count * rows.windows * rows.tokens * job.epochs
    return (
        Workload(
            dims=model.dims,
            parameters=parameters(
                model.dims,
                pooler=pairs or not pretrains,
                vocabulary_head=pretrains,
                pair_head=pairs,
                outputs=0 if pretrains else len(job.labels or ()),
            ),
            step_tokens=step_tokens,
            steps=steps,
            tokens=tokens,
            row_tokens=rows.tokens,
            row_squares=rows.squares,
            asked_share=job.pretraining.mask_rate if pretrains else 0.0,
            # The masked tokens, and the first of each row where it is asked about its parts.
            read_share=job.pretraining.mask_rate + (1 / rows.tokens if pairs else 0.0) if pretrains else 1.0,
            accumulation=job.gradient_accumulation,
            micro_batches=job.micro_batches,
            precision=_precision(job, gpu, notes),
            zero_stage=job.zero_stage,
            offload=job.offload,
            recompute=job.activation_checkpointing,
            dropout=model.dropout,
            attention_dropout=model.attention_dropout,
            optimizer=job.optimizer,
        ),
        notes,
    )


def _model(job: TrainJob, asked: PlanJob, notes: list[str]) -> _Model:
    if job.model != "new":
        from bert_ray.model.architectures import dropout_rates, encoder_config
        from bert_ray.model.bundle import load_bundle

        base = load_bundle(job.model)
        config = encoder_config(base.config)
        given = (job.dropout, job.attention_dropout)
        hidden, attention = (
            own if rate is None else rate for own, rate in zip(dropout_rates(config), given, strict=True)
        )
        return _Model(dims_of(config), hidden, attention, base)
    shape = job.architecture
    dims = Dims(
        layers=shape.layers,
        hidden=shape.hidden_size,
        heads=shape.heads,
        feed_forward=shape.intermediate_size or 4 * shape.hidden_size,
        vocabulary=asked.vocabulary or _corpus_vocabulary(job, notes),
        positions=shape.max_positions,
    )
    hidden, attention = (_DROPOUT if rate is None else rate for rate in (job.dropout, job.attention_dropout))
    return _Model(dims, hidden, attention, None)


def _corpus_vocabulary(job: TrainJob, notes: list[str]) -> int:
    from bert_ray.training.shards import is_corpus, read_manifest

    corpus = Path(job.data.train)
    if is_corpus(corpus):
        return read_manifest(corpus).vocabulary
    notes.append(f"{corpus} is no corpus yet: a vocabulary of {_VOCABULARY:,} tokens is assumed (--vocabulary)")
    return _VOCABULARY


def _corpus_rows(job: TrainJob, asked: PlanJob, model: _Model, notes: list[str]) -> Rows:
    """The rows of a corpus, as training cuts its documents; or what the flags say."""
    longest = job.max_length or (model.base.card.max_length if model.base else model.dims.positions)
    if asked.row_tokens is None and (found := _rows_of_corpus(job, longest)) is not None:
        return found if asked.rows is None else replace(found, count=asked.rows)
    tokens = float(asked.row_tokens or longest)
    if asked.row_tokens is None:
        notes.append(f"{job.data.train} is no corpus yet: rows of {longest} tokens are assumed (--row-tokens)")
    if asked.rows is None and job.steps is None:
        raise JobError(
            f"how many rows {job.data.train} has is not looked up beside --row-tokens, or it is no corpus yet: give "
            "the training job's steps, or --rows"
        )
    return Rows(count=float(asked.rows or 0), tokens=tokens, squares=tokens**2)


def _rows_of_corpus(job: TrainJob, longest: int) -> Rows | None:
    from bert_ray.training.shards import is_corpus

    corpus = Path(job.data.train)
    if not is_corpus(corpus):
        return None
    from bert_ray.training import corpus_source
    from bert_ray.training.shards import Documents

    special = 2 if job.pretraining.sentences == "none" else 3
    lengths = corpus_source.Rows(Documents(corpus, "train"), longest - special).lengths + special
    return _measured(lengths, len(lengths))


def _table_rows(job: TrainJob, asked: PlanJob, model: _Model, notes: list[str]) -> Rows:
    """The rows of a labelled table, a sample of them tokenised; or what the flags say."""
    from bert_ray.training.job import is_uri

    place = Path(job.data.train)
    if asked.rows is not None and asked.row_tokens is not None:
        return Rows(count=asked.rows, tokens=asked.row_tokens, squares=asked.row_tokens**2)
    if is_uri(job.data.train):
        raise JobError(f"{job.data.train} lies on a store, where the plan does not look: give --rows and --row-tokens")
    if not os.path.exists(place):
        raise JobError(f"{place} does not exist: give --rows and --row-tokens, or the table of the training job")
    count, windows, lengths, task = _sample(job, model)
    held = 0.0 if job.data.validation else job.data.validation_fraction
    found = _measured(lengths, asked.rows or count * (1 - held), windows)
    if asked.row_tokens is not None:
        return Rows(count=found.count, tokens=asked.row_tokens, squares=asked.row_tokens**2)
    if task.piece_is_sample and found.windows > 1:  # A step takes so many windows, not texts.
        found = replace(found, count=found.count * found.windows, windows=1.0)
        if getattr(task.options, "null_windows", 1.0) < 1.0:
            notes.append("windows that null_windows leaves out are counted as if they were kept")
    if count > _SAMPLE_ROWS:
        notes.append(f"row lengths are those of the first {_SAMPLE_ROWS:,} of {count:,} rows")
    return found


def _sample(job: TrainJob, model: _Model) -> tuple[int, float, Any, Task]:
    """Rows of the table; of the first ones windows of each, and tokens of each window; the task that reads them."""
    import pyarrow as pa

    from bert_ray.errors import ColumnError
    from bert_ray.lake.tables import parquet_dataset
    from bert_ray.training.launch import new_task

    assert model.base is not None, "only pretraining starts from a new model"
    task = new_task(job, model.base)
    try:
        table = parquet_dataset(job.data.train)
        columns = {name: (job.data.columns or {}).get(name, name) for name in task.inputs}
        if missing := [column for column in columns.values() if column not in table.schema.names]:
            raise ColumnError(f"{job.data.train} has no column {missing[0]!r}: name it with data.columns")
        rows = table.head(_SAMPLE_ROWS, columns=list(columns.values()))
        count = table.count_rows()
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{job.data.train} cannot be read as Parquet: {error}") from error
    inputs = [task.read(name, rows.column(column), column) for name, column in columns.items()]
    whole = np.ones(len(rows), bool)
    for array in inputs:
        whole &= np.asarray(array.is_valid())
    if not whole.any():
        raise JobError(f"{job.data.train} has no row whose {', '.join(columns.values())} is not null")
    kept = [array.filter(pa.array(whole)) for array in inputs]
    lengths = task.encode(task.tokenizer(model.base.tokenizer()), kept).tokens.lengths
    return count, len(lengths) / int(whole.sum()), lengths, task


def _measured(lengths: Any, count: float, windows: float = 1.0) -> Rows:
    sizes = np.asarray(lengths, np.float64)
    if not len(sizes):
        raise JobError("there are no rows to train on")
    return Rows(
        count=float(count),
        tokens=float(sizes.mean()),
        squares=float((sizes**2).mean()),
        windows=windows,
        longest=int(sizes.max()),
    )


def _precision(job: TrainJob, gpu: Gpu, notes: list[str]) -> Literal["fp32", "bf16", "fp16"]:
    """What the job's `precision` is on a GPU."""
    if job.precision == "auto":
        if gpu.bf16:
            return "bf16"
        notes.append(f"{gpu.name} does not multiply in bf16: fp32 is planned with (--train precision=fp16)")
        return "fp32"
    if job.precision == "bf16" and not gpu.bf16:
        raise JobError(f"precision is bf16, but {gpu.name} does not multiply in bf16: give --train precision=fp16")
    return job.precision
