"""`bert-ray submit --to spark` against a real standalone master and worker, through spark-submit."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bert_ray as package
from tests.conftest import needs
from tests.integration.clusters import Cluster, bert_ray, spark_cluster

needs("pyspark", "spark")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java: install a Java 17 runtime (Debian: openjdk-17-jre-headless)")
    with spark_cluster(tmp_path_factory.mktemp("spark")) as cluster:
        yield cluster


def test_wait_shows_the_log_and_the_table_is_the_same(
    master: Cluster, tmp_path: Path, tiny_bundle: Path, uci_sample: pa.Table
) -> None:
    (tmp_path / "lake").mkdir()
    table = uci_sample.select(["id", "text"])
    pq.write_table(table, tmp_path / "lake" / "a.parquet")
    (tmp_path / "job.yaml").write_text(
        f"input: lake\nmodel: {tiny_bundle}\noutput: other\nspark:\n  master: {master.address}\n"
        "  config: {spark.executor.memory: 1g, spark.ui.enabled: 'false'}\n"
    )
    done = bert_ray(
        *["submit", "job.yaml", "--to", "spark", "--wait", "output=out"],
        cwd=tmp_path,
        environment=master.environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "annotated 300 rows" in done.stdout + done.stderr
    expected = package.load(str(tiny_bundle))(table).sort_by("id")
    found = pq.read_table(tmp_path / "out").sort_by("id")
    label = [item["label"] for item in found["sentiment"].to_pylist()]
    assert label == [item["label"] for item in expected["sentiment"].to_pylist()]
    # It ran on the cluster, not beside it.
    with urllib.request.urlopen(f"{master.web}/json/", timeout=10) as answer:
        apps = json.load(answer)["completedapps"]
    assert len(apps) == 1
    assert apps[0]["cores"] == 2


def test_a_failing_job_gives_its_status(master: Cluster, tmp_path: Path, tiny_bundle: Path) -> None:
    words = ["input=/nowhere/lake", f"model={tiny_bundle}", "output=out"]
    done = bert_ray(
        *["submit", "--to", "spark", "--master", master.address, "--wait", *words],
        cwd=tmp_path,
        environment=master.environment,
    )
    assert "/nowhere/lake" in done.stdout + done.stderr
    assert done.returncode == 2, done.stdout + done.stderr


def test_without_wait_the_driver_runs_on_in_the_background(
    master: Cluster, tmp_path: Path, tiny_bundle: Path, uci_sample: pa.Table
) -> None:
    pq.write_table(uci_sample.select(["id", "text"]), tmp_path / "a.parquet")
    words = ["input=a.parquet", f"model={tiny_bundle}", "output=out"]
    done = bert_ray(
        *["submit", "--to", "spark", "--master", master.address, *words], cwd=tmp_path, environment=master.environment
    )
    assert done.returncode == 0, done.stderr
    assert "background" in done.stdout
    assert "bert-ray runs status" in done.stdout
    log = Path(re.search(r"follow  tail -f (\S+)", done.stdout)[1])
    driver = int(re.search(r"stop    kill (\d+)", done.stdout)[1])
    deadline = time.monotonic() + 240
    while "annotated" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.3)
    assert "annotated 300 rows" in log.read_text()
    while Path(f"/proc/{driver}").exists() and time.monotonic() < deadline:
        time.sleep(0.3)
    assert not Path(f"/proc/{driver}").exists()
