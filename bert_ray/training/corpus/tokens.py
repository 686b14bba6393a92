"""Documents to token ids, and whether a token begins a word.

Shapes: N documents, S slices, T tokens of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from bert_ray.training.corpus.cleaning import CHINESE, slices
from bert_ray.training.masking import special_ids
from bert_ray.training.shards import id_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What the tokenizer tells of a token takes about a hundred bytes: so many characters at a time are some 25 MB.
_BATCH_CHARACTERS = 2**20
# A longer document is tokenised in slices.
_SLICE_CHARACTERS = 2**16


class Tokenised(NamedTuple):
    """Documents as tokens, end to end.

    Attributes:
        ids: (T,), in the type that shards have.
        word_starts: bool (T,).
        lengths: tokens of each document, int64 (N,).
    """

    ids: np.ndarray
    word_starts: np.ndarray
    lengths: np.ndarray


def pretraining_tokenizer(reference: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory or a bundle, checked for what pretraining needs of it.

    Raises:
        BundleError: there is none at the reference.
        JobError: see `special_ids`.
    """
    from bert_ray.model.bundle import load_tokenizer
    from bert_ray.model.references import resolve

    tokenizer = load_tokenizer(resolve(reference), reference)
    special_ids(tokenizer, reference)
    return tokenizer


class Tokeniser:
    """Tokenises documents of any length; built on the worker, from the file that the corpus keeps."""

    def __init__(self, file: Path, vocabulary: int, words: str) -> None:
        """Load it.

        Args:
            file: tokenizer.json.
            vocabulary: tokens that it knows.
            words: "tokenizer", or "jieba" for Chinese words.
        """
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_file(str(file))
        self._backend.no_truncation()
        self._backend.no_padding()
        # "[SEP]" in a text is five characters, and not the end of a sentence.
        self._backend.encode_special_tokens = True
        self._dtype = id_type(vocabulary).to_pandas_dtype()
        self._starts = self._table()
        self._cut = _chinese_words() if words == "jieba" else None
        model = self._backend.model
        unknown = getattr(model, "unk_token", None)
        self.unknown_id: int | None = self._backend.token_to_id(unknown) if unknown else None

    def __call__(self, texts: list[str]) -> Tokenised:
        """Tokenise documents, without special tokens."""
        pieces: list[str] = []
        owners: list[int] = []
        ids, starts, lengths = [], [], np.zeros(len(texts), np.int64)

        def flush() -> None:
            some = self._encode(pieces)
            ids.append(some.ids)
            starts.append(some.word_starts)
            np.add.at(lengths, owners, some.lengths)
            pieces.clear()
            owners.clear()

        size = 0
        for owner, text in enumerate(texts):
            for piece in slices(text, _SLICE_CHARACTERS):
                pieces.append(piece)
                owners.append(owner)
                size += len(piece)
                if size >= _BATCH_CHARACTERS:
                    flush()
                    size = 0
        flush()
        return Tokenised(np.concatenate(ids), np.concatenate(starts), lengths)

    def _encode(self, pieces: list[str]) -> Tokenised:
        exact = self._cut is not None or self._starts is None
        encode = self._backend.encode_batch if exact else self._backend.encode_batch_fast
        encodings = encode(pieces, add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        total = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), self._dtype, total)
        if self._starts is not None:
            starts = self._starts[ids]
        else:
            # Not WordPiece: a word is what the pre-tokenizer sets apart.
            parts = [np.array(encoding.word_ids, np.int64) for encoding in encodings]
            starts = np.concatenate([np.diff(part, prepend=-1) != 0 for part in parts] or [np.empty(0, bool)])
        if self._cut is not None and total:
            inside = [self._inside(text, encoding) for text, encoding in zip(pieces, encodings, strict=True)]
            starts = starts & ~np.concatenate(inside)
        return Tokenised(ids, starts, lengths)

    def _inside(self, text: str, encoding: Any) -> np.ndarray:
        """Which tokens stand within a Chinese word, bool."""
        begins = np.fromiter((start for start, _ in encoding.offsets), np.int64, len(encoding))
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        chinese = _is_chinese(codes)
        within = np.zeros(len(codes), bool)
        if chinese.any():
            assert self._cut is not None
            within[:] = chinese
            within[list(self._cut(text))] = False
        return within[begins] if len(codes) else np.zeros(len(begins), bool)

    def _table(self) -> np.ndarray | None:
        """Whether each token of a WordPiece vocabulary begins a word, bool (V,); None: another kind."""
        prefix = getattr(self._backend.model, "continuing_subword_prefix", None)
        if type(self._backend.model).__name__ != "WordPiece" or not prefix:
            return None
        known = self._backend.get_vocab(with_added_tokens=True)
        table = np.ones(max(known.values()) + 1, bool)
        for token, number in known.items():
            table[number] = not token.startswith(prefix)
        return table


def _chinese_words() -> Callable[[str], Iterator[int]]:
    """A function from a text to where its words begin, by jieba."""
    import logging

    import jieba  # type: ignore[import-untyped]

    jieba.setLogLevel(logging.WARNING)

    def starts(text: str) -> Iterator[int]:
        place = 0
        for word in jieba.cut(text):
            yield place
            place += len(word)

    return starts


def _is_chinese(codes: np.ndarray) -> np.ndarray:
    """Which code points are Chinese characters, bool."""
    found = np.zeros(len(codes), bool)
    for first, last in zip(CHINESE[::3], CHINESE[2::3], strict=True):
        found |= (codes >= ord(first)) & (codes <= ord(last))
    return found


def lists_of(schema: pa.Schema, ids: pa.Array, tokens: Tokenised) -> list[pa.Array]:
    """The columns of a shard: ids of the documents (N), their tokens and their word starts."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(tokens.lengths)]), pa.int64())
    flat = (pa.array(tokens.ids), pa.array(tokens.word_starts))
    kinds = (schema.field("tokens").type, schema.field("word_starts").type)
    return [
        ids,
        *(pa.LargeListArray.from_arrays(offsets, values, type=kind) for values, kind in zip(flat, kinds, strict=True)),
    ]


def quiet_threads() -> None:
    """One thread of the tokenizer in this process: its neighbours use the other cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
