"""transformers' own answers, as its question-answering pipeline gave them: what ours are held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def answers_of(
    bundle: Path,
    rows: dict[str, list[str]],
    max_length: int,
    *,
    overlap: int,
    max_answer_tokens: int,
    impossible: bool = False,
) -> list[dict[str, Any]]:
    """What transformers' question-answering pipeline said until 4.x, with align_to_words=False.

    Version 5 has no such pipeline; its core, `select_starts_ends`, is still there for documents. Where ours differs by
    design: an answer is never widened to whole words, and answers of equal text in several windows do not add up their
    scores, which would be no probability.
    """
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer
    from transformers.pipelines.document_question_answering import select_starts_ends

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    model = AutoModelForQuestionAnswering.from_pretrained(bundle).eval()
    found = []
    for question, context in zip(rows["question"], rows["context"], strict=True):
        windows = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_length,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        answers, null = [], 1_000_000.0
        for window in range(len(windows["input_ids"])):
            inputs = {
                name: torch.tensor([windows[name][window]])
                for name in ("input_ids", "token_type_ids", "attention_mask")
            }
            with torch.inference_mode():
                outputs = model(**inputs)
            mask = np.array([source != 1 for source in windows.sequence_ids(window)])
            mask[0] = False
            starts, ends, scores, null = select_starts_ends(
                outputs.start_logits.numpy(),
                outputs.end_logits.numpy(),
                mask.astype(int),
                None,
                null,
                top_k=1,
                handle_impossible_answer=impossible,
                max_answer_len=max_answer_tokens,
            )
            for start, end, score in zip(starts, ends, scores, strict=True):
                span = windows["offset_mapping"][window]
                first, last = span[start][0], span[end][1]
                answers.append({"text": context[first:last], "start": first, "end": last, "score": float(score)})
        if impossible:
            answers.append({"text": None, "score": null})
        found.append(max(answers, key=lambda answer: answer["score"]))
    return found
