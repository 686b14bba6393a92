"""Start a training run, in this process or on Ray Train, and bring its bundle home.

While a run is under way, `<output>.run` holds all it needs to go on after a kill (run_directory.py). When it has ended,
the bundle stands in `<output>` and `<output>.run` is gone.
With engine ray on several machines, `<output>` lies on storage that all of them see.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_ray.errors import JobError, Stopped
from bert_ray.lake.lock import exclusive
from bert_ray.training.job import DataOptions, TrainJob, is_uri
from bert_ray.training.progress import duration, show
from bert_ray.training.run_directory import (
    BEST,
    begun_in,
    clear,
    ended,
    enter,
    note_shards,
    publish,
    same_run,
    seen_shards,
)
from bert_ray.training.trackers import tracked

if TYPE_CHECKING:
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.tasks import Task
    from bert_ray.training.data import Data, LabelledTable
    from bert_ray.training.loop import Callback
    from bert_ray.training.position import Position

# In a run's directory: the bundle that training starts from, where the task made one of its own.
START = "start"
# As a job's model: random weights.
NEW = "new"

# Keys that only a task that reads a corpus heeds, and those that it does not.
_OF_A_CORPUS = (
    "steps",
    "batch_tokens",
    "batch_warmup",
    "evaluate_every",
    "pretraining",
    "architecture",
    "data.on_bad_shard",
)
_OF_ROWS = ("batch_size", "data.validation_fraction")

_PACKAGES = ("bert-ray", "torch", "transformers", "pyarrow", "ray", "deepspeed")


@dataclass(kw_only=True, slots=True)
class TrainResult:
    """What came out.

    Attributes:
        bundle: the trained bundle's directory.
        metrics: of the best epoch on the validation rows, or by cross-validation of a bundle that was made without
            training; empty without any.
        history: one entry per epoch: epoch, step, train_loss, validation_loss, metrics, tokens_per_second,
            learning_rate (of the epoch's last step); empty where the bundle was made without training.
        baseline: the metric of the best constant answer (the most frequent label); None without such a thing.
        best_epoch: the epoch whose model was kept, from 1.
        train_rows, validation_rows: rows used.
        seconds: from start to end, this session alone.
        tokens_per_second: real (unpadded) tokens per second of training, evaluation and checkpoints left out.
        trained: False where an equal run had already ended here and nothing was done.
    """

    bundle: Path
    metrics: dict[str, float]
    history: list[dict[str, float]]
    baseline: float | None
    best_epoch: int
    train_rows: int
    validation_rows: int
    seconds: float
    tokens_per_second: float
    trained: bool = True

    def summary(self) -> str:
        """A few lines to read."""
        lines = [f"bundle: {self.bundle}" + ("" if self.trained else " (trained before with these settings)")]
        if not self.history:
            lines.append(f"made from {self.train_rows:,} rows, {duration(self.seconds)}")
        else:
            lines.append(
                f"trained on {self.train_rows:,} rows, best epoch {self.best_epoch} of {len(self.history)}, "
                f"{duration(self.seconds)}, {self.tokens_per_second:,.0f} tokens/s"
            )
        if self.metrics:
            found = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
            where = f"{self.validation_rows:,} validation rows" if self.validation_rows else "rows held out in turn"
            lines.append(
                f"on {where}: {found}" + ("" if self.baseline is None else f" (majority baseline {self.baseline:.4f})")
            )
        return "\n".join(lines)


def train(
    job: TrainJob, *, callbacks: Sequence[Callback] = (), tell: Callable[[dict[str, Any]], None] = show
) -> TrainResult:
    """Run a job to its end; a run that was cut off goes on from its last checkpoint, an ended one is not repeated.

    Args:
        job: what to do.
        callbacks: called with a StepEvent after each optimiser step on each worker; with engine ray they are pickled.
        tell: called with progress events (dictionaries); prints lines to standard error by default.

    Raises:
        JobError: settings or data are at fault, the output is taken, or the loss or its gradient stopped being finite.
        ColumnError: a column is missing or of the wrong type.
        BundleError: the base cannot be used.
        LakeError: a corpus is damaged, a checkpoint cannot be read or written, or another run works on the same output.
        Stopped: the run was asked to stop, and has written a checkpoint.
    """
    from bert_ray.model.bundle import make_room

    started = time.perf_counter()
    if is_uri(job.output):
        raise JobError(f"output {job.output} is no directory: give one, and copy the bundle there when it is finished")
    job = job.absolute()
    output, directory = Path(job.output), Path(f"{job.output}.run")
    make_room(output)
    lock = output.with_name(f".{output.name}.lock")
    with exclusive(lock, f"the training run of {output}"):
        has_ended = output.exists() and any(output.iterdir())
        # Killed after it ended, it may have left MLflow's run open.
        over = has_ended and begun_in(directory) is None
        with nullcontext(tell) if over else tracked(job, tell) as told:
            return _train(job, output, directory, has_ended, callbacks, told, started)


def _train(
    job: TrainJob,
    output: Path,
    directory: Path,
    has_ended: bool,
    callbacks: Sequence[Callback],
    tell: Callable[[dict[str, Any]], None],
    started: float,
) -> TrainResult:
    """`train`, while no other run works on the same output."""
    from bert_ray.model.bundle import load_bundle

    # Who began, or ended, by a version that ignored such keys goes on with them.
    if begun_in(directory) is None and not has_ended:
        _check_kind(job)
    fresh = output.parent / f".{output.name}.{os.getpid()}.start"
    for left in output.parent.iterdir():  # What a killed start left, here or of a bundle that is built.
        if re.fullmatch(rf"\.{re.escape(output.name)}\.\d+\.(start|made)", left.name):
            shutil.rmtree(left, ignore_errors=True)
    try:
        base, asked = _base(job, fresh)
        task = new_task(job, base)
        if task.builds:
            from bert_ray.training.build import build

            return build(job, base, tell)
        table = None
        if not task.reads_corpus:
            from bert_ray.training.data import read_labelled

            table = read_labelled(job.data.train, task, job.data.columns)
            if task.start(base, table.inputs, table.truth, fresh):
                base = load_bundle(fresh)
        seen = seen_shards(directory)
        card, data, notes = prepare(job, base, table, seen)
        identity = job.identity() | {"base": asked} | data.identity()
        if job.augmentation.substitution:
            identity["augmentation's model"] = load_bundle(str(job.augmentation.model)).fingerprint
        if card.labels and not job.labels:  # In the rows they are numbers.
            identity["labels found"] = list(card.labels)
        if has_ended:
            return _finished(job, output, directory, identity, data, time.perf_counter() - started)
        enter(job, directory, identity)
        note_shards(directory, seen)
        if fresh.exists():
            base = _keep_start(job, data, fresh, directory / START, tell)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for text in notes:
        tell({"what": "note", "text": text})
    card.provenance |= provenance(job, asked, data, identity)
    run, kept = _run_ray if job.engine == "ray" else _run_local, job.checkpoint.directory or directory
    try:
        position = run(job, base, card, data, directory, callbacks, tell)
    except KeyboardInterrupt:
        tell({"what": "note", "text": f"stopped; the same command goes on from the last checkpoint in {kept}"})
        raise
    if position.diverged is not None:
        raise JobError(_divergence(job, position, directory, identity))
    if position.stopped:
        raise Stopped(f"stopped as asked, at step {position.curve[-1][0]:.0f}; a checkpoint is in {kept}")
    seconds = time.perf_counter() - started
    publish(job, directory, output, identity, position, seconds)
    return TrainResult(
        bundle=output,
        metrics=load_bundle(output).card.metrics,
        history=position.history,
        baseline=data.baseline,
        best_epoch=position.best_epoch,
        train_rows=data.train_rows,
        validation_rows=data.validation_rows,
        seconds=seconds,
        tokens_per_second=position.tokens / max(1e-9, position.seconds),
    )


def _base(job: TrainJob, fresh: Path) -> tuple[Bundle, str]:
    """The bundle that the job names, and its fingerprint; of new weights one that is made at `fresh`."""
    from bert_ray.model.bundle import load_bundle

    if job.model != NEW:
        base = load_bundle(job.model)
        return base, base.fingerprint
    from bert_ray.training.pretraining import new_bundle
    from bert_ray.training.shards import is_corpus

    if not _reads_corpus(job):
        raise JobError(f"model new is for task pretraining; for task {job.task} give a pretrained model")
    if not is_corpus(Path(job.data.train)):
        raise JobError(f"{job.data.train} holds no finished corpus: make it with `bert-ray corpus`")
    new_bundle(job, fresh)
    return load_bundle(fresh), NEW


def prepare(
    job: TrainJob, base: Bundle, table: LabelledTable | None = None, seen: dict[str, list[Any]] | None = None
) -> tuple[Card, Data, list[str]]:
    """The card of the bundle to come, what it learns from, and notes for the user.

    Args:
        job: what to do.
        base: the bundle that training starts from.
        table: `data.train`, where it is a table and has been read already.
        seen: a corpus's shards that need not be read to be checked.
    """
    from bert_ray.training.data import labels_for, read_labelled, training_data

    task = new_task(job, base)
    if task.reads_corpus:
        from bert_ray.training.pretraining import corpus_data

        return task.card, *corpus_data(job, base, seen)
    if job.data.replay is not None:
        raise JobError(f"data.replay is a corpus, which task {job.task} cannot learn from: leave it out")
    table = table or read_labelled(job.data.train, task, job.data.columns)
    task.card.labels = labels_for(job, task, table)
    data, notes = training_data(job, table, task, task.tokenizer(base.tokenizer()))
    if job.augmentation.any:
        import torch

        from bert_ray.training.augmentation import Augmentation

        # Made for its errors alone: on a worker they would come when the run has begun, and count as its death.
        Augmentation(job.augmentation, base.tokenizer(), task.card.max_length, job.seed, torch.device("cpu"))
    return task.card, data, notes


def _keep_start(job: TrainJob, data: Data, fresh: Path, place: Path, tell: Callable[[dict[str, Any]], None]) -> Bundle:
    """Bring the bundle to start from into the run's directory, where all workers see it; a run that goes on has it."""
    from bert_ray.model.bundle import load_bundle

    if not place.exists():
        if job.model == NEW and job.architecture.start == "cooccurrence":
            _count_neighbours(job, data, fresh, tell)
        os.replace(fresh, place)
    return load_bundle(place)


def _count_neighbours(job: TrainJob, data: Data, fresh: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """Make the new bundle again, with embeddings that start from its corpus."""
    from bert_ray.training.pretraining import CorpusData, new_bundle

    assert isinstance(data, CorpusData)
    began = time.perf_counter()
    tokens = new_bundle(job, fresh, data.corpus.documents("train"))
    seconds = time.perf_counter() - began
    text = f"embeddings start from the neighbours of {tokens:,} tokens, counted in {seconds:.0f} s"
    tell({"what": "note", "text": text})


def new_task(job: TrainJob, base: Bundle) -> Task:
    """The task of a job, bound to the card of the bundle to come."""
    from bert_ray.model.architectures import encoder_config, max_positions
    from bert_ray.model.card import Card
    from bert_ray.model.tasks import TRAINED_ONLY

    kind = TRAINED_ONLY.get(job.task)
    limit, layers = max_positions(base.config), encoder_config(base.config).num_hidden_layers
    if job.freeze_layers > layers:
        raise JobError(f"freeze_layers is {job.freeze_layers}, but {job.model} has {layers} layers")
    if job.max_length is not None and job.max_length > limit:
        raise JobError(f"max_length is {job.max_length}, but {job.model} has {limit} positions: give at most {limit}")
    card = Card(
        task=(kind and kind.leaves) or job.task,
        name=job.name,
        labels=job.labels or [],
        inputs=[],
        max_length=job.max_length or base.card.max_length,
        pooling=base.card.pooling,
        normalize=base.card.normalize,
        options=dict(job.options),
    )
    task = base.bind(card, kind=job.task)
    if inherited := task.inherited(base.card):
        card.options = inherited | card.options
        task = base.bind(card, kind=job.task)
    _check_levers(job, task)
    task.choose_inputs(job.data.columns or ())
    card.inputs = list(task.annotates)
    return task


def _reads_corpus(job: TrainJob) -> bool:
    from bert_ray.model.tasks import TRAINED_ONLY

    kind = TRAINED_ONLY.get(job.task)
    return kind is not None and kind.reads_corpus


def _check_kind(job: TrainJob) -> None:
    """Refuse keys that the job's kind of training would ignore."""
    default = TrainJob(model=job.model, output=job.output, data=DataOptions(train=job.data.train))
    reads_corpus = _reads_corpus(job)
    given = [
        key for key in (_OF_ROWS if reads_corpus else _OF_A_CORPUS) if attrgetter(key)(job) != attrgetter(key)(default)
    ]
    if given and reads_corpus:
        raise JobError(
            f"{', '.join(given)}: task {job.task} reads a corpus, and takes batch_tokens and its own validation"
        )
    if given:
        raise JobError(
            f"{', '.join(given)}: for a task that reads a corpus; task {job.task} takes epochs and batch_size"
        )
    if not reads_corpus and job.gradient_accumulation > job.batch_size:
        raise JobError(
            f"gradient_accumulation {job.gradient_accumulation} exceeds batch_size {job.batch_size}: a step of so few "
            "rows has no such many micro-batches"
        )


def _check_levers(job: TrainJob, task: Task) -> None:
    """Refuse what a task would have to ignore, or could learn nothing from."""
    if job.labels is not None and len(job.labels) < task.least_labels:
        raise JobError(f"labels are {job.labels}; task {job.task} needs at least {task.least_labels}")
    if task.builds:
        asked = {
            "augmentation": job.augmentation.any,
            "class_weights": job.class_weights != "none",
            **{name: getattr(job, name) for name in ("label_smoothing", "l1", "early_stopping", "keep_base")},
            "freeze_layers": job.freeze_layers,
            "layer_decay": job.layer_decay != 1.0,
        }
        if named := [name for name, given in asked.items() if given]:
            raise JobError(f"{', '.join(named)}: task {job.task} makes its bundle without training; leave it out")
    if job.augmentation.any and not task.distortable:
        raise JobError(f"augmentation: the truth of task {task.kind} belongs to single words; leave it out")
    if not _reads_corpus(job):
        return
    asked = {
        "augmentation": job.augmentation.any,
        "label_smoothing": job.label_smoothing,
        "class_weights": job.class_weights != "none",
    }
    if named := [name for name, given in asked.items() if given]:
        raise JobError(f"{', '.join(named)}: task {job.task} reads a corpus, which has no labelled rows; leave it out")


def provenance(job: TrainJob, base: str, data: Data, identity: dict[str, Any]) -> dict[str, Any]:
    """Where a bundle comes from, for its card; `base` is the fingerprint of what the job names."""
    return {
        "base": {"reference": job.model, "fingerprint": base},
        "data": {
            "train": job.data.train,
            "validation": _validation_of(job),
            "train_rows": data.train_rows,
            "validation_rows": data.validation_rows,
        },
        "job": identity,
        "seed": job.seed,
        "majority_baseline": data.baseline,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _validation_of(job: TrainJob) -> str:
    """Where validation rows stem from, in words."""
    if _reads_corpus(job):
        return "the corpus's own"
    return job.data.validation or f"{job.data.validation_fraction} of train, by hash of the text"


def versions() -> dict[str, str | None]:
    """Of Python and the packages that decide what comes out."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _run_local(
    job: TrainJob,
    base: Bundle,
    card: Card,
    data: Data,
    directory: Path,
    callbacks: Sequence[Callback],
    tell: Callable[[dict[str, Any]], None],
) -> Position:
    import torch

    from bert_ray.training.loop import Loop
    from bert_ray.training.notice import heeded
    from bert_ray.training.optim import PlainStepper
    from bert_ray.training.peers import Peers

    before = torch.get_num_threads()
    torch.set_num_threads(job.threads or os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loop = Loop(
            job=job,
            base=base,
            card=card,
            data=data,
            directory=directory,
            peers=Peers(),
            device=device,
            make_stepper=lambda module: PlainStepper(module, job, device),
            tell=tell,
            callbacks=callbacks,
        )
        with heeded(directory, here=True):
            return loop.run()
    finally:
        torch.set_num_threads(before)


def _run_ray(*arguments: Any) -> Position:
    try:
        from bert_ray.training.ray_train import run
    except ImportError as error:
        raise JobError(
            f"engine ray needs Ray Train and DeepSpeed ({error}): pip install 'bert-ray[ray,train]', or use engine "
            "local"
        ) from error
    return run(*arguments)


def _finished(
    job: TrainJob, output: Path, directory: Path, identity: dict[str, Any], data: Data, seconds: float
) -> TrainResult:
    """The result of a run that ended before."""
    card = ended(output, identity)
    # Where it was killed between its bundle's appearance and its end.
    if same_run(begun_in(directory) or {}, identity):
        clear(job, directory, identity)
    return TrainResult(
        bundle=output,
        metrics=card.metrics,
        history=card.provenance["history"],
        baseline=data.baseline,
        best_epoch=card.provenance["best_epoch"],
        train_rows=data.train_rows,
        validation_rows=data.validation_rows,
        seconds=seconds,
        tokens_per_second=card.provenance["tokens_per_second"],
        trained=False,
    )


def _divergence(job: TrainJob, position: Position, directory: Path, identity: dict[str, Any]) -> str:
    """Say what happened. Checkpoints and the best bundle stay where they are; where there is neither, all goes."""
    from bert_ray.training.checkpoints import checkpoints_of

    what = f"the loss or its gradient stopped being finite at step {position.diverged} (epoch {position.epoch + 1})"
    remedy = f"train again with a smaller learning_rate (now {job.learning_rate:g})"
    if position.overflowed:
        what = f"no step since long was within fp16's range, and none was taken, up to step {position.diverged}"
        remedy = "train again with precision=bf16, or fp32"
    elif not job.clip:
        remedy += " or with clip: 1.0"
    checkpoints = checkpoints_of(job, directory)
    checkpoints.latest()
    if not (whole := checkpoints.whole()):
        clear(job, directory, identity)
        return f"{what}, before an epoch or a checkpoint; nothing was kept. {remedy[0].upper()}{remedy[1:]}"
    where = f"{directory} and {checkpoints.where}" if job.checkpoint.directory else directory
    best = f"the best model until then, of epoch {position.best_epoch}, is {directory / BEST}; "
    return (
        f"{what}; {best if position.best_epoch else ''}the last good checkpoint is {checkpoints.where}/{whole[-1]}, "
        f"from which the same command comes to that step again. To start anew, delete {where} and {remedy}"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
