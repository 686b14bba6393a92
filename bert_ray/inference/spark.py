"""Annotating with Spark: a DataFrame, or the units of a run.

Both go through mapInArrow: Arrow batches in, Arrow batches out, and one model per Python worker process, which Spark
keeps for the tasks that follow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import os
import re
import shlex
import stat
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

# PySpark warns of pandas 3 at every turn; nothing here goes through pandas.
warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas", category=FutureWarning)

from pyspark import SparkContext, TaskContext  # noqa: E402
from pyspark.sql import DataFrame, SparkSession  # noqa: E402
from pyspark.sql.pandas.types import from_arrow_type, to_arrow_schema  # noqa: E402
from pyspark.sql.types import StructField, StructType  # noqa: E402

from bert_ray.errors import EngineError, JobError  # noqa: E402
from bert_ray.inference.spark_settings import is_secret, write_properties  # noqa: E402
from bert_ray.inference.specs import annotator_of  # noqa: E402
from bert_ray.inference.work import Outcome, Work, annotate_unit  # noqa: E402
from bert_ray.lake.journal import Journal  # noqa: E402
from bert_ray.lake.units import Unit  # noqa: E402

if TYPE_CHECKING:
    from bert_ray.inference.bulk import Plan
    from bert_ray.inference.job import SparkOptions
    from bert_ray.model.annotator import AnnotatorSpec

# Tasks of a run: one unit each up to here, so that a task that dies takes one unit with it.
_MOST_TASKS = 10_000
# How often the journal is read for what has ended: Spark itself tells only when all has.
_LOOK_SEC = 1.0
# How long a run that ends waits for its tasks to do so.
_CANCEL_SEC = 30.0
# A task is tried this often in a session of our own; Spark's default there is once.
_TRIES = 4
# Workers that share a GPU at most; there is no memory for more.
_MOST_WORKERS = 64


def annotate(
    frame: DataFrame,
    model: str,
    column: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    threads: int | None = None,
    **options: Any,
) -> DataFrame:
    """Append a model's annotation to a DataFrame; lazy, as Spark's own transformations are.

    Args:
        frame: rows with the task's input columns.
        model: a bundle reference that every executor can resolve.
        column: the text column, for a task of one input; default: the input's name, `text`.
        columns: table columns by task input, for a task of several.
        threads: torch threads per Python worker; default: the cores among the tasks that run at a time.
        **options: `name`, `scores`, `task`, `options`, `batch_tokens`, `device`, `dtype` (see `AnnotatorSpec`).

    Returns:
        The frame with one more column; null text has a null annotation.

    Raises:
        BundleError: the model cannot be used.
        ColumnError: the frame lacks the column, has it in another type, or has the annotation's name already.
    """
    spec, annotator = annotator_of(model, column=column, columns=columns, **options)
    annotator.check(to_arrow_schema(frame.schema))
    spec = dataclasses.replace(spec, threads=threads or worker_threads(frame.sparkSession))
    field = annotator.output_field
    schema = StructType([*frame.schema.fields, StructField(field.name, from_arrow_type(field.type), True)])
    return frame.mapInArrow(_row_annotator(spec), schema)


def _row_annotator(spec: AnnotatorSpec) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def annotate_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        annotator = on_gpu(spec).build()  # The same object for every task of this process.
        for batch in batches:
            yield as_spark(annotator(batch))

    return annotate_batches


def on_gpu(spec: AnnotatorSpec) -> AnnotatorSpec:
    """In a task, on a machine of several GPUs: the description with one of them named, where it names none."""
    import torch

    if spec.device not in ("auto", "cuda") or (gpus := torch.cuda.device_count()) < 2:
        return spec
    device = f"cuda:{gpu_of_task(gpus)}"
    if _taken and _taken[0] != device:  # Spark gave this process's task another: what is on the one before goes.
        from bert_ray.model.annotator import forget_built

        forget_built()
    _taken[:] = [device]
    return dataclasses.replace(spec, device=device)


# Where PySpark takes the words of spark-submit from.
_SUBMIT_WORDS = "PYSPARK_SUBMIT_ARGS"
# The GPU that this process computes on.
_taken: list[str] = []


def gpu_of_task(gpus: int) -> int:
    """Which of so many GPUs this task computes on: the one that Spark gave it, else the one with the fewest workers."""
    task = TaskContext.get()
    given = task.resources().get("gpu") if task else None
    if given is None:
        return _free_gpu(gpus)
    address, shown = given.addresses[0], os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if address in shown:
        return shown.index(address)
    return int(address) % gpus if address.isdigit() else 0  # What a process sees alone counts from 0.


@functools.cache  # A process keeps its GPU: the model is there.
def _free_gpu(gpus: int) -> int:
    """Take a GPU of this machine by a lock that ends with the process; by its number where there are no locks."""
    place = Path(tempfile.gettempdir(), f"bert_ray-gpus-{os.getuid()}")
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, exist_ok=True)
        made = place.lstat()
        if not stat.S_ISDIR(made.st_mode) or made.st_uid != os.getuid():
            raise PermissionError(f"{place} is another user's")
        for turn in range(_MOST_WORKERS):
            for gpu in range(gpus):
                handle = os.open(place / f"{gpu}.{turn}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return gpu  # Never closed: held as long as the process lives.
                except BlockingIOError:
                    os.close(handle)
    return os.getpid() % gpus


def as_spark(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with types that Spark has: it knows lists, but none of a fixed size."""
    columns = [spark_array(column) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def spark_array(array: pa.Array) -> pa.Array:
    """The array, as a plain list where it is a list of a fixed size."""
    kind = array.type
    return array.cast(pa.list_(kind.value_type)) if pa.types.is_fixed_size_list(kind) else array


def run_units(plan: Plan, watch: Callable[[int], None]) -> Iterator[Outcome]:
    """Annotate the plan's units as Spark tasks; outcomes come as units end, as the journal tells.

    Closing the generator cancels the tasks.

    Raises:
        EngineError: Spark gave up.
    """
    with _session(plan.job.spark, plan.job.workers) as (session, held):
        job = plan.job
        # Where the master is ours too it holds the workers to their number; elsewhere the tasks must.
        tasks = min(len(plan.todo), _MOST_TASKS, (job.workers if not held else None) or _MOST_TASKS)
        threads = job.threads or worker_threads(session, tasks=tasks)
        work = dataclasses.replace(plan.work, annotator=dataclasses.replace(plan.work.annotator, threads=threads))
        # From Arrow: rows of Python's would each go through Python workers that do nothing else.
        turns = pa.array([place % tasks for place in range(len(plan.todo))], pa.int32())
        units = pa.table({"unit": [unit.to_json() for unit in plan.todo], "task": turns})
        # As many units to each task as to the next, tried in the plan's order, so that what fails early is known early;
        # a plain repartition sorts by hash first.
        frame = session.createDataFrame(units).coalesce(1).repartitionById(tasks, "task")
        annotated = frame.mapInArrow(_unit_annotator(work), "outcome string")
        yield from _collected(session, annotated, plan)


def _unit_annotator(work: Work) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def annotate_units(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        here = dataclasses.replace(work, annotator=on_gpu(work.annotator))
        for batch in batches:
            for text in batch.column(0).to_pylist():
                outcome = annotate_unit(here, Unit.from_json(text))
                yield pa.RecordBatch.from_pydict({"outcome": [outcome.to_json()]})

    return annotate_units


def _collected(session: SparkSession, frame: DataFrame, plan: Plan) -> Iterator[Outcome]:
    """Run the frame in a thread, and tell what ended from the journal meanwhile."""
    # The context's tags: the session's own can be interrupted only by the thread that added them.
    context, tag = session.sparkContext, f"bert_ray-{uuid.uuid4().hex[:12]}"
    result: dict[str, Any] = {}

    def collect() -> None:
        try:
            context.addJobTag(tag)
            result["rows"] = frame.collect()
        except Exception as error:  # Told to whoever waits for the thread.
            result["error"] = error

    thread = threading.Thread(target=collect, name="bert_ray-spark", daemon=True)
    thread.start()
    journal = Journal(plan.work.output)
    waiting = {unit.id for unit in plan.todo}
    try:
        while thread.is_alive():
            thread.join(_LOOK_SEC)
            # What is done comes first: a lasting failure ends the run, and the summary counts what came before it.
            done = journal.receipts()
            for unit_id in sorted(waiting & (done | journal.failed()), key=lambda unit_id: unit_id not in done):
                if ended := Outcome.from_journal(journal, unit_id, plan.work.session):
                    waiting.discard(unit_id)
                    yield ended
    finally:
        _cancel(context, tag, thread)
    if error := result.get("error"):
        raise EngineError(f"Spark gave up: {_why(error)}") from error
    # What could not be written to the journal (a full disk) is in the rows alone.
    outcomes = (Outcome.from_json(row.outcome) for row in result["rows"])
    yield from (outcome for outcome in outcomes if outcome.unit in waiting)


def _cancel(context: SparkContext, tag: str, thread: threading.Thread) -> None:
    """End the job that the thread waits for. Before it is submitted there is none to end, so this is said again."""
    until = time.monotonic() + _CANCEL_SEC
    while thread.is_alive() and time.monotonic() < until:
        with contextlib.suppress(Exception):  # Java may be gone: why the run ends is what counts.
            context.cancelJobsWithTag(tag)
        thread.join(_LOOK_SEC)


def _why(error: BaseException) -> str:
    """What Spark says, without the stack of the JVM."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Through py4j the first line only says which Java method was called.
    told = next((line for line in lines if "Exception:" in line or "Error:" in line), lines[0] if lines else "")
    return told.lstrip(": ")[:500] or type(error).__name__


@contextlib.contextmanager
def _session(options: SparkOptions, workers: int | None) -> Iterator[tuple[SparkSession, bool]]:
    """The session in use, or one of our own that is stopped at the end; and whether its master has `workers` cores."""
    if (active := _active()) is not None:
        yield active, False
        return
    session = new_session(options, workers)
    try:
        yield session, not options.master and not options.submitted()
    finally:
        with contextlib.suppress(Exception):  # Java may be gone: why the run ends is what counts.
            session.stop()


def _active() -> SparkSession | None:
    """The session in use. A thread has only those for its own that were made in it, but a process one context."""
    if (active := SparkSession.getActiveSession()) is not None:
        return active
    return SparkSession.builder.getOrCreate() if SparkContext._active_spark_context is not None else None


def new_session(options: SparkOptions, workers: int | None = None) -> SparkSession:
    """Start a SparkSession.

    Args:
        options: master and settings.
        workers: cores to use where the master is this machine.

    Raises:
        JobError: there is no Java, or the master cannot be reached.
    """
    submitted = options.submitted()
    if not submitted:
        options.check_java()
    # Executors on this machine must run this interpreter, not the first "python3" on the PATH.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("bert_ray")
    if options.master or not submitted:
        master = options.master or f"local[{workers or '*'}]"
        # In a process of its own Spark tries a task once, unless it is told; on a cluster so often.
        master = re.sub(r"^local\[(\d+|\*)\]$", rf"local[\1,{_TRIES}]", master)
        builder = builder.master(master)
        builder = builder.config("spark.ui.enabled", "false").config("spark.ui.showConsoleProgress", "false")
        if master.startswith("local"):
            # Else Spark looks for this machine's name in the network, which a laptop may not have.
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    for key, value in options.config.items():
        builder = builder.config(key, value)
    try:
        if not submitted and any(map(is_secret, options.config)):
            _start_java(builder._options)
        session = builder.getOrCreate()
    except Exception as error:
        raise JobError(f"Spark cannot be started: {_why(error)}") from error
    session.sparkContext.setLogLevel("ERROR")
    # On Ctrl-C Java may end before we do: that the thread which listens for accumulators (there are none) then finds
    # nobody at the other end is no news.
    if (listener := getattr(session.sparkContext, "_accumulatorServer", None)) is not None:
        listener.handle_error = lambda *_: None
    return session


def _start_java(settings: Mapping[str, Any]) -> None:
    """Start Java with the settings in a file: its words, where PySpark puts them, are for all users of the machine."""
    given = os.environ.get(_SUBMIT_WORDS)
    with tempfile.TemporaryDirectory(prefix="bert_ray-spark-") as place:
        texts = {name: str(value) for name, value in settings.items() if name.startswith("spark.")}
        file = write_properties(Path(place, "spark.properties"), texts)
        words = f"--properties-file {shlex.quote(str(file))} --load-spark-defaults {given or 'pyspark-shell'}"
        os.environ[_SUBMIT_WORDS] = words
        try:
            SparkContext._ensure_initialized()  # Until Java has read them.
        finally:
            os.environ.pop(_SUBMIT_WORDS)
            if given is not None:
                os.environ[_SUBMIT_WORDS] = given


def worker_threads(session: SparkSession, tasks: int | None = None) -> int | None:
    """Torch threads for a Python worker, so that those which run at a time share the cores."""
    master = session.conf.get("spark.master", "") or ""
    if not master.startswith("local"):
        return int(session.conf.get("spark.task.cpus", "1") or 1)
    inside = master.partition("[")[2].partition("]")[0].split(",")[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slots = int(inside) if inside.isdigit() else cores if inside == "*" else 1
    return max(1, cores // min(slots, tasks or slots))
