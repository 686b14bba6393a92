"""Embeddings that start from which tokens stand near which."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from bert_ray.errors import JobError
from bert_ray.model.bundle import load_bundle
from bert_ray.training import cooccurrence
from bert_ray.training.cooccurrence import count_neighbours, factorize, sinusoids
from bert_ray.training.job import ArchitectureOptions, CheckpointOptions, DataOptions, TrainJob
from bert_ray.training.launch import train
from bert_ray.training.loop import StepEvent
from bert_ray.training.pretraining import new_bundle
from bert_ray.training.shards import Documents
from tests.conftest import tiny_tokenizer
from tests.corpora import make_corpus, random_texts

SHAPE = ArchitectureOptions(layers=1, hidden_size=16, heads=2, max_positions=64, start="cooccurrence")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents to train on."""
    place = tmp_path_factory.mktemp("corpus") / "corpus"
    return make_corpus(place, tiny_tokenizer(), random_texts(60, 0), random_texts(10, 1))


def job_for(corpus: Path, output: Path, **settings: Any) -> TrainJob:
    defaults: dict[str, Any] = {
        "task": "pretraining",
        "model": "new",
        "output": str(output),
        "data": DataOptions(train=str(corpus)),
        "engine": "local",
        "threads": 1,
        "steps": 6,
        "batch_tokens": 256,
        "evaluate_every": 3,
        "max_length": 40,
        "architecture": SHAPE,
    }
    return TrainJob(**(defaults | settings))


def neighbours(documents: Documents, vocabulary: int) -> np.ndarray:
    """Counted one pair at a time."""
    counts = np.zeros((vocabulary, vocabulary))
    for number, length in enumerate(documents.lengths.tolist()):
        ids, _ = documents.take(np.array([number]), np.array([0]), np.array([length]))
        for one, first in enumerate(ids):
            for second in ids[one + 1 : one + 1 + cooccurrence.WINDOW]:
                counts[first, second] += 1
                counts[second, first] += 1
    return counts


def test_neighbours_are_counted_within_documents(corpus: Path) -> None:
    documents, vocabulary = Documents(corpus, "train"), len(tiny_tokenizer())
    counts, tokens = count_neighbours(documents, vocabulary, 0)
    assert tokens == documents.lengths.sum()
    assert counts.sum() > 1000
    assert_allclose(counts.toarray(), neighbours(documents, vocabulary))


