from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bert_ray.errors import JobError
from bert_ray.inference.job import AnnotateJob, SparkOptions
from bert_ray.inference.spark_settings import without_secrets
from bert_ray.options import RayOptions

GIVEN = {"input": "lake", "model": "m", "output": "out"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": " "}, "input is empty"),
        ({"model": ""}, "model is empty"),
        ({"engine": "dask"}, "local, ray, spark"),
        ({"on_error": "ignore"}, "continue, fail"),
        ({"dtype": "int8"}, "auto, fp32"),
        ({"device": "gpu"}, "auto, cpu, cuda"),
        ({"device": "cuda:"}, "auto, cpu, cuda"),
        ({"unit_rows": 0}, "unit_rows is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"column": "a", "columns": {"text": "b"}}, "both given"),
        ({"keep": []}, "keep is empty"),
        ({"keep": ["a", "a"]}, "twice"),
    ],
)
def test_what_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        AnnotateJob(**{**GIVEN, **change})


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices(device: str) -> None:
    assert AnnotateJob(**GIVEN, device=device).device == device


def test_defaults_are_a_job() -> None:
    job = AnnotateJob(**GIVEN)
    assert (job.engine, job.on_error, job.ray.address, job.spark.config) == ("local", "continue", None, {})


@pytest.mark.parametrize(
    ("java", "told"),
    [
        (None, "there is none"),
        ('openjdk version "11.0.2" 2019-01-15', 'java is version "11'),
        ('java version "1.8.0_392"', 'java is version "1'),
        ("The operation couldn't be completed. Unable to locate a Java Runtime.", "there is none"),
    ],
)
def test_a_java_that_does_not_run_spark_is_told(
    java: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if java else str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    if java:
        (tmp_path / "java").write_text(f"#!/bin/sh\necho '{java.replace(chr(39), '')}' >&2\n")
        (tmp_path / "java").chmod(0o755)
    with pytest.raises(JobError, match=f"Spark needs Java 17 or later, and {told}"):
        SparkOptions.check_java()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    with pytest.raises(JobError, match=r"gone/bin/java does not run"):
        SparkOptions.check_java()


def test_a_java_that_runs_spark_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").write_text("#!/bin/sh\necho 'openjdk version \"21\" 2023-09-19' >&2\n")
    (tmp_path / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    SparkOptions.check_java()


def test_which_cluster_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    job = AnnotateJob(input="a", model="m", output="o", ray=RayOptions(address="head:6379"))
    spark = SparkOptions(master="spark://head:7077")
    assert job.cluster() is None
    assert dataclasses.replace(job, engine="ray").cluster() == "head:6379"
    assert dataclasses.replace(job, engine="spark", spark=spark).cluster() == "spark://head:7077"
    assert dataclasses.replace(job, engine="spark", spark=SparkOptions(master="local[4]")).cluster() is None
    monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "1")
    assert dataclasses.replace(job, engine="spark").cluster() == "that of spark-submit"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("spark.hadoop.fs.s3a.secret.key", True),
        ("spark.hadoop.fs.s3a.access.key", True),
        ("spark.ssl.keyStorePassword", True),
        ("spark.hadoop.fs.azure.account.key.lake.dfs.core.windows.net", True),
        ("spark.authenticate.secret", True),
        ("spark.executor.memory", False),
        ("spark.hadoop.fs.s3a.aws.credentials.provider", False),
        ("spark.security.credentials.hive.enabled", False),
        ("spark.sql.shuffle.partitions", False),
    ],
)
def test_which_settings_are_secrets(name: str, secret: bool) -> None:
    assert without_secrets({name: "value"}) == {name: None if secret else "value"}
