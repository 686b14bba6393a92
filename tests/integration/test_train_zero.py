"""DeepSpeed's stepper: every ZeRO stage, one worker or two, plain torch: the same losses. Nothing is compiled."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'bert-ray[train]'")

import pyarrow.parquet as pq
import torch.multiprocessing as mp

from bert_ray.training.job import CheckpointOptions, DataOptions, TrainJob

STAGES = (0, 1, 2, 3)


def losses(history: list[dict[str, float]]) -> list[float]:
    return [entry[name] for entry in history for name in ("train_loss", "validation_loss")]


def run_loop(job: TrainJob, directory: Path, stop: int | None = None) -> list[dict[str, float]]:
    """The loop in this process's group, as `ray_train._worker` runs it; `stop` cuts it off after that step."""
    import torch

    from bert_ray.model.bundle import load_bundle
    from bert_ray.training.deepspeed import DeepSpeedStepper
    from bert_ray.training.launch import prepare
    from bert_ray.training.loop import Loop
    from bert_ray.training.peers import Peers

    class Stop(Exception):
        pass

    def callback(event: Any) -> None:
        if event.step == stop:
            raise Stop

    base = load_bundle(job.model)
    card, data, _ = prepare(job, base)
    peers, device = Peers(), torch.device("cpu")
    loop = Loop(
        job=job,
        base=base,
        card=card,
        data=data,
        directory=directory,
        peers=peers,
        device=device,
        make_stepper=lambda module: DeepSpeedStepper(module, job, device, peers.world),
        tell=lambda _: None,
        callbacks=[callback],
    )
    try:
        return loop.run().history
    except Stop:
        return []


def worker(rank: int, world: int, port: int, job: TrainJob, root: Path, answers: Any) -> None:
    """All stages after each other in one group: importing and joining takes longer than training."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "TORCH_EXTENSIONS_DIR": str(root / "extensions"),
    }
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found: dict[str, list[dict[str, float]]] = {}
    for stage in STAGES:
        run = replace(job, zero_stage=stage)
        found[f"stage {stage}"] = run_loop(run, root / f"world{world}-stage{stage}")
        # Cut off between two checkpoints, then to the end: here, and from a copy in one plain process.
        cut = root / f"world{world}-cut{stage}"
        run_loop(run, cut, stop=5)
        if world == 2 and rank == 0:
            shutil.copytree(cut, root / f"world{world}-moved{stage}")
        torch.distributed.barrier()
        found[f"cut {stage}"] = run_loop(run, cut)
    for stage in STAGES:
        levers = replace(job, zero_stage=stage, freeze_layers=1, layer_decay=0.5)
        found[f"levers {stage}"] = run_loop(levers, root / f"world{world}-levers{stage}")
    found["accumulated"] = run_loop(replace(job, gradient_accumulation=3), root / f"world{world}-accumulated")
    if rank == 0:
        answers.put((world, found))
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def runs(
    tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory, reviews_table: pa.Table
) -> Iterator[dict[str, Any]]:
    """Histories by number of workers and name, and the directory of all."""
    root = tmp_path_factory.mktemp("zero")
    # 16 rows a step: the last step has one row, and of two workers one has none.
    pq.write_table(reviews_table.slice(0, 81), root / "train.parquet")
    pq.write_table(reviews_table.slice(81), root / "validation.parquet")
    job = TrainJob(
        model=str(tiny_encoder),
        output=str(root / "unused"),
        data=DataOptions(train=str(root / "train.parquet"), validation=str(root / "validation.parquet")),
        epochs=2,
        batch_size=16,
        learning_rate=1e-3,
        dropout=0.0,
        l1=1e-5,
        checkpoint=CheckpointOptions(every_steps=4),
    )
    context = mp.get_context("spawn")
    found: dict[Any, Any] = {"root": root, "job": job}
    for world in (2, 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        answers = context.Queue()
        workers = [
            context.Process(target=worker, args=(rank, world, port, job, root, answers)) for rank in range(world)
        ]
        for process in workers:
            process.start()
        _, found[world] = answers.get(timeout=300)
        for process in workers:
            process.join(60)
            assert process.exitcode == 0
    yield found


@pytest.fixture(scope="module")
def reviews_table() -> pa.Table:
    """Texts of many lengths with labels."""
    words = ["great", "terrible"]
    rows = [(f"the film {'was very ' * (row % 9)}{words[row % 2]} {row}", row % 2) for row in range(121)]
    return pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})


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
def test_frozen_layers_and_layer_wise_rates(runs: dict[Any, Any], world: int) -> None:
    from bert_ray.training.launch import train

    output = str(runs["root"] / f"plain levers {world}")
    job = replace(runs["job"], engine="local", threads=1, output=output, freeze_layers=1, layer_decay=0.5)
    expected = losses(train(job, tell=lambda _: None).history)
    assert expected != losses(runs[world]["stage 0"])
    for stage in STAGES:
        assert losses(runs[world][f"levers {stage}"]) == pytest.approx(expected, abs=1e-5), stage


@pytest.mark.parametrize("world", [1, 2])
def test_accumulation(runs: dict[Any, Any], world: int) -> None:
    assert losses(runs[world]["accumulated"]) == pytest.approx(losses(runs[world]["stage 0"]), abs=1e-5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_cut_off_goes_on_to_the_same_bits(runs: dict[Any, Any], world: int, stage: int) -> None:
    assert losses(runs[world][f"cut {stage}"]) == losses(runs[world][f"stage {stage}"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_of_two_workers_at_any_stage_goes_on_in_one_plain_process(runs: dict[Any, Any], stage: int) -> None:
    import torch

    from bert_ray.model.bundle import load_bundle
    from bert_ray.training.launch import prepare
    from bert_ray.training.loop import Loop
    from bert_ray.training.optim import PlainStepper
    from bert_ray.training.peers import Peers

    job, told = runs["job"], []
    base = load_bundle(job.model)
    card, data, _ = prepare(job, base)
    device = torch.device("cpu")
    loop = Loop(
        job=job,
        base=base,
        card=card,
        data=data,
        directory=runs["root"] / f"world2-moved{stage}",
        peers=Peers(),
        device=device,
        make_stepper=lambda module: PlainStepper(module, job, device),
        tell=told.append,
    )
    assert told[0]["what"] == "resumed"
    assert told[0]["step"] == 4
    assert losses(loop.run().history) == pytest.approx(losses(runs[2]["stage 0"]), abs=1e-5)


def test_nothing_was_compiled(runs: dict[Any, Any]) -> None:
    assert not list(runs["root"].glob("extensions/**/*"))
