"""A corpus on disk: tokenised documents in shards that can be read from any position.

    CORPUS/
      corpus.json             the manifest, written last: a corpus without it is not finished
      tokenizer/              the tokenizer that the ids belong to, as transformers saves it
      train/00000.arrow …     shards: Arrow IPC files, memory-mapped, one row a document
      train/index.arrow       the length of every document, in the order of the shards
      validation/…            likewise

A shard's columns are `id`, `tokens` (ids without special tokens) and `word_starts` (whether a token begins a word).

Shapes: D documents of a split, T tokens of one document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from bert_ray.errors import LakeError, why
from bert_ray.lake.files import file_sha256, printable, sync, write_json
from bert_ray.model.examples import ranges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST_FILE, TOKENIZER_FOLDER, INDEX_FILE = "corpus.json", "tokenizer", "index.arrow"
SPLITS = ("train", "validation")
# The layout; one that a later version cannot read is refused by name rather than misread.
FORMAT = 1

INDEX_SCHEMA = pa.schema([pa.field("length", pa.uint32(), nullable=False)])


def id_type(vocabulary: int) -> pa.DataType:
    """The type of token ids: those of a vocabulary of up to 65,536 take two bytes each."""
    return pa.uint16() if vocabulary <= 2**16 else pa.uint32()


def shard_schema(vocabulary: int) -> pa.Schema:
    """The columns of a shard."""
    item = pa.field("item", id_type(vocabulary), nullable=False)
    return pa.schema(
        [
            pa.field("id", pa.binary(16), nullable=False),
            pa.field("tokens", pa.large_list(item), nullable=False),
            pa.field("word_starts", pa.large_list(pa.field("item", pa.bool_(), nullable=False)), nullable=False),
        ]
    )


@dataclass(kw_only=True, slots=True)
class Shard:
    """One shard as the manifest has it.

    Attributes:
        path: below the corpus directory, with /.
        documents, tokens: in it.
        bytes: the file's size.
        sha256: of the file, in hex.
    """

    path: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(kw_only=True, slots=True)
class Split:
    """What is to be trained on, or to be judged by.

    Attributes:
        shards: in order; document numbers run through them.
        index_sha256: of the split's index, in hex; None where it has no documents.
        words: as whitespace and the tokenizer's own rules part them.
    """

    shards: list[Shard] = field(default_factory=list)
    index_sha256: str | None = None
    words: int = 0

    @property
    def documents(self) -> int:
        """In all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """In all shards."""
        return sum(shard.tokens for shard in self.shards)


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What a corpus is.

    Attributes:
        splits: `train` and `validation`.
        vocabulary: tokens that the tokenizer knows.
        tokenizer_sha256: of its tokenizer.json, in hex.
        job: what it was made by: settings that decide its contents.
        dropped: documents left out, by reason.
        provenance: versions, date, and what else is worth knowing.
    """

    splits: dict[str, Split]
    vocabulary: int
    tokenizer_sha256: str
    job: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Tells this corpus from others: a hash over the hashes of its shards and its tokenizer, 16 hex digits."""
        hashes = [shard.sha256 for name in SPLITS for shard in self.splits[name].shards]
        return hashlib.sha256(" ".join([self.tokenizer_sha256, *hashes]).encode()).hexdigest()[:16]

    def write(self, corpus: Path) -> None:
        """Finish a corpus: whole or not at all."""
        write_json(corpus / MANIFEST_FILE, {"format": FORMAT, "fingerprint": self.fingerprint, **asdict(self)})


