from __future__ import annotations

from typing import Any

import pytest

from bert_ray.errors import JobError
from bert_ray.inference.job import AnnotateJob

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
