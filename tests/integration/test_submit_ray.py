"""`bert-ray submit --to ray` against a real `ray start --head`, through its Jobs API, with token authentication."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bert_ray as package
from tests.conftest import needs
from tests.integration.clusters import Cluster, bert_ray, ray_head

needs("ray", "ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ray_head(tmp_path_factory.mktemp("head")) as cluster:
        yield cluster


def test_wait_shows_the_log_and_the_table_is_the_same(
    head: Cluster, tmp_path: Path, tiny_bundle: Path, uci_sample: pa.Table
) -> None:
    (tmp_path / "lake").mkdir()
    table = uci_sample.select(["id", "text"])
    pq.write_table(table.slice(0, 150), tmp_path / "lake" / "a.parquet")
    pq.write_table(table.slice(150), tmp_path / "lake" / "b.parquet")
    # Relative paths, an engine that the cluster is not, and overrides: all resolved before they travel.
    (tmp_path / "job.yaml").write_text(f"input: lake\nmodel: {tiny_bundle}\noutput: other\nengine: local\n")
    done = bert_ray(
        *["submit", "job.yaml", "--to", "ray", "--address", head.address, "--wait", "output=out", "workers=1"],
        cwd=tmp_path,
        environment=head.environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "annotated 300 rows" in done.stdout + done.stderr
    assert " on ray" in done.stdout + done.stderr
    expected = package.load(str(tiny_bundle))(table).sort_by("id")
    found = pq.read_table(tmp_path / "out").sort_by("id")
    assert found["id"].to_pylist() == expected["id"].to_pylist()
    label = [item["label"] for item in found["sentiment"].to_pylist()]
    assert label == [item["label"] for item in expected["sentiment"].to_pylist()]
    sent = next((tmp_path / "runs").iterdir())
    assert (sent / "job.yaml").is_file()


def test_a_failing_job_gives_its_status(head: Cluster, tmp_path: Path, tiny_bundle: Path) -> None:
    words = ["input=/nowhere/lake", f"model={tiny_bundle}", "output=out"]
    done = bert_ray(
        *["submit", "--to", "ray", "--address", head.address, "--wait", *words],
        cwd=tmp_path,
        environment=head.environment,
    )
    assert "/nowhere/lake" in done.stdout + done.stderr
    assert done.returncode == 2, done.stdout + done.stderr


def test_without_wait_it_says_how_to_follow(head: Cluster, tmp_path: Path, tiny_bundle: Path) -> None:
    words = ["input=/nowhere/lake", f"model={tiny_bundle}", "output=out"]
    environment = head.environment | {"RAY_API_SERVER_ADDRESS": head.address}
    done = bert_ray("submit", "--to", "ray", *words, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    status = re.search(r"status  ray (job status .*)", done.stdout)[1].split()
    assert "ray job logs --follow" in done.stdout
    # What it says to type works.
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        command = [sys.executable, "-m", "ray.scripts.scripts", *status]
        told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        if "failed with exit code 2" in told.stdout + told.stderr:
            return
        time.sleep(1)
    pytest.fail(told.stdout + told.stderr)


def test_a_wrong_token_is_an_error_that_says_so(head: Cluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    environment = head.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    words = ["input=lake", "model=m", "output=out"]
    done = bert_ray(
        *["submit", "--to", "ray", "--address", head.address, *words], cwd=tmp_path, environment=environment
    )
    assert done.returncode == 2
    assert "did not take the job" in done.stderr
    assert "token" in done.stderr
