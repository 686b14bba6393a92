"""A run's figures reach TensorBoard's files and MLflow's store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bert_ray.errors import JobError
from bert_ray.training.job import TrainJob
from bert_ray.training.launch import train
from bert_ray.training.loop import StepEvent

Jobs = Callable[..., TrainJob]


def test_tensorboard(job_for: Jobs) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    job = job_for(trackers=["tensorboard"])
    result = train(job, tell=lambda _: None)
    (file,) = Path(f"{job.output}.tensorboard").iterdir()
    content, found = file.read_bytes(), {}
    while content:
        # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
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


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_tracker_that_fails_under_way_costs_its_figures_alone(
    job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "mlflow":
        mlflow = pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
        module, method = mlflow, "log_metrics"
    else:
        module, method = pytest.importorskip("tensorboardX").SummaryWriter, "add_scalar"
    failed: list[object] = []

    def fail(*arguments: object, **_: object) -> None:
        failed.append(arguments)
        raise RuntimeError("the server is away")

    monkeypatch.setattr(module, method, fail)
    told: list[dict[str, Any]] = []
    result = train(job_for(trackers=[name]), tell=told.append)
    assert len(result.history) == 2
    assert [event["text"] for event in told if event["what"] == "note"] == [
        f"trackers: {name} misses figures: the server is away"
    ]
    assert len(failed) == 1  # It is left alone for a while.


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
