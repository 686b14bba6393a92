"""DeepSpeed's stepper: every ZeRO stage, one worker or two, plain torch: the same losses. Nothing is compiled."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bert_ray.training.job import TrainJob
from tests.conftest import needs
from tests.groups import go_on_alone, in_group, losses, reviews_job, run_loop

needs("deepspeed", "train")

STAGES = (0, 1, 2, 3)


def worker(job: TrainJob, root: Path, world: int) -> dict[str, list[dict[str, float]]]:
    """All stages after each other in one group: importing and joining takes longer than training."""
    import torch

    os.environ["TORCH_EXTENSIONS_DIR"] = str(root / "extensions")
    found: dict[str, list[dict[str, float]]] = {}
    for stage in STAGES:
        run = replace(job, zero_stage=stage)
        found[f"stage {stage}"] = run_loop(run, root / f"world{world}-stage{stage}")
        # Cut off between two checkpoints, then to the end: here, and from a copy in one plain process.
        cut = root / f"world{world}-cut{stage}"
        run_loop(run, cut, stop=5)
        if world == 2 and torch.distributed.get_rank() == 0:
            shutil.copytree(cut, root / f"world{world}-moved{stage}")
        torch.distributed.barrier()
        # A run that began anew, instead of at step 4, would be cut off there.
        found[f"cut {stage}"] = run_loop(run, cut, stop=4)
    for stage in STAGES:
        levers = replace(job, zero_stage=stage, freeze_layers=1, layer_decay=0.5, clip=0.0)
        found[f"levers {stage}"] = run_loop(levers, root / f"world{world}-levers{stage}")
    for stage in STAGES[:3]:
        found[f"mean {stage}"] = run_loop(
            replace(job, zero_stage=stage, keep_base=0.25), root / f"world{world}-mean{stage}"
        )
    found["accumulated"] = run_loop(replace(job, gradient_accumulation=3), root / f"world{world}-accumulated")
    return found


@pytest.fixture(scope="module")
def runs(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Histories by number of workers and name, and the directory of all."""
    root = tmp_path_factory.mktemp("zero")
    job = reviews_job(tiny_encoder, root, epochs=2, l1=1e-5)
    found: dict[Any, Any] = {"root": root, "job": job}
    return found | {world: in_group(world, worker, job, root, world) for world in (2, 1)}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_the_losses_of_stage_0(runs: dict[Any, Any], stage: int) -> None:
    assert losses(runs[2][f"stage {stage}"]) == pytest.approx(losses(runs[2]["stage 0"]), abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_one_worker_or_two(runs: dict[Any, Any], stage: int) -> None:
    assert losses(runs[1][f"stage {stage}"]) == pytest.approx(losses(runs[2][f"stage {stage}"]), abs=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_plain_torch_has_them_too(runs: dict[Any, Any], world: int) -> None:
    from bert_ray.training.launch import train

    job = replace(runs["job"], engine="local", threads=1, output=str(runs["root"] / f"plain{world}"))
    assert losses(train(job, tell=lambda _: None).history) == pytest.approx(losses(runs[world]["stage 0"]), abs=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_frozen_layers_and_layer_wise_rates_unclipped(runs: dict[Any, Any], world: int) -> None:
    from bert_ray.training.launch import train

    output = str(runs["root"] / f"plain levers {world}")
    levers = {"freeze_layers": 1, "layer_decay": 0.5, "clip": 0.0}
    job = replace(runs["job"], engine="local", threads=1, output=output, **levers)
    expected = losses(train(job, tell=lambda _: None).history)
    assert expected != losses(runs[world]["stage 0"])
    for stage in STAGES:
        assert losses(runs[world][f"levers {stage}"]) == pytest.approx(expected, abs=1e-5), stage


@pytest.mark.parametrize("world", [1, 2])
def test_the_mean_with_the_base_is_judged(runs: dict[Any, Any], world: int) -> None:
    from bert_ray.training.launch import train

    output = str(runs["root"] / f"plain mean {world}")
    job = replace(runs["job"], engine="local", threads=1, output=output, keep_base=0.25)
    expected = train(job, tell=lambda _: None).history
    trained = runs[world]["stage 0"]
    for stage in STAGES[:3]:
        found = runs[world][f"mean {stage}"]
        assert losses(found) == pytest.approx(losses(expected), abs=1e-5), stage
        # Training goes on with the trained weights, bucket by bucket as they were.
        assert [entry["train_loss"] for entry in found] == pytest.approx([e["train_loss"] for e in trained], abs=1e-5)
    assert losses(expected) != losses(trained)


@pytest.mark.parametrize("world", [1, 2])
def test_accumulation(runs: dict[Any, Any], world: int) -> None:
    assert losses(runs[world]["accumulated"]) == pytest.approx(losses(runs[world]["stage 0"]), abs=1e-5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_cut_off_goes_on_to_the_same_bits(runs: dict[Any, Any], world: int, stage: int) -> None:
    assert runs[world][f"cut {stage}"], "the run began anew"
    assert losses(runs[world][f"cut {stage}"]) == losses(runs[world][f"stage {stage}"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_of_two_workers_at_any_stage_goes_on_in_one_plain_process(runs: dict[Any, Any], stage: int) -> None:
    first, history = go_on_alone(runs["job"], runs["root"] / f"world2-moved{stage}")
    assert (first["what"], first["step"]) == ("resumed", 4)
    assert losses(history) == pytest.approx(losses(runs[2]["stage 0"]), abs=1e-5)


def test_nothing_was_compiled(runs: dict[Any, Any]) -> None:
    assert not list(runs["root"].glob("extensions/**/*"))
