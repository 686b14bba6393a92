"""What tasks with one output for a text, or for two texts, share: inputs, the sequence head, windows, class weights.

The head is transformers' own `…ForSequenceClassification` over the first token ([CLS]) of each piece. Of a text read in
windows each window has outputs of its own; their mean counts, in training and afterwards.

Shapes: B rows, P pieces, T tokens of a packed batch, D hidden size, C outputs of the head, S samples of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from bert_ray.errors import JobError
from bert_ray.model.tasks.base import Options, Outputs, Task, set_dropout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.packing import PackedBatch
    from bert_ray.model.tokenization import Pieces

_PAIR = ("text", "text_pair")


@dataclass(kw_only=True, frozen=True, slots=True)
class SequenceOptions(Options):
    """What may be chosen per call.

    Attributes:
        pair: whether the model reads two texts, `text` and `text_pair`, as one row. None: as the bundle's card says.
    """

    pair: bool | None = None


class SequenceTask(Task):
    """A task whose head gives C outputs for a text, or for two texts together."""

    blank_is_null: ClassVar[bool] = True
    options_type: ClassVar[type[Options]] = SequenceOptions
    architecture: ClassVar[str | None] = "ForSequenceClassification"
    reads_pooler: ClassVar[bool] = True

    def __init__(
        self, card: Card, config: PretrainedConfig | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Bind to a card, whose `inputs` say whether there are two texts; none at all: as the task has it.

        Raises:
            JobError: an option that the task does not have, a value that it does not take, or overflow other than
                truncate for two texts.
        """
        super().__init__(card, config, options)
        pair = self.options.pair
        self._read(_PAIR[1] in (card.inputs or self.inputs) if pair is None else pair)

    def _read(self, pair: bool) -> None:
        overflow = self.options.overflow
        if pair and overflow != "truncate":
            raise JobError(
                f"options.overflow is {overflow!r}, but the model reads two texts as one row, which can only be cut: "
                "give truncate, or one text alone (pair: false)"
            )
        self.inputs = _PAIR if pair else _PAIR[:1]  # type: ignore[misc]  # Of this card, over those of the class.

    def choose_inputs(self, named: Collection[str]) -> None:
        """Two texts where the job names a column for text_pair, unless its options say otherwise."""
        if self.options.pair is None and _PAIR[1] in named:
            self._read(True)

    def auto_class(self) -> Any:
        """AutoModelForSequenceClassification."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def tokens_read(self, batch: PackedBatch, targets: torch.Tensor | None = None) -> torch.Tensor | None:
        """The first token of each piece."""
        return batch.first_tokens

    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Outputs (P, C): transformers' own head modules over the first token ([CLS]) of each piece."""
        first = of_first(hidden, batch)
        kind = model.config.model_type
        if kind == "bert":
            pooled = model.bert.pooler.activation(model.bert.pooler.dense(first))
            return exactly(model.classifier, model.dropout(pooled))
        if kind == "distilbert":
            return exactly(model.classifier, model.dropout(F.relu(model.pre_classifier(first))))
        head = model.classifier  # RoBERTa's.
        pooled = torch.tanh(head.dense(head.dropout(first)))
        return exactly(head.out_proj, head.dropout(pooled))

    def exact_layers(self, model: PreTrainedModel) -> list[torch.nn.Linear]:
        """The head's last one."""
        return [getattr(model.classifier, "out_proj", model.classifier)]

    def fresh_model(
        self,
        base: Bundle,
        *,
        problem_type: str,
        labels: Sequence[str] = (),
        dropout: float | None = None,
        attention_dropout: float | None = None,
    ) -> Any:
        """The base's encoder and pooler with a fresh classifier; its configuration carries the labels.

        Args:
            base: any bundle with a supported encoder.
            problem_type: transformers' name for the loss.
            labels: C names; none: one output without a name.
            dropout: rate for hidden states; None keeps the base's.
            attention_dropout: rate for attention weights; None keeps the base's.
        """
        from transformers import AutoConfig

        from bert_ray.model.bundle import read_model

        config = AutoConfig.from_pretrained(base.directory, num_labels=len(labels) or 1, problem_type=problem_type)
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
        set_dropout(config, dropout, attention_dropout)
        # A base fine-tuned for other labels lends its encoder; its head does not fit and is made anew.
        model, _ = read_model(self.auto_class(), base.directory, config=config, ignore_mismatched_sizes=True)
        return model


def of_first(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Of hidden states (T, D), those of each piece's first token, (P, D); where only they are read, they are all."""
    return hidden[batch.first_tokens] if batch.read is None else hidden


def exactly(layer: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The product of one of a task's `exact_layers`, in fp32 where the layer was left in it."""
    return layer(hidden if torch.is_grad_enabled() else hidden.to(layer.weight.dtype))


def by_row(outputs: Outputs, pieces: Pieces) -> np.ndarray:
    """One output a row: the mean over its pieces, float32 (P, C) -> (B, C)."""
    starts = pieces.starts
    if len(pieces) == len(starts) - 1:
        return outputs.values
    counts = np.diff(starts)[:, None].astype(np.float32)
    return np.add.reduceat(outputs.values, starts[:-1], axis=0) / counts


def by_sample(outputs: torch.Tensor, batch: PackedBatch, samples: int) -> torch.Tensor:
    """One output a sample of a training batch: the mean over its pieces, (P, C) -> (S, C)."""
    if batch.samples is None:
        return outputs
    # Not index_add: on a GPU its sums depend on which thread comes first, and a resumed run would differ.
    order = batch.samples.argsort(stable=True)
    counts = torch.bincount(batch.samples, minlength=samples)
    return torch.segment_reduce(outputs[order], "mean", lengths=counts, axis=0)


def weights_of(
    chosen: str | Mapping[str, float], labels: Sequence[str], balanced: Sequence[float] | np.ndarray
) -> list[float] | None:
    """The weight of each label in the loss, C numbers; None: 1 each.

    Args:
        chosen: of the job: "none", "balanced", or weights by label; a label that is not named has 1.
        labels: C names.
        balanced: C numbers.

    Raises:
        JobError: a weight for a label that there is not.
    """
    if isinstance(chosen, Mapping):
        given = {str(label): float(weight) for label, weight in chosen.items()}
        if strange := sorted(set(given) - set(labels)):
            known = ", ".join(map(repr, list(labels)[:10])) + (", …" if len(labels) > 10 else "")
            raise JobError(f"class_weights names {strange[0]!r}, which is no label; the labels are {known}")
        return [given.get(label, 1.0) for label in labels]
    return [float(weight) for weight in balanced] if chosen == "balanced" else None
