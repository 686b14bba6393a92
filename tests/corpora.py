"""Small corpora, written shard by shard from given texts: what `bert-ray corpus` makes, without its pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from bert_ray.lake.files import file_sha256
from bert_ray.training.corpus.tokens import Tokenised, lists_of
from bert_ray.training.corpus_source import CorpusSource, Rows, marks_of
from bert_ray.training.shards import (
    INDEX_FILE,
    SPLITS,
    TOKENIZER_FOLDER,
    Documents,
    Manifest,
    Split,
    describe,
    id_type,
    shard_schema,
    write_index,
    write_shard,
)
from tests.conftest import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bert_ray.training.job import TrainJob


WORDS = "the film phone food place was very good bad great terrible staff and story with a happy waiter".split()


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 59 words."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size)) for size in draw.integers(1, 60, count)]


def documents(count: int, seed: int = 0) -> list[str]:
    """The same, each a sentence with its end."""
    return [f"{text} ." for text in random_texts(count, seed)]


def make_corpus(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    train: Sequence[str],
    validation: Sequence[str] = (),
    documents_per_shard: int = 20,
) -> Path:
    """A corpus of these documents, in their order."""
    tokenizer.save_pretrained(directory / TOKENIZER_FOLDER)
    size = max(tokenizer.get_vocab().values()) + 1
    continues = np.zeros(size, bool)
    for token, number in tokenizer.get_vocab().items():
        continues[number] = token.startswith("##")
    schema, splits = shard_schema(size), {}
    for name, texts in zip(SPLITS, (train, validation), strict=True):
        (directory / name).mkdir(parents=True)
        ids = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64) for text in texts]
        split, lengths = Split(words=sum(len(text.split()) for text in texts)), []
        for first in range(0, len(texts), documents_per_shard):
            last = first + documents_per_shard
            hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts[first:last]]
            flat = np.concatenate(ids[first:last])
            counts = np.array([len(found) for found in ids[first:last]])
            tokens = Tokenised(flat.astype(id_type(size).to_pandas_dtype()), ~continues[flat], counts)
            columns = lists_of(schema, pa.array(hashes, pa.binary(16)), tokens)
            path = f"{name}/{len(split.shards):05d}.arrow"
            written = write_shard(directory / path, schema, iter([pa.record_batch(columns, schema=schema)]))
            split.shards.append(describe(directory, path, *written))
            lengths.append(pa.array(counts))
        if texts:
            split.index_sha256 = write_index(directory / name / INDEX_FILE, lengths)
        splits[name] = split
    tokenizer_sha256 = file_sha256(directory / TOKENIZER_FOLDER / "tokenizer.json")
    Manifest(splits=splits, vocabulary=size, tokenizer_sha256=tokenizer_sha256).write(directory)
    return directory


def corpus_source(corpus: Path, job: TrainJob) -> CorpusSource:
    """The rows that a job trains on."""
    room = job.max_length - (2 if job.pretraining.sentences == "none" else 3)
    return CorpusSource(Rows(Documents(corpus, "train"), room), marks_of(tiny_tokenizer(), "the model"), job)
