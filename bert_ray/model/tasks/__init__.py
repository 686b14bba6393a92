"""The tasks, one file each. A new task is a new file and a line in TASKS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bert_ray.errors import BundleError
from bert_ray.model.architectures import ENCODER_DECODER
from bert_ray.model.tasks.answer import Answer
from bert_ray.model.tasks.base import Task
from bert_ray.model.tasks.classification import Classification
from bert_ray.model.tasks.embedding import Embedding
from bert_ray.model.tasks.entities import Entities
from bert_ray.model.tasks.faq import Faq
from bert_ray.model.tasks.few_shot import FewShot
from bert_ray.model.tasks.fill_mask import FillMask
from bert_ray.model.tasks.mask import Mask
from bert_ray.model.tasks.multilabel import MultiLabel
from bert_ray.model.tasks.pretraining import Pretraining
from bert_ray.model.tasks.regression import Regression
from bert_ray.model.tasks.similarity import Similarity
from bert_ray.model.tasks.translation import Translation
from bert_ray.model.tasks.zero_shot import ZeroShot

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bert_ray.model.card import Card

TASKS: dict[str, type[Task]] = {
    task.kind: task
    for task in (
        Answer,
        Classification,
        Embedding,
        Entities,
        Faq,
        FewShot,
        FillMask,
        Mask,
        MultiLabel,
        Regression,
        Similarity,
        Translation,
        ZeroShot,
    )
}

# What is trained and leaves a bundle of another task.
TRAINED_ONLY: dict[str, type[Task]] = {Pretraining.kind: Pretraining}

__all__ = [
    "TASKS",
    "TRAINED_ONLY",
    "Answer",
    "Classification",
    "Embedding",
    "Entities",
    "Faq",
    "FewShot",
    "FillMask",
    "Mask",
    "MultiLabel",
    "Pretraining",
    "Regression",
    "Similarity",
    "Task",
    "Translation",
    "ZeroShot",
    "get_task",
]


def get_task(
    card: Card,
    config: PretrainedConfig | None = None,
    *,
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Task:
    """The task that a card names, bound to it and, where one is there, to the model's configuration.

    Args:
        card: of the bundle.
        config: of the model.
        kind: another task to run on the same model ("similarity" on an encoder, say); None: the card's own.
        options: over those of the card.

    Raises:
        BundleError: no such task, or one that cannot run on a model with a decoder.
        JobError: an option that the task does not have.
    """
    kind = kind or card.task
    known = TASKS | TRAINED_ONLY
    if kind not in known:
        raise BundleError(f"unknown task {kind!r}; known are {', '.join(sorted(TASKS))}")
    if config is not None and config.model_type == ENCODER_DECODER and not known[kind].generates:
        able = ", ".join(sorted(name for name, task in TASKS.items() if task.generates))
        raise BundleError(f"task {kind!r} wants a plain encoder; a model with a decoder does {able}")
    return known[kind](card, config, options)
