"""Pretraining on one, two and three workers, and from one number to another: the same samples, the same losses."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs

from bert_ray.training.job import CheckpointOptions, DataOptions, PretrainingOptions, TrainJob
from bert_ray.training.launch import train
from tests.conftest import needs, tiny_tokenizer
from tests.corpora import make_corpus, random_texts
from tests.groups import go_on_alone, group_loop, in_group, losses, run_loop

needs("deepspeed", "train")
pytestmark = pytest.mark.slow

# DeepSpeed's stage, and what of its work lies in the memory of the CPU.
ENGINES = ((0, "none"), (2, "none"), (2, "optimizer"), (3, "parameters"))
# DeepSpeed's stage, and where gradients are clipped; 0: they are not.
SPOILED = ((0, 1.0), (0, 0.0), (1, 1.0), (2, 1.0), (2, 0.0), (3, 1.0))


def two_workers(job: TrainJob, root: Path) -> dict[str, Any]:
    """All that two workers do, in one group: joining takes longer than training."""
    found = {
        f"stage {stage}": run_loop(replace(job, zero_stage=stage), root / f"stage{stage}") for stage in (0, 1, 2, 3)
    }
    found["offload"] = run_loop(replace(job, zero_stage=2, offload="optimizer"), root / "offload")
    found["parameters"] = run_loop(replace(job, zero_stage=3, offload="parameters"), root / "parameters")
    found["lamb"] = run_loop(replace(job, optimizer="lamb"), root / "lamb")
    found["recomputed"] = run_loop(replace(job, zero_stage=3, activation_checkpointing=True), root / "recomputed")
    for stage, offload in ENGINES:
        engine = group_loop(replace(job, zero_stage=stage, offload=offload), root / "engine").stepper.engine
        parameters = engine.zero_offload_param()
        found[f"engine {stage} {offload}"] = (
            engine.zero_optimization_stage(),
            bool(engine.zero_cpu_offload()),
            parameters is not None and str(parameters.device) == "cpu",
        )
    run_loop(job, root / "cut", stop=5)
    found["apart"] = apart(job, root)
    for stage, clip in SPOILED:
        spoiled = root / f"spoiled{stage}-{clip}"
        diverged = spoil_gradient(replace(job, zero_stage=stage, clip=clip), spoiled, 5)
        kept = sorted(path.name for path in (spoiled / "checkpoints").iterdir())
        found[f"spoiled {stage} {clip}"] = diverged, kept
    return found


def apart(job: TrainJob, root: Path) -> str:
    """What is said where the second worker does not see the first one's checkpoints."""
    from bert_ray.errors import LakeError

    rank = torch.distributed.get_rank()
    directory = root / "cut" if rank == 0 else root / "elsewhere"
    try:
        group_loop(job, directory)
    except LakeError as error:
        return str(error)
    return ""


def spoil_gradient(job: TrainJob, directory: Path, step: int) -> int | None:
    """Worker 1's gradient of a step, counted from 0, is NaN while its loss is a number; where the run says it was."""
    loop = group_loop(job, directory)
    backward, rank = loop.stepper.backward, loop.peers.rank

    def spoiled(loss: torch.Tensor) -> None:
        backward(loss * float("nan") if rank == 1 and loop.done == step else loss)

    loop.stepper.backward = spoiled
    return loop.run().diverged


def three_workers(job: TrainJob, root: Path) -> dict[str, Any]:
    # A run that began anew, instead of at step 4, would be cut off there.
    return {"whole": run_loop(job, root / "three"), "resumed": run_loop(job, root / "cut3", stop=4)}


