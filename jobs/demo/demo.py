"""The whole way once, on bundled real reviews: train a BERT, annotate a lake on Ray and on Spark, ask it from SQL.

    make demo                                         sets up what is missing, then runs this
    .venv/bin/python jobs/demo/demo.py                the same without the set-up
    .venv/bin/python jobs/demo/demo.py epochs=1       keys of jobs/demo/finetune.yaml may be given, as to bert-ray train

Run again, what is done is not done again: a trained model is kept, annotated units have receipts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch, ray or pyspark is imported: what they would say about themselves is no part of a demo.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
warnings.simplefilter("ignore")

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from bert_ray.errors import BertRayError

if TYPE_CHECKING:
    from bert_ray.training.job import TrainJob

ROOT = Path(__file__).resolve().parents[2]
JOB, LAKE = "jobs/demo/finetune.yaml", "jobs/demo/lake"
STEPS = 5
# Engines agree where labels are equal and probabilities as close as fp32 sums in another order come out.
TOLERANCE = 1e-5

SQL = """\
SELECT source,
       bert_sentiment(text).label   AS says,
       count(*)                     AS reviews,
       count_if(label = 'negative') AS known_negative,
       count_if(label = 'positive') AS known_positive
FROM   reviews
GROUP  BY ALL
ORDER  BY source, says"""


class Demo:
    """The demo's steps, and what they have measured.

    Attributes:
        output: the directory that everything goes to.
        facts: what the summary tells, kept in OUTPUT/facts.json so that a second run can tell it as well.
    """

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.model = Path(job.output)
        self.output = self.model.parent.parent
        self.output.mkdir(parents=True, exist_ok=True)
        self._facts_file = self.output / "facts.json"
        self.facts: dict[str, Any] = {}
        if self._facts_file.exists():
            self.facts = json.loads(self._facts_file.read_text("utf-8"))

    def table(self, engine: str) -> str:
        """Where an engine's annotated lake lies."""
        return str(self.output / f"annotated-{engine}")

    def note(self, name: str, **values: Any) -> None:
        """Keep facts for the summary."""
        self.facts[name] = values
        self._facts_file.write_text(json.dumps(self.facts, indent=2) + "\n", "utf-8")

    def train(self) -> None:
        """Fine-tune, unless a model of this very job is there."""
        from bert_ray.model.bundle import load_bundle

        if self.facts.get("train", {}).get("job") == self._identity() and (self.model / "bert_ray.json").exists():
            load_bundle(self.model)  # It has not been damaged since.
            say(f"trained already ({self.facts['train']['seconds']:.0f} s then): {shown(self.model)}")
            return
        from bert_ray.training.launch import train

        # What an earlier model said about the lake is not this one's.
        for engine in ("ray", "spark"):
            shutil.rmtree(self.table(engine), ignore_errors=True)
        began = time.monotonic()
        with ray_session():
            train(self.job)
        self.note("train", job=self._identity(), seconds=time.monotonic() - began)

    def _identity(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.job.identity()))

    def annotate(self, engine: str) -> None:
        """Annotate the lake, or what an interrupted run has left of it."""
        from bert_ray.inference.bulk import run
        from bert_ray.inference.job import AnnotateJob

        output = self.table(engine)
        say(
            f"$ bert-ray annotate --input {LAKE} --model {shown(self.model)} --output {shown(output)} --engine {engine}"
        )
        summary = run(AnnotateJob(input=LAKE, model=str(self.model), output=output, engine=engine))
        if summary.exit_status:
            raise BertRayError(f"the {engine} engine left units undone: bert-ray runs failures {output}")
        if summary.done:
            self.note(engine, rows=summary.rows, rows_per_second=summary.rows_per_second)

    def compare(self) -> None:
        """Hold the engines' tables to each other, row by row."""
        ray, spark = read(self.table("ray")), read(self.table("spark"))
        equal = ray["id"].equals(spark["id"]) and labels(ray).equals(labels(spark))
        scores = [pc.struct_field(table["sentiment"].combine_chunks(), "score") for table in (ray, spark)]
        apart = pc.max(pc.abs(pc.subtract(*scores))).as_py() if equal else float("nan")
        self.note("agree", rows=ray.num_rows, equal=equal, apart=apart)
        if not (equal and apart <= TOLERANCE):
            raise BertRayError("the engines disagree: this must not happen, please report it")
        say(f"yes: {ray.num_rows:,} rows, all labels equal, scores at most {apart:.1e} apart")

    def ask(self) -> None:
        """Ask the model from Spark SQL, beside the known labels."""
        from pyspark.sql import SparkSession

        from bert_ray.inference import functions

        session = SparkSession.active()
        functions.register(session, models=self.model.parent)
        session.read.parquet(LAKE).createOrReplaceTempView("reviews")
        say("functions.register(session, models=...) gives the session bert_sentiment(text); then\n")
        print(textwrap.indent(SQL, " " * 9) + "\n", flush=True)
        rows = [row.asDict() for row in session.sql(SQL).collect()]
        print_table(rows)
        right: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for row in rows:
            right[row["source"]] += row[f"known_{row['says']}"]
            total[row["source"]] += row["reviews"]
        accuracy = {source: right[source] / total[source] for source in sorted(total)}
        self.note("sql", accuracy=accuracy, rows=sum(total.values()))
        say("right, by source: " + ", ".join(f"{source} {share:.1%}" for source, share in accuracy.items()))

    def accuracy(self) -> tuple[float, float]:
        """Share of the lake's rows that the model gets right, and that the most frequent label would."""
        table = read(self.table("ray"))
        right = pc.mean(pc.cast(pc.equal(labels(table), table["label"].combine_chunks()), pa.float64())).as_py()
        return right, max(Counter(table["label"].to_pylist()).values()) / table.num_rows

    def summary(self, spark: bool) -> None:
        """What was done, how well and how fast, where it lies, what to try next."""
        accuracy, majority = self.accuracy()
        lines = [
            (
                "trained",
                f"MiniLM on {pq.read_metadata(self.job.data.train).num_rows:,} reviews, {self.job.epochs} epochs, "
                f"Ray Train + DeepSpeed, {self.job.workers} workers: {self.facts['train']['seconds']:.0f} s",
            ),
            ("accuracy", f"{accuracy:.1%} on the lake's reviews; the most frequent label alone: {majority:.1%}"),
        ]
        for engine in ("ray", "spark") if spark else ("ray",):
            fact = self.facts[engine]
            lines.append(
                (engine, f"{fact['rows']:,} rows annotated, {fact['rows_per_second']:,.0f} rows/s once started")
            )
        if spark:
            agree = self.facts["agree"]
            lines.append(
                ("engines", f"agree on all {agree['rows']:,} rows (scores at most {agree['apart']:.1e} apart)")
            )
        lines.append(("model", shown(self.model)))
        lines += [("table", shown(self.table(engine))) for engine in (("ray", "spark") if spark else ("ray",))]
        heading("Summary")
        for name, text in lines:
            print(f"   {name:<9} {text}")
        print(
            textwrap.dedent(f"""
            Next, on your own data (after: source {shown(Path(sys.prefix))}/bin/activate):

              bert-ray train jobs/finetune.yaml data.train=my.parquet output=models/sentiment
              bert-ray annotate --input lake/ --model models/sentiment --output out/ --engine ray
              bert-ray evaluate models/sentiment test.parquet
            """),
            flush=True,
        )


