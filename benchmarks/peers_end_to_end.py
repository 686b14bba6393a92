"""The contestants end to end: a directory of Parquet files in, a directory of Parquet files with vectors out.

Each peer is written as its own documentation writes it, with the settings that made it fastest on two cores: one Ray
actor of two threads (one CPU is left to reading and writing), two Spark tasks of one thread each.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import numpy as np
import pyarrow.dataset as ds

Contestant = Callable[[Path, Path], None]

# Files of the lake, and the rows of the run that stands for start-up: one for each file.
FILES = 4
FEW_ROWS = 4
_CORES = 2
_MAX_LENGTH = 256
# Rows that Ray and pandas hand over at a time, and rows of a padded batch (sentence-transformers sorts them by length).
_BLOCK_ROWS = 128
_BATCH = 32


@contextlib.contextmanager
def sessions(scratch: Path) -> Iterator[None]:
    """One Ray and one Spark for all contestants, so that what is timed is the work and the models' start-up."""
    import logging
    import os

    import ray
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join([str(common.ROOT), str(common.ROOT / "benchmarks")])
    ray.init(
        address="local", num_cpus=_CORES, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    spark = (
        SparkSession.builder.master(f"local[{_CORES}]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.warehouse.dir", str(scratch / "warehouse"))
        # One file, one partition, as the units have it.
        .config("spark.sql.files.maxPartitionBytes", "64m")
        .config("spark.sql.files.openCostInBytes", "64m")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", str(_BLOCK_ROWS))
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    try:
        yield
    finally:
        spark.stop()
        ray.shutdown()


def contestants(scratch: Path) -> dict[str, Contestant]:
    """Name -> call(lake, out)."""
    return {
        "bert_ray, local": lambda lake, out: _bert_ray("local", lake, out),
        "bert_ray, Ray": lambda lake, out: _bert_ray("ray", lake, out),
        "bert_ray, Spark": lambda lake, out: _bert_ray("spark", lake, out),
        "sentence-transformers, Ray map_batches": lambda lake, out: _ray(SentenceTransformers, lake, out),
        "Hugging Face pipeline, Ray map_batches": lambda lake, out: _ray(Pipeline, lake, out),
        "sentence-transformers, Spark pandas_udf": _spark_pandas_udf,
        "Daft embed_text": _daft,
    }


def timed(run: Contestant, lake: Path, out: Path, rows: int) -> float:
    """Seconds of one run into a fresh directory, its output looked at."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    run(lake, out)
    seconds = time.perf_counter() - start
    # Names that begin with "_" are notes of the run, as Spark and Arrow have it.
    found = ds.dataset(str(out), format="parquet").to_table()
    assert found.num_rows == rows, (found.num_rows, rows)
    assert {"id", "text", "embedding"} <= set(found.column_names), found.column_names
    assert found["embedding"].null_count == 0
    return seconds


def _model() -> str:
    from bert_ray.model.references import resolve

    return str(resolve(common.MODEL))


def _bert_ray(engine: str, lake: Path, out: Path) -> None:
    from bert_ray.inference.bulk import run
    from bert_ray.inference.job import AnnotateJob

    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        run(AnnotateJob(input=str(lake), model=common.MODEL, output=str(out), engine=engine))


def _ray(actor: type, lake: Path, out: Path) -> None:
    import ray

    ray.data.read_parquet(str(lake)).map_batches(
        actor,
        fn_constructor_args=(_model(),),
        batch_size=_BLOCK_ROWS,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    ).write_parquet(str(out))


class SentenceTransformers:
    """A Ray Data actor around sentence-transformers."""

    def __init__(self, model: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(_CORES)
        self.model = SentenceTransformer(model, device="cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batch["embedding"] = self.model.encode(batch["text"].tolist(), batch_size=_BATCH, show_progress_bar=False)
        return batch


class Pipeline:
    """A Ray Data actor around transformers' feature-extraction pipeline, mean pooling behind it."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import pipeline

        torch.set_num_threads(_CORES)
        self.pipeline = pipeline("feature-extraction", model=model, device="cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # A batch size of 1 is what the pipeline's documentation advises on a CPU.
        states = self.pipeline(
            batch["text"].tolist(),
            batch_size=1,
            return_tensors=True,
            tokenize_kwargs={"truncation": True, "max_length": _MAX_LENGTH},
        )
        pooled = np.stack([state[0].mean(0).numpy() for state in states])
        batch["embedding"] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return batch


def _spark_pandas_udf(lake: Path, out: Path) -> None:
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import pandas_udf

    spark, model = SparkSession.getActiveSession(), _model()

    def embed(batches):
        import pandas as pd
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(1)
        encoder = SentenceTransformer(model, device="cpu")
        for texts in batches:
            yield pd.Series(list(encoder.encode(texts.tolist(), batch_size=_BATCH, show_progress_bar=False)))

    import pandas as pd

    embed.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    column = pandas_udf(embed, "array<float>")("text")
    spark.read.parquet(str(lake)).withColumn("embedding", column).write.parquet(str(out))


def _daft(lake: Path, out: Path) -> None:
    import daft
    from daft.functions import embed_text

    frame = daft.read_parquet(str(lake / "*.parquet"))
    frame = frame.with_column("embedding", embed_text(daft.col("text"), provider="transformers", model=_model()))
    numbers = daft.DataType.list(daft.DataType.float32())  # Daft's own embedding type is not one of Parquet's.
    frame.with_column("embedding", daft.col("embedding").cast(numbers)).write_parquet(str(out))
