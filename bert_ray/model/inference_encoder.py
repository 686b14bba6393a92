"""The encoder as the annotator runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bert_ray.model.encoder import encode_with, encoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bert_ray.model.packing import PackedBatch


class InferenceEncoder:
    """Packed forward without dropout."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.encoder = encoder_of(model)
        self.batch_tokens = 512 if model.device.type == "cpu" else 16384

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        return encode_with(self.encoder, batch, training=False)