def read(directory: str) -> pa.Table:
    """An annotated lake in the order of its ids."""
    return ds.dataset(directory, partitioning="hive").to_table().sort_by("id")


def labels(table: pa.Table) -> pa.Array:
    """What the model says of each row."""
    return pc.struct_field(table["sentiment"].combine_chunks(), "label")


def shown(path: str | Path) -> str:
    """A path as a user at the project's root would type it."""
    return os.path.relpath(path) if Path(path).absolute().is_relative_to(Path.cwd()) else str(path)


def say(text: str) -> None:
    """A line of the demo's own."""
    print(f"   {text}", flush=True)


def heading(text: str) -> None:
    """Begin a step on the screen."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{text}{plain}", flush=True)


@contextlib.contextmanager
def step(number: int, text: str) -> Iterator[None]:
    """Begin a step, and tell its seconds at the end."""
    heading(f"{number}/{STEPS}  {text}")
    began = time.monotonic()
    yield
    say(f"{time.monotonic() - began:.1f} s")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows as a table; numbers to the right."""
    names = list(rows[0])
    widths = [max(len(str(value)) for value in (name, *(row[name] for row in rows))) for name in names]
    for cells in (dict(zip(names, names, strict=True)), *rows):
        line = "  ".join(
            str(cells[name]).rjust(width) if isinstance(rows[0][name], int) else str(cells[name]).ljust(width)
            for name, width in zip(names, widths, strict=True)
        )
        print(f"         {line}")
    print(flush=True)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """A Ray of this machine's own cores, two at least, without a word from it."""
    import ray

    if not ray.is_initialized():
        logging.getLogger("ray").setLevel(logging.ERROR)
        cpus = max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield


def stop_ray() -> None:
    """Give Ray's processes and memory back before Spark starts."""
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        ray.shutdown()


def start_spark(log: Path) -> None:
    """Start a SparkSession; what Java and Spark say of themselves goes to a file, for as long as they run."""
    from bert_ray.inference.job import SparkOptions
    from bert_ray.inference.spark import new_session

    sys.stderr.flush()
    screen = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)  # Java inherits it when it starts.
        new_session(SparkOptions())
    finally:
        os.dup2(screen, 2)
        os.close(screen)


def has_java() -> bool:
    """Whether Spark can start."""
    return bool(shutil.which("java") or os.environ.get("JAVA_HOME"))


def run(arguments: Sequence[str]) -> None:
    """All steps."""
    from bert_ray.config import load_job
    from bert_ray.training.job import TrainJob

    demo = Demo(load_job(TrainJob, [JOB, *arguments]))
    spark = has_java()
    heading("bert_ray: train a BERT, annotate a lake with it on Ray and on Spark, ask it from SQL")
    say(f"{os.cpu_count()} cores, no GPU needed; all that is made here goes to {shown(demo.output)}/")
    with step(1, "Fine-tune MiniLM for sentiment: Ray Train + DeepSpeed"):
        say(f"$ bert-ray train {' '.join([JOB, *arguments])}")
        demo.train()
    with step(2, "Annotate a lake of other reviews with Ray Data"):
        demo.annotate("ray")
    stop_ray()
    if spark:
        with step(3, "Annotate the same lake with Spark"):
            start_spark(demo.output / "spark.log")
            demo.annotate("spark")
        with step(4, "Do the engines agree?"):
            demo.compare()
        with step(5, "Ask the model from Spark SQL"):
            demo.ask()
    else:
        heading(f"3 to {STEPS} of {STEPS}, with Spark, are left out: there is no Java")
        say("install Java 17 or later (Debian, Ubuntu: openjdk-17-jre-headless) and run make demo again")
    demo.summary(spark)


def main() -> int:
    """Run the demo from the project's root; returns the exit status."""
    os.chdir(ROOT)
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nstopped; make demo goes on from here", file=sys.stderr)
        return 130
    except BertRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
