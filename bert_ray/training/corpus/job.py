"""What making a corpus or a vocabulary is told: every key, its default and its check. Imports nothing heavy."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import Literal

from bert_ray.errors import JobError
from bert_ray.options import RayOptions, check_choices


@dataclass(kw_only=True, slots=True)
class ReadingOptions:
    """How the input is read.

    Attributes:
        format: `parquet`, `delta`, `text` (files named .txt or .txt.gz); `auto`: what the place looks like.
        documents: what is a document in a plain-text file: each `line`, each `paragraph` (lines up to a blank one), or
            the whole `file`.
        encoding: of plain-text files, as Python calls it: `utf-8`, `latin-1`, `gb18030`.
        bad_bytes: what becomes of bytes that are no text in that encoding (in tables: in UTF-8): `fail`: the file is
            at fault, and the error names the byte; `replace`: U+FFFD stands for them, and the documents are counted.
    """

    format: Literal["auto", "parquet", "delta", "text"] = "auto"
    documents: Literal["line", "paragraph", "file"] = "line"
    encoding: str = "utf-8"
    bad_bytes: Literal["fail", "replace"] = "fail"

    def __post_init__(self) -> None:
        check_choices(self, "reading.")
        try:
            text = codecs.lookup(self.encoding)._is_text_encoding
        except LookupError:
            text = False
        _check(text, f"reading.encoding is {self.encoding!r}, which Python does not know: give utf-8, latin-1, gb18030")


@dataclass(kw_only=True, slots=True)
class NearOptions:
    """What counts as a near duplicate: MinHash over runs of words (Broder 1997; Lee et al., arXiv 2107.06499).

    Attributes:
        threshold: two documents are near duplicates if about this share of their runs of words is common to both
            (Jaccard similarity). The higher it is, the surer a document is to stay.
        words: in a run; each Chinese character is a word.
        permutations: hash functions of a signature; more tell documents around the threshold apart more sharply, and
            take as much more time.
    """

    threshold: float = 0.8
    words: int = 5
    permutations: int = 128

    def __post_init__(self) -> None:
        good = 0.0 < self.threshold < 1.0
        _check(good, f"near.threshold is {self.threshold}; give a share between 0 and 1, such as 0.8")
        _check(self.words >= 1, f"near.words is {self.words}; give 1 or more")
        _check(
            16 <= self.permutations <= 1024, f"near.permutations is {self.permutations}; give 16 to 1024, such as 128"
        )


@dataclass(kw_only=True, slots=True)
class CorpusJob:
    """Make a corpus: texts cleaned, rid of duplicates, tokenised, split, and written as shards to pretrain on.

    Attributes:
        input: a directory or a file, or several: Parquet (hive-partitioned or flat), a Delta table, or plain text.
        tokenizer: what to tokenise with: the output of `bert-ray vocabulary`, or the reference of a bundle.
        output: the corpus's directory: new, empty, or of an earlier run of the same job, which is then gone on with.
        columns: a table's text columns; each text in each of them is a document of its own. A table needs to have one
            of them at least.
        reading: see ReadingOptions.
        markup: `html`: tags become spaces and character references their characters; `none`: the text stays as it is.
        min_characters: documents with fewer, once cleaned, are left out.
        duplicates: which documents are left out because an earlier one says the same: `none`; `exact`: the same text
            once cleaned; `near`: also nearly the same.
        near: see NearOptions.
        validation_fraction: share of the documents that is set apart for validation, chosen by a hash of the text.
        words: what a word is when words are masked whole: `tokenizer`: as the tokenizer parts them, each Chinese
            character by itself; `jieba`: Chinese words as the segmenter jieba finds them.
        shard_tokens: tokens in a shard, about; a document is never split.
        engine: `local` (this process) or `ray` (Ray Data).
        workers: tasks at a time of engine ray; None: as many as the cluster has CPUs.
        on_error: what a file that cannot be read means: `continue`: it is listed, the others are read, and the corpus
            waits until it is mended; `fail`: the first one stops the run; `skip`: the corpus is made without it.
        unit_rows: rows of a table in a unit of work, about: what is lost at most when a worker is killed. A row group
            is never split.
        unit_megabytes: the same for plain text; a .gz file is never split.
        ray: where Ray runs.
    """

    input: str | list[str]
    tokenizer: str
    output: str
    columns: list[str] = field(default_factory=lambda: ["text"])
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    markup: Literal["none", "html"] = "none"
    min_characters: int = 1
    duplicates: Literal["none", "exact", "near"] = "near"
    near: NearOptions = field(default_factory=NearOptions)
    validation_fraction: float = 0.02
    words: Literal["tokenizer", "jieba"] = "tokenizer"
    shard_tokens: int = 2**24
    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    on_error: Literal["continue", "fail", "skip"] = "continue"
    unit_rows: int = 50_000
    unit_megabytes: int = 64
    ray: RayOptions = field(default_factory=RayOptions)

    def __post_init__(self) -> None:
        _check_places(self.input, self.output, self.columns, "the corpus's directory")
        _check(
            self.tokenizer.strip() != "",
            "tokenizer is empty: give a directory that `bert-ray vocabulary` made, or a bundle reference",
        )
        check_choices(self)
        _check_workers(self.workers)
        for name in ("min_characters", "shard_tokens", "unit_rows", "unit_megabytes"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give 1 or more")
        _check(
            0.0 <= self.validation_fraction <= 0.5,
            f"validation_fraction is {self.validation_fraction}; give a share from 0 (none) to 0.5",
        )

    @property
    def inputs(self) -> list[str]:
        """The input's places."""
        return [self.input] if isinstance(self.input, str) else self.input


