"""Workers of a process group without Ray: the loop with DeepSpeed's stepper, as `ray_train` runs it on each worker."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from bert_ray.training.job import CheckpointOptions, DataOptions, TrainJob
from tests.processes import begin, context

if TYPE_CHECKING:
    from bert_ray.training.loop import Loop


def in_group(world: int, work: Callable[..., Any], *arguments: Any, timeout_sec: float = 300) -> Any:
    """`work(*arguments)` on every one of `world` processes; what rank 0 returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = context.Queue()
    processes = [begin(_member, rank, world, port, answers, work, arguments) for rank in range(world)]
    try:
        good, answer = answers.get(timeout=timeout_sec)
        assert good, answer
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return answer


def _member(
    rank: int, world: int, port: int, answers: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    try:
        answer = work(*arguments)
    except Exception:
        answers.put((False, traceback.format_exc()))
        raise
    if rank == 0:
        answers.put((True, answer))
    torch.distributed.barrier()


def reviews_job(encoder: Path, root: Path, **settings: Any) -> TrainJob:
    """A classifier of 81 texts of many lengths, 40 more to judge by, whose tables it writes to `root`."""
    words = ["great", "terrible"]
    rows = [(f"the film {'was very ' * (row % 9)}{words[row % 2]} {row}", row % 2) for row in range(121)]
    table = pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    # 16 rows a step: the last step has one row, and of two workers one has none.
    pq.write_table(table.slice(0, 81), root / "train.parquet")
    pq.write_table(table.slice(81), root / "validation.parquet")
    return TrainJob(
        model=str(encoder),
        output=str(root / "unused"),
        data=DataOptions(train=str(root / "train.parquet"), validation=str(root / "validation.parquet")),
        batch_size=16,
        learning_rate=1e-3,
        dropout=0.0,
        checkpoint=CheckpointOptions(every_steps=4),
        **settings,
    )


def group_loop(job: TrainJob, directory: Path, callback: Callable[[Any], None] | None = None) -> Loop:
    """The loop in this process's group, as `ray_train._worker` makes it."""
    import torch

    from bert_ray.model.bundle import load_bundle
    from bert_ray.training.deepspeed import DeepSpeedStepper
    from bert_ray.training.launch import prepare
    from bert_ray.training.loop import Loop
    from bert_ray.training.peers import Peers

    base = load_bundle(job.model)
    card, data, _ = prepare(job, base)
    peers, device = Peers(), torch.device("cpu")
    directory.mkdir(parents=True, exist_ok=True)
    return Loop(
        job=job,
        base=base,
        card=card,
        data=data,
        directory=directory,
        peers=peers,
        device=device,
        make_stepper=lambda module: DeepSpeedStepper(module, job, device, peers.world),
        tell=lambda _: None,
        callbacks=[callback] if callback else [],
    )


def run_loop(job: TrainJob, directory: Path, stop: int | None = None) -> list[dict[str, float]]:
    """Run that loop; `stop` cuts it off after that step.

    Returns:
        its history; [] where it was cut off.
    """

    class Stop(Exception):
        pass

    def callback(event: Any) -> None:
        if event.step == stop:
            raise Stop

    try:
        return group_loop(job, directory, callback).run().history
    except Stop:
        return []


def go_on_alone(job: TrainJob, directory: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The loop in this process alone, with torch's own stepper, on a run that others began in `directory`.

    Returns:
        the first event that it told, and its history.
    """
    import torch

    from bert_ray.model.bundle import load_bundle
    from bert_ray.training.launch import prepare
    from bert_ray.training.loop import Loop
    from bert_ray.training.optim import PlainStepper
    from bert_ray.training.peers import Peers

    base, device = load_bundle(job.model), torch.device("cpu")
    card, data, _ = prepare(job, base)
    told: list[dict[str, Any]] = []
    loop = Loop(
        job=job,
        base=base,
        card=card,
        data=data,
        directory=directory,
        peers=Peers(),
        device=device,
        make_stepper=lambda module: PlainStepper(module, job, device),
        tell=told.append,
    )
    return told[0], loop.run().history


def losses(history: list[dict[str, float]]) -> list[float]:
    """Training and validation loss of each epoch, in order."""
    return [entry[name] for entry in history for name in ("train_loss", "validation_loss")]
