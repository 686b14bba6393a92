"""The plan beside what happens: memory and time of a training step on this machine, predicted and measured:

    python benchmarks/plan.py                 both models, four batches each
    python benchmarks/plan.py --rounds 1      a quick look

One worker without DeepSpeed pretrains MiniLM's shape and a BERT of 4 layers, 256 wide, in packed batches. Memory is
what torch's allocator has handed out at the worst moment of a step (its profiler counts every allocation), beside the
growth of the process's peak resident set. Time is processor time, the median of a few steps: what one thread takes on
an idle machine, also where others use it too. It is predicted from the matrix-multiply peak measured right before and
after each step, at a share of it (`mfu`) that is measured on the other model: none of a model's own steps enters its
prediction. Results: benchmarks/results/plan.json and plan.md. ZeRO's stages: benchmarks/zero.py.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common

# Steps before anything is measured: moments and the gradients' storage are made in the first.
_WARM_UP = 1
# How far off a prediction may be.
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.25


@dataclass(frozen=True)
class Case:
    """A model's shape and a batch of it.

    Attributes:
        model: in words.
        layers, hidden, heads, vocabulary: its shape; the feed-forward part is four times as wide.
        rows: of the batch.
        tokens: of each row; of the longest where lengths are spread.
        spread: lengths as those of film reviews: most are short.
        mask_rate: share of tokens that are asked for.
        recompute: activation checkpointing.
    """

    model: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    rows: int
    tokens: int
    spread: bool = False
    mask_rate: float = 0.15
    recompute: bool = False

    @property
    def name(self) -> str:
        """For the tables."""
        lengths = f"up to {self.tokens}" if self.spread else str(self.tokens)
        return f"{self.rows} rows of {lengths} tokens" + (", checkpointed" if self.recompute else "")


def cases() -> list[Case]:
    """What is measured."""
    found = []
    shapes = (("MiniLM's shape", 6, 384, 12, 30_522), ("4 layers, 256 wide", 4, 256, 4, 16_000))
    for model, layers, hidden, heads, vocabulary in shapes:
        shape = (model, layers, hidden, heads, vocabulary)
        found.append(Case(*shape, rows=16, tokens=128))
        found.append(Case(*shape, rows=4, tokens=512))
        found.append(Case(*shape, rows=10, tokens=512, spread=True, mask_rate=0.3))
        found.append(Case(*shape, rows=4, tokens=512, recompute=True))
    return found


class Trainer:
    """One worker that takes the same step again and again."""

    def __init__(self, case: Case, threads: int, zero_stage: int | None = None) -> None:
        """Set up: plain torch, or DeepSpeed at a stage in a process group that is there."""
        common.set_threads(threads)
        import numpy as np
        import torch
        from transformers import BertConfig, BertForPreTraining

        from bert_ray.model.card import Card
        from bert_ray.model.memory import keep_freed_memory
        from bert_ray.model.tasks import get_task
        from bert_ray.training.job import DataOptions, TrainJob
        from bert_ray.training.optim import PlainStepper, TaskModel

        torch.set_num_threads(threads)
        keep_freed_memory()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=case.vocabulary,
            hidden_size=case.hidden,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            intermediate_size=4 * case.hidden,
            attention_probs_dropout_prob=0.0,  # as a training job has it
        )
        model = BertForPreTraining(config).train()
        task = get_task(Card(task="fill-mask"), config, kind="pretraining")
        job = TrainJob(
            model="new",
            output="none",
            data=DataOptions(train="none"),
            task="pretraining",
            engine="local",
            zero_stage=zero_stage or 0,
        )
        module = TaskModel(model, task, 0.0, None, case.recompute)
        # Counted here: at stage 3 no worker has whole weights afterwards.
        self.parameters = sum(weight.numel() for weight in model.parameters())
        device = torch.device("cpu")
        if zero_stage is None:
            self.stepper: Any = PlainStepper(module, job, device)
        else:
            from bert_ray.training.deepspeed import DeepSpeedStepper

            self.stepper = DeepSpeedStepper(module, job, device, torch.distributed.get_world_size())
        random = np.random.default_rng(0)
        lengths = np.full(case.rows, case.tokens)
        if case.spread:
            # IMDB's reviews: a log-normal with a median of about 230 tokens, cut at the longest.
            lengths = np.sort(np.exp(random.normal(5.4, 0.7, case.rows)).clip(8, case.tokens).astype(int))[::-1].copy()
        self.lengths = lengths
        batch, self.targets = _batch(lengths, case, random)
        self.batch = self.stepper.module.task.narrowed(batch, self.targets)
        self.weight = float(self.targets[-case.rows :].sum())
        self.asked = int((self.targets[: int(lengths.sum())] >= 0).sum())
        for _ in range(_WARM_UP):
            self.step()

    def step(self) -> Any:
        """Forward, backward, optimiser; gives the loss."""
        loss, _, _ = self.stepper.forward(self.batch, self.targets, 1.0 / self.weight, 1.0)
        self.stepper.backward(loss)
        self.stepper.step(1e-4)
        return loss.detach()


def _batch(lengths: Any, case: Case, random: Any) -> tuple[Any, Any]:
    """Random tokens, of which a share is asked for, as pretraining's own batches have it."""
    import numpy as np
    import torch

    from bert_ray.model.packing import PackedBatch

    total, ends = int(lengths.sum()), np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(5, case.vocabulary, total)
    asked, budgets = np.full(total, -100), np.maximum(1, np.rint(lengths * case.mask_rate)).astype(int)
    for start, length, budget in zip(ends, lengths, budgets, strict=False):
        places = start + random.choice(length, budget, replace=False)
        asked[places] = ids[places]
    batch = PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        token_type_ids=None,
        lengths=tuple(lengths.tolist()),
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        rows=np.arange(case.rows),
    )
    return batch, torch.from_numpy(np.concatenate([asked, np.full(case.rows, -1), budgets]).astype(np.int64))


