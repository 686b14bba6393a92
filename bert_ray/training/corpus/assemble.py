"""What one process does with all parts: decide on duplicates, lay the tokens out in shards, write the manifest.

Memory grows with the number of documents (some 40 bytes each), not with their text; a shard is in memory whole.

Shapes: D documents that were cleaned, K of a split that stay.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bert_ray import __version__
from bert_ray.errors import LakeError
from bert_ray.lake.files import file_sha256, sync
from bert_ray.lake.journal import Journal, output_errors
from bert_ray.training.corpus.duplicates import EXACT, KEPT, NEAR, bands, decide
from bert_ray.training.corpus.work import Work
from bert_ray.training.shards import (
    INDEX_FILE,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    Shard,
    Split,
    shard_schema,
    write_index,
    write_shard,
)

_Read = Callable[[str], np.ndarray]


def decide_duplicates(work: Work, parts: Sequence[str], exact: bool) -> None:
    """Write down which documents are left out because an earlier one says the same.

    Args:
        work: the run.
        parts: ids of the cleaned parts, in order.
        exact: whether equal documents are looked for at all.
    """
    journal, name = Journal(work.output), f"duplicates-{work.digest}"
    if journal.has_receipt(name):
        return
    clock = time.perf_counter()
    files = [work.place("clean", part) for part in parts]
    counts = [pq.read_metadata(file).num_rows for file in files]
    if exact:
        band = (lambda number: _column(files, counts, f"band_{number}")) if work.near else None
        verdicts = decide(_ids(files, counts), band, bands(work.near)[0] if work.near else 0)
    else:
        verdicts = np.full(sum(counts), KEPT, np.uint8)
    found = {"exact": int((verdicts == EXACT).sum()), "near": int((verdicts == NEAR).sum()), "read": len(verdicts)}
    with journal.temporary(name) as temporary:
        with output_errors(Path(work.output)), temporary.open("wb") as file:
            np.save(file, verdicts)
        sync(temporary)
        receipt = {"unit": name, **found, "seconds": round(time.perf_counter() - clock, 3), "session": work.session}
        journal.commit(name, temporary, work.verdicts, receipt)


def _ids(files: Sequence[Path], counts: Sequence[int]) -> np.ndarray:
    """The ids of all documents, as two numbers each, uint64 (D, 2)."""
    found = np.empty((sum(counts), 2), np.uint64)
    start = 0
    for batch in _batches(files, "id"):
        column = batch.column(0)
        raw = np.frombuffer(column.buffers()[1], np.uint64).reshape(-1, 2)
        found[start : start + len(column)] = raw[column.offset : column.offset + len(column)]
        start += len(column)
    return found


def _column(files: Sequence[Path], counts: Sequence[int], name: str) -> np.ndarray:
    """One number of all documents, uint64 (D,)."""
    found = np.empty(sum(counts), np.uint64)
    start = 0
    for batch in _batches(files, name):
        found[start : start + batch.num_rows] = batch.column(0).to_numpy()
        start += batch.num_rows
    return found


def _batches(files: Sequence[Path], column: str) -> Iterator[pa.RecordBatch]:
    for path in files:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(columns=[column])


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A tokenised part as laying out sees it.

    Attributes:
        validation: bool (N,), of its documents; lengths: tokens of each, uint32 (N,).
    """

    path: Path
    validation: np.ndarray
    lengths: np.ndarray


def write_shards(work: Work, parts: Sequence[str], shard_tokens: int, watch: Callable[[int], None]) -> dict[str, Split]:
    """Lay the tokens of all parts out in shards, train and validation, with their indexes.

    Args:
        work: the run.
        parts: ids of the tokenised parts, in order.
        shard_tokens: a shard ends with the document that reaches so many.
        watch: told how many documents are laid out so far.

    Returns:
        the splits as the manifest has them.
    """
    tokenised = [_look_at(work.place("tokens", part)) for part in parts]
    splits, done = {}, 0
    for split in SPLITS:
        chosen = [part.validation == (split == "validation") for part in tokenised]
        lengths = np.concatenate(
            [np.empty(0, np.uint32), *(part.lengths[mine] for part, mine in zip(tokenised, chosen, strict=True))]
        )
        first = np.concatenate([[0], np.cumsum([int(c.sum()) for c in chosen])])
        found = Split()
        cuts = _cuts(lengths, shard_tokens)
        for number, (start, stop) in enumerate(pairwise(cuts)):
            path = f"{split}/{number:05}.arrow"
            rows = _rows(tokenised, chosen, first, start, stop)
            shard, words = _write_shard(work, path, rows)
            found.shards.append(shard)
            found.words += words
            done += stop - start
            watch(done)
        _remove_others(Path(work.output, split), {Path(shard.path).name for shard in found.shards})
        if found.shards:
            found.index_sha256 = _write_index(work, split, lengths)
        splits[split] = found
    return splits


def _look_at(path: Path) -> _Tokens:
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        validation, lengths = [np.empty(0, bool)], [np.empty(0, np.uint32)]
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            validation.append(batch.column("validation").to_numpy(zero_copy_only=False))
            lengths.append(batch.column("tokens").value_lengths().to_numpy().astype(np.uint32))
    return _Tokens(path, np.concatenate(validation), np.concatenate(lengths))


