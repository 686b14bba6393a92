"""Memory of each of two workers with DeepSpeed at ZeRO's stages 0 to 3, measured beside the plan's formula:

    python benchmarks/zero.py

Both take the same step of a BERT of 8 layers of 512, in packed batches, over gloo on loopback. Memory is what torch's
allocator has handed out at the worst moment of a step, counted from before the model was made: weights, gradients,
optimiser, activations and DeepSpeed's buffers; the larger of the two workers' figures. Then some steps more on the same
batch, for how far the losses of the stages are apart; on a corpus, and beside one plain process, that is a test,
tests/integration/test_pretrain_elastic.py. Results: benchmarks/results/zero.json and zero.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import common
from plan import Case, Trainer, most_allocated, work_of

WORKERS = 2
STEPS = 10
CASE = Case("8 layers, 512 wide", 8, 512, 8, 30_522, rows=4, tokens=128)


def measure(stage: int) -> dict[str, Any]:
    """Bytes at the worst moment of a step, beside the prediction."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_worker, range(WORKERS), [port] * WORKERS, [stage] * WORKERS, timeout=600))
    most = max(found, key=lambda figures: figures["allocated"])
    return most | {"predicted_over_allocated": most["predicted"] / most["allocated"]}


def _worker(rank: int, port: int, stage: int) -> dict[str, Any]:
    common.set_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from bert_ray.planning.memory import memory

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainer = Trainer(CASE, 1, stage)
        with torch.profiler.record_function("measured"):
            trainer.step()
    most = most_allocated(profile, since="measured")
    torch.manual_seed(0)  # Of dropout, whatever a stage has drawn before.
    losses = [float(trainer.step()) for _ in range(STEPS)]
    work = work_of(CASE, trainer, WORKERS, zero_stage=stage)
    torch.distributed.barrier()
    return {
        "predicted": memory(work, WORKERS).peak,
        "allocated": most,
        "parameters": trainer.parameters,
        "losses": losses,
    }


def main() -> None:
    """Measure, compare, keep."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figures = {stage: measure(stage) for stage in range(4)}
    path = common.keep("zero", {"workers": WORKERS, "stages": figures})
    first = figures[0]["losses"]
    header = ("ZeRO stage", "MB predicted", "MB allocated", "ratio", f"largest difference of {STEPS} losses")
    rows = [
        (
            str(stage),
            *(f"{found[name] / 1e6:,.0f}" for name in ("predicted", "allocated")),
            f"{found['predicted_over_allocated']:.3f}",
            f"{max(abs(one - other) for one, other in zip(found['losses'], first, strict=True)):.0e}",
        )
        for stage, found in figures.items()
    ]
    parameters = next(iter(figures.values()))["parameters"]
    title = f"Memory of each of {WORKERS} workers, {parameters / 1e6:.1f} M parameters, {CASE.name}"
    common.table(title, header, rows)
    common.page(path, title, "fp32", ("torch", "deepspeed"), common.markdown(header, rows))


if __name__ == "__main__":
    main()
