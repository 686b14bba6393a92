"""The whole way once, on bundled real reviews: train a BERT, annotate a lake on Ray and on Spark, ask it from SQL.

    make demo                                         sets up what is missing, then runs this
    .venv/bin/python jobs/demo/demo.py                the same without the set-up
    .venv/bin/python jobs/demo/demo.py epochs=1       keys of jobs/demo/finetune.yaml may be given, as to bert-ray train

Run again, nothing is done twice: a trained model is kept, annotated units have receipts. All state is in the bundle and
in the journals of the annotated tables.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch, ray or pyspark is imported: what they would say about themselves is no part of a demo.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same on every machine: two workers, and engines that agree
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for this process; training workers say their own
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
warnings.simplefilter("ignore")

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from screen import heading, print_table, shown, stderr_to, step

from bert_ray.errors import BertRayError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from bert_ray.model.bundle import Bundle
    from bert_ray.training.job import TrainJob

ROOT = Path(__file__).resolve().parents[2]
JOB, LAKE = "jobs/demo/finetune.yaml", "jobs/demo/lake"
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

NEXT = """
Next, on your own data (after: source {activate}):

  bert-ray train jobs/finetune.yaml data.train=my.parquet output=models/sentiment
  bert-ray annotate --input lake/ --model models/sentiment --output out/ --engine ray
  bert-ray evaluate models/sentiment test.parquet
"""


class Demo:
    """The demo's steps.

    Attributes:
        job: what is trained.
        model: where the trained bundle comes to lie.
        output: the directory that everything goes to.
    """

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.model = Path(job.output)
        self.output = self.model.parent.parent
        self.output.mkdir(parents=True, exist_ok=True)

    @cached_property
    def bundle(self) -> Bundle:
        """The trained bundle."""
        from bert_ray.model.bundle import load_bundle

        return load_bundle(self.model)

    def table(self, engine: str) -> str:
        """Where an engine's annotated lake lies."""
        return str(self.output / f"annotated-{engine}")

    def train(self) -> None:
        """Fine-tune, or go on with it; a model that is there already is kept."""
        from bert_ray.training.launch import train

        with contextlib.nullcontext() if self.model.exists() else self.ray():
            result = train(self.job)
        if result.trained:
            print(f"{result.train_rows:,} rows, {result.tokens_per_second:,.0f} tokens/s: {shown(self.model)}")
        else:
            print(f"trained already: {shown(self.model)} (to train anew, delete it, or: make clean)")

    def annotate(self, engine: str) -> None:
        """Annotate the lake, or what an interrupted run has left of it."""
        from bert_ray.inference import runs
        from bert_ray.inference.bulk import run
        from bert_ray.inference.job import AnnotateJob
        from bert_ray.lake.journal import Journal

        output = self.table(engine)
        earlier = Journal(output).read_run()
        if earlier and earlier["settings"]["model's fingerprint"] != self.bundle.fingerprint:
            shutil.rmtree(output)  # What a model said that is not there any more.
        elif earlier and runs.status(output).exit_status == 0:
            print(f"annotated already, each unit has its receipt: {shown(output)}")
            return
        with self.ray() if engine == "ray" else self.spark():
            summary = run(AnnotateJob(input=LAKE, model=str(self.model), output=output, engine=engine))
        if summary.exit_status:
            raise BertRayError(f"the {engine} engine left units undone: bert-ray runs failures {output}")

    @contextlib.contextmanager
    def ray(self) -> Iterator[None]:
        """A Ray of this machine's own cores, two at least, started at first use."""
        import ray

        if not ray.is_initialized():
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
            with stderr_to(self.output / "ray.log"):
                ray.init("local", num_cpus=max(2, cores), include_dashboard=False, log_to_driver=False)
        yield

    @contextlib.contextmanager
    def spark(self) -> Iterator[SparkSession]:
        """A SparkSession, started at first use."""
        from pyspark.sql import SparkSession

        from bert_ray.inference.job import SparkOptions
        from bert_ray.inference.spark import new_session

        session = SparkSession.getActiveSession()
        if session is None:
            stop_ray()
            with stderr_to(self.output / "spark.log"):
                session = new_session(SparkOptions())
        yield session

    def compare(self) -> tuple[int, float]:
        """Hold the engines' tables to each other, row by row; returns the rows and the largest distance of scores."""
        ray, spark = read(self.table("ray")), read(self.table("spark"))
        scores = [pc.struct_field(table["sentiment"].combine_chunks(), "score") for table in (ray, spark)]
        equal = ray["id"].equals(spark["id"]) and labels(ray).equals(labels(spark))
        apart = pc.max(pc.abs(pc.subtract(*scores))).as_py() if equal else 1.0
        if apart > TOLERANCE:
            raise BertRayError("the engines disagree: this must not happen, please report it")
        return ray.num_rows, apart

    def ask(self) -> None:
        """Ask the model from Spark SQL, and tell the answer beside the known labels."""
        from bert_ray.inference import functions

        print(f"functions.register(session, models={shown(self.model.parent)!r})\n\n{SQL}\n", flush=True)
        with self.spark() as session:
            functions.register(session, models=self.model.parent)
            session.read.parquet(LAKE).createOrReplaceTempView("reviews")
            rows = [row.asDict() for row in session.sql(SQL).collect()]
        print_table(rows)
        right: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for row in rows:
            right[row["source"]] += row[f"known_{row['says']}"]
            total[row["source"]] += row["reviews"]
        shares = ", ".join(f"{source} {right[source] / total[source]:.1%}" for source in sorted(total))
        print(f"\naccuracy by source: {shares}")

    def summary(self, engines: Sequence[str]) -> None:
        """What was trained, how well and how fast it works, where it lies, what to try next."""
        table, origin = read(self.table("ray")), self.bundle.card.provenance
        right = pc.mean(pc.cast(pc.equal(labels(table), table["label"].combine_chunks()), pa.float64())).as_py()
        majority = max(Counter(table["label"].to_pylist()).values()) / table.num_rows
        lines = [
            (
                "trained",
                f"{origin['data']['train_rows']:,} reviews, {self.job.epochs} epochs: {origin['seconds']:.0f} s "
                f"(Ray Train + DeepSpeed, {self.job.workers} workers, {origin['tokens_per_second']:,.0f} tokens/s)",
            ),
            ("accuracy", f"{right:.1%} on {table.num_rows:,} other reviews; always the same label: {majority:.1%}"),
        ]
        for engine in engines:
            rows, rate = speed(self.table(engine))
            lines.append((engine, f"{rows:,} rows annotated, {rate:,.0f} rows/s once started"))
        if len(engines) > 1:
            rows, apart = self.compare()
            lines.append(("agree", f"yes: the labels of all {rows:,} rows; scores are at most {apart:.0e} apart"))
        lines.append(("model", f"{shown(self.model)}/"))
        lines.append(("tables", "  ".join(f"{shown(self.table(engine))}/" for engine in engines)))
        heading("Summary")
        for name, text in lines:
            print(f"  {name:<9} {text}")
        print(NEXT.format(activate=shown(Path(sys.prefix) / "bin" / "activate")), flush=True)


