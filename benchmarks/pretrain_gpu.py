"""Pretraining on one GPU, in one process without Ray or DeepSpeed, nothing read from a network:

    python benchmarks/pretrain_gpu.py                      BERT-base and BERT-large, bf16, 40 steps each
    python benchmarks/pretrain_gpu.py --shape base --micro-tokens 65536
    python benchmarks/pretrain_gpu.py --shape base --alone --profile      where the time goes, kernel by kernel

Random token ids in rows of a natural length spread, random weights: what is measured is the device. The loop's own
batches, task, loss and stepper; tokens per second, and model FLOPs (bert_ray/model/flops.py) as a share of the device's
measured bf16 matrix-multiply rate. Beside it transformers' BertForMaskedLM on the same tokens, as full blocks and as
padded lines. Results, with the device's name: benchmarks/results/pretrain_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import common
import numpy as np
import torch

if TYPE_CHECKING:
    from bert_ray.planning.workload import Workload

SHAPES = {"base": (12, 768, 12), "large": (24, 1024, 16)}
VOCABULARY, LENGTH, MASKED = 30_528, 512, 0.3
WARM_UP_STEPS, RATE = 5, 1e-4


@dataclass(kw_only=True)
class Drawn:
    """The batches of one shape: the same for all contestants."""

    config: Any
    sizes: list[np.ndarray]
    ids: list[np.ndarray]


def drawn(shape: str, micro_tokens: int) -> Drawn:
    """Four batches of random tokens, rows longest first, lengths spread as those of documents are."""
    from transformers import BertConfig

    layers, hidden, heads = SHAPES[shape]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
    )
    draw = np.random.default_rng(0)
    found = Drawn(config=config, sizes=[], ids=[])
    for _ in range(4):
        lengths: list[int] = []
        while sum(lengths) < micro_tokens:
            lengths.append(int(np.clip(draw.lognormal(5.4, 0.6), 16, LENGTH)))
        found.sizes.append(np.sort(np.array(lengths))[::-1].copy())
        found.ids.append(draw.integers(5, VOCABULARY, sum(lengths)))
    return found


class Ours:
    """The loop's own task, loss and stepper, on packed batches."""

    def __init__(self, batches: Drawn, device: torch.device, precision: str, recompute: bool) -> None:
        from transformers import BertForMaskedLM

        from bert_ray.model.card import Card
        from bert_ray.model.packing import PackedBatch
        from bert_ray.model.tasks.pretraining import Pretraining
        from bert_ray.training.job import DataOptions, TrainJob
        from bert_ray.training.masking import Vocabulary, budget, keys, mask_rows
        from bert_ray.training.optim import PRECISIONS, PlainStepper, TaskModel

        task = Pretraining(Card(task="fill-mask", max_length=LENGTH), batches.config)
        model = TaskModel(BertForMaskedLM(batches.config), task, 0.0, PRECISIONS[precision], recompute).train()
        job = TrainJob(model="unused", output="unused", data=DataOptions(train="unused"))
        self.stepper = PlainStepper(model, job, device)
        vocabulary = Vocabulary(mask=4, ordinary=np.arange(5, VOCABULARY))
        self.batches, self.weights = [], []
        for number, (sizes, ids) in enumerate(zip(batches.sizes, batches.ids, strict=True)):
            masked, targets = mask_rows(ids, sizes, keys(number, np.arange(len(sizes))), MASKED, vocabulary)
            ends, counts = np.concatenate([[0], np.cumsum(sizes)]), budget(sizes, MASKED)
            packed = PackedBatch(
                input_ids=torch.from_numpy(masked),
                position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(ends[:-1], sizes)),
                token_type_ids=None,
                lengths=tuple(sizes.tolist()),
                cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
                rows=np.arange(len(sizes)),
            )
            asked = torch.from_numpy(np.concatenate([targets, np.full(len(sizes), -1), counts]))
            self.batches.append((task.narrowed(packed, asked).to(device), asked.to(device)))
            self.weights.append(float(counts.sum()))

    def micro_batch(self, number: int, count: int) -> torch.Tensor:
        """Forward and backward of one batch; gives the sum of its losses."""
        loss, total, _ = self.stepper.forward(*self.batches[number], 1.0 / (self.weights[number] * count))
        self.stepper.backward(loss)
        return total / self.weights[number]

    def step(self) -> None:
        """One optimiser step."""
        self.stepper.step(RATE)


