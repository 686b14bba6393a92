"""On a GPU what is computed is what a CPU computes: attention, every task's annotations, training. Skipped without one.

Shapes: T tokens of a packed batch, D hidden size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bert_ray.model import residual
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.attention import packed_attention
from bert_ray.model.ragged_attention import RaggedAttention
from bert_ray.model.residual import residual_norm
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import train
from tests.tiny_tasks import MAKERS, Tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LENGTHS = (300, 180, 64, 63, 17, 17, 2, 1)
HEADS, WIDTH = 4, 128


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """torch.compile gives up on a function after eight kinds of inputs, and computes it uncompiled from then on.

    A process with one model has two kinds; the tests together have more.
    """
    torch._dynamo.reset()
    residual._compiled.cache_clear()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of all numbers together."""
    return float(
        torch.nn.functional.cosine_similarity(one.double().cpu().view(1, -1), other.double().cpu().view(1, -1))
    )


def gradient(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The value, and the gradients of its weighted sum."""
    own = [item.detach().requires_grad_() for item in inputs]
    value = function(*own)
    (value * torch.linspace(-1, 1, value.numel(), device=value.device).view(value.shape)).sum().backward()
    return value.detach(), [item.grad for item in own if item.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention(dtype: torch.dtype) -> None:
    qkv = torch.randn(sum(LENGTHS), 3 * WIDTH, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    right = gradient(lambda x: packed_attention(x, LENGTHS, ends, HEADS), qkv)
    found = gradient(lambda x: packed_attention(x, LENGTHS, ends.cuda(), HEADS), qkv.cuda().to(dtype))
    least = 0.99999 if dtype is torch.float32 else 0.999
    assert cosine(found[0], right[0]) > least
    assert cosine(found[1][0], right[1][0]) > least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_other_rows(causal: bool, dtype: torch.dtype) -> None:
    keys = LENGTHS if causal else tuple(reversed(LENGTHS))
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(sum(lengths), WIDTH, generator=draw) for lengths in (LENGTHS, keys, keys)]
    right = gradient(lambda q, k, v: RaggedAttention(LENGTHS, keys, causal=causal)(q, k, v, HEADS), *parts)
    on_gpu = RaggedAttention(LENGTHS, keys, causal=causal, device="cuda")
    found = gradient(lambda q, k, v: on_gpu(q, k, v, HEADS), *(part.cuda().to(dtype) for part in parts))
    for one, other in zip((found[0], *found[1]), (right[0], *right[1]), strict=True):
        assert cosine(one, other) > (0.99999 if dtype is torch.float32 else 0.999)


@pytest.mark.parametrize("tokens", [200, 41_000])
def test_residual_sum_and_norm(tokens: int) -> None:
    """Of few tokens and of so many (5 Mi numbers and more) as torch makes another kernel for."""
    norm = torch.nn.LayerNorm(WIDTH)
    x, y = (torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    right = gradient(lambda a, b: norm(a + b), x, y)
    norm.cuda()
    found = gradient(lambda a, b: residual_norm(a, b, norm), x.cuda().bfloat16(), y.cuda().bfloat16())
    assert found[0].dtype == torch.bfloat16
    for one, other in zip((found[0], *found[1]), (right[0], *right[1]), strict=True):
        assert cosine(one, other) > 0.999
    # Dropout takes a tenth, and its masks are decided by torch's seed.
    said = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        zeros, ones = torch.zeros(500, WIDTH), torch.ones(500, WIDTH)
        said.append(residual_norm(zeros.cuda().bfloat16(), ones.cuda().bfloat16(), norm, 0.1))
    assert float((said[0] < 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


@pytest.mark.parametrize("task", MAKERS)
def test_every_task_says_what_it_says_on_a_cpu(task: str, tiny: Callable[[str], Tiny]) -> None:
    if task == "mask" and importlib.util.find_spec("presidio_analyzer") is None:
        pytest.skip("presidio-analyzer is not installed")
    ready = tiny(task)
    spec = AnnotatorSpec(model=ready.model, task=ready.task, name="said", options=ready.options)
    right, full, half = (
        replace(spec, device=device, dtype=dtype).build()(ready.table)["said"].to_pylist()
        for device, dtype in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "auto"))
    )
    assert any(one is not None for one in right)
    assert [one is None for one in half] == [one is None for one in right]
    for one, other in zip(full, right, strict=True):
        same(one, other, task)


def same(one: Any, other: Any, where: str) -> None:
    """Equal but for rounding."""
    if isinstance(other, float):
        assert one == pytest.approx(other, abs=1e-3), where
    elif isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key, value in other.items():
            same(one[key], value, f"{where}.{key}")
    elif isinstance(other, list):
        assert len(one) == len(other), where
        for a, b in zip(one, other, strict=True):
            same(a, b, where)
    else:
        assert one == other, where


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training(precision: str, tiny_bundle: Path, uci_sample: pa.Table, tmp_path: Path) -> None:
    pq.write_table(uci_sample, tmp_path / "rows.parquet")

    def job(output: str, **settings: Any) -> TrainJob:
        data = DataOptions(train=str(tmp_path / "rows.parquet"), validation_fraction=0.2)
        common = {"engine": "local", "epochs": 1, "batch_size": 16, "dropout": 0.0, "learning_rate": 1e-4, "threads": 1}
        return TrainJob(model=str(tiny_bundle), output=str(tmp_path / output), data=data, **(common | settings))

    found = train(job("gpu", precision=precision))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        right = train(job("cpu", precision="fp32"))
    loss = "validation_loss"
    assert found.history[-1][loss] == pytest.approx(right.history[-1][loss], abs=1e-4 if precision == "fp32" else 2e-2)
    # Dropout's masks stem from the seed: the same run is the same again.
    twice = [train(job(f"again{turn}", precision=precision, dropout=0.1)).history[-1][loss] for turn in range(2)]
    assert twice[0] == pytest.approx(twice[1], abs=0 if precision == "fp32" else 1e-3)


def test_rows_too_long_for_the_batch_share_a_gpu(tiny_bundle: Path) -> None:
    """More tokens than a packed batch should have, in one row and in many."""
    texts = pa.array(["a good film " * 2000, *["the staff was nice " * 100] * 50, ""])
    one, other = (
        AnnotatorSpec(model=str(tiny_bundle), device=device, dtype="fp32").build().annotate([texts]).to_pylist()
        for device in ("cuda", "cpu")
    )
    assert other[-1] is None
    for a, b in zip(one, other, strict=True):
        same(a, b, "classification")
