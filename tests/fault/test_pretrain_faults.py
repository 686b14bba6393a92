"""What can go wrong in a long pretraining: workers that die or hang, notices, full disks, torn checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs

from bert_ray.config import load_job
from bert_ray.errors import JobError, LakeError
from bert_ray.training.checkpoints import Checkpoints
from bert_ray.training.job import CheckpointOptions, DataOptions, TrainJob
from bert_ray.training.launch import TrainResult, train
from bert_ray.training.loop import StepEvent
from tests.conftest import tiny_tokenizer
from tests.corpora import make_corpus, random_texts
from tests.processes import begin, ended, kill_at


class Cut(Exception):
    """Stands for whatever ends a process."""


def cut_at(step: int) -> Callable[[StepEvent], None]:
    def callback(event: StepEvent) -> None:
        if event.step == step:
            raise Cut

    return callback


def losses(result: TrainResult) -> list[float]:
    return [entry[name] for entry in result.history for name in ("train_loss", "validation_loss")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = random_texts(110)
    return make_corpus(tmp_path_factory.mktemp("faults") / "corpus", tiny_tokenizer(), texts[:100], texts[100:])


def job_at(output: Path, model: Path, corpus: Path) -> TrainJob:
    """A pretraining of 12 steps with dropout, in this process."""
    return TrainJob(
        task="pretraining",
        model=str(model),
        output=str(output),
        data=DataOptions(train=str(corpus)),
        engine="local",
        steps=12,
        batch_tokens=512,
        evaluate_every=6,
        micro_batches=2,
        learning_rate=1e-3,
        max_length=40,
        dropout=0.1,
        threads=1,
        checkpoint=CheckpointOptions(every_steps=2),
    )


@pytest.fixture
def job(tiny_encoder: Path, corpus: Path, tmp_path: Path) -> TrainJob:
    return job_at(tmp_path / "model", tiny_encoder, corpus)


@pytest.fixture(scope="module")
def undisturbed(tiny_encoder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(job_at(tmp_path_factory.mktemp("whole") / "model", tiny_encoder, corpus), tell=lambda _: None)


# Ray's workers.


def kill_and_hang(killed: Path, hung: Path) -> Callable[[StepEvent], None]:
    """A callback by which worker 1 kills itself after step 5 and hangs after step 9, each the first time."""

    def callback(event: StepEvent) -> None:
        if event.rank == 1 and event.step == 5 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if event.rank == 1 and event.step == 9 and not hung.exists():
            hung.touch()
            time.sleep(3600)

    return callback


@pytest.mark.slow
def test_a_worker_is_killed_and_another_hangs(
    ray_session: None, job: TrainJob, undisturbed: TrainResult, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'bert-ray[train]'")
    from ray import cloudpickle

    # Ray's workers cannot import a test module: what they need of it travels whole.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    killed, hung = tmp_path / "killed", tmp_path / "hung"
    told: list[dict[str, object]] = []
    started = time.monotonic()
    result = train(
        replace(job, engine="ray", workers=2, zero_stage=2, timeout_minutes=0.25),
        callbacks=[kill_and_hang(killed, hung)],
        tell=told.append,
    )
    assert killed.exists(), "no worker was killed"
    assert hung.exists(), "no worker hung"
    assert time.monotonic() - started < 600
    assert [event["step"] for event in told if event["what"] == "resumed"] == [4, 8]
    # Two workers add up in another order than one process does.
    assert losses(result) == pytest.approx(losses(undisturbed), abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "resources", "found"),
    [
        ({}, {"CPU": 8.0}, False),
        ({}, {"CPU": 8.0, "GPU": 2.0}, True),
        (
            {},
            {"CPU": 8.0, "GPU": 1.0},
            "workers is 2, but Ray has 8 CPUs and 1 GPUs: give fewer .*CUDA_VISIBLE_DEVICES",
        ),
        ({"min_workers": 1}, {"CPU": 8.0, "GPU": 1.0}, True),
        (
            {"workers": 4, "min_workers": 3, "micro_batches": 4},
            {"CPU": 8.0, "GPU": 1.0},
            "min_workers is 3, but Ray has 8 CPUs and 1 GPUs",
        ),
        (
            {},
            {"CPU": 1.0, "GPU": 4.0},
            "workers is 2, but Ray has 1 CPUs and 4 GPUs: give fewer workers, or add nodes$",
        ),
        ({}, {"CPU": 1.0}, "workers is 2, but Ray has 1 CPUs and 0 GPUs: give fewer workers, or add nodes$"),
    ],
)
def test_some_gpus_but_too_few_are_not_passed_over_for_cpus(
    job: TrainJob, settings: dict[str, int], resources: dict[str, float], found: bool | str
) -> None:
    pytest.importorskip("ray")
    from bert_ray.training.ray_train import _on_gpus

    job = replace(job, **settings)
    if isinstance(found, bool):
        assert _on_gpus(job, resources) is found
    else:
        with pytest.raises(JobError, match=found):
            _on_gpus(job, resources)


# A notice to the process that the user started.


@pytest.mark.slow
def test_sigterm_to_the_driver_of_a_run_on_ray(job: TrainJob) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'bert-ray[train]'")
    settings = {
        "task": "pretraining",
        "model": job.model,
        "output": job.output,
        "data.train": job.data.train,
        **{name: getattr(job, name) for name in ("batch_tokens", "evaluate_every", "micro_batches", "max_length")},
        "steps": 100_000,
        "workers": 2,
        "threads": 1,
        "checkpoint.every_steps": 0,
    }
    command = [sys.executable, "-m", "bert_ray.cli", "train", *(f"{key}={value}" for key, value in settings.items())]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "done  train_loss" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, rest = process.communicate(timeout=120)
    assert any("done  train_loss" in line for line in seen), "".join(seen)
    assert process.returncode == 143, "".join(seen) + rest
    assert "stopped as asked, at step" in rest
    assert "The same command goes on" in rest
    latest = Checkpoints(Path(f"{job.output}.run/checkpoints"), 2).latest()
    assert latest is not None
    assert latest.position["stopped"]
    # The same job goes on; here without Ray, and not to its end.
    told: list[dict[str, object]] = []
    again = load_job(TrainJob, [*(f"{key}={value}" for key, value in settings.items()), "engine=local", "workers=1"])
    step = int(latest.directory.name.removeprefix("step-"))
    with pytest.raises(Cut):
        train(again, callbacks=[cut_at(step + 3)], tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", step)


# In the midst of a checkpoint's writing.


def train_and_die(job: TrainJob, number: int, when: str) -> None:
    kill_at("/checkpoints/step-", number, when)
    train(job, tell=lambda _: None)


@pytest.mark.parametrize(("when", "step"), [("before", 2), ("after", 4)])
def test_killed_while_a_checkpoint_is_put_in_its_place(
    job: TrainJob, undisturbed: TrainResult, when: str, step: int
) -> None:
    """Its files are written, it is not there yet; or it is, and the one before was not cleared away."""
    process = begin(train_and_die, job, 2, when)
    assert ended(process) == -signal.SIGKILL
    left = sorted(path.name for path in Path(f"{job.output}.run/checkpoints").iterdir() if path.is_dir())
    assert [name for name in left if name.startswith("step-")] == [f"step-{n:08}" for n in range(2, step + 1, 2)]
    assert any(name.startswith(".") for name in left) == (when == "before"), left
    told: list[dict[str, object]] = []
    result = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", step)
    assert losses(result) == losses(undisturbed)
    assert not Path(f"{job.output}.run").exists()


# Disks and stores.


@pytest.fixture
def small_disk(disk_of: Callable[[str], Path]) -> Path:
    """A file system of 2 MiB."""
    return disk_of("2m")


def test_an_output_that_is_a_mount_point_is_refused_at_once(job: TrainJob, small_disk: Path) -> None:
    with pytest.raises(JobError, match=rf"{small_disk} is a mount point: name a directory in it"):
        train(replace(job, output=str(small_disk)), tell=lambda _: None)


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(
    job: TrainJob, undisturbed: TrainResult, small_disk: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    where = small_disk / "checkpoints"
    job = replace(job, checkpoint=CheckpointOptions(every_steps=2, keep=2, directory=str(where)))
    with pytest.raises(Cut):
        train(job, callbacks=[cut_at(5)], tell=lambda _: None)
    size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) // 2
    # Room for two checkpoints and a half: the third has none.
    room = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(room.f_bavail * room.f_frsize - size // 2))
    if engine == "ray":
        request.getfixturevalue("ray_session")
    with pytest.raises(LakeError, match=r"cannot write checkpoint step-00000006 .*No space left.*step-00000004"):
        train(replace(job, engine=engine, max_failures=0), tell=lambda _: None)
    assert sorted(path.name for path in where.glob("step-*")) == ["step-00000002", "step-00000004"]
    (small_disk / "other").unlink()
    told: list[dict[str, object]] = []
    result = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 4)
    assert losses(result) == losses(undisturbed)


@pytest.fixture
def store(object_store: str) -> str:
    """A bucket on an S3 server on loopback: what follows its URIs."""
    fs.S3FileSystem(endpoint_override=object_store, scheme="http", allow_bucket_creation=True).create_dir("runs")
    return f"?endpoint_override={object_store}&scheme=http"


def test_checkpoints_on_a_store_and_one_that_is_torn(job: TrainJob, undisturbed: TrainResult, store: str) -> None:
    where = f"s3://runs/pretraining{store}"
    job = replace(job, checkpoint=CheckpointOptions(every_steps=2, keep=2, directory=where))
    with pytest.raises(Cut):
        train(job, callbacks=[cut_at(7)], tell=lambda _: None)
    system, root = fs.FileSystem.from_uri(where)

    def steps() -> list[str]:
        infos = system.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.base_name.startswith("step-"))

    assert steps() == ["step-00000004", "step-00000006"]
    with pytest.raises(JobError, match=r"s3://runs/pretraining.* another run \(.*seed 0, now 1"):
        train(replace(job, seed=1, output=f"{job.output}-other"), tell=lambda _: None)
    # Torn in the midst of its writing: the state is there, what makes it a checkpoint is not.
    system.delete_file(f"{root}/step-00000006/position.json")
    told: list[dict[str, object]] = []
    result = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 4)
    assert "step-00000006 is damaged" in str(told[0]["skipped"])
    assert losses(result) == losses(undisturbed)
    assert not system.get_file_info(fs.FileSelector(root, allow_not_found=True))


def test_a_store_that_does_not_answer(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    # Port 9 (discard) of loopback: nobody listens.
    where = "s3://runs/pretraining?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    job = replace(job, checkpoint=CheckpointOptions(directory=where))
    with pytest.raises(LakeError, match=r"s3://runs/pretraining\S* cannot be listed: "):
        train(job, tell=lambda _: None)
