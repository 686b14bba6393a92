"""The loop in one plain process: it learns, keeps the best, resumes bit for bit, and stops at a loss gone wrong."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bert_ray.errors import JobError, LakeError, Stopped
from bert_ray.model import bundle
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.bundle import load_bundle
from bert_ray.model.packing import plan
from bert_ray.model.tasks.classification import Classification
from bert_ray.training import launch, loop, optim, run_directory
from bert_ray.training.checkpoints import STATE_FILE
from bert_ray.training.data import read_labelled
from bert_ray.training.job import CheckpointOptions, DataOptions, TrainJob
from bert_ray.training.launch import TrainResult, train
from bert_ray.training.loop import StepEvent
from bert_ray.training.optim import STEPS, TaskModel
from bert_ray.training.order import held_out
from bert_ray.training.schedule import learning_rate

Jobs = Callable[..., TrainJob]


class Cut(Exception):
    """Stands for whatever ends a process."""


def cut_at(step: int) -> Callable[[StepEvent], None]:
    def callback(event: StepEvent) -> None:
        if event.step == step:
            raise Cut

    return callback


def quiet(job: TrainJob, **more: object) -> TrainResult:
    return train(job, tell=lambda _: None, **more)


def without_speed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in history]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return dict(load_bundle(result.bundle).model().state_dict())


def test_a_tiny_model_learns_and_its_bundle_says_how(job_for: Jobs) -> None:
    events: list[dict[str, object]] = []
    job = job_for(epochs=12, batch_size=8)
    result = train(job, tell=events.append)
    assert result.metrics["accuracy"] >= 0.75 > result.baseline
    assert [entry["epoch"] for entry in result.history] == list(range(1, 13))
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert not Path(f"{job.output}.run").exists()
    assert [event["what"] for event in events].count("epoch") == 12

    card = load_bundle(job.output).card
    assert (card.task, card.name, card.labels) == ("classification", "sentiment", ["negative", "positive"])
    assert card.metrics == result.metrics
    assert card.provenance["history"] == result.history
    assert card.provenance["seed"] == 0
    assert card.provenance["base"]["fingerprint"] == load_bundle(job.model).fingerprint
    best = max(entry["accuracy"] for entry in result.history)
    assert result.metrics["accuracy"] == best
    assert result.history[result.best_epoch - 1]["accuracy"] == best
    assert "majority baseline" in result.summary()


def test_the_bundle_is_the_best_epochs_model(job_for: Jobs) -> None:
    job = job_for(epochs=4)
    result = quiet(job)
    table = read_labelled(job.data.train, load_bundle(result.bundle).task)
    out = held_out(table.inputs[0].to_pylist(), job.data.validation_fraction)
    texts, labels = table.filter(out).inputs[0], table.filter(out).truth[0].to_pylist()
    annotated = AnnotatorSpec(model=str(result.bundle)).build()(pa.table({"text": texts}))
    said = [["negative", "positive"].index(item["label"]) for item in annotated["sentiment"].to_pylist()]
    accuracy = sum(one == other for one, other in zip(said, labels, strict=True)) / len(labels)
    assert accuracy == pytest.approx(result.metrics["accuracy"])


@pytest.mark.parametrize(("step", "optimizer"), [(3, "adamw"), (6, "adamw"), (10, "adamw"), (5, "lamb")])
def test_a_run_cut_off_goes_on_to_the_same_bits(job_for: Jobs, tmp_path: Path, step: int, optimizer: str) -> None:
    # Dropout on, so that the noise after the cut has to be the undisturbed run's too.
    job = job_for(dropout=0.2, attention_dropout=0.1, optimizer=optimizer, checkpoint=CheckpointOptions(every_steps=2))
    whole = quiet(replace(job, output=str(tmp_path / "whole")))
    with pytest.raises(Cut):
        quiet(job, callbacks=[cut_at(step)])
    assert Path(f"{job.output}.run").exists()
    assert not Path(job.output).exists()
    events: list[dict[str, object]] = []
    resumed = train(job, tell=events.append)
    assert events[0]["what"] == "resumed"
    # The last checkpoint before the step that was cut off.
    assert events[0]["step"] == (step - 1) // 2 * 2
    assert without_speed(resumed.history) == without_speed(whole.history)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(job_for: Jobs, tmp_path: Path) -> None:
    job = job_for(checkpoint=CheckpointOptions(every_steps=2))
    whole = quiet(replace(job, output=str(tmp_path / "whole")))
    with pytest.raises(Cut):
        quiet(job, callbacks=[cut_at(5)])
    newest = sorted(Path(f"{job.output}.run/checkpoints").glob("step-*"))[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    events: list[dict[str, object]] = []
    resumed = train(job, tell=events.append)
    assert events[0]["step"] == 2
    assert "damaged" in events[0]["skipped"][0]
    assert without_speed(resumed.history) == without_speed(whole.history)


def test_where_no_checkpoint_is_whole_it_is_said_and_new_ones_are_kept(job_for: Jobs, tmp_path: Path) -> None:
    job = job_for(checkpoint=CheckpointOptions(every_steps=2))
    whole = quiet(replace(job, output=str(tmp_path / "whole")))
    with pytest.raises(Cut):
        quiet(job, callbacks=[cut_at(11)])
    place = Path(f"{job.output}.run/checkpoints")
    for path in place.glob(f"*/{STATE_FILE}"):
        path.write_bytes(b"torn")
    damaged = sorted(path.name for path in place.iterdir())
    assert damaged == ["step-00000008", "step-00000010"]
    told: list[dict[str, object]] = []
    with pytest.raises(Cut):
        train(job, callbacks=[cut_at(3)], tell=told.append)
    notes = "\n".join(str(event.get("text")) for event in told if event["what"] == "note")
    assert "training starts anew" in notes
    assert all(name in notes for name in damaged)
    assert [path.name for path in place.iterdir()] == ["step-00000002"]
    told.clear()
    resumed = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 2)
    assert without_speed(resumed.history) == without_speed(whole.history)


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("noticed", ["at a step", "behind the last step", "in the evaluation"])
def test_sigterm_at_the_end_of_an_epoch_leaves_a_run_that_goes_on(
    job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noticed: str, epoch: int
) -> None:
    job = job_for()
    whole = quiet(replace(job, output=str(tmp_path / "whole")))
    steps = int(whole.history[epoch - 1]["step"])
    # Losses are looked at after each step, or of many together: then after the last step of a round.
    monkeypatch.setattr(loop, "_LOOK_EVERY", 1 if noticed == "at a step" else 10)
    monkeypatch.setattr(loop, "_LOOK_EVERY_SEC", 1e9)
    sent: list[int] = []
    evaluations = itertools.count(1)

    def send(event: StepEvent) -> None:
        if noticed != "in the evaluation" and event.step == steps - (noticed == "at a step"):
            sent.append(event.step)
            os.kill(os.getpid(), signal.SIGTERM)

    def batches(*arguments: Any) -> list[np.ndarray]:
        if next(evaluations) == epoch and noticed == "in the evaluation":
            sent.append(steps)
            os.kill(os.getpid(), signal.SIGTERM)
        return plan(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "plan", batches)
        with pytest.raises(Stopped, match=f"at step {steps}"):
            quiet(job, callbacks=[send])
    assert len(sent) == 1
    assert not Path(job.output).exists()
    told: list[dict[str, object]] = []
    result = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"], told[0]["epoch"]) == ("resumed", steps, epoch - 1)
    assert without_speed(result.history) == without_speed(whole.history)


def test_fp16_goes_on_with_the_steps_that_its_optimizer_took(
    job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps whose gradients overflow are skipped, and Adam's bias correction does not count them."""
    scaler = torch.amp.GradScaler

    def overflowing(*arguments: object, **more: object) -> torch.amp.GradScaler:
        return scaler(*arguments, init_scale=2.0**40, **more)

    monkeypatch.setattr(torch.amp, "GradScaler", overflowing)
    job = job_for(precision="fp16", epochs=8, checkpoint=CheckpointOptions(every_steps=0))
    whole = quiet(replace(job, output=str(tmp_path / "whole")))
    with pytest.raises(Cut):
        quiet(job, callbacks=[cut_at(37)])
    newest = sorted(Path(f"{job.output}.run/checkpoints").glob("step-*"))[-1]
    taken = int(load_file(newest / STATE_FILE)[STEPS])
    assert 0 < taken < int(newest.name.removeprefix("step-")), "no step overflowed, or all"
    # A norm that overflowed is none, also to those who read the card by the letter of JSON.
    card = json.loads((whole.bundle / "bert_ray.json").read_text(), parse_constant=pytest.fail)
    assert len(card["provenance"]["curve"]) > 1
    told: list[dict[str, object]] = []
    resumed = train(job, tell=told.append)
    assert told[0]["what"] == "resumed"
    assert without_speed(resumed.history) == without_speed(whole.history)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SafetensorError("No space left on device")])
