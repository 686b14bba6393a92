"""Training on Ray Train with two workers: a bundle comes home, errors arrive as ours, a run moves engines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BundleError, JobError, LakeError
from bert_ray.model.bundle import load_bundle
from bert_ray.training.job import CheckpointOptions, DataOptions, TrainJob
from bert_ray.training.launch import train
from bert_ray.training.loop import StepEvent
from tests.conftest import needs

needs("deepspeed", "train")


@pytest.fixture
def job(tiny_encoder: Path, uci_sample: pa.Table, tmp_path: Path) -> TrainJob:
    from ray import cloudpickle

    # Ray's workers cannot import a test module: what they need of it travels whole.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pq.write_table(uci_sample.slice(0, 150), tmp_path / "train.parquet")
    return TrainJob(
        model=str(tiny_encoder),
        output=str(tmp_path / "model"),
        data=DataOptions(train=str(tmp_path / "train.parquet"), validation_fraction=0.2),
        epochs=2,
        batch_size=16,
        dropout=0.0,
        max_failures=0,
        checkpoint=CheckpointOptions(every_steps=3),
    )


def fail_at(step: int, kind: type[Exception] = JobError) -> Callable[[StepEvent], None]:
    """A callback that fails on the first worker, and notes it in the run's directory."""

    def callback(event: StepEvent) -> None:
        if event.step == step and event.rank == 0:
            with (event.directory / "fired").open("a") as file:
                file.write("once\n")
            raise kind("the test's own error")

    return callback


def test_two_workers_on_ray_reach_the_losses_of_one_process(ray_session: None, job: TrainJob) -> None:
    told: list[dict[str, object]] = []
    result = train(replace(job, zero_stage=2), tell=told.append)
    assert [event["what"] for event in told].count("epoch") == 2
    assert load_bundle(result.bundle).card.metrics == result.metrics
    assert not Path(f"{job.output}.run").exists()
    alone = train(replace(job, engine="local", output=f"{job.output}-alone"), tell=lambda _: None)
    for name in ("train_loss", "validation_loss"):
        ours, theirs = ([entry[name] for entry in each.history] for each in (result, alone))
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_workers_error_arrives_as_it_was_and_the_run_goes_on_without_ray(ray_session: None, job: TrainJob) -> None:
    with pytest.raises(JobError, match=r"^the test's own error$"):
        train(replace(job, max_failures=1), callbacks=[fail_at(5)], tell=lambda _: None)
    assert Path(f"{job.output}.run", "fired").read_text() == "once\n", "a fault of the job's own costs no second group"
    told: list[dict[str, object]] = []
    result = train(replace(job, engine="local"), tell=told.append)
    assert told[0]["what"] == "resumed"
    assert told[0]["step"] == 3
    whole = train(replace(job, engine="local", output=f"{job.output}-whole"), tell=lambda _: None)
    ours, theirs = ([entry["train_loss"] for entry in each.history] for each in (result, whole))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_fault_of_the_store_costs_a_group(ray_session: None, job: TrainJob) -> None:
    with pytest.raises(LakeError, match=r"^the test's own error$"):
        train(replace(job, max_failures=1), callbacks=[fail_at(2, LakeError)], tell=lambda _: None)
    assert Path(f"{job.output}.run", "fired").read_text() == "once\n" * 2


def test_what_may_pass_is_no_fault_of_the_job() -> None:
    """Where the error's cause is a disk, a store or a network, other workers may have more luck."""
    from bert_ray.training.ray_train import _of_the_job

    behind = BundleError("the model cannot be read")
    behind.__cause__ = TimeoutError("no answer")
    for error, expected in (
        (JobError("x"), True),
        (BundleError("x"), True),
        (behind, False),
        (LakeError("x"), False),
        (ValueError("x"), False),
    ):
        assert _of_the_job(error) is expected


def test_more_workers_than_ray_has_cpus_is_an_error(ray_session: None, job: TrainJob) -> None:
    with pytest.raises(JobError, match="workers is 64, but Ray has 2 CPUs"):
        train(replace(job, workers=64), tell=lambda _: None)
