"""How often each word stands in texts: counted part by part, the counts added up.

Words are what a tokenizer's normaliser and pre-tokenizer make of the texts, before any vocabulary.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bert_ray.errors import LakeError, why
from bert_ray.lake.files import printable
from bert_ray.lake.progress import Progress
from bert_ray.training.corpus.cleaning import slices

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Offsets of 64 bits: the words of a large lake are more than 2 GiB.
SCHEMA = pa.schema([pa.field("word", pa.large_string(), nullable=False), pa.field("count", pa.int64(), nullable=False)])

# The rule that words are counted by; counts by another one are not gone on with.
COUNTING = 1
# The library takes memory in proportion to what it is handed at once.
_SLICE_CHARACTERS = 2**18
# Counts of so many words wait to be added up at least, and as many as have been added up: each is added few times.
_WAITING = 4 * 2**20
# So many of what stands between blanks are held before they are parted.
_CHUNKS = 2**20
_BATCH_WORDS = 2**18


class WordCounter:
    """Counts words as a tokenizer parts them.

    What stands between blanks is counted first, and parted once however often it stands there: the library's way from
    a text to Python's words takes ten times as long as the blanks do.
    """

    def __init__(self, backend: Backend) -> None:
        self._normalise = backend.normalizer.normalize_str if backend.normalizer else str
        self._part = backend.pre_tokenizer.pre_tokenize_str
        self._chunks: Counter[str] = Counter()
        self._words: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Count a text's words."""
        for piece in slices(text, _SLICE_CHARACTERS):
            self._chunks.update(self._normalise(piece).split())
        if len(self._chunks) > _CHUNKS:
            self._part_chunks()

    def table(self) -> pa.Table:
        """The counts so far: SCHEMA, in the order of the words."""
        self._part_chunks()
        known = sorted(self._words)
        return pa.table([known, [self._words[word] for word in known]], schema=SCHEMA)

    def _part_chunks(self) -> None:
        for chunk, count in self._chunks.items():
            for word, _ in self._part(chunk):
                self._words[word] += count
        self._chunks.clear()


def add_up(paths: Sequence[Path], progress: Progress | None = None) -> pa.Table:
    """The counts of several parts as one: SCHEMA, the most frequent first, words of one count by their letters.

    Raises:
        LakeError: a file cannot be read.
    """
    whole, waiting, rows = SCHEMA.empty_table(), list[pa.Table](), 0
    for path in paths:
        try:
            with pa.OSFile(os.fsencode(path)) as file:
                waiting.append(pq.read_table(file, schema=SCHEMA))
        except (OSError, pa.ArrowInvalid) as error:
            if isinstance(error, OSError) and error.errno:
                raise LakeError(f"{printable(path)} cannot be read: {why(error)}") from error
            raise LakeError(  # What a damaged page gives has no number of the system's.
                f"{printable(path)} is damaged ({error}): remove it, and the same command counts it again"
            ) from error
        rows += waiting[-1].num_rows
        if progress is not None:
            progress.ended(waiting[-1].num_rows, 0.0, failed=False)
        if rows > max(_WAITING, whole.num_rows):
            whole, waiting, rows = _sum([whole, *waiting]), [], 0
    return _sum([whole, *waiting]).sort_by([("count", "descending"), ("word", "ascending")])


def _sum(tables: list[pa.Table]) -> pa.Table:
    summed = pa.concat_tables(tables).group_by("word").aggregate([("count", "sum")])
    return summed.rename_columns(["word", "count"]).cast(SCHEMA)


def characters(counts: pa.Table) -> Counter[str]:
    """How often each character stands in the words counted."""
    often = np.zeros(0x110000, np.int64)
    for batch in counts.to_batches(max_chunksize=_BATCH_WORDS):
        words = batch.column("word").to_pylist()
        codes = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32)
        np.add.at(often, codes, np.repeat(batch.column("count").to_numpy(), [len(word) for word in words]))
    return Counter({chr(code): int(often[code]) for code in np.flatnonzero(often)})
