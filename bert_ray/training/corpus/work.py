"""What a worker does with a part, on either engine: clean, tokenise, or count; then leave a receipt.

- clean: the part's documents, cleaned, with the hashes that tell duplicates: _bert_ray/clean/ID.parquet
- tokens: those of them that stay, tokenised: _bert_ray/tokens/ID.arrow
- count: how often each word stands in the part, for a vocabulary: _bert_ray/count/RULE/ID.parquet
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bert_ray.lake import attempts
from bert_ray.lake.files import as_text, file_sha256, sync
from bert_ray.lake.journal import FOLDER, Journal, OutputError, output_errors
from bert_ray.lake.outputs import writing
from bert_ray.training.corpus.cleaning import clean
from bert_ray.training.corpus.counting import WordCounter
from bert_ray.training.corpus.duplicates import KEPT, bands, signer
from bert_ray.training.corpus.job import NearOptions
from bert_ray.training.corpus.sources import Part, Reader
from bert_ray.training.corpus.tokens import Tokenised, Tokeniser, lists_of
from bert_ray.training.order import held_out
from bert_ray.training.shards import TOKENIZER_FOLDER, shard_schema

Stage = Literal["clean", "tokens", "count"]

# The bytes of a document's hash that shards keep.
_ID_BYTES = 16
# Documents that are tokenised and written together, or so many characters.
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 4096, 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What all parts of a run have in common: small, picklable, sent to every worker.

    Attributes:
        session: names one driver's try at the run.
        output: the corpus's directory, or where a vocabulary's counts lie.
        readers: of the sources, by number.
        near: None: near duplicates stay.
        vocabulary: tokens that the tokenizer knows.
        digest: of the parts that the corpus is made of, as tokens belong to one set of them; or of what words are
            counted by. "" while it is not known.
    """

    session: str
    engine: str
    output: str
    readers: tuple[Reader, ...]
    markup: str
    min_characters: int = 1
    near: NearOptions | None = None
    validation_fraction: float = 0.0
    vocabulary: int = 0
    words: str = "tokenizer"
    digest: str = ""

    def name(self, stage: Stage, part: str) -> str:
        """How the journal calls a part's stage."""
        return f"clean-{part}" if stage == "clean" else f"{stage}-{self.digest}-{part}"

    def place(self, stage: Stage, part: str) -> Path:
        """Where a part's file of a stage stands."""
        file = f"{part}.{'arrow' if stage == 'tokens' else 'parquet'}"
        # Counts by another rule stand beside these: a worker of a killed driver may still be at them.
        return Path(self.output, FOLDER, stage, *([self.digest] if stage == "count" else ()), file)

    @property
    def tokenizer(self) -> Path:
        """What words are counted by."""
        return Path(self.output, FOLDER, TOKENIZER_FOLDER, f"{self.digest}.json")

    @property
    def verdicts(self) -> Path:
        """Which documents are left out as duplicates: a file of one byte each, in the order of the parts."""
        return Path(self.output, FOLDER, "duplicates", f"{self.digest}.npy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One stage of one part.

    Attributes:
        first: tokens: the number of the part's first document in the corpus.
    """

    stage: Stage
    part: Part
    first: int = 0

    def to_json(self) -> str:
        return json.dumps({"stage": self.stage, "part": self.part.to_json(), "first": self.first})

    @classmethod
    def from_json(cls, text: str) -> Task:
        fields = json.loads(text)
        return cls(stage=fields["stage"], part=Part.from_json(fields["part"]), first=fields["first"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a task ended.

    Attributes:
        part: its id.
        documents: read (clean), or written (tokens).
        lasting: every other task would fail in the same way.
    """

    part: str
    state: Literal["done", "failed"]
    documents: int = 0
    seconds: float = 0.0
    error: str = ""
    lasting: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        return cls(**json.loads(text))


def do(work: Work, task: Task, watch: Callable[[int], None] | None = None) -> Outcome:
    """Do a task; whatever goes wrong with it is the outcome, not an exception.

    Args:
        work: what all tasks of the run have in common.
        task: the task.
        watch: told after each batch how many documents are done so far.
    """
    journal = Journal(work.output)
    part, name = task.part, work.name(task.stage, task.part.id)
    if note := journal.has_receipt(name) and journal.receipt(name):
        return Outcome(part=part.id, state="done", documents=note["read"], seconds=note["seconds"])
    try:
        attempts.begin(journal, name, work, str(part.unit), "try fewer workers")
        clock = time.perf_counter()
        with journal.temporary(name) as temporary:
            found = _STAGES[task.stage](work, task, temporary, watch or _nobody)
            seconds = round(time.perf_counter() - clock, 3)
            receipt = {
                "unit": name,
                "file": part.unit.path,
                **found,
                "seconds": seconds,
                **attempts.signature(work),
            }
            journal.commit(name, temporary, work.place(task.stage, part.id), receipt)
        return Outcome(part=part.id, state="done", documents=found["read"], seconds=seconds)
    except Exception as error:
        return _failed(work, task, journal, error)


def _clean(work: Work, task: Task, temporary: Path, watch: Callable[[int], None]) -> dict[str, Any]:
    part = task.part
    dropped: Counter[str] = Counter()
    read = kept = characters = replaced = 0
    near = work.near
    sign = _signer(near.threshold, near.words, near.permutations) if near else None
    schema = clean_schema(work.near)
    with writing(Path(work.output), temporary, schema, {"bert_ray.source": as_text(part.unit.path)}) as writer:
        for texts, bad in work.readers[part.source].read(part):
            read += len(texts)
            replaced += bad
            cleaned = []
            for text in texts:
                if text is None:
                    dropped["null"] += 1
                elif not (body := clean(text, work.markup)):
                    dropped["empty"] += 1
                elif len(body) < work.min_characters:
                    dropped["too short"] += 1
                else:
                    cleaned.append(body)
            if cleaned:
                writer.write(_batch(cleaned, schema, work.validation_fraction, sign))
            kept += len(cleaned)
            characters += sum(map(len, cleaned))
            watch(read)
    return {"read": read, "kept": kept, "dropped": dict(dropped), "characters": characters, "replaced": replaced}


def clean_schema(near: NearOptions | None) -> pa.Schema:
    """The columns of a cleaned part."""
    count = bands(near)[0] if near else 0
    return pa.schema(
        [
            pa.field("id", pa.binary(_ID_BYTES), nullable=False),
            pa.field("validation", pa.bool_(), nullable=False),
            *(pa.field(f"band_{number}", pa.uint64(), nullable=False) for number in range(count)),
            pa.field("text", pa.large_string(), nullable=False),
        ]
    )


def _batch(
    texts: list[str], schema: pa.Schema, fraction: float, sign: Callable[[str], np.ndarray] | None
) -> pa.RecordBatch:
    ids = [hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest()[:_ID_BYTES] for text in texts]
    columns: list[pa.Array] = [pa.array(ids, schema.field("id").type), pa.array(held_out(texts, fraction))]
    if sign is not None:
        signed = np.stack([sign(text) for text in texts])
        columns += [pa.array(np.ascontiguousarray(signed[:, band])) for band in range(signed.shape[1])]
    columns.append(pa.array(texts, pa.large_string()))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _tokens(work: Work, task: Task, temporary: Path, watch: Callable[[int], None]) -> dict[str, Any]:
    path = Path(work.output, TOKENIZER_FOLDER, "tokenizer.json")
    tokenise = _tokeniser(path, file_sha256(path), work.vocabulary, work.words)
    schema = tokens_schema(work.vocabulary)
    verdicts = np.load(work.verdicts, mmap_mode="r")
    number, read, kept, empty = task.first, 0, 0, 0
    tokens = unknown = 0
    with output_errors(Path(work.output)), pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in _kept_text(work.place("clean", task.part.id)):
                stays = verdicts[number : number + batch.num_rows] == KEPT
                number += batch.num_rows
                read += batch.num_rows
                batch = batch.filter(pa.array(stays))
                if batch.num_rows:
                    found = tokenise(batch.column("text").to_pylist())
                    told = found.lengths > 0
                    empty += int((~told).sum())
                    kept += int(told.sum())
                    writer.write_batch(_token_batch(batch, found, told, schema))
                    tokens += len(found.ids)
                    unknown += int((found.ids == tokenise.unknown_id).sum())
                watch(read)
        file.flush()
    with output_errors(Path(work.output)):
        sync(temporary)
    return {"read": read, "kept": kept, "no tokens": empty, "tokens": tokens, "unknown": unknown}


def tokens_schema(vocabulary: int) -> pa.Schema:
    """The columns of a tokenised part: a shard's, and which split a document belongs to."""
    return shard_schema(vocabulary).append(pa.field("validation", pa.bool_(), nullable=False))


def _token_batch(batch: pa.RecordBatch, tokens: Tokenised, told: np.ndarray, schema: pa.Schema) -> pa.RecordBatch:
    """A batch of the schema, without documents of which no token is left."""
    columns = [*lists_of(schema, batch.column("id"), tokens), batch.column("validation")]
    whole = pa.RecordBatch.from_arrays(columns, schema=schema)
    return whole if told.all() else whole.filter(pa.array(told))


def _kept_text(path: Path) -> Iterator[pa.RecordBatch]:
    """A cleaned part's documents, a bounded amount of text at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            known = file.metadata.row_group(group)
            each = max(1, known.total_byte_size // max(1, known.num_rows))
            rows = max(1, min(_BATCH_DOCUMENTS, _BATCH_CHARACTERS // each))
            yield from file.iter_batches(rows, row_groups=[group], columns=["id", "validation", "text"])


def _count(work: Work, task: Task, temporary: Path, watch: Callable[[int], None]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    words = WordCounter(Tokenizer.from_str(work.tokenizer.read_text("utf-8")))
    read = replaced = 0
    for texts, bad in work.readers[task.part.source].read(task.part):
        read += len(texts)
        replaced += bad
        for text in texts:
            if text and (body := clean(text, work.markup)):
                words.add(body)
        watch(read)
    table = words.table()
    source = {"bert_ray.source": as_text(task.part.unit.path)}
    with writing(Path(work.output), temporary, table.schema, source) as writer:
        for batch in table.to_batches():
            writer.write(batch)
    return {"read": read, "words": table.num_rows, "replaced": replaced}


_STAGES = {"clean": _clean, "tokens": _tokens, "count": _count}


# A worker process does many parts; what takes time to make is made once.
@lru_cache(maxsize=1)
def _signer(threshold: float, words: int, permutations: int) -> Callable[[str], np.ndarray]:
    return signer(NearOptions(threshold=threshold, words=words, permutations=permutations))


@lru_cache(maxsize=1)
def _tokeniser(file: Path, sha256: str, vocabulary: int, words: str) -> Tokeniser:
    """`sha256` is the file's: another may stand in its place by now."""
    return Tokeniser(file, vocabulary, words)


def _failed(work: Work, task: Task, journal: Journal, error: Exception) -> Outcome:
    told = attempts.fail(journal, work.name(task.stage, task.part.id), task.part.unit, work, error)
    return Outcome(part=task.part.id, state="failed", error=told, lasting=isinstance(error, OutputError))


def _nobody(done: int) -> None:
    """Nobody watches."""
