"""SIGKILL in the middle of training, of a Ray worker, of Ray's driver and of a plain process: the same final loss."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bert_ray.model.bundle import load_bundle
from bert_ray.training.job import CheckpointOptions, DataOptions, TrainJob
from bert_ray.training.launch import TrainResult, train
from bert_ray.training.loop import StepEvent
from tests.conftest import needs, tiny_tokenizer
from tests.corpora import make_corpus, random_texts
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


FIGURES = ("train_loss", "validation_loss", "learning_rate")


def assert_same(
    disturbed: TrainResult, history: list[dict[str, float]], bundle: Path, figures: tuple[str, ...] = FIGURES
) -> None:
    """The same history and weights as those of an undisturbed run, bit for bit."""
    for one, other in zip(disturbed.history, history, strict=True):
        for name in figures:
            assert one[name] == other[name], name
    left, right = (load_bundle(path).model().state_dict() for path in (disturbed.bundle, bundle))
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_a_killed_ray_worker(ray_session: None, job: TrainJob, tmp_path: Path) -> None:
    needs("deepspeed", "train")
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
    assert_same(disturbed, undisturbed, tmp_path / "whole" / "best", (*FIGURES, "accuracy"))


def drive_and_die(job: TrainJob, marker: Path, everyone: bool) -> None:
    """Kill this driver once the first epoch is told, after all that it has started, or alone; what that is is noted."""
    # Of 60: how long Ray's agents on a node ask its dead head for an answer before they end.
    os.environ.update({"RAY_gcs_server_request_timeout_seconds": "10"})

    def tell(event: dict[str, object]) -> None:
        if event["what"] == "epoch":
            started = psutil.Process().children(recursive=True)
            marker.write_text(json.dumps({item.pid: item.create_time() for item in started}))
            for item in started if everyone else []:
                item.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    train(job, tell=tell)


def lives(pid: int, begun: float) -> bool:
    try:
        process = psutil.Process(pid)
        return bool(process.create_time() == begun and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def killed(job: TrainJob, marker: Path, everyone: bool) -> None:
    """Begin a run on Ray in a process of its own, and kill that; wait until all that it started has ended."""
    process = begin(drive_and_die, job, marker, everyone)
    assert ended(process) == -signal.SIGKILL
    assert marker.exists(), "the driver was not killed"
    assert not Path(job.output).exists()
    started = json.loads(marker.read_text())
    assert len(started) > 4, "Ray was not there"
    until = time.monotonic() + 120
    while left := [pid for pid, begun in started.items() if lives(int(pid), begun)]:
        assert time.monotonic() < until, f"processes {left} outlive their driver"
        time.sleep(0.5)


@pytest.mark.slow
def test_a_killed_driver_of_ray(job: TrainJob, tmp_path: Path) -> None:
    """Ray's processes end with it; the same job goes on, here with fewer workers and without Ray."""
    needs("deepspeed", "train")
    job = replace(job, zero_stage=1, dropout=0.0, attention_dropout=0.0)
    undisturbed = train(replace(job, engine="local", output=str(tmp_path / "whole")), tell=lambda _: None)
    killed(job, tmp_path / "killed", everyone=False)
    told: list[dict[str, object]] = []
    disturbed = train(replace(job, engine="local"), tell=told.append)
    assert told[0]["what"] == "resumed"
    for one, other in zip(disturbed.history, undisturbed.history, strict=True):
        for name in ("train_loss", "validation_loss"):
            assert one[name] == pytest.approx(other[name], abs=1e-5), name


@pytest.mark.slow
def test_a_pretraining_of_which_all_is_killed_goes_on_on_ray(
    tiny_encoder: Path, tmp_path: Path, ray_session: None
) -> None:
    """Driver, workers and Ray itself; the same command again, and the losses are the undisturbed run's, bit for bit."""
    needs("deepspeed", "train")
    corpus = make_corpus(tmp_path / "corpus", tiny_tokenizer(), random_texts(60), random_texts(10, seed=1))
    job = TrainJob(
        model=str(tiny_encoder),
        output=str(tmp_path / "model"),
        task="pretraining",
        data=DataOptions(train=str(corpus)),
        steps=60,
        batch_tokens=512,
        evaluate_every=6,
        max_length=40,
        learning_rate=3e-3,
        dropout=0.1,
        zero_stage=1,
        threads=1,
        checkpoint=CheckpointOptions(every_steps=4),
    )
    undisturbed = in_group(2, run_loop, job, tmp_path / "whole")
    killed(job, tmp_path / "killed", everyone=True)
    told: list[dict[str, object]] = []
    disturbed = train(job, tell=told.append)
    # An epoch is told before its checkpoint is written, and the driver hears of it a moment late.
    (step,) = (event["step"] for event in told if event["what"] == "resumed")
    assert 4 <= step < job.steps, "the kill came too late"
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
    assert_same(disturbed, undisturbed.history, undisturbed.bundle, (*FIGURES, "accuracy"))