def work_of(case: Case, trainer: Trainer, workers: int = 1, **more: Any) -> Any:
    """The same as the plan sees it, every worker taking such a batch."""
    from bert_ray.model.flops import Dims, parameters
    from bert_ray.planning.workload import Workload

    dims = Dims(
        layers=case.layers,
        hidden=case.hidden,
        heads=case.heads,
        feed_forward=4 * case.hidden,
        vocabulary=case.vocabulary,
    )
    count = parameters(dims, vocabulary_head=True, pair_head=True)
    assert count == trainer.parameters
    lengths = trainer.lengths.astype(float)
    return Workload(
        dims=dims,
        parameters=count,
        step_tokens=workers * lengths.sum(),
        steps=1,
        tokens=workers * lengths.sum(),
        row_tokens=lengths.mean(),
        row_squares=(lengths**2).mean(),
        asked_share=trainer.asked / lengths.sum(),
        read_share=len(trainer.batch.read) / lengths.sum(),
        precision="fp32",
        recompute=case.recompute,
        device="cpu",
        **more,
    )


def measure(case: Case, threads: int, rounds: int) -> dict[str, Any]:
    """A case in a process of its own.

    Returns:
        bytes at the worst moment of a step, allocated and resident, beside the prediction; processor seconds of single
        steps, each with the peak beside it; what the plan sees of the case; and memory's bandwidth.
    """
    common.set_threads(threads)
    import torch

    torch.set_num_threads(threads)
    before = _resident()
    trainer = Trainer(case, threads)
    work = work_of(case, trainer)
    trainer.step()
    grown = _status("VmHWM") - before
    runs = []
    for _ in range(rounds):
        earlier = _peak_flops()
        start = time.process_time()
        trainer.step()
        seconds = (time.process_time() - start) / threads
        runs.append((seconds, (earlier + _peak_flops()) / 2))
    from bert_ray.planning.memory import memory

    held = {"predicted": memory(work, 1).peak, "allocated": _allocated(trainer, case), "resident_growth": grown}
    return {"memory": held, "runs": runs, "work": asdict(work), "bandwidth": _bandwidth()}


def _allocated(trainer: Trainer, case: Case) -> float:
    """Bytes that torch's allocator has handed out at the worst moment of a step."""
    import torch

    # What lies there between two steps: weights, moments, and the storage of the word embeddings' gradient.
    resting = 4.0 * (3 * trainer.parameters + case.vocabulary * case.hidden)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.step()
    return resting + most_allocated(profile)


def most_allocated(profile: Any, since: str | None = None) -> float:
    """Bytes handed out at the worst moment of a profile of memory, what was given back taken off.

    Args:
        profile: counted from its beginning.
        since: only moments from the beginning of the profiled function of this name on.
    """
    events = profile.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == since) if since else 0
    now = most = 0.0
    for start, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        most = max(most, now) if start >= begin else 0.0
    return most


def _peak_flops() -> float:
    """As `common.peak_flops`, in processor time of one thread."""
    import torch

    from bert_ray.model.peak import matmul_rate

    return torch.get_num_threads() * matmul_rate(clock=time.process_time)


def _resident() -> float:
    """Resident bytes of this process, torch and transformers imported already."""
    import transformers  # noqa: F401

    import bert_ray.training.optim  # noqa: F401

    return _status("VmRSS")


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) * 1024


def _bandwidth() -> float:
    """Bytes a second that a copy moves, read and written."""
    import torch

    source = torch.ones(16 * 2**20)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = time.process_time()
        target.copy_(source)
        best = min(best, (time.process_time() - start) / torch.get_num_threads())
    return 2 * 4 * source.numel() / best


