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
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch

LABELS = ["negative", "positive"]
BATCHES = (64, 256)


def classifier() -> str:
    """The base model with a random head: what it says does not matter, only how fast."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from bert_ray.model.bundle import Card, save_bundle
    from bert_ray.model.references import resolve

    source, place = resolve(common.MODEL), tempfile.mkdtemp(prefix="bert_ray-classifier-") + "/bundle"
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: place for place, name in enumerate(LABELS)}}
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, **names)
    tokenizer = AutoTokenizer.from_pretrained(source)
    save_bundle(place, model.eval(), tokenizer, Card(task="classification", labels=LABELS, max_length=512))
    return place


def timed(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of the median round, after one that warms up."""
    run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return common.median(found)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from sentence_transformers import SentenceTransformer
    from transformers import pipeline

    from bert_ray.model.annotator import AnnotatorSpec
    from bert_ray.model.references import resolve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    reviews, what = common.reviews(options.rows)
    texts = reviews.to_pylist()
    bundle = classifier()
    embedder = AnnotatorSpec(model=common.MODEL, task="embedding", device=device, dtype="bf16").build()
    sentences = SentenceTransformer(str(resolve(common.MODEL)), device=device, model_kwargs={"dtype": torch.bfloat16})
    # Equal work: the same limit for both.
    sentences.max_seq_length = embedder.bundle.card.max_length
    annotator = AnnotatorSpec(model=bundle, device=device, dtype="bf16").build()
    pipe = pipeline("text-classification", model=bundle, device=device, dtype=torch.bfloat16)
    found: dict[str, float] = {}

    def keep(name: str, run: Callable[[], Any]) -> None:
        found[name] = len(texts) / timed(run, options.rounds)
        print(f"{name}: {found[name]:.0f} texts/s", flush=True)

    keep("embedding, bert_ray", lambda: embedder.annotate([reviews]))
    keep("classification, bert_ray", lambda: annotator.annotate([reviews]))
    tokens = embedder.task.encode(embedder.tokenizer, [reviews]).tokens
    keep("embedding, bert_ray's tokenizer alone", lambda: embedder.task.encode(embedder.tokenizer, [reviews]))
    for size in BATCHES:
        keep(
            f"embedding, sentence-transformers, {size} rows", lambda size=size: sentences.encode(texts, batch_size=size)
        )
        keep(
            f"classification, pipeline, {size} rows",
            lambda size=size: pipe(texts, batch_size=size, truncation=True, max_length=512),
        )
    ours = np.array(embedder.annotate([reviews.slice(0, 500)]).to_pylist())
    theirs = sentences.encode(texts[:500], normalize_embeddings=True)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    figures = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "what": f"{len(texts):,} {what}",
        "tokens": int(tokens.lengths.sum()),
        "texts_per_second": found,
        "lowest_cosine": float(cosine.min()),
    }
    print(figures, flush=True)
    if device == "cuda":
        common.keep("annotate_gpu", figures)


if __name__ == "__main__":
    main()
