"""Pretraining on one GPU, in one process without Ray or DeepSpeed, nothing read from a network:

    python benchmarks/pretrain_gpu.py                      BERT-base and BERT-large, bf16, 40 steps each
    python benchmarks/pretrain_gpu.py --shape base --micro-tokens 65536

Random token ids in rows of a natural length spread, random weights: what is measured is the device. The loop's own
batches, task, loss and stepper; tokens per second, and model FLOPs (bert_ray/model/flops.py) as a share of the device's
measured bf16 matrix-multiply rate. Results, with the device's name: benchmarks/results/pretrain_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import common
import numpy as np

SHAPES = {"base": (12, 768, 12), "large": (24, 1024, 16)}
VOCABULARY, LENGTH, MASKED = 30_528, 512, 0.3
WARM_UP_STEPS = 5


def measure(shape: str, micro_tokens: int, pieces: int, steps: int, precision: str, recompute: bool) -> dict[str, Any]:
    """Tokens per second and share of the peak of one shape."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from bert_ray.model.bundle import Card
    from bert_ray.model.flops import dims_of, training_flops
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.peak import matmul_rate
    from bert_ray.model.tasks.pretraining import Pretraining
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.masking import Vocabulary, budget, keys, mask_rows
    from bert_ray.training.optim import PRECISIONS, PlainStepper, TaskModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    card = Card(task="fill-mask", max_length=LENGTH)
    model = TaskModel(BertForMaskedLM(config), Pretraining(card, config), 0.0, PRECISIONS[precision], recompute)
    job = TrainJob(model="unused", output="unused", data=DataOptions(train="unused"))
    stepper = PlainStepper(model, job, device)
    draw, vocabulary = np.random.default_rng(0), Vocabulary(mask=4, ordinary=np.arange(5, VOCABULARY))

    def batch(number: int) -> tuple[PackedBatch, torch.Tensor, np.ndarray, float]:
        lengths = []
        while sum(lengths) < micro_tokens:
            lengths.append(int(np.clip(draw.lognormal(5.4, 0.6), 16, LENGTH)))
        sizes = np.sort(np.array(lengths))[::-1].copy()
        ids = draw.integers(5, VOCABULARY, int(sizes.sum()))
        masked, targets = mask_rows(ids, sizes, keys(number, np.arange(len(sizes))), MASKED, vocabulary)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        counts = budget(sizes, MASKED)
        packed = PackedBatch(
            input_ids=torch.from_numpy(masked),
            position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(ends[:-1], sizes)),
            token_type_ids=None,
            lengths=tuple(sizes.tolist()),
            cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
            rows=np.arange(len(sizes)),
        )
        parts = np.full(len(sizes), -1)
        asked = torch.from_numpy(np.concatenate([targets, parts, counts]))
        return packed.to(device), asked.to(device), sizes, float(counts.sum())

    batches = [batch(number) for number in range(4)]
    dims = dims_of(config)
    flops = tokens = 0.0
    model.train()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    before = matmul_rate(device, model.autocast or torch.float32)
    start = 0.0
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            wait()
            start, flops, tokens = time.perf_counter(), 0.0, 0.0
        for piece in range(pieces):
            packed, asked, sizes, weight = batches[(step * pieces + piece) % len(batches)]
            loss, _, _ = stepper.forward(packed, asked, 1.0 / (weight * pieces))
            stepper.backward(loss)
            flops += training_flops(dims, sizes.sum(), float((sizes.astype(float) ** 2).sum()), weight)
            tokens += sizes.sum()
        stepper.step(1e-4)
    wait()
    seconds = time.perf_counter() - start
    peak = (before + matmul_rate(device, model.autocast or torch.float32)) / 2
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "tokens_per_second": tokens / seconds,
        "model_tflops": flops / seconds / 1e12,
        "peak_tflops": peak / 1e12,
        "share_of_peak": flops / seconds / peak,
        "memory_gib": memory,
    }


def main() -> None:
    """Measure the shapes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: both")
    parser.add_argument("--micro-tokens", type=int, default=32_768, help="tokens of one forward pass")
    parser.add_argument("--pieces", type=int, default=2, help="forward passes of a step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    options = parser.parse_args()
    path = common.RESULTS / "pretrain_gpu.json"
    figures = json.loads(path.read_text()).get("shapes", {}) if path.exists() else {}
    for shape in options.shape or list(SHAPES):
        figures[shape] = measure(
            shape, options.micro_tokens, options.pieces, options.steps, options.precision, options.recompute
        ) | {"settings": vars(options)}
        print(shape, json.dumps(figures[shape], indent=1), flush=True)
    if any(figure["device"] != "cpu" for figure in figures.values()):
        common.keep("pretrain_gpu", {"shapes": figures})


if __name__ == "__main__":
    main()
