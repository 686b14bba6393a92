"""Bulk annotation on one GPU, in one process without Ray or Spark, nothing read from a network:

    python benchmarks/annotate_gpu.py                    film reviews: embeddings, and classes of a random head
    python benchmarks/annotate_gpu.py --rows 20000

The annotator from Arrow to Arrow, tokenisation included, beside sentence-transformers (which sorts by length) and
transformers' text-classification pipeline, all in bf16. Results, with the device's name:
benchmarks/results/annotate_gpu.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from tasks import save

BATCHES = (64, 256)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForSequenceClassification, pipeline

    from bert_ray.model.annotator import AnnotatorSpec
    from bert_ray.model.references import resolve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reviews, what = common.reviews(options.rows)
    texts = reviews.to_pylist()
    # A random head: what it says does not matter, only how fast.
    scratch = tempfile.TemporaryDirectory(prefix="bert_ray-bench-")
    bundle = save(AutoModelForSequenceClassification, Path(scratch.name), num_labels=2)
    embedder = AnnotatorSpec(model=common.MODEL, task="embedding", device=device, dtype="bf16").build()
    sentences = SentenceTransformer(str(resolve(common.MODEL)), device=device, model_kwargs={"dtype": torch.bfloat16})
    # Equal work: the same limit for both.
    sentences.max_seq_length = embedder.bundle.card.max_length
    annotator = AnnotatorSpec(model=bundle, device=device, dtype="bf16").build()
    pipe = pipeline("text-classification", model=bundle, device=device, dtype=torch.bfloat16)
    contestants: dict[str, Callable[[], Any]] = {
        "embedding, bert_ray": lambda: embedder.annotate([reviews]),
        "classification, bert_ray": lambda: annotator.annotate([reviews]),
        "embedding, bert_ray's tokenizer alone": lambda: embedder.task.encode(embedder.tokenizer, [reviews]),
    }
    for size in BATCHES:
        contestants |= {
            f"embedding, sentence-transformers, {size} rows": partial(sentences.encode, texts, batch_size=size),
            f"classification, pipeline, {size} rows": partial(
                pipe, texts, batch_size=size, truncation=True, max_length=512
            ),
        }
    for run in contestants.values():
        run()  # Warm-up.
    measured = common.interleaved(contestants, options.rounds)
    found = {name: len(texts) / common.median([sec for sec, _ in runs]) for name, runs in measured.items()}
    ours = np.array(embedder.annotate([reviews.slice(0, 500)]).to_pylist())
    theirs = sentences.encode(texts[:500], normalize_embeddings=True)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    figures = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "what": f"{len(texts):,} {what}",
        "tokens": int(embedder.task.encode(embedder.tokenizer, [reviews]).tokens.lengths.sum()),
        "texts_per_second": found,
        "lowest_cosine": float(cosine.min()),
    }
    print(figures, flush=True)
    if device == "cuda":
        common.keep("annotate_gpu", figures)


if __name__ == "__main__":
    main()
