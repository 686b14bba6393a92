"""Extractive answers with transformers alone, as run_qa.py of its examples finds them.

transformers 5 has no question-answering pipeline any more; this is its recipe: windows with a stride, padded batches,
the best span over all windows of a context by the sum of start and end logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Starts and ends that are combined, and the longest answer in tokens: run_qa.py's defaults.
_BEST = 20
_LONGEST = 30


def answers(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], *, max_length: int = 384, stride: int = 128, batch: int = 16
) -> list[dict[str, Any]]:
    """The best span of each row's context: text, start, end, and the sum of its logits."""
    import torch

    found = tokenizer(
        [row["question"] for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners, offsets = found["overflow_to_sample_mapping"], found["offset_mapping"]
    best: list[dict[str, Any]] = [{"text": "", "start": 0, "end": 0, "score": float("-inf")} for _ in rows]
    names = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in found]
    with torch.inference_mode():
        for start in range(0, len(owners), batch):
            windows = range(start, min(start + batch, len(owners)))
            padded = tokenizer.pad(
                {name: [found[name][window] for window in windows] for name in names}, return_tensors="pt"
            )
            outputs = model(**padded.to(model.device))
            for place, window in enumerate(windows):
                inside = np.array([source == 1 for source in found.sequence_ids(window)])
                first, last = (
                    np.where(inside, logits[place, : len(inside)].float().cpu().numpy(), -np.inf)
                    for logits in (outputs.start_logits, outputs.end_logits)
                )
                starts, ends = (np.argsort(-values)[:_BEST] for values in (first, last))
                sums = first[starts][:, None] + last[ends][None, :]
                sizes = ends[None, :] - starts[:, None] + 1
                sums[(sizes < 1) | (sizes > _LONGEST)] = -np.inf
                one, other = np.unravel_index(int(sums.argmax()), sums.shape)
                row = owners[window]
                if sums[one, other] > best[row]["score"]:
                    begin, end = offsets[window][starts[one]][0], offsets[window][ends[other]][1]
                    text = rows[row]["context"][begin:end]
                    best[row] = {"text": text, "start": begin, "end": end, "score": float(sums[one, other])}
    return best