@pytest.fixture(scope="module")
def runs(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each number of workers found, and the job; dropout is on: its noise must be the same too."""
    root = tmp_path_factory.mktemp("elastic")
    texts = random_texts(120)
    corpus = make_corpus(root / "corpus", tiny_tokenizer(), texts[:100], texts[100:])
    job = TrainJob(
        task="pretraining",
        model=str(tiny_encoder),
        output=str(root / "plain"),
        data=DataOptions(train=str(corpus)),
        steps=8,
        batch_tokens=600,
        evaluate_every=4,
        micro_batches=4,
        learning_rate=1e-3,
        max_length=40,
        dropout=0.1,
        attention_dropout=0.1,
        threads=1,
        pretraining=PretrainingOptions(sentences="order", whole_words=True),
        checkpoint=CheckpointOptions(every_steps=2),
    )
    found: dict[str, Any] = {"job": job, "root": root, "two": in_group(2, two_workers, job, root)}
    shutil.copytree(root / "cut", root / "cut3")
    shutil.copytree(root / "cut", Path(f"{job.output}-cut.run"))
    found["three"] = in_group(3, three_workers, job, root)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_has_the_losses_of_one_plain_process(runs: dict[str, Any], stage: int) -> None:
    job = replace(runs["job"], engine="local", output=str(runs["root"] / f"plain{stage}"))
    expected = losses(train(job, tell=lambda _: None).history)
    assert losses(runs["two"][f"stage {stage}"]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("stage", "offload"), ENGINES)
def test_deepspeed_shares_out_and_offloads_what_the_job_says(runs: dict[str, Any], stage: int, offload: str) -> None:
    expected = (stage, offload != "none", offload == "parameters")
    assert runs["two"][f"engine {stage} {offload}"] == expected


def test_workers_that_see_different_checkpoints_do_not_begin(runs: dict[str, Any]) -> None:
    assert "the workers see different checkpoints in" in runs["two"]["apart"]


@pytest.mark.parametrize("how", ["offload", "parameters", "recomputed"])
def test_less_memory_gives_the_same(runs: dict[str, Any], how: str) -> None:
    expected = losses(runs["two"]["stage 0"])
    assert losses(runs["two"][how]) == pytest.approx(expected, abs=1e-4)


def test_lamb_takes_the_steps_of_one_plain_process(runs: dict[str, Any]) -> None:
    job = replace(runs["job"], engine="local", optimizer="lamb", output=str(runs["root"] / "plain-lamb"))
    expected = losses(train(job, tell=lambda _: None).history)
    assert losses(runs["two"]["lamb"]) == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(losses(runs["two"]["stage 0"]), abs=1e-2)


def test_three_workers_reach_what_two_do(runs: dict[str, Any]) -> None:
    expected = runs["two"]["stage 0"]
    assert losses(runs["three"]["whole"]) == pytest.approx(losses(expected), abs=1e-4)
    assert runs["three"]["whole"][-1]["step"] == expected[-1]["step"] == 8


def test_a_run_of_two_goes_on_with_three(runs: dict[str, Any]) -> None:
    expected = losses(runs["two"]["stage 0"])
    assert runs["three"]["resumed"], "the run began anew"
    assert losses(runs["three"]["resumed"]) == pytest.approx(expected, abs=1e-4)


def test_a_run_of_two_goes_on_with_one(runs: dict[str, Any]) -> None:
    job = replace(runs["job"], engine="local", output=f"{runs['job'].output}-cut")
    directory = Path(f"{job.output}.run")
    assert sorted(path.name for path in (directory / "checkpoints").iterdir())[-1] == "step-00000004"

    first, history = go_on_alone(job, directory)
    assert (first["what"], first["step"]) == ("resumed", 4)
    assert losses(history) == pytest.approx(losses(runs["two"]["stage 0"]), abs=1e-4)


@pytest.mark.parametrize(("stage", "clip"), SPOILED)
def test_a_gradient_that_is_no_number_stops_the_run(runs: dict[str, Any], stage: int, clip: float) -> None:
    """The checkpoint before it stays, and none is written of what came of it."""
    assert runs["two"][f"spoiled {stage} {clip}"] == (6, ["step-00000002", "step-00000004"])


def cut_and_go_on(job: TrainJob, root: Path, keys: dict[str, str]) -> tuple[list[str], list[dict[str, float]]]:
    """Two workers whose checkpoints lie on a store are cut off after step 5, and go on with other directories."""
    os.environ |= keys  # The workers' environment is that of the first test that used any.
    run_loop(job, root / "first", stop=5)
    torch.distributed.barrier()
    system, place = fs.FileSystem.from_uri(job.checkpoint.directory)
    kept = sorted(info.base_name for info in system.get_file_info(fs.FileSelector(place)))
    torch.distributed.barrier()
    # A run that began anew, instead of at step 4, would be cut off there.
    return kept, run_loop(job, root / "second", stop=4)


def test_two_workers_whose_checkpoints_lie_on_a_store(runs: dict[str, Any], object_store: str, tmp_path: Path) -> None:
    fs.S3FileSystem(endpoint_override=object_store, scheme="http", allow_bucket_creation=True).create_dir("runs")
    where = f"s3://runs/elastic?endpoint_override={object_store}&scheme=http"
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    job = replace(runs["job"], zero_stage=2, checkpoint=CheckpointOptions(every_steps=2, directory=where))
    kept, resumed = in_group(2, cut_and_go_on, job, tmp_path, keys)
    assert {"step-00000002", "step-00000004"} <= set(kept)
    assert resumed, "the run began anew"
    assert losses(resumed) == pytest.approx(losses(runs["two"]["stage 2"]), abs=0)
