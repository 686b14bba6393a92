"""A run's figures reach TensorBoard's files and MLflow's store."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bert_ray.errors import JobError
from bert_ray.training import trackers
from bert_ray.training.job import TrainJob
from bert_ray.training.launch import train
from bert_ray.training.loop import StepEvent

Jobs = Callable[..., TrainJob]


def figures(file: Path) -> dict[str, list[tuple[int, float]]]:
    """The whole events of a file of TensorBoard's: (step, value) by name."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = file.read_bytes(), {}
    while content:
        # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
        size = int.from_bytes(content[:8], "little")
        if len(content) < 16 + size:
            break
        event = Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard(job_for: Jobs) -> None:
    pytest.importorskip("tensorboardX")
    job = job_for(trackers=["tensorboard"])
    result = train(job, tell=lambda _: None)
    (file,) = Path(f"{job.output}.tensorboard").iterdir()
    found = figures(file)
    losses = [(int(entry["step"]), entry["train_loss"]) for entry in result.history]
    assert [step for step, _ in found["round/train_loss"]] == [step for step, _ in losses]
    assert [value for _, value in found["round/train_loss"]] == pytest.approx([value for _, value in losses])


def test_mlflow(job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a training that was cut off: one run."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    job = job_for(trackers=["mlflow"])

    def cut(event: StepEvent) -> None:
        if event.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job, callbacks=[cut], tell=lambda _: None)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FAILED"
    result = train(job, tell=lambda _: None)
    assert len(result.history) > 1
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == str(job.learning_rate)
    logged = client.get_metric_history(run.info.run_id, "round/train_loss")
    assert [item.value for item in logged] == [entry["train_loss"] for entry in result.history]
    # What has ended is not repeated, in MLflow neither.
    assert not train(job, tell=lambda _: None).trained
    assert len(client.search_runs([run.info.experiment_id])) == 1
    with mlflow.start_run(), pytest.raises(JobError, match=r"mlflow has run \w+ under way in this process"):
        train(replace(job, output=str(tmp_path / "another")), tell=lambda _: None)


def test_a_server_that_goes_away_costs_its_figures_alone(
    job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    failed: list[str] = []

    def fail(what: str) -> Callable[..., None]:
        def call(*_: object, **__: object) -> None:
            failed.append(what)
            raise mlflow.exceptions.MlflowException("the server is away")

        return call

    monkeypatch.setattr(mlflow, "log_metrics", fail("figures"))
    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", fail("the end"))
    told: list[dict[str, Any]] = []
    result = train(job_for(trackers=["mlflow"]), tell=told.append)
    assert len(result.history) == 2
    assert [event["text"] for event in told if event["what"] == "note"] == [
        "trackers: mlflow misses figures: the server is away"
    ]
    assert failed == ["figures", "the end"]  # It is left alone for a while after the first.


def test_a_disk_that_fills_up_costs_its_figures_alone(
    job_for: Jobs, disk_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(trackers, "_PAUSE_SEC", 0.0)
    # Its figures lie on a disk of their own, which is full when the first epoch ends.
    small_disk = disk_of("200k")
    job = job_for(trackers=["tensorboard"], epochs=3)
    Path(f"{job.output}.tensorboard").symlink_to(small_disk)
    filler = small_disk / "filler"

    def fill(event: StepEvent) -> None:
        if event.step == 1:
            with contextlib.suppress(OSError), filler.open("wb") as file:
                while True:
                    file.write(bytes(4096))
        elif event.epoch == 2:
            filler.unlink(missing_ok=True)

    told: list[dict[str, Any]] = []
    result = train(job, callbacks=[fill], tell=told.append)
    assert len(result.history) == 3
    notes = [str(event["text"]) for event in told if event["what"] == "note"]
    assert len(notes) == 1
    assert re.fullmatch(r"trackers: tensorboard misses figures: .*No space left on device.*", notes[0])
    told_of = [figures(file).get("round/train_loss", []) for file in small_disk.glob("events*")]
    steps = sorted(step for some in told_of for step, _ in some)
    assert steps == [int(entry["step"]) for entry in result.history[1:]]


def test_a_server_that_does_not_answer_is_told_before_the_training(
    job_for: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # Port 9 (discard) of loopback: nobody listens.
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with pytest.raises(
        JobError, match=r"trackers: mlflow at http://127\.0\.0\.1:9 cannot be used: .*MLFLOW_TRACKING_URI"
    ):
        train(job_for(trackers=["mlflow"]), tell=lambda _: None)


def test_another_is_refused(job_for: Jobs) -> None:
    with pytest.raises(JobError, match="trackers is 'wandb'; give one of tensorboard, mlflow"):
        job_for(trackers=["wandb"])
