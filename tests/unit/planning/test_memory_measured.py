"""Predicted memory beside what torch's allocator hands out in a real step: every allocation is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining

from bert_ray.model.card import Card
from bert_ray.model.flops import dims_of, parameters
from bert_ray.model.packing import PackedBatch
from bert_ray.model.tasks import get_task
from bert_ray.planning.memory import memory
from bert_ray.planning.workload import Workload
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.optim import PRECISIONS, PlainStepper, TaskModel


def batch_of(rows: int, length: int, vocabulary: int, share: float) -> tuple[PackedBatch, torch.Tensor]:
    """Rows of one length, of whose tokens this share, one of so many, is asked for."""
    ids = torch.randint(5, vocabulary, (rows * length,), generator=torch.Generator().manual_seed(0))
    places = torch.arange(rows * length)
    asked = torch.where(places % int(1 / share) == 1, ids, -100)
    batch = PackedBatch(
        input_ids=ids,
        position_ids=places % length,
        token_type_ids=None,
        lengths=(length,) * rows,
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * length,
        rows=np.arange(rows),
    )
    return batch, torch.cat((asked, torch.full((rows,), -1), torch.full((rows,), length * share).long()))


def worst_moment(stepper: PlainStepper, batch: PackedBatch, targets: torch.Tensor, resting: float) -> float:
    """Bytes allocated at the worst moment of the second step."""

    def step() -> None:
        loss, _, _ = stepper.forward(batch, targets, 1e-3, 1.0)
        stepper.backward(loss)
        stepper.step(1e-4)

    step()  # Makes what stays: moments, and the storage of the word embeddings' gradient.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    sizes = [
        size for _, size in sorted((item.start_ns(), item.nbytes()) for item in events if item.name() == "[memory]")
    ]
    assert len(sizes) > 100, "the profiler saw nothing"
    return resting + float(np.cumsum(sizes).max())


@pytest.mark.parametrize("narrowed", [True, False])
@pytest.mark.parametrize(
    ("rows", "length", "precision", "recompute", "attention_dropout"),
    [
        (32, 64, "fp32", False, 0.0),
        (8, 256, "fp32", False, 0.1),
        (8, 256, "fp32", True, 0.0),
        (64, 32, "fp32", True, 0.1),
        (8, 64, "bf16", False, 0.0),
        (8, 256, "bf16", True, 0.1),
        (2, 16, "fp32", False, 0.0),  # Weights and gradients outweigh activations.
    ],
)
def test_memory_is_what_torch_allocates(
    rows: int, length: int, precision: str, recompute: bool, attention_dropout: float, narrowed: bool
) -> None:
    check(rows, length, precision, recompute, attention_dropout, narrowed)


@pytest.mark.parametrize(("layers", "masked"), [(1, 0.125), (1, 0.5), (2, 0.5)])
def test_memory_of_few_layers_of_which_much_is_read(layers: int, masked: float) -> None:
    check(16, 128, "fp32", False, 0.0, True, layers, masked)


def check(
    rows: int,
    length: int,
    precision: str,
    recompute: bool,
    attention_dropout: float,
    narrowed: bool,
    layers: int = 3,
    masked: float = 0.125,
) -> None:
    """A step of a model, predicted and measured."""
    config = BertConfig(
        vocab_size=1000,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=512,
        attention_probs_dropout_prob=attention_dropout,
    )
    model = BertForPreTraining(config).train()
    task = get_task(Card(task="fill-mask"), config, kind="pretraining")
    job = TrainJob(model="new", output="none", data=DataOptions(train="none"), task="pretraining", engine="local")
    module = TaskModel(model, task, 0.0, PRECISIONS[precision], recompute)
    dims = dims_of(config)
    numbers = parameters(dims, vocabulary_head=True)
    resting = 4.0 * (3 * numbers + dims.vocabulary * dims.hidden)
    batch, targets = batch_of(rows, length, dims.vocabulary, masked)
    if narrowed:
        batch = task.narrowed(batch, targets)
    measured = worst_moment(PlainStepper(module, job, torch.device("cpu")), batch, targets, resting)
    work = Workload(
        dims=dims,
        parameters=numbers,
        step_tokens=rows * length,
        steps=1,
        tokens=rows * length,
        row_tokens=length,
        row_squares=length**2,
        asked_share=masked,
        read_share=masked if narrowed else 1.0,
        precision=precision,  # type: ignore[arg-type]
        recompute=recompute,
        attention_dropout=attention_dropout,
        device="cpu",
    )
    assert memory(work, 1).peak == pytest.approx(measured, rel=0.05)
