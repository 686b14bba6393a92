"""The head over the vocabulary: logits, and the cross-entropy of asked tokens without copies of the logits.

    loss = (1 - ε) (lse - z_t) + ε (lse - mean(z)),    lse = log Σ exp(z)
    dz = g (softmax(z) - (1 - ε) onehot(t) - ε / V)

(label smoothing ε as in Szegedy et al., arXiv 1512.00567, section 7, and as torch's cross_entropy has it). The logits
of a thousand tokens are the largest tensor of a training step, and torch's own operations hold three of their kind at
once. Here one storage, in the precision of the product, is first the logits, then their softmax, then their gradient, a
few rows at a time, so that what is computed in fp32 stays in the cache.

Shapes: M asked tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from bert_ray.model.gradients import matrix_gradient, row_sum
from bert_ray.model.projection import filled

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

# Logits that are taken together: half a megabyte in fp32 stays in a CPU's second-level cache; a GPU wants few launches.
_BLOCK, _BLOCK_GPU = 2**17, 2**25


@dataclass(kw_only=True, frozen=True, slots=True)
class VocabularyHead:
    """Transformers' masked-language-model head, under common names.

    Attributes:
        transform: hidden states (M, D) -> what is compared with the words' vectors, (M, D).
        words: the layer (V, D) of those vectors, with a bias; in BERT the word embeddings themselves.
    """

    transform: Callable[[torch.Tensor], torch.Tensor]
    words: nn.Linear


def head_of(model: PreTrainedModel) -> VocabularyHead:
    """Find the head in a model `...ForMaskedLM`, BertForPreTraining or BertLMHeadModel."""
    kind = model.config.model_type
    if kind == "bert":
        return VocabularyHead(transform=model.cls.predictions.transform, words=model.cls.predictions.decoder)
    if kind == "distilbert":
        return VocabularyHead(
            transform=lambda x: model.vocab_layer_norm(model.activation(model.vocab_transform(x))),
            words=model.vocab_projector,
        )
    head = model.lm_head
    return VocabularyHead(transform=lambda x: head.layer_norm(F.gelu(head.dense(x))), words=head.decoder)


def vocabulary_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states (M, D) -> logits (M, V)."""
    head = head_of(model)
    return head.words(head.transform(hidden))


def vocabulary_losses(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    label_smoothing: float = 0.0,
    guesses: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """How unlikely the head finds each token that was asked for.

    Args:
        model: see `head_of`.
        hidden: (M, D).
        tokens: int64, M of them.
        label_smoothing: ε.
        guesses: whether it is asked what is likeliest: a pass more over the logits.

    Returns:
        cross-entropies in nats, fp32 (M,), and whether no token is likelier, bool (M,), or None.
    """
    head, device = head_of(model), hidden.device.type
    hidden = head.transform(filled(hidden))
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _VocabularyLosses.apply(hidden, head.words.weight, head.words.bias, tokens, label_smoothing, guesses)


class _VocabularyLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        tokens: torch.Tensor,
        smoothing: float,
        guesses: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cast, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
        logits = hidden @ cast.t()
        full = torch.promote_types(hidden.dtype, torch.float32)
        asked, best, mean = logits.new_empty((3, len(tokens)), dtype=full)
        for rows in _blocks(logits, len(tokens)):
            block = logits[rows].add_(bias)
            logs = F.log_softmax(block, 1, dtype=full)
            asked[rows] = logs.gather(1, tokens[rows, None]).squeeze(1)
            if guesses:
                best[rows] = logs.amax(1)
            if smoothing:
                mean[rows] = logs.mean(1)
            torch.exp(logs, out=block)
        ctx.save_for_backward(hidden, weight, cast, logits, tokens, asked)
        ctx.smoothing = smoothing
        right = asked == best if guesses else None
        if right is not None:
            ctx.mark_non_differentiable(right)
        return -asked if not smoothing else (smoothing - 1) * asked - smoothing * mean, right

    @staticmethod
    def backward(ctx: Any, d_losses: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # The softmax becomes the gradient where it lies: a second backward pass over it is refused by autograd itself.
        hidden, weight, cast, d_logits, tokens, asked = ctx.saved_tensors
        spread = ctx.smoothing / d_logits.shape[1]
        d_asked = d_losses * (asked.exp() - (1 - ctx.smoothing) - spread)
        for rows in _blocks(d_logits, len(tokens)):
            block = d_logits[rows].mul_(d_losses[rows, None])
            if spread:
                block.sub_(spread * d_losses[rows, None])
            block.scatter_(1, tokens[rows, None], d_asked[rows, None].to(block.dtype))
        d_logits[len(tokens) :] = 0  # Rows that fill up are nobody's.
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            d_logits @ cast if of_hidden else None,
            matrix_gradient(weight, d_logits, hidden, wide=False) if of_weight else None,
            row_sum(d_logits) if of_bias else None,
            None,
            None,
            None,
        )


def _blocks(logits: torch.Tensor, rows: int) -> list[slice]:
    """The first `rows` rows of (M, V), some at a time."""
    step = max(1, (_BLOCK_GPU if logits.is_cuda else _BLOCK) // logits.shape[1])
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
