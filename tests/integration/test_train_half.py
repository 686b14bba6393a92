"""DeepSpeed's stepper in half precision: every ZeRO stage learns as one plain process does; fp16's scale falls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bert_ray.training.checkpoints import STATE_FILE
from bert_ray.training.job import TrainJob
from tests.conftest import needs
from tests.groups import in_group, losses, reviews_job, run_loop

needs("deepspeed", "train")

STAGES = (0, 1, 2, 3)
# Far above what fp16 can hold of a gradient.
TOO_LARGE = 2.0**28
# A run that begins at one stage and goes on at another.
MOVES = ((2, 0), (0, 3))


def worker(job: TrainJob, root: Path, world: int) -> dict[str, list[dict[str, float]]]:
    """All stages in one group, in both precisions; and with a scale at which the first steps overflow."""
    from bert_ray.training import deepspeed

    found: dict[str, list[dict[str, float]]] = {}
    for stage in STAGES:
        for precision in ("bf16", "fp16"):
            run = replace(job, zero_stage=stage, precision=precision)
            found[f"{precision} {stage}"] = run_loop(run, root / f"{precision}-{stage}")
    usual, deepspeed._FIRST_SCALE = deepspeed._FIRST_SCALE, TOO_LARGE
    try:
        for stage in STAGES:
            run = replace(job, zero_stage=stage, precision="fp16")
            found[f"overflow {stage}"] = run_loop(run, root / f"overflow-{stage}")
            run_loop(run, root / f"cut-{stage}", stop=17)
            deepspeed._FIRST_SCALE = usual  # What a resumed run scales by stands in its checkpoint.
            found[f"cut {stage}"] = run_loop(run, root / f"cut-{stage}")
            deepspeed._FIRST_SCALE = TOO_LARGE
        for before, after in MOVES:
            place = root / f"moved-{before}-{after}"
            run_loop(replace(job, zero_stage=before, precision="fp16"), place, stop=17)
            found[f"moved {before} {after}"] = run_loop(replace(job, zero_stage=after, precision="fp16"), place)
        # A scale that grows with every step or every second one, and stays far below what overflows.
        deepspeed._FIRST_SCALE, window, deepspeed._GOOD_STEPS = 8.0, deepspeed._GOOD_STEPS, 1
        for stage in STAGES:
            run_loop(replace(job, zero_stage=stage, precision="fp16"), root / f"grown-{stage}", stop=5)
        deepspeed._GOOD_STEPS = window
    finally:
        deepspeed._FIRST_SCALE = usual
    return found


@pytest.fixture(scope="module")
def runs(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Histories by name, and the directory of all."""
    root = tmp_path_factory.mktemp("half")
    job = reviews_job(tiny_encoder, root, epochs=4)
    return {"root": root, "job": job} | in_group(2, worker, job, root, 2)


def scaling(directory: Path) -> dict[str, float]:
    """fp16's scaling in the last checkpoint of a run."""
    from bert_ray.training.checkpoints import Checkpoints

    found = Checkpoints(directory / "checkpoints", 2).latest()
    assert found is not None
    return dict(found.position["scaling"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_stage_learns_as_one_process_does(runs: dict[str, Any], precision: str) -> None:
    from bert_ray.training.launch import train

    plain = replace(runs["job"], engine="local", threads=1, precision=precision, output=str(runs["root"] / precision))
    expected = losses(train(plain, tell=lambda _: None).history)
    assert expected[-2] < 0.7 * expected[0]  # It does learn.
    for stage in STAGES:
        found = losses(runs[f"{precision} {stage}"])
        assert found == pytest.approx(expected, abs=0.05), stage
        assert found[0] == pytest.approx(expected[0], abs=5e-3), stage


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_lowers_the_scale_and_training_goes_on(runs: dict[str, Any], stage: int) -> None:
    found = losses(runs[f"overflow {stage}"])
    assert np.isfinite(found).all()
    scale = scaling(runs["root"] / f"overflow-{stage}")["scale"]
    assert scale < TOO_LARGE, "nothing overflowed"
    assert found != losses(runs[f"fp16 {stage}"]), "no step was left out"
    assert found[-2] < 0.95 * found[0]
    assert found == pytest.approx(losses(runs["overflow 0"]), abs=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_scale_that_grows_divides_what_comes_after(runs: dict[str, Any], stage: int) -> None:
    """Adam's first moments, in which a gradient that was divided by too much would show, after four steps."""

    def moments(place: str) -> dict[str, torch.Tensor]:
        state = load_file(runs["root"] / place / "checkpoints" / "step-00000004" / STATE_FILE)
        return {name: value for name, value in state.items() if name.startswith("exp_avg/")}

    assert scaling(runs["root"] / f"grown-{stage}")["scale"] > 8.0, "it did not grow"
    found, expected = moments(f"grown-{stage}"), moments("grown-0")
    assert found.keys() == expected.keys() and len(found) > 10
    sizes = [float(sum((value**2).sum() for value in state.values()) ** 0.5) for state in (found, expected)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_overflowed_and_was_cut_off_goes_on_to_the_same_bits(runs: dict[str, Any], stage: int) -> None:
    assert losses(runs[f"cut {stage}"]) == losses(runs[f"overflow {stage}"])
    root = runs["root"]
    assert scaling(root / f"cut-{stage}") == scaling(root / f"overflow-{stage}")


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_the_scale_goes_on_at_another_stage(runs: dict[str, Any], before: int, after: int) -> None:
    """Its own first scale would overflow some ten times over."""
    assert losses(runs[f"moved {before} {after}"]) == pytest.approx(losses(runs["overflow 0"]), abs=1e-3)
    root = runs["root"]
    assert scaling(root / f"moved-{before}-{after}") == scaling(root / "overflow-0")
