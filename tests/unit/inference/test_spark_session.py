from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from bert_ray.inference.bulk import EngineError
from bert_ray.inference.job import SparkOptions
from tests.conftest import needs

needs("pyspark", "spark")

from bert_ray.inference import spark  # noqa: E402


def test_the_session_of_another_thread_is_used_and_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SimpleNamespace()  # Without stop().
    builder = SimpleNamespace(getOrCreate=lambda: theirs)
    known = SimpleNamespace(getActiveSession=lambda: None, builder=builder)
    monkeypatch.setattr(spark, "SparkSession", known)
    monkeypatch.setattr(spark, "SparkContext", SimpleNamespace(_active_spark_context=object()))
    with spark._session(SparkOptions(), None) as (session, ours):
        assert (session, ours) == (theirs, False)


def test_an_end_without_java_does_not_hide_why(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: Any) -> None:
        asked.append(True)
        raise ConnectionRefusedError

    monkeypatch.setattr(spark, "_active", lambda: None)
    monkeypatch.setattr(spark, "new_session", lambda *_: SimpleNamespace(stop=refuse))
    monkeypatch.setattr(spark, "_LOOK_SEC", 0.01)
    monkeypatch.setattr(spark, "_CANCEL_SEC", 0.05)
    gone = threading.Event()
    thread = threading.Thread(target=gone.wait)
    thread.start()
    with pytest.raises(EngineError, match="why"), spark._session(SparkOptions(), None):
        spark._cancel(SimpleNamespace(cancelJobsWithTag=refuse), "tag", thread)
        raise EngineError("why")
    assert len(asked) > 2
    gone.set()
    thread.join()


def test_a_job_that_is_submitted_late_is_cancelled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spark, "_LOOK_SEC", 0.01)
    submitted, ended, early = threading.Event(), threading.Event(), []

    def cancel(tag: str) -> None:
        if submitted.is_set():
            ended.set()
        else:
            early.append(tag)
            submitted.set()

    thread = threading.Thread(target=ended.wait)
    thread.start()
    spark._cancel(SimpleNamespace(cancelJobsWithTag=cancel), "tag", thread)
    assert early == ["tag"]
    assert not thread.is_alive()