@dataclass(kw_only=True, slots=True)
class VocabularyJob:
    """Train a WordPiece vocabulary on texts, or add a domain's frequent words to the one that a model has.

    Attributes:
        input: the texts: a directory or a file, or several: Parquet, a Delta table, or plain text.
        output: directory of the tokenizer, or with `extend` of the new bundle. Until it is there, what has been counted
            lies beside it, in `<output>.run`.
        columns: a table's text columns.
        reading: see ReadingOptions.
        markup: as in a corpus: `html`, or `none`.
        size: tokens of a new vocabulary; 30,522 in BERT.
        alphabet: characters of a new vocabulary, the most frequent ones; the others are unknown. Chinese takes some
            thousands.
        lowercase: whether letters lose case and accents, as in BERT uncased. With `extend` the model's own rule holds.
        min_count: how often a word, a piece or a character has to stand in the texts to be taken in.
        extend: reference of a bundle whose vocabulary is to be extended; None: a new vocabulary.
        words: with `extend`: how many words to add, the most frequent of those that the model has to spell in pieces.
        engine: what counts words: `local` (this process) or `ray` (Ray Data).
        workers: tasks at a time of engine ray; None: as many as the cluster has CPUs.
        on_error: what a file that cannot be read means, as in a corpus: `continue`, `fail` or `skip`.
        ray: where Ray runs.
    """

    input: str | list[str]
    output: str
    columns: list[str] = field(default_factory=lambda: ["text"])
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    markup: Literal["none", "html"] = "none"
    size: int = 30_000
    alphabet: int = 6_000
    lowercase: bool = True
    min_count: int = 2
    extend: str | None = None
    words: int = 1_000
    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    on_error: Literal["continue", "fail", "skip"] = "continue"
    ray: RayOptions = field(default_factory=RayOptions)

    def __post_init__(self) -> None:
        _check_places(self.input, self.output, self.columns, "the vocabulary's directory")
        check_choices(self)
        _check(self.size >= 100, f"size is {self.size}; give 100 or more tokens, such as 30000")
        for name in ("alphabet", "min_count", "words"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give 1 or more")
        _check_workers(self.workers)
        _check(self.extend != "", "extend is empty: give a bundle reference, or leave it out for a new vocabulary")

    @property
    def inputs(self) -> list[str]:
        """The input's places."""
        return [self.input] if isinstance(self.input, str) else self.input


def _check_places(given: str | list[str], output: str, columns: list[str], what: str) -> None:
    inputs = [given] if isinstance(given, str) else given
    _check(bool(inputs) and all(place.strip() for place in inputs), "input is empty: give a directory or a file")
    _check(len(set(inputs)) == len(inputs), f"input names a place twice: {', '.join(inputs)}")
    _check(output.strip() != "", f"output is empty: give {what}")
    _check(bool(columns) and all(columns), "columns is empty: name the text columns, or leave it out for `text`")
    _check(len(set(columns)) == len(columns), f"columns names a column twice: {', '.join(columns)}")


def _check_workers(workers: int | None) -> None:
    _check(workers is None or workers >= 1, f"workers is {workers}; give 1 or more")


def _check(good: bool, message: str) -> None:
    if not good:
        raise JobError(message)
