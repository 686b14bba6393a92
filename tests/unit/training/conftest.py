"""A small labelled table that a tiny model learns, and a job on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.training.job import DataOptions, TrainJob
from tests.conftest import tiny_tokenizer
from tests.corpora import documents, make_corpus

Jobs = Callable[..., TrainJob]


def review_rows(rows: int, seed: int = 0) -> pa.Table:
    """Short texts whose one judging word decides the label."""
    draw = np.random.default_rng(seed)
    good, bad = ["great", "excellent", "love", "happy"], ["terrible", "awful", "hate", "waste"]
    things = ["film", "phone", "food", "place", "service", "product", "battery", "story", "staff"]
    texts, labels = [], []
    for row in range(rows):
        label = int(draw.integers(2))
        word = str(draw.choice((bad, good)[label]))
        filler = " ".join(draw.choice(things, size=int(draw.integers(1, 12))))
        texts.append(f"the {filler} was {word} {row}")
        labels.append(label)
    return pa.table({"text": texts, "label": labels})


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 rows as Parquet."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.parquet"
    pq.write_table(review_rows(120), path)
    return path


@pytest.fixture
def job_for(reviews: Path, tiny_encoder: Path, tmp_path: Path) -> Callable[..., TrainJob]:
    """Makes small local jobs; keywords replace settings, `data` among them."""

    def make(**settings: object) -> TrainJob:
        data = settings.pop("data", None) or DataOptions(train=str(reviews), validation_fraction=0.2)
        defaults: dict[str, object] = {
            "model": str(tiny_encoder),
            "name": "sentiment",
            "output": str(tmp_path / "model"),
            "engine": "local",
            "epochs": 2,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "threads": 1,
        }
        return TrainJob(data=data, **(defaults | settings))

    return make


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 documents to train on in five shards, 20 to be judged by."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", tiny_tokenizer(), documents(100), documents(20, 1))


@pytest.fixture
def pretraining_for(corpus: Path, tiny_encoder: Path, tmp_path: Path) -> Jobs:
    """Makes small local pretraining jobs; keywords replace settings."""

    def make(**settings: object) -> TrainJob:
        defaults: dict[str, object] = {
            "task": "pretraining",
            "model": str(tiny_encoder),
            "output": str(tmp_path / "model"),
            "data": DataOptions(train=str(corpus)),
            "engine": "local",
            "threads": 1,
            "steps": 12,
            "batch_tokens": 512,
            "evaluate_every": 6,
            "learning_rate": 3e-3,
            "max_length": 40,
        }
        return TrainJob(**(defaults | settings))

    return make


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second corpus, of 40 documents, all of one word."""
    return make_corpus(tmp_path_factory.mktemp("general") / "corpus", tiny_tokenizer(), ["money " * 30] * 40)
