"""The loop on Ray Train: a group of workers with a process group, each with a DeepSpeedStepper.

A worker that dies takes the group with it; Ray Train starts a new one, which goes on from the newest checkpoint in
the run's directory, as a run that was started again by hand does.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from bert_ray.errors import BertRayError, BundleError, ColumnError, JobError, LakeError
from bert_ray.lake.files import write_json
from bert_ray.ray_session import session
from bert_ray.training.job import TrainJob
from bert_ray.training.loop import Callback
from bert_ray.training.notice import heeded
from bert_ray.training.position import Position
from bert_ray.training.progress import following, writer

if TYPE_CHECKING:
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.training.data import Data
    from bert_ray.training.peers import Peers

# What another worker in the place of one that met it would meet too.
_FAULTS = {kind.__name__: kind for kind in (BundleError, ColumnError, JobError)}


def run(
    job: TrainJob,
    base: Bundle,
    card: Card,
    data: Data,
    directory: Path,
    callbacks: Sequence[Callback],
    tell: Callable[[dict[str, Any]], None],
) -> Position:
    """Run the loop on `job.workers` Ray Train workers.

    Raises:
        JobError: Ray cannot be reached or has too little, or workers died more often than `max_failures`.
        BundleError, ColumnError, JobError: a worker's, as it was.
        LakeError: what a worker reads or writes does not answer, as often.
    """
    # Of a name of their own each time: a worker that outlives a killed driver says nothing to the next one's.
    name = uuid.uuid4().hex[:8]
    outcome, fault = (directory / f"{kind}-{name}.json" for kind in ("outcome", "fault"))
    # Workers beyond the machine's cores share them, rather than wait for ever.
    with session(job.ray, max(os.cpu_count() or 1, job.workers)):
        resources = ray.cluster_resources()
        least = job.min_workers or job.workers
        gpu = _on_gpus(job, resources)
        trainer = _Trainer(
            _worker,
            # Tokens travel once through the object store, and are not pickled again for each group of workers.
            train_loop_config={
                "job": job,
                "base": base.reference,
                "card": card,
                "data": ray.put(data),
                "directory": directory,
                "outcome": outcome,
                "fault": fault,
                "callbacks": tuple(callbacks),
                "gpu": gpu,
            },
            # Those who wait for one that saves are patient longer than the watchdog, which knows what a worker does.
            torch_config=TorchConfig(
                backend="nccl" if gpu else "gloo", timeout_s=max(1800, int(min(60 * job.timeout_minutes, 1e7)) + 60)
            ),
            scaling_config=ScalingConfig(
                num_workers=job.workers if least == job.workers else (least, job.workers),
                use_gpu=gpu,
                resources_per_worker=_resources(gpu),
            ),
            run_config=RunConfig(
                # A name of its own each time: what there is to resume stands in our checkpoints, not in Ray's.
                name=f"bert-ray-{name}",
                storage_path=str(directory / "ray"),
                failure_config=FailureConfig(max_failures=job.max_failures),
            ),
        )
        with heeded(directory, here=False), following(directory, tell):
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise _fault(fault) or _as_ours(error) from error
    if found := _fault(fault):
        raise found
    try:
        return Position(**json.loads(outcome.read_text("utf-8")))
    except FileNotFoundError:
        raise LakeError(
            f"the workers have ended, but {outcome} does not show here: {directory} must be storage that all machines "
            "share. Run the same command again"
        ) from None
    finally:
        outcome.unlink(missing_ok=True)


class _Trainer(TorchTrainer):
    """Ray's trainer, with Ctrl-C left to the caller.

    Ray's own handler ends the process with status 1 and no word, and stays in place when the training is over. Without
    it a KeyboardInterrupt leaves `fit`, which lets go of the run's controller, and Ray ends it and its workers.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        pass