class Transformers:
    """transformers' BertForMaskedLM under autocast, as its run_mlm.py has it: full blocks, or padded lines."""

    def __init__(self, batches: Drawn, device: torch.device, precision: str, lines: bool) -> None:
        from transformers import BertForMaskedLM

        from bert_ray.training.optim import PRECISIONS

        torch.manual_seed(0)
        self.dtype, self.device = PRECISIONS[precision], device
        self.model = BertForMaskedLM._from_config(batches.config, attn_implementation="sdpa").to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
        draw, self.batches = np.random.default_rng(1), []
        for sizes, ids in zip(batches.sizes, batches.ids, strict=True):
            if not lines:
                sizes = np.full(len(ids) // LENGTH, LENGTH)
            block, mask = np.zeros((len(sizes), sizes.max()), np.int64), np.zeros((len(sizes), sizes.max()), np.int64)
            start = 0
            for row, size in enumerate(sizes):
                block[row, :size], mask[row, :size] = ids[start : start + size], 1
                start += size
            labels = np.where((draw.random(block.shape) < MASKED) & (mask == 1), block, -100)
            rows = {"input_ids": np.where(labels >= 0, 4, block), "labels": labels}
            if lines:
                rows["attention_mask"] = mask
            self.batches.append({name: torch.from_numpy(values).to(device) for name, values in rows.items()})

    def micro_batch(self, number: int, count: int) -> torch.Tensor:
        """Forward and backward of one batch; gives its mean loss."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            loss = self.model(**self.batches[number]).loss
        (loss / count).backward()
        return loss.detach()

    def step(self) -> None:
        """One optimiser step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def timed(
    contestant: Ours | Transformers, device: torch.device, micro_batches: int, steps: int
) -> dict[str, float | None]:
    """Seconds of one step, the peak measured right before and after, memory, and the loss at the end."""
    from bert_ray.model.peak import matmul_rate

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begun, start, loss = time.perf_counter(), 0.0, torch.zeros(())
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            wait()
            before, start = matmul_rate(device, dtype), time.perf_counter()
        for number in range(micro_batches):
            loss = contestant.micro_batch((step * micro_batches + number) % 4, micro_batches)
        contestant.step()
    wait()
    seconds = time.perf_counter() - start
    return {
        "seconds_per_step": seconds / steps,
        "set_up_seconds": start - begun,
        "peak_tflops": (before + matmul_rate(device, dtype)) / 2e12,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "loss": float(loss),
    }


def profile(contestant: Ours | Transformers, device: torch.device) -> None:
    """Print where the time of a step of two micro-batches goes, by operation and shapes, and what none accounts for.

    What the wall clock has beyond the sum of the kernels is launching and waiting; shapes tell products that are far
    from the device's rate from those that are near it.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as found:
        start = time.perf_counter()
        for number in range(2):
            contestant.micro_batch(number, 2)
        contestant.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    key = f"self_{device.type}_time_total"
    # An operation that launches kernels carries their time once more: on a GPU the kernels alone are counted.
    kernels = [
        item
        for item in found.key_averages()
        if device.type == "cpu" or (item.device_type != torch.autograd.DeviceType.CPU and not item.is_user_annotation)
    ]
    total = sum(getattr(item, key.replace("cuda", "device")) for item in kernels) / 1e6
    table = found.key_averages(group_by_input_shape=True).table(
        sort_by=key, row_limit=60, max_name_column_width=60, max_shapes_column_width=60
    )
    print(
        f"{table}\nwall {wall * 1e3:.1f} ms, of which {total * 1e3:.1f} ms are in operations on {device.type}",
        flush=True,
    )


def work_of(batches: Drawn, options: argparse.Namespace) -> Workload:
    """A step as `bert-ray plan` sees it."""
    from bert_ray.model.flops import dims_of, parameters
    from bert_ray.planning.workload import Workload
    from bert_ray.training.masking import budget

    dims = dims_of(batches.config)
    lengths = np.concatenate(batches.sizes).astype(float)
    tokens = options.micro_batches * lengths.sum() / len(batches.sizes)
    return Workload(
        dims=dims,
        parameters=parameters(dims, pooler=False, vocabulary_head=True),
        step_tokens=tokens,
        steps=1,
        tokens=tokens,
        row_tokens=lengths.mean(),
        row_squares=(lengths**2).mean(),
        asked_share=budget(lengths.astype(int), MASKED).sum() / lengths.sum(),
        read_share=budget(lengths.astype(int), MASKED).sum() / lengths.sum(),
        accumulation=options.micro_batches,
        precision=options.precision,
        recompute=options.recompute,
        dropout=batches.config.hidden_dropout_prob,
    )


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ours and transformers, on the same tokens, one after the other."""
    from bert_ray.planning.memory import memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = drawn(shape, options.micro_tokens)
    work = work_of(batches, options)
    one_pass = work.passes(1)
    flops = one_pass.times * work.model_flops(one_pass.tokens)
    contestants: dict[str, Callable[[], Ours | Transformers]] = {
        "bert_ray, packed": lambda: Ours(batches, device, options.precision, options.recompute)
    }
    if not options.alone:
        contestants |= {
            "transformers, blocks of 512": lambda: Transformers(batches, device, options.precision, lines=False),
            "transformers, padded lines": lambda: Transformers(batches, device, options.precision, lines=True),
        }
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "settings": vars(options),
    }
    for name, make in contestants.items():
        contestant = make()
        one = timed(contestant, device, options.micro_batches, options.steps)
        if options.profile:
            profile(contestant, device)
        own = work.step_tokens
        if isinstance(contestant, Transformers):
            own = options.micro_batches * float(
                np.mean(
                    [int((batch.get("attention_mask", batch["input_ids"]) != 0).sum()) for batch in contestant.batches]
                )
            )
        seconds, peak = float(one["seconds_per_step"] or 0), float(one["peak_tflops"] or 0)
        found[name] = one | {"tokens_per_second": own / seconds}
        if isinstance(contestant, Ours):
            tflops = flops / seconds / 1e12
            found[name] |= {"model_tflops": tflops, "share_of_peak": tflops / peak}
            found[name]["planned_memory_gib"] = memory(work, 1).peak / 2**30
        print(shape, name, json.dumps(found[name]), flush=True)
        del contestant
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main() -> None:
    """Measure the shapes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: both")
    parser.add_argument("--micro-tokens", type=int, default=32_768, help="tokens of one forward pass")
    parser.add_argument("--micro-batches", type=int, default=2, help="forward passes of a step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take longest; nothing is kept")
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    options = parser.parse_args()
    path = common.RESULTS / "pretrain_gpu.json"
    figures = json.loads(path.read_text()).get("shapes", {}) if path.exists() else {}
    measured = {shape: measure(shape, options) for shape in options.shape or list(SHAPES)}
    figures |= measured
    # What is no GPU's, or lacks the peer, does not take the place of what is whole.
    if not (options.profile or options.alone) and all(figure["device"] != "cpu" for figure in measured.values()):
        common.keep("pretrain_gpu", {"shapes": figures})


if __name__ == "__main__":
    main()