def test_a_disk_that_is_full_when_the_best_model_is_kept(
    job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    job = job_for(checkpoint=CheckpointOptions(every_steps=2))
    whole = quiet(replace(job, output=str(tmp_path / "whole")))

    def full(*arguments: object, **more: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "save_card", full)
        with pytest.raises(LakeError, match=r"cannot write the best model to .*best: No space left.*step-00000006"):
            quiet(job)
    told: list[dict[str, object]] = []
    resumed = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 6)
    assert without_speed(resumed.history) == without_speed(whole.history)


def test_a_kill_when_the_bundle_has_just_appeared_leaves_nothing_for_long(
    job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "checkpoints"
    job = job_for(epochs=1, checkpoint=CheckpointOptions(directory=str(place)))

    def die(*arguments: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "clear", die)
        with pytest.raises(Cut):
            quiet(job)
    assert Path(job.output).exists()
    assert Path(f"{job.output}.run").exists()
    assert list(place.glob("step-*"))
    assert not quiet(job).trained
    assert not Path(f"{job.output}.run").exists()
    assert not list(place.iterdir())


def test_checkpoints_that_lie_elsewhere_are_not_forgotten(job_for: Jobs, tmp_path: Path) -> None:
    job = job_for(checkpoint=CheckpointOptions(every_steps=2, directory=str(tmp_path / "one")))
    whole = quiet(replace(job, output=str(tmp_path / "whole"), checkpoint=CheckpointOptions()))
    elsewhere = replace(job, checkpoint=CheckpointOptions(every_steps=2, directory=str(tmp_path / "other")))
    here = replace(job, checkpoint=CheckpointOptions(every_steps=2))
    with pytest.raises(Cut):
        quiet(job, callbacks=[cut_at(1)])
    # There was none yet: the place may change, and the one before is left as it was found.
    with pytest.raises(Cut):
        quiet(elsewhere, callbacks=[cut_at(3)])
    assert not list((tmp_path / "one").iterdir())
    for other in (job, here):
        with pytest.raises(JobError, match=rf"checkpoints lie in {tmp_path}/other: give checkpoint.directory=\S+other"):
            quiet(other)
    told: list[dict[str, object]] = []
    result = train(elsewhere, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 2)
    assert without_speed(result.history) == without_speed(whole.history)


@pytest.mark.parametrize("place", ["model", "model/checkpoints", "model.run", "model.run/checkpoints/mine"])
def test_checkpoints_are_not_where_the_bundle_comes(job_for: Jobs, tmp_path: Path, place: str) -> None:
    for directory in (str(tmp_path / place), (tmp_path / place).as_uri()):
        with pytest.raises(JobError, match=r"checkpoint\.directory \S+ is in \S+/model(\.run)?, .*choose another"):
            quiet(job_for(checkpoint=CheckpointOptions(directory=directory)))
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.run").exists()


def test_a_better_model_that_no_checkpoint_tells_of(job_for: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the keeping of epoch 2's model and the checkpoint that says so."""
    job = job_for(epochs=2)
    save = loop.Loop._save

    def die(self: loop.Loop) -> None:
        if self.position.epoch == 2:
            raise Cut
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_save", die)
        patch.setattr(loop.Loop, "evaluate", lambda self, source: (1.0, {"accuracy": 0.1 * self.position.epoch}))
        with pytest.raises(Cut):
            quiet(job)
    assert load_bundle(f"{job.output}.run/best").card.provenance["best_epoch"] == 2
    # Where the session that goes on finds epoch 2 worse, epoch 1's model is gone all the same.
    monkeypatch.setattr(loop.Loop, "evaluate", lambda self, source: (1.0, {"accuracy": -1.0}))
    told: list[dict[str, Any]] = []
    result = train(job, tell=told.append)
    assert any("the model of epoch 1, is gone" in str(event.get("text")) for event in told)
    assert result.best_epoch == 2
    assert load_bundle(result.bundle).card.metrics == {"accuracy": -1.0}


def test_what_a_killed_start_left_is_swept(job_for: Jobs, tmp_path: Path) -> None:
    left = tmp_path / ".model.1234.start"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    others = [tmp_path / name for name in (".another.1234.start", ".model.v2.1234.start")]
    for other in others:
        other.mkdir()
    quiet(job_for(epochs=1))
    assert not left.exists()
    assert all(other.exists() for other in others)


def test_a_run_begun_with_a_key_that_was_ignored_goes_on(job_for: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_for(batch_tokens=999, checkpoint=CheckpointOptions(every_steps=2))
    with pytest.raises(JobError, match="batch_tokens: for a task that reads a corpus"):
        quiet(job)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_OF_A_CORPUS", ())
        with pytest.raises(Cut):
            quiet(job, callbacks=[cut_at(3)])
    told: list[dict[str, Any]] = []
    train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 2)
    assert not quiet(job).trained


@pytest.mark.parametrize("when", ["in the third epoch", "at the end"])
def test_checkpoints_on_a_store_outlive_the_runs_directory(
    job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A spot machine is gone, and what lay on its disk."""
    place = CheckpointOptions(directory=str(tmp_path / "store"), every_steps=2)
    job = job_for(epochs=3, early_stopping=2, checkpoint=place)
    whole = quiet(replace(job, output=str(tmp_path / "whole"), checkpoint=CheckpointOptions()))
    assert len(whole.history) == 3

    def die(*arguments: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(launch, "publish", die)
        steps = int(whole.history[1]["step"])
        with pytest.raises(Cut):
            quiet(job, callbacks=[] if when == "at the end" else [cut_at(steps + 3)])
    shutil.rmtree(f"{job.output}.run")
    told: list[dict[str, Any]] = []
    result = train(job, tell=told.append)
    assert told[0]["what"] == "resumed"
    assert "is gone: the best from here on counts" in told[1]["text"]
    assert result.best_epoch == 3
    assert without_speed(result.history) == without_speed(whole.history)
    assert result.metrics["accuracy"] == whole.history[2]["accuracy"]
    assert AnnotatorSpec(model=str(result.bundle)).build()(pa.table({"text": ["good"]})).num_rows == 1


def test_an_ended_run_is_not_repeated_and_not_overwritten(job_for: Jobs) -> None:
    job = job_for(epochs=1)
    first = quiet(job)
    again = quiet(job, callbacks=[cut_at(1)])
    assert not again.trained
    assert again.metrics == first.metrics
    assert again.history == first.history
    with pytest.raises(JobError, match=r"learning_rate 0\.003, now 0\.1"):
        quiet(replace(job, learning_rate=0.1))


def test_labels_by_other_names_are_another_run(job_for: Jobs, tmp_path: Path) -> None:
    """Also where they come in the same order."""
    job = job_for(epochs=1)
    place = tmp_path / "renamed.parquet"
    job = replace(job, data=replace(job.data, train=str(place)))
    table = pq.read_table(job_for().data.train)
    pq.write_table(table, place)
    quiet(job)
    labels = pa.array([f"a {label}" for label in table["label"].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", labels), place)
    with pytest.raises(JobError, match=r"labels found.*now"):
        quiet(job)
    # Of a run that was begun before they were noted nothing can be said.
    now = {"seed": 0, "labels found": ["a"]}
    assert run_directory.same_run({"seed": 0}, now)
    assert not run_directory.same_run({"seed": 1}, now)
    assert not run_directory.same_run({"seed": 0, "labels found": ["b"]}, now)


def test_a_gpu_without_memory_for_a_step_is_told(job_for: Jobs) -> None:
    def fill(event: StepEvent) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(
        JobError,
        match=r"what follows step 1 \(.*20\.00 GiB\): .*checkpointing=true .*\.run and begin anew .*micro_batches=2",
    ):
        quiet(job_for(), callbacks=[fill])


def test_an_unfinished_run_refuses_other_settings(job_for: Jobs) -> None:
    job = job_for()
    with pytest.raises(Cut):
        quiet(job, callbacks=[cut_at(1)])
    with pytest.raises(JobError, match=r"unfinished run with other settings.*seed 0, now 1"):
        quiet(replace(job, seed=1))
    quiet(replace(job, threads=2))


def test_checkpoints_of_another_run_are_not_gone_on_with(job_for: Jobs, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    job = job_for(checkpoint=CheckpointOptions(every_steps=2, directory=str(place)))
    whole = quiet(replace(job, output=str(tmp_path / "whole"), checkpoint=CheckpointOptions()))
    with pytest.raises(Cut):
        quiet(job, callbacks=[cut_at(3)])
    for change, named in (
        ({"learning_rate": 0.1}, r"learning_rate 0\.003, now 0\.1.*output '.*model', now '.*other'"),
        ({}, r"output '.*model', now '.*other'"),
    ):
        with pytest.raises(JobError, match=rf"{place} holds the checkpoints of another run \(.*{named}"):
            quiet(replace(job, output=str(tmp_path / "other"), **change))
        assert not (tmp_path / "other.run").exists()
    with pytest.raises(JobError, match=rf"delete that directory and {place} to start anew"):
        quiet(replace(job, learning_rate=0.1))
    # The run's own directory lost, its checkpoints left: they are still nobody else's.
    shutil.move(f"{job.output}.run", tmp_path / "kept")
    with pytest.raises(JobError, match=rf"{place} holds the checkpoints of another run .*delete it and .*model\.run"):
        quiet(replace(job, learning_rate=0.1))
    shutil.move(tmp_path / "kept", f"{job.output}.run")
    told: list[dict[str, object]] = []
    resumed = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 2)
    assert without_speed(resumed.history) == without_speed(whole.history)
    assert not list(place.iterdir())
    # Now it is free for another run.
    assert quiet(replace(job, output=str(tmp_path / "other"), learning_rate=1e-3)).trained


def test_checkpoints_that_name_no_run_are_not_gone_on_with(job_for: Jobs, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    job = job_for(checkpoint=CheckpointOptions(every_steps=2, directory=str(place)))
    with pytest.raises(Cut):
        quiet(job, callbacks=[cut_at(3)])
    (place / "run.json").unlink()
    with pytest.raises(JobError, match=r"another run \(it is not said of which\)"):
        quiet(job)


def test_an_output_on_a_store_is_refused(job_for: Jobs) -> None:
    with pytest.raises(JobError, match=r"output s3://bucket/model is no directory"):
        quiet(job_for(output="s3://bucket/model"))


def test_an_output_that_is_not_ours_is_refused(job_for: Jobs) -> None:
    job = job_for()
    Path(job.output).mkdir()
    (Path(job.output) / "thesis.tex").write_text("x")
    with pytest.raises(JobError, match="holds no bundle"):
        quiet(job)
    assert (Path(job.output) / "thesis.tex").exists()


def test_a_run_directory_that_is_not_ours_is_refused_and_a_torn_first_write_is_not(job_for: Jobs) -> None:
    job = job_for(epochs=1)
    directory = Path(f"{job.output}.run")
    directory.mkdir()
    (directory / ".run.json.new").write_text('{"task": "clas')
    (directory / "thesis.tex").write_text("x")
    with pytest.raises(JobError, match="is not empty and holds no run"):
        quiet(job)
    (directory / "thesis.tex").unlink()
    assert quiet(job).trained
    assert not directory.exists()


def test_accumulation_gives_the_same_steps(job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    backward = optim.PlainStepper.backward

    def counted(stepper: optim.PlainStepper, loss: torch.Tensor) -> None:
        passes[-1] += 1
        backward(stepper, loss)

    monkeypatch.setattr(optim.PlainStepper, "backward", counted)
    one = job_for(dropout=0.0, output=str(tmp_path / "one"))
    four = replace(one, gradient_accumulation=4, output=str(tmp_path / "four"))
    histories = []
    for job in (one, four):
        passes.append(0)
        histories.append(quiet(job).history)
    losses = [[entry["train_loss"] for entry in history] for history in histories]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    steps = histories[0][-1]["step"]
    assert passes == [steps, 4 * steps]


def test_steps_take_the_rate_of_the_schedule_and_noise_of_their_own(
    job_for: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    noise: list[tuple[int, int, int]] = []
    step, seed = optim.PlainStepper.step, loop.noise_seed

    def stepped(stepper: optim.PlainStepper, rate: float) -> torch.Tensor | None:
        rates.append(rate)
        return step(stepper, rate)

    def seeded(*place: int) -> int:
        noise.append(place)
        return seed(*place)

    monkeypatch.setattr(optim.PlainStepper, "step", stepped)
    monkeypatch.setattr(loop, "noise_seed", seeded)
    job = job_for(schedule="trapezoidal", warmup=0.3, cooldown=0.5, gradient_accumulation=2)
    steps = int(quiet(job).history[-1]["step"])
    assert rates == [learning_rate(at, steps, job.learning_rate, 0.3, "trapezoidal", 0.5) for at in range(steps)]
    assert rates[0] < max(rates) > rates[-1]
    # The first seed is that of the new head.
    assert noise[1:] == [(job.seed, at, part) for at in range(steps) for part in range(2)]


def test_fp16_that_takes_no_step_any_more_ends_the_run(job_for: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(loop, "_MOST_OVERFLOWS", 3)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *given, **more: scaler(*given, init_scale=2.0**100, **more))
    job = job_for(precision="fp16", epochs=8)
    with pytest.raises(JobError, match=r"no step since long was within fp16's range.*precision=bf16"):
        quiet(job)
    assert not Path(job.output).exists()


def test_a_run_whose_place_is_a_file_is_told(job_for: Jobs) -> None:
    job = job_for()
    Path(f"{job.output}.run").touch()
    with pytest.raises(JobError, match=r"model\.run, where the run's checkpoints belong, is a file"):
        quiet(job)


def test_penalties_pull_weights_to_nought(job_for: Jobs, tmp_path: Path) -> None:
    """L1, and L2 as AdamW's decoupled decay."""

    def size(**settings: object) -> float:
        settings = {"l1": 0.0, "weight_decay": 0.0} | settings
        result = quiet(job_for(output=str(tmp_path / f"{settings}"), epochs=1, **settings))
        return sum(float(value.abs().sum()) for name, value in weights(result).items() if value.dim() > 1)

    free = size()
    assert size(l1=0.01) < 0.99 * free
    assert size(weight_decay=5.0) < 0.99 * free


def test_bf16_trains(job_for: Jobs, tmp_path: Path) -> None:
    result = quiet(job_for(precision="bf16"))
    losses = [entry["train_loss"] for entry in result.history]
    exact = [entry["train_loss"] for entry in quiet(job_for(output=str(tmp_path / "fp32"), precision="fp32")).history]
    assert losses[-1] < losses[0]
    assert losses != exact, "it was computed in fp32"
    assert losses == pytest.approx(exact, abs=0.05)
    assert {value.dtype for value in weights(result).values()} == {torch.float32}


def test_early_stopping_ends_when_the_metric_no_longer_rises(job_for: Jobs) -> None:
    result = quiet(job_for(epochs=30, early_stopping=2, learning_rate=1e-9))
    assert len(result.history) == result.best_epoch + 2


def test_an_epoch_whose_metric_is_no_number_is_not_the_best(job_for: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of outputs that overflowed."""
    found = iter([float("nan"), 0.5, float("nan")])
    monkeypatch.setattr(Classification, "validate", lambda *_: {"accuracy": next(found)})
    result = quiet(job_for(epochs=3))
    assert (result.best_epoch, result.metrics) == (2, {"accuracy": 0.5})


def test_all_rows_train_where_nothing_is_held_out(job_for: Jobs, reviews: Path) -> None:
    result = quiet(job_for(epochs=2, data=DataOptions(train=str(reviews), validation_fraction=0.0)))
    assert result.train_rows == 120
    assert result.best_epoch == 2
    assert result.metrics == {}
    assert result.baseline is None


def poison_at(step: int) -> Callable[[StepEvent], None]:
    """Spoils the weights of the running model after `step`, so that the next step's loss is NaN."""

    def callback(event: StepEvent) -> None:
        if event.step == step:
            spoilt = [item for item in gc.get_objects() if type(item) is TaskModel]
            assert spoilt, "no model found to spoil"
            for item in spoilt:
                with torch.no_grad():
                    next(item.model.parameters()).fill_(float("nan"))

    return callback


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_checkpoint_and_best(job_for: Jobs) -> None:
    job = job_for(epochs=3, checkpoint=CheckpointOptions(every_steps=2))
    whole = quiet(replace(job, output=f"{job.output}-whole"))
    best = Path(f"{job.output}.run/best")
    said = rf"step 10 \(epoch 2\).*epoch 1, is {best};.*checkpoints/step-00000008.*learning_rate"
    for _ in range(2):  # The same command does not take for finished what was not.
        with pytest.raises(JobError, match=said):
            quiet(job, callbacks=[poison_at(9)])
        assert not Path(job.output).exists()
        assert all(value.isfinite().all() for value in load_bundle(best).model().state_dict().values())
    assert load_bundle(best).card.provenance["best_epoch"] == 1
    # What spoilt it may have been the machine.
    assert without_speed(quiet(job).history) == without_speed(whole.history)


def test_a_loss_that_is_no_number_before_any_checkpoint_keeps_nothing(job_for: Jobs) -> None:
    job = job_for()
    with pytest.raises(JobError, match=r"step 2 \(epoch 1\), before an epoch or a checkpoint"):
        quiet(job, callbacks=[poison_at(1)])
    assert not Path(job.output).exists()
    assert not Path(f"{job.output}.run").exists()


def test_a_gradient_that_is_no_number_is_seen_before_a_checkpoint_has_its_weights(
    job_for: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where gradients are not clipped; that step's own loss is finite still."""
    backward, calls = optim.PlainStepper.backward, []

    def spoilt(stepper: optim.PlainStepper, loss: torch.Tensor) -> None:
        backward(stepper, loss)
        calls.append(float(loss.detach()))
        if len(calls) == 3:
            next(weight.grad for weight in stepper.module.parameters() if weight.grad is not None).fill_(float("nan"))

    monkeypatch.setattr(optim.PlainStepper, "backward", spoilt)
    job = job_for(clip=0.0, checkpoint=CheckpointOptions(every_steps=1))
    with pytest.raises(JobError, match=r"gradient stopped being finite at step 3 .*step-00000002"):
        quiet(job)
    assert np.isfinite(calls[2])
    assert not (Path(f"{job.output}.run") / "checkpoints" / "step-00000003").exists()


def test_a_loss_that_is_no_number_in_the_first_epoch_keeps_the_last_good_checkpoint(
    job_for: Jobs, tmp_path: Path
) -> None:
    """Hours may lie before the first evaluation, and what spoilt the loss may have been the machine."""
    job = job_for(checkpoint=CheckpointOptions(every_steps=2))
    whole = quiet(replace(job, output=str(tmp_path / "whole")))
    run = f"{job.output}.run"
    said = rf"step 6 \(epoch 1\).*last good checkpoint is {run}/checkpoints/step-00000004.*delete {run} and train"
    for _ in range(2):  # The same command goes on from it, and says the same when it comes to the same.
        with pytest.raises(JobError, match=said):
            quiet(job, callbacks=[poison_at(5)])
    with pytest.raises(JobError, match=r"learning_rate 0\.003, now 0\.001.*delete that directory to start anew"):
        quiet(replace(job, learning_rate=1e-3))
    told: list[dict[str, object]] = []
    resumed = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 4)
    assert without_speed(resumed.history) == without_speed(whole.history)


def test_validation_rows_given_apart(job_for: Jobs, reviews: Path, tmp_path: Path) -> None:
    path = tmp_path / "validation.parquet"
    pq.write_table(pq.read_table(reviews).slice(0, 30), path)
    events: list[dict[str, object]] = []
    result = train(job_for(data=DataOptions(train=str(reviews), validation=str(path)), epochs=1), tell=events.append)
    assert result.validation_rows == 30
    assert "30 of the 30 rows" in events[0]["text"]


def test_settings_that_a_file_gives_back_otherwise_are_the_same_settings(job_for: Jobs) -> None:
    """Keys of a table are strings in JSON."""
    job = job_for(epochs=1, class_weights={0: 1.0, 1: 2.0}, labels=["0", "1"])
    assert job.identity()["class_weights"] == {"0": 1.0, "1": 2.0}


def test_a_file_system_without_locks_is_no_obstacle(job_for: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def flock(handle: int, how: int) -> None:
        asked.append(handle)
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("bert_ray.lake.lock.fcntl.flock", flock)
    assert quiet(job_for(epochs=1)).trained
    assert asked


def test_the_run_directory_says_what_was_asked(job_for: Jobs) -> None:
    job = job_for()
    with pytest.raises(Cut):
        quiet(job, callbacks=[cut_at(1)])
    asked = json.loads(Path(f"{job.output}.run/run.json").read_text())
    assert asked["learning_rate"] == 3e-3
    assert asked["base"] == load_bundle(job.model).fingerprint


def test_class_weights_and_smoothing_reach_the_loss(job_for: Jobs, tmp_path: Path) -> None:
    job = job_for(epochs=1, learning_rate=1e-6)
    plain = quiet(job).history[0]["train_loss"]
    heavy = quiet(replace(job, class_weights={"negative": 3, "positive": 3}, output=str(tmp_path / "heavy")))
    assert heavy.history[0]["train_loss"] == pytest.approx(3 * plain, rel=1e-3)
    # Of a model that learns: before it has learned, smoothing moves the mean loss by chance alone.
    learning = replace(job, epochs=4, learning_rate=3e-3)
    sharp = quiet(replace(learning, output=str(tmp_path / "sharp"))).history[-1]["train_loss"]
    smooth = quiet(replace(learning, label_smoothing=0.5, output=str(tmp_path / "smooth")))
    assert abs(smooth.history[-1]["train_loss"] - sharp) > 1e-3
    card = load_bundle(smooth.bundle).card
    assert (card.provenance["job"]["label_smoothing"], card.provenance["job"]["class_weights"]) == (0.5, "none")
    with pytest.raises(JobError, match="class_weights names 'neutral'"):
        quiet(replace(job, class_weights={"neutral": 2}, output=str(tmp_path / "strange")))


def test_an_output_that_is_none_is_told_before_anything_is_read(job_for: Jobs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, says in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "cannot be made")):
        with pytest.raises(JobError, match=rf"output {output} {says}"):
            quiet(job_for(output=str(output)))


def test_a_loss_that_is_no_number_goes_before_a_stop_that_was_asked_for(job_for: Jobs) -> None:
    """Nothing was saved of what came after the last checkpoint, so that it must not be said."""

    def stop_and_poison(event: StepEvent) -> None:
        if event.step == 5:
            (event.directory / "stop").touch()

    job = job_for(checkpoint=CheckpointOptions(every_steps=2))
    with pytest.raises(JobError, match="step-00000004"):
        quiet(job, callbacks=[stop_and_poison, poison_at(5)])


def test_a_run_that_is_stopped_at_an_epochs_last_step_goes_on(
    job_for: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LOOK_EVERY", 1)
    job = job_for(checkpoint=CheckpointOptions(keep=1))
    whole = quiet(replace(job, output=str(tmp_path / "whole")))
    last = int(whole.history[0]["step"])

    def stop(event: StepEvent) -> None:
        if event.step == last - 1:
            (event.directory / "stop").touch()

    with pytest.raises(Stopped, match=rf"at step {last}; "):
        quiet(job, callbacks=[stop])
    told: list[dict[str, Any]] = []
    result = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", last)
    assert without_speed(result.history) == without_speed(whole.history)
