"""What tests of tasks with a sequence head share: odd texts, plain transformers, a batch's samples."""

from __future__ import annotations

import numpy as np
import torch

from bert_ray.model.packing import PackedBatch

ODD = ["nul \x00 inside", "émoji 🎬🍿 𝔘 and 中文", "x", "word " * 700]


def logits_of(model: str, columns: list[list[str]]) -> torch.Tensor:
    """What transformers says of texts or pairs, a row at a time: (B, C)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForSequenceClassification.from_pretrained(model).eval()
    found = []
    with torch.inference_mode():
        for row in zip(*columns, strict=True):
            found.append(plain(**tokenizer(*row, truncation=True, max_length=512, return_tensors="pt")).logits[0])
    return torch.stack(found)


def batch_of(samples: list[int] | None) -> PackedBatch:
    """A batch of pieces that belong to these samples; None: each is one."""
    pieces = len(samples or [])
    return PackedBatch(
        input_ids=torch.zeros(pieces, dtype=torch.long),
        position_ids=torch.zeros(pieces, dtype=torch.long),
        token_type_ids=None,
        lengths=(1,) * pieces,
        cu_seqlens=torch.arange(pieces + 1, dtype=torch.int32),
        rows=np.arange(pieces),
        samples=None if samples is None else torch.tensor(samples),
    )
