"""Layer-wise learning rates and frozen layers, in the plain optimiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert_ray.errors import JobError
from bert_ray.model.bundle import load_bundle
from bert_ray.training.job import TrainJob
from bert_ray.training.launch import train
from bert_ray.training.optim import clip, make_optimizer, set_rate

Jobs = Callable[..., TrainJob]


def test_lower_layers_learn_more_slowly(tiny_encoder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_encoder)
    optimizer = make_optimizer(model, 0.01, layer_decay=0.5)
    set_rate(optimizer, 1.0)
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    named = {name: rates[id(weight)] for name, weight in model.named_parameters()}
    assert len(named) == len(rates)
    assert {rate for name, rate in named.items() if name.startswith(("classifier", "bert.pooler"))} == {1.0}
    assert {rate for name, rate in named.items() if ".layer.1." in name} == {0.5}
    assert {rate for name, rate in named.items() if ".layer.0." in name} == {0.25}
    assert {rate for name, rate in named.items() if "embeddings" in name} == {0.125}
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert all((decay[id(weight)] > 0) == (weight.dim() > 1) for weight in model.parameters())


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_gradients_are_clipped_as_torch_does(largest: float) -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5))] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn(one.shape, generator=draw)
        other.grad = one.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, largest)
    clip(ours, largest)
    assert (norm > largest) == (largest == 0.5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_dropout_of_the_job_reaches_the_model(job_for: Jobs) -> None:
    job = job_for(dropout=0.3, attention_dropout=0.2, epochs=1)
    config = load_bundle(train(job, tell=lambda _: None).bundle).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.2)
    base = load_bundle(job.model).config
    assert (base.hidden_dropout_prob, base.attention_probs_dropout_prob) != (0.3, 0.2)


def test_frozen_layers_keep_the_bases_weights(job_for: Jobs) -> None:
    job = job_for(freeze_layers=1, l1=1e-6)
    result = train(job, tell=lambda _: None)
    base, trained = (dict(load_bundle(path).model().state_dict()) for path in (job.model, result.bundle))
    for name, value in base.items():
        low = name.startswith(("embeddings", "encoder.layer.0."))
        if "pooler" not in name:
            assert torch.equal(value, trained[f"bert.{name}"]) == low, name


def test_more_layers_than_there_are_cannot_be_frozen(job_for: Jobs) -> None:
    with pytest.raises(JobError, match=r"freeze_layers is 3, but .* has 2 layers"):
        train(job_for(freeze_layers=3), tell=lambda _: None)


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_layer_decay_is_checked(job_for: Jobs, decay: float) -> None:
    with pytest.raises(JobError, match="layer_decay"):
        job_for(layer_decay=decay)
