from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from bert_ray.errors import EngineError
from bert_ray.inference.job import SparkOptions
from tests.conftest import needs

needs("pyspark", "spark")

from pyspark.sql import SparkSession  # noqa: E402

from bert_ray.inference import spark as engine  # noqa: E402
from bert_ray.model import annotator  # noqa: E402
from bert_ray.model.annotator import AnnotatorSpec  # noqa: E402


def test_the_session_of_another_thread_is_used_and_not_stopped(spark: SparkSession) -> None:
    found: list[tuple[bool, bool, bool]] = []

    def work() -> None:
        seen = SparkSession.getActiveSession() is not None
        with engine._session(SparkOptions(), None) as (session, ours):
            found.append((seen, session.sparkContext is spark.sparkContext, ours))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    # Spark itself shows such a thread none.
    assert found == [(False, True, False)]
    assert spark.range(3).count() == 3


@pytest.mark.parametrize(
    ("master", "submitted", "held"), [(None, False, True), ("spark://head:7077", False, False), (None, True, False)]
)
def test_tasks_hold_the_workers_to_their_number_where_the_master_does_not(
    monkeypatch: pytest.MonkeyPatch, master: str | None, submitted: bool, held: bool
) -> None:
    monkeypatch.setattr(engine, "_active", lambda: None)
    monkeypatch.setattr(engine, "new_session", lambda *_: SimpleNamespace(stop=lambda: None))
    monkeypatch.setattr(SparkOptions, "submitted", staticmethod(lambda: submitted))
    with engine._session(SparkOptions(master=master), 3) as (_, found):
        assert found is held


def test_an_end_without_java_does_not_hide_why(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: Any) -> None:
        asked.append(True)
        raise ConnectionRefusedError

    monkeypatch.setattr(engine, "_active", lambda: None)
    monkeypatch.setattr(engine, "new_session", lambda *_: SimpleNamespace(stop=refuse))
    monkeypatch.setattr(engine, "_LOOK_SEC", 0.01)
    monkeypatch.setattr(engine, "_CANCEL_SEC", 0.05)
    gone = threading.Event()
    thread = threading.Thread(target=gone.wait)
    thread.start()
    with pytest.raises(EngineError, match="why"), engine._session(SparkOptions(), None):
        engine._cancel(SimpleNamespace(cancelJobsWithTag=refuse), "tag", thread)
        raise EngineError("why")
    assert len(asked) > 2
    gone.set()
    thread.join()


def test_a_job_that_is_submitted_late_is_cancelled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_LOOK_SEC", 0.01)
    submitted, ended, early = threading.Event(), threading.Event(), []

    def cancel(tag: str) -> None:
        if submitted.is_set():
            ended.set()
        else:
            early.append(tag)
            submitted.set()

    thread = threading.Thread(target=ended.wait)
    thread.start()
    engine._cancel(SimpleNamespace(cancelJobsWithTag=cancel), "tag", thread)
    assert early == ["tag"]
    assert not thread.is_alive()


def test_workers_share_a_machines_gpus_and_each_keeps_its_own(spark: SparkSession, tmp_path: Path) -> None:
    def take(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            before, engine.tempfile.tempdir = engine.tempfile.tempdir, str(tmp_path)
            gpu = engine.gpu_of_task(3)
            engine.tempfile.tempdir = before
            time.sleep(0.5)  # So that both processes have tasks.
            yield pa.RecordBatch.from_pydict({"process": [os.getpid()], "gpu": [gpu]})

    rows = spark.range(0, 8, 1, 8).mapInArrow(take, "process long, gpu long").collect()
    assert len(rows) == 8
    found = {(row.process, row.gpu) for row in rows}
    processes = {process for process, _ in found}
    assert len(processes) >= 2, "all tasks ran in one process"
    assert len({gpu for _, gpu in found}) >= 2, "they are on one GPU"
    assert len(found) == len(processes), "a process has changed its GPU"


def test_a_task_computes_on_the_gpu_that_spark_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["2"]
    given = SimpleNamespace(resources=lambda: {"gpu": SimpleNamespace(addresses=addresses)})
    monkeypatch.setattr(engine.TaskContext, "get", lambda: given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(engine, "_taken", [])
    forgotten = []
    monkeypatch.setattr(annotator, "forget_built", lambda: forgotten.append(True))
    spec = AnnotatorSpec(model="bundle")
    assert engine.on_gpu(spec).device == "cuda:2"
    assert engine.on_gpu(spec).device == "cuda:2"
    assert not forgotten
    addresses[0] = "3"
    assert engine.on_gpu(spec).device == "cuda:3"
    assert forgotten
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert engine.on_gpu(spec).device == "cuda:1"
    assert engine.on_gpu(dataclasses.replace(spec, device="cuda:1")).device == "cuda:1"
    assert engine.on_gpu(dataclasses.replace(spec, device="cpu")).device == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert engine.on_gpu(spec) is spec


def test_a_secret_is_not_among_the_words_of_java(tmp_path: Path) -> None:
    """Which all users of the machine see."""
    code = """
import contextlib, pathlib
from bert_ray.inference.job import SparkOptions
from bert_ray.inference.spark import new_session
session = new_session(SparkOptions(master="local[1]", config={
    "spark.hadoop.fs.s3a.secret.key": "HUSH", "spark.driver.memory": MEMORY.decode(), "spark.ui.enabled": "false"}))
words = b""
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
        words += path.read_bytes()
print("seen" if b"HUSH" in words else "hidden")
print("told" if b"-Xmx" + MEMORY in words else "lost")
print(session.sparkContext._jsc.hadoopConfiguration().get("fs.s3a.secret.key"))
session.stop()
"""
    if not Path("/proc").is_dir():
        pytest.skip("the words of processes are looked up in /proc")
    secret, memory = os.urandom(8).hex(), f"{600 + os.getpid() % 100}m"
    (tmp_path / "session.py").write_text(code.replace("HUSH", secret).replace("MEMORY", f"b{memory!r}"))
    words = [sys.executable, str(tmp_path / "session.py")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stdout.split() == ["hidden", "told", secret], done.stderr[-2000:]


def test_a_place_for_locks_that_is_not_ours_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"bert_ray-gpus-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    engine._free_gpu.cache_clear()
    try:
        assert engine._free_gpu(3) == os.getpid() % 3
        assert list((tmp_path / "elsewhere").iterdir()) == []
    finally:
        engine._free_gpu.cache_clear()
