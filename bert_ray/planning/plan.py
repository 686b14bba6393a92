"""What will it need? A training job planned: memory, speed, hours, cost, and where the network becomes the limit.

    print(plan(PlanJob(job="jobs/pretrain.yaml", gpu="h100", gpus=8, price=2.5)).text())

Every figure is a prediction from `model/flops.py` and this package's formulas; `docs/plan.md` says how far off they
were where they could be compared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bert_ray.config import load_job
from bert_ray.errors import JobError
from bert_ray.planning.from_job import workload
from bert_ray.planning.hardware import GPUS, Gpu
from bert_ray.planning.memory import Memory, memory
from bert_ray.planning.network import Fabric
from bert_ray.planning.speed import Rate, Step, limit, predict, speed_up
from bert_ray.planning.workload import Offload, Workload
from bert_ray.training.job import TrainJob
from bert_ray.training.progress import duration

if TYPE_CHECKING:
    from bert_ray.planning.job import PlanJob

# What of a GPU's memory can be planned with: the rest is the CUDA context, and what the allocator cannot hand out.
_USABLE = 0.9
# From this share of a step on, waiting for the network counts as the limit.
NETWORK_LIMIT = 0.2
# Workers of the drawing: powers of two up to the most.
MOST_WORKERS = 1024
COUNTS = [2**power for power in range(MOST_WORKERS.bit_length())]
_GB, _HOUR_SEC = 1e9, 3600.0
# What ZeRO can leave to the machine's memory, by stage.
_OFFLOADS: dict[int, tuple[Offload, ...]] = {
    0: ("none",),
    1: ("none", "optimizer"),
    2: ("none", "optimizer"),
    3: ("none", "optimizer", "parameters"),
}


@dataclass(kw_only=True, frozen=True, slots=True)
class Option:
    """One way to share a model out, and what it needs.

    Attributes:
        zero_stage, offload: as in a training job.
        memory: of one worker.
        fits: whether a GPU has it.
        chosen: whether it is the job's.
    """

    zero_stage: int
    offload: Offload
    memory: Memory
    fits: bool
    chosen: bool


@dataclass(kw_only=True, frozen=True, slots=True)
class Plan:
    """What came out.

    Attributes:
        asked: what was asked for.
        work: the training, as the plan sees it.
        model: the job's words for it.
        gpu: of each worker.
        rate, fabric: what speeds were computed with.
        options: memory by stage and offload.
        step: on the GPUs asked for.
        as_it_is, grown: tokens a second over those of one worker, for each of COUNTS: with the job's step, and with a
            step that grows with the workers.
        limit_as_it_is, limit_grown: fewest workers that wait for the network for more than NETWORK_LIMIT of a step; 0:
            none up to MOST_WORKERS.
        notes: what had to be assumed.
    """

    asked: PlanJob
    work: Workload
    model: str
    gpu: Gpu
    rate: Rate
    fabric: Fabric
    options: list[Option]
    step: Step
    as_it_is: list[float]
    grown: list[float]
    limit_as_it_is: int
    limit_grown: int
    notes: list[str]

    @property
    def hours(self) -> float:
        """Of the whole run, without evaluation, checkpoints and start-up."""
        return self.work.tokens / self.step.tokens_per_second / _HOUR_SEC

    @property
    def cost(self) -> float | None:
        """Of the whole run, at the price of a GPU hour."""
        return None if self.asked.price is None else self.hours * self.step.workers * self.asked.price

    def text(self) -> str:
        """What `bert-ray plan` prints."""
        drawing = [f"drawing     {self.asked.output}"] if self.asked.output else []
        return "\n".join(
            [
                *(f"{name:<11} {value}" for name, value in self.facts()),
                "",
                f"memory of each GPU in GB, predicted (of {self.gpu.name}'s {self.gpu.memory / _GB:.0f} "
                f"{_USABLE:.0%} can be planned with; * the job's own)",
                *aligned(self.memory_table()),
                "",
                *(f"{name:<11} {value}" for name, value in self.figures()),
                *drawing,
                "",
                *(f"assumed: {note}" for note in self.assumptions()),
            ]
        )

    def facts(self) -> list[tuple[str, str]]:
        """What is planned."""
        work, passed = self.work, self.work.passes(self.step.workers)
        flops = work.model_flops(work.tokens)
        return [
            (
                "model",
                f"{self.model}: {work.dims.layers} layers, {work.dims.hidden} wide, {work.parameters:,} parameters",
            ),
            (
                "step",
                f"{work.step_tokens:,.0f} tokens in {work.rows():,.0f} rows of {work.row_tokens:.0f} on average; on "
                f"each of {self.step.workers} GPUs {passed.times} x {passed.tokens:,.0f} tokens in {work.precision}",
            ),
            ("run", f"{work.steps:,} steps, {work.tokens:.3g} tokens, {flops:.3g} model FLOPs"),
        ]

    def memory_table(self) -> list[tuple[str, ...]]:
        """Header and rows: by stage and offload what each GPU holds."""
        parts = ("weights", "gradients", "optimizer", "buffers", "activations")
        rows: list[tuple[str, ...]] = [("zero_stage", "offload", *parts, "peak", "host", "")]
        for option in self.options:
            held = option.memory
            kept = held.activations + held.working + held.copies
            figures = (held.weights, held.gradients, held.optimizer, held.buffers, kept, held.peak, held.host)
            rows.append(
                (
                    f"{option.zero_stage}{'*' if option.chosen else ''}",
                    option.offload,
                    *(f"{figure / _GB:.2f}" for figure in figures),
                    "fits" if option.fits else "too much",
                )
            )
        return rows

    def figures(self) -> list[tuple[str, str]]:
        """Speed, hours, cost, and the network's limit, predicted."""
        step, work = self.step, self.work
        cost = "" if self.cost is None else f", cost {self.cost:,.2f} at {self.asked.price:g} a GPU hour"
        parts = ", ".join(
            f"{name} {seconds * 1e3:,.1f}"
            for name, seconds in (("computing", step.computing), ("optimizer", step.optimizer), ("net", step.network))
        )
        lines = [
            ("speed", f"{step.tokens_per_second:,.0f} tokens/s on {step.workers} x {self.gpu.name}, predicted"),
            ("step", f"{step.seconds * 1e3:,.1f} ms: {parts} ms; the network {step.network_share:.0%}"),
            ("time", f"{duration(self.hours * _HOUR_SEC)}, {self.hours * step.workers:,.2f} GPU hours{cost}"),
            ("network", f"more than {NETWORK_LIMIT:.0%} of a step {_from(self.limit_as_it_is)} with the job's step;"),
            (
                "",
                f"{_from(self.limit_grown)} with a step that grows with the workers "
                f"({work.step_tokens / step.workers:,.0f} tokens on each)",
            ),
        ]
        too_much = [] if self._job_fits() else [("memory", f"the job does not fit: {self._what_fits()}")]
        return [*too_much, *lines]

    def _job_fits(self) -> bool:
        return any(option.fits for option in self.options if option.chosen)

    def _what_fits(self) -> str:
        for option in self.options:
            if option.fits:
                return f"zero_stage={option.zero_stage} offload={option.offload} does"
        return "nothing does; make passes smaller (gradient_accumulation, activation_checkpointing)"

    def assumptions(self) -> list[str]:
        """Inputs that nobody measured here."""
        given = "as measured" if self.asked.peak_tflops else self.gpu.source
        return [
            f"{self.rate.mfu:.0%} of {self.rate.peak / 1e12:g} TFLOP/s in {self.work.precision} ({given}); --mfu",
            f"{self.fabric.node_gpus} GPUs in a machine at {self.fabric.inside / _GB:g} GB/s each way, machines at "
            f"{self.asked.network_gbps:g} Gbit/s, of which collectives reach {self.fabric.line_share:.0%}; "
            f"latencies {self.fabric.inside_sec * 1e6:g} and {self.fabric.between_sec * 1e6:g} µs; --network-gbps",
            "loading, evaluation and checkpoints take no time; all GPUs are equally fast",
            *self.notes,
        ]


