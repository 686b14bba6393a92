"""What a run tells of itself: the printed lines, and where their figures come from."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bert_ray.model.bundle import load_bundle
from bert_ray.model.flops import dims_of, training_flops
from bert_ray.training import loop, optim
from bert_ray.training.job import TrainJob
from bert_ray.training.launch import train
from bert_ray.training.progress import duration, following, line, show, writer
from tests.corpora import corpus_source

Jobs = Callable[..., TrainJob]

WHERE: dict[str, Any] = {"epoch": 2, "epochs": 3, "step": 40, "steps": 60}
SPEED = {"loss": 0.51239, "tokens_per_second": 12345.6, "utilisation": 0.4567, "seconds_left": 200.4}
EPOCH = {"train_loss": 0.5, "learning_rate": 3e-5, "tokens_per_second": 987.6, "validation_loss": 0.25, "accuracy": 0.8}


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            {"what": "progress", **WHERE, **SPEED},
            "epoch 2/3  step 40/60  loss 0.5124  12,346 tokens/s  46% of peak  3 min 20 s left",
        ),
        (
            {"what": "epoch", **WHERE, **EPOCH},
            "epoch 2/3  step 40/60  done  train_loss 0.5000  validation_loss 0.2500  accuracy 0.8000  988 tokens/s",
        ),
        (
            {"what": "resumed", **WHERE, "workers": 2, "skipped": ["checkpoint step-50 is damaged"]},
            "checkpoint step-50 is damaged\nepoch 2/3  step 40/60  resumed from the checkpoint on 2 workers",
        ),
        (
            {"what": "resumed", **WHERE, "workers": 1, "skipped": []},
            "epoch 2/3  step 40/60  resumed from the checkpoint on 1 worker",
        ),
        (
            {"what": "progress", **WHERE, **{name: SPEED[name] for name in SPEED if name != "utilisation"}},
            "epoch 2/3  step 40/60  loss 0.5124  12,346 tokens/s  3 min 20 s left",
        ),
        ({"what": "note", "text": "120 rows to train on"}, "120 rows to train on"),
    ],
    ids=lambda value: value["what"] if isinstance(value, dict) else "",
)
def test_an_event_is_a_line_to_read(event: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line(event) == expected
    show(event)
    assert capsys.readouterr() == ("", f"{expected}\n")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_seconds_are_spelled_as_people_say_them(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize("masked", [True, False], ids=["pretraining", "table"])
def test_speed_share_of_the_peak_and_time_left_are_those_of_the_steps_since(
    pretraining_for: Jobs, job_for: Jobs, corpus: Path, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    """By a clock on which a step takes two seconds, and a device that does a thousand million operations in one."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "matmul_rate", lambda *_: 1e9)
    step = optim.PlainStepper.step

    def slow(stepper: optim.PlainStepper, rate: float) -> torch.Tensor | None:
        clock.now += 2.0
        return step(stepper, rate)

    monkeypatch.setattr(optim.PlainStepper, "step", slow)
    # Of each step: tokens, squares of rows' lengths, tokens asked for, tokens read.
    taken: list[tuple[float, float, float, float]] = []
    take = loop.Loop._step

    def noted(self: loop.Loop) -> None:
        samples = self.train.select(self.done)
        lengths = self.train.lengths_of(samples).astype(float)
        # A masked model reads what is to be guessed, a classifier the first token of each row.
        asked = self.train.weigh(samples) if masked else 0.0
        taken.append((lengths.sum(), (lengths**2).sum(), asked, asked or len(samples)))
        take(self)

    monkeypatch.setattr(loop.Loop, "_step", noted)
    job = pretraining_for(steps=20, evaluate_every=10) if masked else job_for(epochs=2, freeze_layers=1)
    events: list[dict[str, Any]] = []
    result = train(job, tell=lambda event: events.append({**event, "at": clock.now}))

    whole = sum(item[0] for item in taken)
    if masked:
        rows = corpus_source(corpus, job)
        assert rows.tokens == pytest.approx(whole, rel=0.02)  # Whole rows, so about.
        whole = rows.tokens
        assert [item[0] for item in taken] == [rows.lengths_of(rows.select(step)).sum() for step in range(20)]
    dims = dims_of(load_bundle(result.bundle).config)
    flops = [training_flops(dims, *figures[:3], job.freeze_layers, read=figures[3]) for figures in taken]
    tokens = [figures[0] for figures in taken]
    assert sum(event["what"] == "progress" for event in events) >= len(taken) / 2
    before, at = 0, 1000.0
    for event in events:
        if event["what"] == "progress":
            done, seconds = event["step"], event["at"] - at
            assert seconds == 2.0 * (done - before) > 0
            assert event["tokens_per_second"] == pytest.approx(sum(tokens[before:done]) / seconds)
            assert event["utilisation"] == pytest.approx(sum(flops[before:done]) / seconds / 1e9)
            rest = max(0, whole - sum(tokens[:done]))
            assert event["seconds_left"] == pytest.approx(rest / event["tokens_per_second"])
            assert f"{event['tokens_per_second']:,.0f} tokens/s  {event['utilisation']:.0%} of peak" in line(event)
        if "step" in event:
            before, at = event["step"], event["at"]
    assert result.tokens_per_second == pytest.approx(sum(tokens) / (2.0 * len(tokens)))


def test_a_line_cut_short_or_a_screen_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []

    def hear(event: dict[str, Any]) -> None:
        heard.append(event)
        if event["step"] == 1:
            raise BrokenPipeError

    tell = writer(tmp_path)
    with following(tmp_path, hear):
        tell({"step": 1})
        with (tmp_path / "progress.jsonl").open("a") as file:
            file.write('{"step": \n')
        tell({"step": 2})
    assert heard == [{"step": 1}, {"step": 2}]


def test_a_real_run_tells_figures_that_are_some(job_for: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock runs a hundred times as fast, so that it does not have to take seconds to tell something."""
    fast = SimpleNamespace(monotonic=lambda: 100 * time.monotonic(), perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", fast)
    events: list[dict[str, Any]] = []
    train(job_for(epochs=2), tell=events.append)
    told = [event for event in events if event["what"] == "progress"]
    assert told
    for event in told:
        for name in ("loss", "tokens_per_second", "utilisation"):
            assert 0 < event[name] < math.inf
        assert event["utilisation"] < 1
        assert 0 <= event["seconds_left"] < math.inf
        assert (event["seconds_left"] > 0) == (event["step"] < event["steps"])
        assert re.fullmatch(
            r"epoch \d/2  step \d+/\d+  loss \d\.\d{4}  [\d,]+ tokens/s  \d+% of peak  (\d+ \w+ ){1,2}left", line(event)
        )