def _cuts(lengths: np.ndarray, shard_tokens: int) -> list[int]:
    """Where shards begin and end, among K documents of the given lengths."""
    ends = np.cumsum(lengths, dtype=np.int64)
    cuts = [0]
    while cuts[-1] < len(ends):
        before = int(ends[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(min(len(ends), int(np.searchsorted(ends, before + shard_tokens)) + 1))
    return cuts


def _rows(
    parts: Sequence[_Tokens], chosen: Sequence[np.ndarray], first: np.ndarray, start: int, stop: int
) -> Iterator[pa.RecordBatch]:
    """Documents `start` to `stop` of a split, batch by batch.

    Args:
        parts: all of them.
        chosen: for each part which of its documents are the split's.
        first: the number in the split of each part's first document.
        start: the first document's number in the split.
        stop: one behind the last's.
    """
    for index in range(int(np.searchsorted(first, start, side="right")) - 1, len(parts)):
        if first[index] >= stop:
            return
        places = np.flatnonzero(chosen[index])
        places = places[max(0, start - first[index]) : max(0, stop - first[index])]
        if not len(places):
            continue
        with pa.memory_map(str(parts[index].path)) as source:
            file = pa.ipc.open_file(source)
            begin = 0
            for number in range(file.num_record_batches):
                batch = file.get_batch(number)
                inside = places[(places >= begin) & (places < begin + batch.num_rows)] - begin
                begin += batch.num_rows
                if len(inside):
                    yield batch.select(["id", "tokens", "word_starts"]).take(pa.array(inside))


def _write_shard(work: Work, path: str, rows: Iterator[pa.RecordBatch]) -> tuple[Shard, int]:
    """Write a shard, where it does not stand yet; returns its entry in the manifest, and its words."""
    journal = Journal(work.output)
    name = f"shard-{work.digest}-{path.replace('/', '-').removesuffix('.arrow')}"
    if not journal.has_receipt(name):
        schema = shard_schema(work.vocabulary)
        with journal.temporary(name) as temporary:
            # One batch a shard: then a reader maps its tokens without a copy.
            whole = pa.Table.from_batches(rows, schema).combine_chunks()
            words = int(np.count_nonzero(whole.column("word_starts").chunk(0).flatten().to_numpy(zero_copy_only=False)))
            with output_errors(Path(work.output)):
                documents, tokens = write_shard(temporary, schema, whole.to_batches())
                receipt = {
                    "unit": name,
                    "documents": documents,
                    "tokens": tokens,
                    "words": words,
                    "size": temporary.stat().st_size,
                    "sha256": file_sha256(temporary),
                    "session": work.session,
                }
            journal.commit(name, temporary, Path(work.output, path), receipt)
    note = journal.receipt(name)
    shard = Shard(
        path=path, documents=note["documents"], tokens=note["tokens"], bytes=note["size"], sha256=note["sha256"]
    )
    return shard, note["words"]


def _write_index(work: Work, split: str, lengths: np.ndarray) -> str:
    with Journal(work.output).temporary(f"index-{split}") as temporary, output_errors(Path(work.output)):
        found = write_index(temporary, [pa.array(lengths)])
        temporary.replace(Path(work.output, split, INDEX_FILE))
    return found


def _remove_others(folder: Path, names: set[str]) -> None:
    """Shards that a run over other files had left: no receipt of this one speaks for them."""
    for path in folder.glob("*.arrow") if folder.is_dir() else ():
        if path.name not in names and path.name != INDEX_FILE:
            path.unlink()


def write_manifest(
    work: Work,
    splits: dict[str, Split],
    job: dict[str, Any],
    clean: Sequence[dict[str, Any]],
    parts: Sequence[str],
    skipped: Sequence[str],
    began: str,
) -> Manifest:
    """Finish a corpus.

    Args:
        work: the run.
        splits: of `write_shards`.
        job: the settings that decide its contents.
        clean: receipts of the cleaned parts.
        parts: their ids.
        skipped: files that could not be read and were left out.
        began: the date of the run's beginning.

    Raises:
        LakeError: there is nothing to train on.
    """
    journal = Journal(work.output)
    dropped: Counter[str] = Counter()
    for note in clean:
        dropped.update(note["dropped"])
    duplicates = journal.receipt(f"duplicates-{work.digest}")
    tokens = [journal.receipt(work.name("tokens", part)) for part in parts]
    dropped["exact duplicate"], dropped["near duplicate"] = duplicates["exact"], duplicates["near"]
    dropped["no tokens"] = sum(note["no tokens"] for note in tokens)
    dropped = Counter({reason: count for reason, count in sorted(dropped.items()) if count})
    read = sum(note["read"] for note in clean)
    if not splits["train"].documents:
        why = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items())
        held = splits["validation"].documents
        raise LakeError(
            f"no document is left to train on, of {read:,} that were read ({why or 'none was dropped'}; validation: "
            f"{held:,}): " + ("give validation_fraction=0" if held else "name other columns, or another input")
        )
    manifest = Manifest(
        splits=splits,
        vocabulary=work.vocabulary,
        tokenizer_sha256=file_sha256(Path(work.output, TOKENIZER_FOLDER, "tokenizer.json")),
        job=job,
        dropped=dict(dropped),
        provenance={
            "version": __version__,
            "began": began,
            "engine": work.engine,
            "parts": work.digest,
            "documents_read": read,
            "characters": sum(note["characters"] for note in clean),
            "documents_with_replaced_bytes": sum(note["replaced"] for note in clean),
            "unknown_tokens": sum(note["unknown"] for note in tokens),
            "skipped_files": list(skipped),
        },
    )
    with output_errors(Path(work.output)):
        manifest.write(Path(work.output))
    return manifest
