"""What a bulk annotation is told: the keys of a job file, the command's flags and the Python arguments."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from typing import Any, Literal

from bert_ray.errors import JobError
from bert_ray.options import Dtype, RayOptions, check_choices

Engine = Literal["local", "ray", "spark"]
OnError = Literal["continue", "fail"]

_OLDEST_JAVA = 17


@dataclass(kw_only=True, slots=True)
class SparkOptions:
    """Where Spark runs. A SparkSession that is active in the process is used as it is, and these have no effect.

    Attributes:
        master: the master's URL ("local[4]", "spark://host:7077", "yarn"). None: what spark-submit says, else all cores
            of this machine.
        config: settings of the session ("spark.executor.memory": "4g").
    """

    master: str | None = None
    config: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (named := self.config.get("spark.master")) is not None:
            if self.master not in (None, named):
                raise JobError(f"spark.master is {self.master}, but {named} in spark.config: give one of them")
            self.master = named
            self.config = {name: value for name, value in self.config.items() if name != "spark.master"}

    @staticmethod
    def check_java() -> None:
        """Raise a JobError where there is no Java that runs Spark."""
        home = os.environ.get("JAVA_HOME")
        java = os.path.join(home, "bin", "java") if home else "java"
        try:
            told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60).stderr
        except (OSError, subprocess.TimeoutExpired):
            told = ""
        version = re.search(r'version "(\d+)', told)
        if version is None or int(version[1]) < _OLDEST_JAVA:
            found = f"{java} is {version[0]}" if version else f"{java} does not run" if home else "there is none"
            raise JobError(
                f"Spark needs Java {_OLDEST_JAVA} or later, and {found}: install it (Debian: apt install "
                f"openjdk-17-jre-headless), and name it with JAVA_HOME where it is not the first on the PATH"
            )

    @staticmethod
    def submitted() -> bool:
        """Whether spark-submit has started Java, and said the master."""
        return "PYSPARK_GATEWAY_PORT" in os.environ

    def cluster(self) -> str | None:
        """Which cluster it is: the master's URL, "that of spark-submit"; None: a Spark of our own on this machine."""
        if self.master is not None:
            return None if self.master.startswith("local") else self.master
        return "that of spark-submit" if self.submitted() else None


@dataclass(kw_only=True, slots=True)
class AnnotateJob:
    """One bulk annotation of a table.

    Attributes:
        input: the table: a directory of Parquet files, hive-partitioned or flat, one such file, or a local Delta table.
        model: a bundle reference.
        output: the directory to write, new, empty or of an earlier run of the same job, which is then gone on with.
        engine: "local" (this process), "ray" or "spark".
        column: the text column, for a task of one input; default: the input's name, `text`.
        columns: table columns by task input, for a task of several inputs.
        name: the annotation's column; default: the name on the model's card.
        keep: the input's columns to write beside the annotation, in this order; default: all. Partition columns stay
            in the directories' names in any case.
        scores: also write every label's score, where the task has labels.
        task: another task to run with the model than its own: an encoder's are `embedding`, `similarity`, `zero-shot`,
            a finder of entities may `mask` them.
        options: of the task, over those on the model's card; each task's page in the documentation lists its own.
        on_error: "continue": a unit that fails is listed and the others go on; "fail": the first one stops the run.
        unit_rows: rows in a unit of work, about: what is lost at most when a worker is killed, and what an output file
            holds. A row group is never split.
        batch_tokens: tokens in a packed batch; default: what suits the device.
        threads: torch threads per worker; default: the cores shared among a machine's workers.
        workers: workers (with Ray: actors; with Spark: tasks at a time); default: what the machine or cluster has.
            The local engine is one worker.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" (fp32 on a CPU, bf16 or fp16 on a GPU), "fp32", "bf16" (on a CPU with AMX two to three times as
            fast), "fp16".
        ray, spark: where these engines run.
    """

    input: str
    model: str
    output: str
    engine: Engine = "local"
    column: str | None = None
    columns: dict[str, str] | None = None
    name: str | None = None
    keep: list[str] | None = None
    scores: bool = False
    task: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    on_error: OnError = "continue"
    unit_rows: int = 50_000
    batch_tokens: int | None = None
    threads: int | None = None
    workers: int | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    ray: RayOptions = field(default_factory=RayOptions)
    spark: SparkOptions = field(default_factory=SparkOptions)

    def __post_init__(self) -> None:
        for key in ("input", "model", "output"):
            if not str(getattr(self, key) or "").strip():
                raise JobError(f"{key} is empty: give {key}: in the job file or --{key}")
        check_choices(self)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise JobError(f"device is {self.device!r}: it is one of auto, cpu, cuda, or cuda:1 and the like")
        for key in ("unit_rows", "batch_tokens", "threads", "workers"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise JobError(f"{key} is {value}: it is at least 1")
        if self.column is not None and self.columns:
            raise JobError("column and columns are both given: column is for a task of one input, columns for several")
        if self.keep is not None:
            if not self.keep:
                raise JobError("keep is empty: name a column to keep, or leave keep out to keep all")
            if len(set(self.keep)) < len(self.keep):
                raise JobError(f"keep names a column twice: {', '.join(self.keep)}")

    def cluster(self) -> str | None:
        """Which cluster it runs on; None: this machine."""
        if self.engine == "local":
            return None
        return self.ray.cluster() if self.engine == "ray" else self.spark.cluster()


@dataclass(kw_only=True, slots=True)
class RunsStatus:
    """How far a bulk run is: units done, failed and to do. Exit status 1 where some failed or are left.

    Attributes:
        output: the output directory of a `bert-ray annotate`.
    """

    output: str


@dataclass(kw_only=True, slots=True)
class RunsFailures:
    """Which units of a bulk run failed, and why. Exit status 1 where some did.

    Attributes:
        output: the output directory of a `bert-ray annotate`.
    """

    output: str


@dataclass(kw_only=True, slots=True)
class RunsResume:
    """Go on with a bulk run as it was begun; the flags change where and how fast, never what is written.

    Attributes:
        output: the output directory of a `bert-ray annotate`.
        engine: another engine than before; a run begun on Ray may end on Spark.
        workers: workers.
        threads: torch threads per worker.
        batch_tokens: tokens in a packed batch.
        on_error: "continue": a unit that fails is listed and the others go on; "fail": the first one stops the run.
        device: "auto", "cpu", "cuda", "cuda:1".
        ray, spark: where these engines run, if not where they did.
    """

    output: str
    engine: Engine | None = None
    workers: int | None = None
    threads: int | None = None
    batch_tokens: int | None = None
    on_error: OnError | None = None
    device: str | None = None
    ray: RayOptions = field(default_factory=RayOptions)
    spark: SparkOptions = field(default_factory=SparkOptions)