def _on_gpus(job: TrainJob, resources: dict[str, float]) -> bool:
    """Whether workers have a GPU each, as Ray's resources are; a cluster without any trains on its CPUs.

    Raises:
        JobError: there are too few of them, or of CPUs.
    """
    least = job.min_workers or job.workers
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    if gpus >= least and cpus >= least:
        return True
    if gpus or cpus < least:
        # Some GPUs: on CPUs the run would be many times slower than what was meant.
        hide = "; to train on CPUs, start Ray without GPUs (CUDA_VISIBLE_DEVICES=)" if gpus and cpus >= least else ""
        raise JobError(
            f"{'min_workers' if job.min_workers else 'workers'} is {least}, but Ray has {cpus:g} CPUs and {gpus:g} "
            f"GPUs: give fewer workers, or add nodes{hide}"
        )
    return False


def _resources(gpu: bool) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if gpu else {"CPU": 1}


def _as_ours(error: Exception) -> BertRayError:
    """The error of a worker that is the user's to mend, else one that says where to look."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, BertRayError):
                return cause
            cause = cause.__cause__ or getattr(cause, "_base_exc", None)
    first = next(iter(failures.values()), error)
    return JobError(f"training on Ray failed: {first}\nRun the same command again to go on from the last checkpoint")


def _fault(file: Path) -> BertRayError | None:
    """The fault of the job that a worker has left word of."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    file.unlink(missing_ok=True)
    return _FAULTS[found["kind"]](found["message"])


def _of_the_job(error: BaseException | None) -> bool:
    """Whether an error is the job's fault, and none of a disk, a store or a network behind it, which may pass."""
    known = isinstance(error, tuple(_FAULTS.values()))
    while error is not None:
        if isinstance(error, OSError):
            return False
        error = error.__cause__
    return known


def _worker(config: dict[str, Any]) -> None:
    """One worker's part. Where the group before met a fault of the job, there is none, as all see it or none."""
    import torch

    from bert_ray.training.peers import Peers

    if config["gpu"]:  # Ray shows each worker all of its machine's GPUs, and NCCL asks for one to each.
        torch.cuda.set_device(ray.train.torch.get_device())
    directory, fault, peers = config["directory"], config["fault"], Peers()
    looks = peers.gather(((directory / "run.json").exists(), fault.exists()))
    if any(faulty for _, faulty in looks):
        return
    try:
        if blind := [rank for rank, (sees, _) in enumerate(looks) if not sees]:
            # It may be seen late: of storage that is mounted when it is asked for, say.
            raise LakeError(
                f"worker {blind[0]} does not see {directory}: with several machines, put the output on storage that "
                "all of them see"
            )
        _train(config, peers)
    except BertRayError as error:
        if _of_the_job(error):
            # Written by one or by all, the same.
            with contextlib.suppress(OSError):
                write_json(fault, {"kind": type(error).__name__, "message": str(error)})
        # To be raised all the same: only so are the others, who may wait for this one, let go.
        raise


def _train(config: dict[str, Any], peers: Peers) -> None:
    """The whole of the loop."""
    import torch

    from bert_ray.model.bundle import load_bundle
    from bert_ray.training.deepspeed import DeepSpeedStepper
    from bert_ray.training.loop import Loop
    from bert_ray.training.watchdog import watchdog

    job, directory = config["job"], config["directory"]
    context = ray.train.get_context()
    # Ray sets OMP_NUM_THREADS to the CPUs it gave the worker, one; the machine's cores are shared out instead.
    cores = os.cpu_count() or 1
    torch.set_num_threads(job.threads or max(1, cores // context.get_local_world_size()))
    device = ray.train.torch.get_device() if config["gpu"] else torch.device("cpu")
    base = load_bundle(config["base"])
    with watchdog(60 * job.timeout_minutes) as beat:
        position = Loop(
            job=job,
            base=base,
            card=config["card"],
            data=ray.get(config["data"]),
            directory=directory,
            peers=peers,
            device=device,
            make_stepper=lambda module: DeepSpeedStepper(module, job, device, peers.world),
            tell=writer(directory),
            callbacks=config["callbacks"],
            beat=beat,
        ).run()
    if peers.rank == 0:
        write_json(config["outcome"], asdict(position))
    # Ray's own record of the run: what its dashboard shows.
    ray.train.report({key: value for entry in position.history[-1:] for key, value in entry.items()})
