"""Pretraining: guess the tokens that were masked and, where the job says so, how a row's two parts belong together.

What is trained is an encoder with BERT's own heads; the bundle that comes out annotates as fill-mask, and every other
task can start from it.

Shapes: T tokens of a packed batch, R of them that are read, P pieces, D hidden size, V vocabulary, M masked tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from bert_ray.errors import BundleError, JobError
from bert_ray.model.packing import on_device
from bert_ray.model.tasks.base import Outputs, set_dropout
from bert_ray.model.tasks.fill_mask import FillMask
from bert_ray.model.vocabulary_head import vocabulary_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bert_ray.model.bundle import Bundle
    from bert_ray.model.examples import Examples
    from bert_ray.model.packing import PackedBatch

# What stands for a row without a question about its parts.
_NO_PARTS = -1


class Pretraining(FillMask):
    """A masked language model, trained on a corpus."""

    kind: ClassVar[str] = "pretraining"
    leaves: ClassVar[str | None] = "fill-mask"
    reads_corpus: ClassVar[bool] = True
    architecture: ClassVar[str | None] = None
    metric: ClassVar[str] = "log_likelihood"
    plain_metrics: ClassVar[tuple[str, ...]] = ("log_likelihood", "perplexity")

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """The base with its language-model heads; those that it lacks are new.

        Raises:
            BundleError: the weights lack more than that.
            JobError: rows have two parts, and the base's kind has no head for them.
        """
        from transformers import AutoModelForMaskedLM, BertForPreTraining

        from bert_ray.model.bundle import read_model

        if self.learning.parts and base.config.model_type != "bert":
            raise JobError(
                f"pretraining.sentences: {base.reference} is a {base.config.model_type}, which has no head for two "
                "parts: give none"
            )
        auto = BertForPreTraining if self.learning.parts else AutoModelForMaskedLM
        model, report = read_model(auto, base.directory)
        if strange := [name for name in report["missing_keys"] if not _is_head(name)]:
            raise BundleError(f"{base.reference}: the weights lack {', '.join(sorted(strange)[:4])}")
        set_dropout(model.config, dropout, attention_dropout)
        return model

    def tokens_read(self, batch: PackedBatch, targets: torch.Tensor | None = None) -> torch.Tensor | None:
        """The masked tokens, and the first of each piece where it is asked about its parts."""
        if targets is None:
            return super().tokens_read(batch)
        masked = targets[: len(batch.input_ids)] >= 0
        if self.learning.parts:
            masked[batch.first_tokens] = True
        return masked.nonzero().squeeze(1)

    def losses(
        self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Loss of each piece, (P,): the mean over its masked tokens, and that of its parts, times its budget.

        Only masked tokens go through the vocabulary's head: of the others nobody asks.

        Args:
            model: with the heads.
            hidden: (T, D), or (R, D) of the tokens that are read.
            batch: P pieces.
            targets: int64 (T + 2P,): the original of each masked token, else -100; which way each piece's parts belong
                together, or -1; how much each piece counts.

        Returns:
            the losses, and (P, 4) fp32: sum of the masked tokens' losses, how many were guessed, how many there were,
            and whether the parts were (1, 0, or NaN without a question).
        """
        pieces = len(batch.lengths)
        tokens, parts, budget = targets.split((len(batch.input_ids), pieces, pieces))
        if batch.read is None:
            places = (tokens >= 0).nonzero().squeeze(1)
            of_masked = hidden.index_select(0, places)
        else:
            places, of_masked = self._masked_of_read(hidden, batch)
        of = torch.searchsorted(batch.cu_seqlens.long(), places, right=True) - 1
        asked_for = tokens.index_select(0, places)
        each, right = vocabulary_losses(model, of_masked, asked_for, guesses=not model.training)
        zeros = each.new_zeros(pieces)
        sums, counts = zeros.index_add(0, of, each), zeros.index_add(0, of, torch.ones_like(each))
        losses = sums / counts.clamp(min=1)
        outputs = None
        belong = torch.full_like(zeros, float("nan"))
        asked = parts != _NO_PARTS
        # In training also where no piece has two parts: under ZeRO 1 and 2 every worker has the same gradients.
        if self.learning.parts and (model.training or bool(asked.any())):
            where = batch.first_tokens
            if batch.read is not None:
                where = on_device(torch.from_numpy(_starts(batch)), hidden.device)
            first = hidden.index_select(0, where)
            said = model.cls.seq_relationship(model.bert.pooler.dense(first).tanh()).float()
            losses = losses + F.cross_entropy(said, parts.clamp(min=0), reduction="none") * asked
            belong = torch.where(asked, (said.argmax(1) == parts).float(), belong)
        if right is not None:
            outputs = torch.stack((sums, zeros.index_add(0, of, right.float()), counts, belong), dim=1)
        return losses * budget, outputs

    def _masked_of_read(self, hidden: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the masked tokens are, and their hidden states, of those of the tokens that are read.

        Which those are is known on the CPU: a GPU is not waited for.
        """
        assert batch.read is not None
        if not self.learning.parts:
            return batch.read, hidden
        masked = np.ones(len(batch.read), bool)
        masked[_starts(batch)] = False
        which = on_device(torch.from_numpy(np.flatnonzero(masked)), hidden.device)
        return batch.read.index_select(0, which), hidden.index_select(0, which)

    def validate(self, outputs: Outputs, examples: Any) -> dict[str, float]:
        """Share of masked tokens guessed, their mean log-likelihood (nats), its perplexity, and the share of parts."""
        sums, guessed, counts, right = outputs.values.T.astype(np.float64)
        masked = max(1.0, counts.sum())
        loss = sums.sum() / masked
        found = {"accuracy": guessed.sum() / masked, "log_likelihood": -loss, "perplexity": math.exp(min(700.0, loss))}
        if not np.isnan(right).all():
            found["sentence_accuracy"] = float(np.nanmean(right))
        return {name: float(value) for name, value in found.items()}

    def examples(self, *arguments: Any) -> Examples:
        """None: see `training.pretraining`.

        Raises:
            JobError: always.
        """
        raise JobError("task pretraining learns from a corpus: make one with `bert-ray corpus`, and give its directory")

    def labels_in(self, truth: Sequence[pa.Array]) -> list[str]:
        """None."""
        return []


def _starts(batch: PackedBatch) -> np.ndarray:
    """Which of the tokens that are read are the first of each piece, int64 (P,)."""
    assert batch.read_lengths is not None
    return np.cumsum((0, *batch.read_lengths[:-1]))


def _is_head(name: str) -> bool:
    """Whether a weight belongs to the language-model heads (or to the pooler, which only one of them reads)."""
    return name.startswith(("cls.", "lm_head.", "vocab_")) or ".pooler." in name