def test_whole_documents_are_drawn_until_there_are_enough(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, vocabulary = Documents(corpus, "train"), len(tiny_tokenizer())
    monkeypatch.setattr(cooccurrence, "MOST_TOKENS", 100)
    (some, tokens), (same, _), (other, _) = (count_neighbours(documents, vocabulary, seed) for seed in (0, 0, 1))
    assert 100 <= tokens < 100 + documents.lengths.max()
    assert (some != same).nnz == 0
    assert (some != other).nnz > 0


def test_a_shard_left_out_is_not_counted(corpus: Path) -> None:
    whole = Documents(corpus, "train")
    paths = sorted({Path(path).relative_to(corpus).as_posix() for path in whole.shard_of(np.arange(len(whole)))})
    assert len(paths) > 1
    _, tokens = count_neighbours(Documents(corpus, "train", skip=[paths[0]]), len(tiny_tokenizer()), 0)
    assert 0 < tokens < whole.lengths.sum()


def test_words_with_the_same_neighbours_look_alike() -> None:
    """Two groups of words that stand near their own kind alone; and one word that stands near none."""
    from scipy.sparse import csr_matrix

    kinds = np.repeat([0, 1], 10)
    draw = np.random.default_rng(0)
    counts = np.where(kinds[:, None] == kinds, 20, 0) + draw.integers(0, 3, (20, 20))
    counts = np.pad(counts + counts.T, ((0, 1), (0, 1))).astype(np.float32)
    vectors = factorize(csr_matrix(counts), 8, 0)
    assert vectors.dtype == np.float32
    assert_allclose(np.linalg.norm(vectors[:20], axis=1), 1, rtol=1e-5)
    assert not vectors[20].any()
    cosines = vectors[:20] @ vectors[:20].T
    same = kinds[:, None] == kinds
    assert cosines[same].mean() > 0.5 > 0 > cosines[~same].mean()


@pytest.mark.parametrize("dimension", [4, 32])
def test_factors_of_nothing_and_of_few_tokens(dimension: int) -> None:
    """No pairs at all; and fewer tokens than numbers in a vector."""
    from scipy.sparse import csr_matrix

    assert not factorize(csr_matrix((9, 9), dtype=np.float32), dimension, 0).any()
    counts = csr_matrix(np.diag(np.ones(9, np.float32)))
    vectors = factorize(counts, dimension, 0)
    assert vectors.shape == (9, dimension)
    assert np.isfinite(vectors).all()


def test_near_positions_look_alike() -> None:
    waves = sinusoids(64, 32)
    assert_allclose((waves**2).sum(dim=1), 16, rtol=1e-5)
    product = waves[0] @ waves.T
    assert product[0] > product[1] > product[5]
    assert sinusoids(10, 7).shape == (10, 7)


def test_a_model_starts_from_its_corpus(corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    job = job_for(corpus, tmp_path / "model")
    documents = Documents(corpus, "train")
    assert new_bundle(job, tmp_path / "counted", documents) == documents.lengths.sum()
    assert new_bundle(job, tmp_path / "random") == 0
    counted, random = (
        dict(AutoModelForMaskedLM.from_pretrained(tmp_path / name).named_parameters()) for name in ("counted", "random")
    )
    words = "bert.embeddings.word_embeddings.weight"
    differing = {name for name in random if not torch.equal(counted[name], random[name])}
    assert differing == {words, "bert.embeddings.position_embeddings.weight"}
    ids, _ = documents.take(np.arange(len(documents)), np.zeros(len(documents), int), documents.lengths.astype(int))
    vectors = counted[words].detach()
    moved = (vectors != random[words]).any(dim=1)
    assert set(np.flatnonzero(moved.numpy())) == set(ids)
    assert_allclose(vectors[moved].norm(dim=1), 0.02 * 4, rtol=1e-4)


class Cut(Exception):
    """Stands for whatever ends a process."""


def test_a_run_that_goes_on_does_not_count_again(corpus: Path, tmp_path: Path) -> None:
    job = job_for(corpus, tmp_path / "model", checkpoint=CheckpointOptions(every_steps=2))
    told: list[str] = []

    def notes(event: dict[str, Any]) -> None:
        told.extend([event["text"]] if event["what"] == "note" else [])

    whole = train(replace(job, output=str(tmp_path / "whole")), tell=notes)
    assert sum("neighbours of" in text for text in told) == 1

    def cut(event: StepEvent) -> None:
        if event.step == 3:
            raise Cut

    with pytest.raises(Cut):
        train(job, tell=notes, callbacks=[cut])
    assert sum("neighbours of" in text for text in told) == 2
    resumed = train(job, tell=notes)
    assert sum("neighbours of" in text for text in told) == 2
    assert [entry["train_loss"] for entry in resumed.history] == [entry["train_loss"] for entry in whole.history]
    assert load_bundle(resumed.bundle).card.task == "fill-mask"


def test_another_start_is_another_run(corpus: Path, tmp_path: Path) -> None:
    job = job_for(corpus, tmp_path / "model")
    train(job, tell=lambda _: None)
    with pytest.raises(JobError, match=r"architecture\.start '?cooccurrence'?, now '?random'?"):
        train(replace(job, architecture=replace(SHAPE, start="random")), tell=lambda _: None)
    shutil.rmtree(job.output)
    with pytest.raises(JobError, match=r"architecture\.start is 'frequent'"):
        replace(SHAPE, start="frequent")  # type: ignore[arg-type]
