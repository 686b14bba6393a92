"""A small lake of texts, and a job on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.training.corpus.job import CorpusJob

WORDS = "the film was good and bad service food phone money works well love story staff waiter bland place".split()


def sentence(number: int, words: int = 30) -> str:
    """Words in an order of the number's own."""
    return " ".join(np.random.default_rng(number).choice(WORDS, words))


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """Three files of 40 rows, in row groups of 20: of each 40 the last is null, the one before blank."""
    root = tmp_path / "lake"
    root.mkdir()
    for file in range(3):
        texts = [sentence(40 * file + row) for row in range(38)] + [" \n\t", None]
        pq.write_table(pa.table({"text": texts}), root / f"f{file}.parquet", row_group_size=20)
    return root


@pytest.fixture
def job_for(lake: Path, tiny_encoder: Path, tmp_path: Path) -> Callable[..., CorpusJob]:
    """Makes small local jobs; keywords replace settings."""

    def make(**settings: Any) -> CorpusJob:
        defaults: dict[str, Any] = {
            "input": str(lake),
            "tokenizer": str(tiny_encoder),
            "output": str(tmp_path / "corpus"),
            "validation_fraction": 0.2,
            "unit_rows": 20,
            "shard_tokens": 1000,
        }
        return CorpusJob(**(defaults | settings))

    return make
