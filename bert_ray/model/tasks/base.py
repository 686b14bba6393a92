"""What a task is: inputs, Arrow output type, head, loss, metrics, decoding.

Shapes: B rows, T tokens of a packed batch, D hidden size, C labels (or the width of another output).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from bert_ray.errors import BundleError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from bert_ray.model.bundle import Bundle, Card
    from bert_ray.model.packing import PackedBatch


class Task(ABC):
    """A task bound to a bundle's card. Stateless beyond the card, so it is cheap to make and to pickle.

    Class attributes:
        kind: the name in `bert_ray.json`.
        inputs: the input columns.
        metric: the metric that early stopping and the best bundle go by; higher is better.
        blank_is_null: whether an empty or blank text gives a null annotation; else the model sees the empty text.
    """

    kind: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ("text",)
    metric: ClassVar[str]
    blank_is_null: ClassVar[bool]

    def __init__(self, card: Card, config: PretrainedConfig | None = None) -> None:
        self.card = card
        self.config = config

    @property
    def name(self) -> str:
        """What the annotation is called unless the job says otherwise."""
        return self.card.name or self.kind

    @abstractmethod
    def output_type(self, scores: bool = False) -> pa.DataType:
        """The annotation's Arrow type, declared here once for every engine."""

    @abstractmethod
    def auto_class(self) -> Any:
        """The transformers Auto class that reads a bundle of this task, head included."""

    @abstractmethod
    def forward(self, model: PreTrainedModel, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The head: hidden states (T, D) of a packed batch -> one output per row (B, C)."""

    @abstractmethod
    def decode(self, outputs: np.ndarray, scores: bool = False) -> pa.Array:
        """Outputs float32 (B, C) -> annotations, an array of `output_type`, one per row, none null."""

    def new_model(self, base: Bundle, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
        """A model to train: the base's encoder with a fresh head.

        Args:
            base: any bundle with a supported encoder.
            dropout: rate for hidden states; None keeps the base's.
            attention_dropout: rate for attention weights; None keeps the base's.
        """
        raise BundleError(f"task {self.kind!r} has nothing to train; train a classification model")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each row, (B,)."""
        raise BundleError(f"task {self.kind!r} has no loss")

    def targets(self, labels: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """A label column -> what `loss` and `metrics` take, one entry per row."""
        raise BundleError(f"task {self.kind!r} has no labels")

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Name -> value over a whole validation set."""
        raise BundleError(f"task {self.kind!r} has no metrics")
