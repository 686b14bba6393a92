"""The losses of the head over the vocabulary, and their gradients, are torch's cross_entropy's."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from bert_ray.model import vocabulary_head
from bert_ray.model.vocabulary_head import vocabulary_logits, vocabulary_losses

VOCABULARY, WIDTH, ASKED = 97, 16, 23


def make(kind: str = "bert") -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": VOCABULARY}
    if kind == "distilbert":
        config = DistilBertConfig(n_layers=1, n_heads=2, dim=WIDTH, hidden_dim=32, vocab_size=VOCABULARY)
        model = DistilBertForMaskedLM(config)
    elif kind == "roberta":
        model = RobertaForMaskedLM(RobertaConfig(hidden_size=WIDTH, **sizes))
    else:
        model = BertForMaskedLM(BertConfig(hidden_size=WIDTH, **sizes))
    with torch.no_grad():  # Biases that do something.
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def asked() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(ASKED, WIDTH), torch.randint(VOCABULARY, (ASKED,))


def gradients(model: torch.nn.Module, hidden: torch.Tensor, losses: torch.Tensor) -> list[torch.Tensor]:
    """Of a sum in which each row counts differently: by the hidden states, and by the weights."""
    model.zero_grad()
    (losses * torch.linspace(0.5, 2.0, len(losses))).sum().backward()
    return [hidden.grad] + [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows at a time: several blocks, and a shorter one at the end."""
    monkeypatch.setattr(vocabulary_head, "_BLOCK", 5 * VOCABULARY)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_cross_entropy(kind: str, smoothing: float) -> None:
    model, (hidden, tokens) = make(kind), asked()
    found, expected = [], []
    for keep, with_head in ((found, True), (expected, False)):
        states = hidden.clone().requires_grad_()
        if with_head:
            losses, right = vocabulary_losses(model, states, tokens, smoothing)
        else:
            logits = vocabulary_logits(model, states)
            losses = F.cross_entropy(logits, tokens, reduction="none", label_smoothing=smoothing)
            right = logits.argmax(1) == tokens
        keep += [losses.detach(), right, *gradients(model, states, losses)]
    assert len(found) == len(expected) > 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_head_is_the_one_that_transformers_applies() -> None:
    for kind in ("bert", "roberta", "distilbert"):
        model = make(kind).eval()
        ids = torch.randint(5, VOCABULARY, (2, 7))
        output = model(input_ids=ids, output_hidden_states=True)
        hidden = output.hidden_states[-1].reshape(-1, WIDTH)
        torch.testing.assert_close(vocabulary_logits(model, hidden), output.logits.reshape(-1, VOCABULARY))


def test_a_second_pass_adds_to_the_gradient_of_the_first() -> None:
    model, (hidden, tokens) = make(), asked()
    for pair in ((hidden[:10], tokens[:10]), (hidden[10:], tokens[10:])):
        vocabulary_losses(model, *pair)[0].sum().backward()
    twice = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    vocabulary_losses(model, hidden, tokens)[0].sum().backward()
    assert "bert.embeddings.word_embeddings.weight" in twice  # The head's matrix.
    for name, gradient in twice.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


def test_nothing_is_asked() -> None:
    model = make()
    states = torch.zeros(0, WIDTH, requires_grad=True)
    losses, _ = vocabulary_losses(model, states, torch.zeros(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert not model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_losses_are_summed_in_fp32(dtype: torch.dtype) -> None:
    model, (hidden, tokens) = make(), asked()
    exact = hidden.clone().requires_grad_()
    losses, _ = vocabulary_losses(model, exact, tokens)
    wanted = gradients(model, exact, losses)
    states = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        rough, _ = vocabulary_losses(model, states, tokens)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, losses.detach(), rtol=0, atol=0.1)
    for one, other in zip(gradients(model, states, rough), wanted, strict=True):
        assert one.dtype == torch.float32
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999


def test_a_second_backward_pass_over_the_same_losses_is_refused() -> None:
    """The logits have become their gradient by then: torch says so, nobody computes with what is no longer there."""
    model, (hidden, tokens) = make(), asked()
    total = vocabulary_losses(model, hidden, tokens)[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