def read_manifest(corpus: Path) -> Manifest:
    """What a corpus is.

    Raises:
        LakeError: there is no finished corpus, or one of another layout.
    """
    path = corpus / MANIFEST_FILE
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.get("format") != FORMAT:
            raise LakeError(f"{path} is of format {content.get('format')}, this version reads {FORMAT}: make it anew")
        splits = {
            name: Split(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
            for name, split in content["splits"].items()
        }
        known = {name: content[name] for name in ("vocabulary", "tokenizer_sha256", "job", "dropped", "provenance")}
        return Manifest(splits={name: splits[name] for name in SPLITS}, **known)
    except FileNotFoundError:
        raise LakeError(
            f"{corpus} holds no finished corpus (no {MANIFEST_FILE}): make it with `bert-ray corpus`, or run that "
            "again where it was cut off"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LakeError(f"{path} is damaged ({error}): make the corpus anew") from error


def read_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a corpus's ids belong to."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(corpus / TOKENIZER_FOLDER)


def is_corpus(path: Path) -> bool:
    """Whether a directory is a finished corpus."""
    return (path / MANIFEST_FILE).is_file()


def write_shard(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> tuple[int, int]:
    """Write a shard to `path` and bring it to the disk; putting it in its place is the caller's.

    Args:
        path: a temporary name.
        schema: of `shard_schema`.
        batches: of that schema; one at a time is held in memory.

    Returns:
        documents and tokens written.
    """
    documents = tokens = 0
    with pa.OSFile(str(path), "wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                documents += batch.num_rows
                tokens += len(batch.column("tokens").flatten())
        file.flush()
    sync(path)
    return documents, tokens


def describe(corpus: Path, path: str, documents: int, tokens: int) -> Shard:
    """The manifest's entry of a shard that stands in its place."""
    place = corpus / path
    return Shard(path=path, documents=documents, tokens=tokens, bytes=place.stat().st_size, sha256=file_sha256(place))


def write_index(path: Path, lengths: Iterable[pa.Array]) -> str:
    """Write a split's index to `path`, document lengths shard by shard; returns its sha256."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, INDEX_SCHEMA) as writer:
        for part in lengths:
            writer.write_batch(pa.record_batch([part.cast(pa.uint32())], schema=INDEX_SCHEMA))
    sync(path)
    return file_sha256(path)


class Documents:
    """The documents of one split, or of several, memory-mapped: opened in the time of its index, whatever its size.

    Attributes:
        lengths: tokens of each document, uint32 (D,), also of those that cannot be read.
    """

    def __init__(self, corpus: Path, split: str, skip: Collection[str] = ()) -> None:
        """Open a split.

        Args:
            corpus: its directory.
            split: "train" or "validation".
            skip: paths of shards that are left out: their documents are not `readable`.

        Raises:
            LakeError: the manifest or the index is missing or damaged.
        """
        part = read_manifest(corpus).splits[split]
        self._set(
            [(corpus, shard) for shard in part.shards],
            [shard.path not in skip for shard in part.shards],
            _read_index(corpus, split, part),
        )

    @classmethod
    def joined(cls, parts: Sequence[Documents]) -> Documents:
        """The documents of several corpora, one after the other."""
        whole = cls.__new__(cls)
        whole._set(
            [shard for part in parts for shard in part._shards],
            [good for part in parts for good in part._good],
            np.concatenate([part.lengths for part in parts]),
        )
        return whole

    def _set(self, shards: list[tuple[Path, Shard]], good: list[bool], lengths: np.ndarray) -> None:
        self._shards, self._good, self.lengths = shards, good, lengths
        self.first = np.concatenate([[0], np.cumsum([shard.documents for _, shard in shards])]).astype(np.int64)
        # Arrow's memory maps, opened at first use: a corpus of thousands of shards costs no thousand files at once.
        self._open: dict[int, _OpenShard] = {}

    def verify(
        self, on_bad_shard: Literal["stop", "skip"] = "stop", seen: dict[str, list[Any]] | None = None
    ) -> dict[str, str]:
        """Read every shard and compare its hash with the manifest's.

        Args:
            on_bad_shard: what a bad one means.
            seen: path -> what a file is known by (hash wanted, size, times of change, inode) of shards whose hash was
                right: while that is the same the shard is not read again. What is found right is added to it.

        Returns:
            path of each bad shard -> what is wrong with it; empty where all are as they were written.

        Raises:
            LakeError: one is bad, and `on_bad_shard` is "stop".
        """
        found = {}
        seen = {} if seen is None else seen
        for corpus, shard in self._shards:
            if reason := _fault(corpus / shard.path, shard, seen):
                if on_bad_shard == "stop":
                    raise LakeError(
                        f"{corpus / shard.path} {reason}: restore it, or make the corpus anew; "
                        f"a new run with data.on_bad_shard=skip trains without its {shard.documents} documents (one "
                        "under way keeps to the rows that it began with)"
                    )
                found[shard.path] = reason
        return found

    def __len__(self) -> int:
        return int(self.first[-1])

    @cached_property
    def readable(self) -> np.ndarray | None:
        """Which documents can be read, bool (D,); None: all."""
        return None if all(self._good) else np.repeat(self._good, np.diff(self.first))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens to be read of each document, int64 (D,): none of one that cannot be."""
        lengths = self.lengths.astype(np.int64)
        return lengths if self.readable is None else np.where(self.readable, lengths, 0)

    def shard_of(self, documents: np.ndarray) -> list[str]:
        """The paths of the shards that hold the given documents, each once, in order."""
        found = np.unique(np.searchsorted(self.first, documents, side="right") - 1)
        return [str(corpus / shard.path) for corpus, shard in (self._shards[number] for number in found.tolist())]

    def take(self, documents: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stretches of documents, end to end.

        Args:
            documents: int64 (N,), numbers of documents.
            start: int64 (N,), the first token of each stretch in its document.
            stop: int64 (N,), one behind its last.

        Returns:
            token ids, int64 (sum of stop - start,), and whether each begins a word, bool likewise.
        """
        sizes = stop - start
        ends = np.cumsum(sizes)
        ids = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
        starts = np.empty(len(ids), bool)
        where = np.searchsorted(self.first, documents, side="right") - 1
        for number in np.unique(where).tolist():
            chosen = np.flatnonzero(where == number)
            shard = self._shard(number)
            begin = shard.offsets[documents[chosen] - self.first[number]] + start[chosen]
            take = ranges(begin, begin + sizes[chosen])
            put = ranges(ends[chosen] - sizes[chosen], ends[chosen])
            ids[put] = shard.tokens[take]
            starts[put] = (shard.bits[take >> 3] >> (take & 7).astype(np.uint8)) & 1
        return ids, starts

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            corpus, shard = self._shards[number]
            path = corpus / shard.path
            try:
                if (size := path.stat().st_size) != shard.bytes:
                    raise LakeError(f"{path} has {size} bytes of {shard.bytes}: restore it, or make the corpus anew")
                self._open[number] = _OpenShard(path)
            except (OSError, pa.ArrowException) as error:
                raise LakeError(f"{path} cannot be read ({error}): restore it, or make the corpus anew") from error
        return self._open[number]


def _read_index(corpus: Path, split: str, part: Split) -> np.ndarray:
    if not part.shards:
        return np.empty(0, np.uint32)
    path = corpus / split / INDEX_FILE
    try:
        if file_sha256(path) != part.index_sha256:
            raise LakeError(f"{path} has another hash than when it was written: make the corpus anew")
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all().column("length").to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise LakeError(f"{path} cannot be read ({error}): make the corpus anew") from error


class _OpenShard:
    """A shard's tokens as flat arrays over the memory map; several record batches are laid end to end.

    Attributes:
        offsets: where each document begins in `tokens`, int64 (documents + 1,).
        tokens: ids, (T,).
        bits: whether each begins a word, uint8 (T / 8,), the lowest bit first.
    """

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        lists = table.column("tokens")
        self.offsets = np.zeros(table.num_rows + 1, np.int64)
        np.cumsum(np.concatenate([chunk.value_lengths().to_numpy() for chunk in lists.chunks]), out=self.offsets[1:])
        flat = [chunk.flatten() for chunk in lists.chunks]
        self.tokens = flat[0].to_numpy() if len(flat) == 1 else np.concatenate([part.to_numpy() for part in flat])
        flags = [chunk.flatten() for chunk in table.column("word_starts").chunks]
        if len(flags) == 1 and flags[0].offset == 0:
            self.bits = np.frombuffer(flags[0].buffers()[1], np.uint8)
        else:
            whole = np.concatenate([part.to_numpy(zero_copy_only=False) for part in flags])
            self.bits = np.packbits(whole, bitorder="little")


def _fault(path: Path, shard: Shard, seen: dict[str, list[Any]]) -> str | None:
    """What is wrong with a shard's file; None: nothing, which `seen` notes."""
    name = printable(path)
    try:
        status = path.stat()
        if status.st_size != shard.bytes:
            return f"has {status.st_size} bytes of {shard.bytes}"
        now = [shard.sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        if seen.get(name) != now:
            seen.pop(name, None)
            if file_sha256(path) != shard.sha256:
                return "has another hash than when it was written"
            seen[name] = now
    except OSError as error:
        return f"cannot be read ({why(error)})"
    return None