def main() -> None:
    """Measure, compare, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each case")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    common.set_threads(options.threads)
    from bert_ray.model.flops import Dims, computed_flops
    from bert_ray.planning.network import Fabric
    from bert_ray.planning.speed import Rate, predict
    from bert_ray.planning.workload import Workload

    everything = cases()
    figures: dict[str, Any] = {}
    timed: dict[Case, dict[str, Any]] = {}
    for case in everything:
        timed[case] = common.isolated(measure, case, options.threads, options.rounds)
        figures[f"{case.model}: {case.name}"] = {"memory": timed[case]["memory"]}
        print(f"  {case.model}: {case.name}", flush=True)
    works, mfus = {}, {}
    for case, found in timed.items():
        raw = found["work"]
        works[case] = work = Workload(**(raw | {"dims": Dims(**raw["dims"])}))
        one = work.passes(1)
        flops = computed_flops(work.dims, one.tokens, one.squares, one.asked, recompute=work.recompute, read=one.read)
        # The share without the optimiser, as the plan has it.
        idle = Rate(peak=1.0, mfu=1.0, bandwidth=found["bandwidth"], launches=False)
        optimizer = predict(work, 1, idle, Fabric(node_gpus=1, inside=1.0, between=1.0)).optimizer
        shares = [flops / max(1e-9, seconds - optimizer) / peak for seconds, peak in found["runs"]]
        mfus[case] = common.median(shares)
        found["model_share"] = common.median([work.model_flops(one.tokens) / sec / peak for sec, peak in found["runs"]])
    lines = []
    for case, found in timed.items():
        others = [share for other, share in mfus.items() if other.model != case.model]
        mfu = common.median(others)
        ratios = []
        for seconds, peak in found["runs"]:
            rate = Rate(peak=peak, mfu=mfu, bandwidth=found["bandwidth"], launches=False)
            step = predict(works[case], 1, rate, Fabric(node_gpus=1, inside=1.0, between=1.0))
            ratios.append(step.seconds / seconds)
        held = figures[f"{case.model}: {case.name}"]["memory"]
        time_ratio, memory_ratio = common.median(ratios), held["predicted"] / held["allocated"]
        figures[f"{case.model}: {case.name}"]["time"] = {
            "seconds": common.median([seconds for seconds, _ in found["runs"]]),
            "peak_gflops": common.median([peak for _, peak in found["runs"]]) / 1e9,
            "mfu_of_the_other_model": mfu,
            "own_share_of_peak": found["model_share"],
            "predicted_over_measured": time_ratio,
        }
        figures[f"{case.model}: {case.name}"]["memory"]["predicted_over_allocated"] = memory_ratio
        lines.append(
            (
                case.model,
                case.name,
                f"{held['predicted'] / 1e6:,.0f}",
                f"{held['allocated'] / 1e6:,.0f}",
                f"{memory_ratio:.3f}",
                f"{held['resident_growth'] / 1e6:,.0f}",
                f"{common.median([seconds for seconds, _ in found['runs']]):.2f}",
                f"{time_ratio:.2f}",
            )
        )
    header = (
        "model",
        "batch",
        "MB predicted",
        "MB allocated",
        "ratio",
        "MB resident",
        "s a step",
        "time predicted / measured",
    )
    settings = {"rounds": options.rounds, "threads": options.threads}
    path = common.keep("plan", {**settings, "cases": figures})
    path.with_suffix(".md").write_text(_markdown(header, lines, settings))
    common.table(f"The plan beside what was measured, {options.threads} thread(s)", header, lines)
    ratios = [case["memory"]["predicted_over_allocated"] for case in figures.values()]
    times = [case["time"]["predicted_over_measured"] for case in figures.values()]
    print(f"memory {min(ratios):.3f} to {max(ratios):.3f}; wanted within {MEMORY_WITHIN:.0%}")
    print(f"time   {min(times):.2f} to {max(times):.2f}; wanted within {TIME_WITHIN:.0%}")


def _markdown(header: tuple[str, ...], lines: list[tuple[str, ...]], settings: dict[str, int]) -> str:
    """The table beside machine and date."""
    where = common.machine()
    rows = common.markdown(header, lines)
    return (
        "# The plan beside what was measured\n\n"
        f"One worker, {settings['threads']} thread(s), fp32, on {where['cpu']} with {where['cores']} cores "
        f"({where['vector']}), {where['date']}, torch {where['versions'].get('torch')}; medians of "
        f"{settings['rounds']} steps. The share of the peak that time is predicted with was measured on the other "
        "model; time is processor time. Resident: growth of the process's peak, with what the allocator keeps.\n\n"
        f"{rows}\n"
    )


if __name__ == "__main__":
    main()
