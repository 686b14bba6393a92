"""SIGKILL in the middle of training, of a Ray worker and of a plain process: the same final loss, bit for bit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bert_ray.model.bundle import load_bundle
from bert_ray.training.job import CheckpointOptions, DataOptions, TrainJob
from bert_ray.training.launch import TrainResult, train
from bert_ray.training.loop import StepEvent
from tests.groups import in_group, run_loop
from tests.processes import begin, ended

# Between the checkpoints of step 9 and 12, in the second epoch.
KILL_AT = 11


def kill_once(marker: Path, rank: int) -> Callable[[StepEvent], None]:
    """A callback by which worker `rank` kills itself after step KILL_AT, the first time it comes there."""

    def callback(event: StepEvent) -> None:
        if event.step == KILL_AT and event.rank == rank and not marker.exists():
            marker.write_text(f"{os.getpid()}")
            os.kill(os.getpid(), signal.SIGKILL)

    return callback


@pytest.fixture
def job(tiny_encoder: Path, uci_sample: pa.Table, tmp_path: Path) -> TrainJob:
    pq.write_table(uci_sample.slice(0, 120), tmp_path / "train.parquet")
    return TrainJob(
        model=str(tiny_encoder),
        output=str(tmp_path / "model"),
        data=DataOptions(train=str(tmp_path / "train.parquet"), validation_fraction=0.2),
        epochs=2,
        batch_size=16,
        learning_rate=1e-3,
        # Dropout, so that the noise after the kill has to be the undisturbed run's.
        dropout=0.1,
        attention_dropout=0.1,
        threads=1,
        checkpoint=CheckpointOptions(every_steps=3),
    )


def assert_same(disturbed: TrainResult, history: list[dict[str, float]], bundle: Path) -> None:
    """The same history and weights as those of an undisturbed run, bit for bit."""
    for one, other in zip(disturbed.history, history, strict=True):
        for name in ("train_loss", "validation_loss", "accuracy", "learning_rate"):
            assert one[name] == other[name], name
    left, right = (load_bundle(path).model().state_dict() for path in (disturbed.bundle, bundle))
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_a_killed_ray_worker(ray_session: None, job: TrainJob, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'bert-ray[train]'")
    from ray import cloudpickle

    # Ray's workers cannot import a test module: what they need of it travels whole.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    job = replace(job, zero_stage=1)
    # Without Ray: three groups of its workers would be the slowest part of this test, and this says more.
    undisturbed = in_group(2, run_loop, job, tmp_path / "whole")
    told: list[dict[str, object]] = []
    marker = tmp_path / "killed"
    disturbed = train(job, callbacks=[kill_once(marker, rank=1)], tell=told.append)
    assert marker.exists(), "no worker was killed"
    resumed = [event for event in told if event["what"] == "resumed"]
    assert [event["step"] for event in resumed] == [9]
    assert_same(disturbed, undisturbed, tmp_path / "whole" / "best")


def train_and_die(job: TrainJob, marker: Path) -> None:
    train(job, callbacks=[kill_once(marker, rank=0)], tell=lambda _: None)


def test_a_killed_process_run_again(job: TrainJob, tmp_path: Path) -> None:
    job = replace(job, engine="local")
    undisturbed = train(replace(job, output=str(tmp_path / "whole")), tell=lambda _: None)
    marker = tmp_path / "killed"
    process = begin(train_and_die, job, marker)
    assert ended(process) == -signal.SIGKILL
    assert marker.exists(), "the process was not killed"
    assert not Path(job.output).exists()
    told: list[dict[str, object]] = []
    disturbed = train(job, tell=told.append)
    assert told[0]["what"] == "resumed"
    assert_same(disturbed, undisturbed.history, undisturbed.bundle)