def read(directory: str) -> pa.Table:
    """An annotated lake in the order of its ids."""
    return ds.dataset(directory, partitioning="hive").to_table().sort_by("id")


def labels(table: pa.Table) -> pa.Array:
    """What the model says of each row."""
    return pc.struct_field(table["sentiment"].combine_chunks(), "label")


def speed(output: str) -> tuple[int, float]:
    """Rows of an annotated lake, and rows per second from the first row read to the last receipt of each session."""
    from bert_ray.lake.journal import Journal

    journal = Journal(output)
    sessions = defaultdict(list)
    for unit in journal.receipts():
        receipt = journal.receipt(unit)
        sessions[receipt["session"]].append(receipt)
    rows = sum(receipt["rows"] for receipts in sessions.values() for receipt in receipts)
    busy = sum(
        max(receipt["began"] + receipt["seconds"] for receipt in receipts)
        - min(receipt["began"] for receipt in receipts)
        for receipts in sessions.values()
    )
    return rows, rows / max(busy, 1e-9)


def stop_ray() -> None:
    """Give Ray's processes and memory back where it runs."""
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        ray.shutdown()


def has_java() -> bool:
    """Whether there is a Java that runs Spark."""
    from bert_ray.inference.job import SparkOptions

    try:
        SparkOptions.check_java()
    except BertRayError as error:
        print(f"{error}; the steps with Spark are left out", flush=True)
        return False
    return True


def run(arguments: Sequence[str]) -> None:
    """All steps."""
    from bert_ray.config import load_job
    from bert_ray.training.job import TrainJob

    demo = Demo(load_job(TrainJob, [JOB, *arguments]))
    java = has_java()
    heading("bert_ray: train a BERT, annotate a lake with it on Ray and on Spark, ask it from SQL")
    print(f"No GPU, no cluster and no network are needed; all that is made here goes to {shown(demo.output)}/")
    train = f"bert-ray train {' '.join([JOB, *arguments])}"
    annotate = f"bert-ray annotate --input {LAKE} --model {shown(demo.model)} --output {shown(demo.output)}/annotated-"
    with step("1/5  Fine-tune MiniLM, a pretrained BERT, on 1,000 reviews with Ray Train and DeepSpeed"):
        print(f"$ {train}", flush=True)
        demo.train()
    with step("2/5  Annotate a lake of 2,001 other reviews with Ray Data"):
        print(f"$ {annotate}ray --engine ray", flush=True)
        demo.annotate("ray")
    if java:
        with step("3/5  Annotate the same lake with Spark"):
            print(f"$ {annotate}spark --engine spark", flush=True)
            demo.annotate("spark")
        with step("4/5  Compare: do the two engines agree?"):
            rows, apart = demo.compare()
            print(f"yes: {rows:,} rows, all labels equal, scores at most {apart:.0e} apart")
        with step("5/5  Ask the model from Spark SQL, beside the known labels"):
            demo.ask()
    else:
        heading("3/5 to 5/5, with Spark, are left out: there is no Java")
        print("Install Java 17 or later (Debian, Ubuntu: openjdk-17-jre-headless) and run make demo again.")
    demo.summary(("ray", "spark") if java else ("ray",))


def main() -> int:
    """Run the demo from the project's root; returns the exit status."""
    os.chdir(ROOT)
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nstopped; make demo goes on from here", file=sys.stderr)
        return 130
    except BertRayError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
