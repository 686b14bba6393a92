"""SIGKILL in the middle of training, of a Ray worker and of a plain process: the same final loss, bit for bit."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
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


def assert_same(disturbed: TrainResult, undisturbed: TrainResult) -> None:
    for one, other in zip(disturbed.history, undisturbed.history, strict=True):
        for name in ("train_loss", "validation_loss", "accuracy", "learning_rate"):
            assert one[name] == other[name], name
    left, right = (load_bundle(result.bundle).model().state_dict() for result in (disturbed, undisturbed))
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_a_killed_ray_worker(ray_session: None, job: TrainJob, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'bert-ray[train]'")
    from ray import cloudpickle

    # Ray's workers cannot import a test module: what they need of it travels whole.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    undisturbed = train(replace(job, output=str(tmp_path / "whole"), zero_stage=1), tell=lambda _: None)
    told: list[dict[str, object]] = []
    marker = tmp_path / "killed"
    disturbed = train(replace(job, zero_stage=1), callbacks=[kill_once(marker, rank=1)], tell=told.append)
    assert marker.exists(), "no worker was killed"
    resumed = [event for event in told if event["what"] == "resumed"]
    assert [event["step"] for event in resumed] == [9]
    assert_same(disturbed, undisturbed)


def test_a_killed_process_run_again(job: TrainJob, tmp_path: Path) -> None:
    job = replace(job, engine="local")
    undisturbed = train(replace(job, output=str(tmp_path / "whole")), tell=lambda _: None)
    marker = tmp_path / "killed"
    script = tmp_path / "run.py"
    script.write_text(
        "import pickle\n"
        "from pathlib import Path\n"
        "from tests.fault.test_train_kill import kill_once, train\n"
        f"job = pickle.loads(Path({str(tmp_path / 'job')!r}).read_bytes())\n"
        f"train(job, callbacks=[kill_once(Path({str(marker)!r}), rank=0)])\n"
    )
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    killed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert marker.exists(), "the process was not killed"
    assert not Path(job.output).exists()
    told: list[dict[str, object]] = []
    disturbed = train(job, tell=told.append)
    assert told[0]["what"] == "resumed"
    assert_same(disturbed, undisturbed)