def plan(asked: PlanJob) -> Plan:
    """Plan a training.

    Raises:
        JobError: the training job is wrong, or says too little.
        BundleError: its model cannot be used.
    """
    if not os.path.isfile(asked.job):
        raise JobError(f"no job file {asked.job}; give that of a `bert-ray train`, such as jobs/finetune.yaml")
    job = load_job(TrainJob, [asked.job, *asked.train], command="bert-ray train").absolute()
    gpu = GPUS[asked.gpu]
    work, notes = workload(job, asked, gpu)
    workers = asked.gpus or (job.workers if job.engine == "ray" else 1)
    peak = asked.peak_tflops * 1e12 if asked.peak_tflops else gpu.peak(work.precision)
    rate = Rate(peak=peak, mfu=asked.mfu, bandwidth=gpu.bandwidth)
    fabric = Fabric(node_gpus=asked.node_gpus, inside=gpu.link, between=asked.network_gbps * 1e9 / 8)
    busy, what = min((work.rows(), "rows"), (float(work.micro_batches or work.rows()), "micro_batches"))
    if workers > busy:
        notes.append(f"a step has {busy:,.0f} {what}: more workers than that have nothing to do")
    found = Plan(
        asked=asked,
        work=work,
        model=job.model,
        gpu=gpu,
        rate=rate,
        fabric=fabric,
        options=list(_options(work, workers, gpu)),
        step=predict(work, workers, rate, fabric),
        as_it_is=speed_up(work, COUNTS, rate, fabric),
        grown=speed_up(work, COUNTS, rate, fabric, grow_from=workers),
        limit_as_it_is=limit(work, rate, fabric, NETWORK_LIMIT, MOST_WORKERS),
        limit_grown=limit(work, rate, fabric, NETWORK_LIMIT, MOST_WORKERS, grow_from=workers),
        notes=notes,
    )
    if asked.output:
        from bert_ray.planning.drawing import write

        write(found, Path(asked.output))
    return found


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """A table as lines of text, figures at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 1, len(row) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _options(work: Workload, workers: int, gpu: Gpu) -> list[Option]:
    found = []
    for stage, offloads in _OFFLOADS.items():
        for offload in offloads:
            if work.optimizer == "lamb" and stage:
                continue  # LAMB scales by the norm of whole matrices, which shares do not know.
            held = memory(replace(work, zero_stage=stage, offload=offload), workers)
            found.append(
                Option(
                    zero_stage=stage,
                    offload=offload,
                    memory=held,
                    fits=held.peak <= _USABLE * gpu.memory,
                    chosen=(stage, offload) == (work.zero_stage, work.offload),
                )
            )
    return found


def _from(workers: int) -> str:
    return f"from {workers:,} GPUs on" if workers else f"never, up to {MOST_WORKERS:,} GPUs,"
