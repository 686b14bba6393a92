"""The annotated table: where it may stand, and how a unit's part of it is written.

A part is OUT/<partition directories of the input>/part-<unit id>.parquet.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from bert_ray.errors import JobError, LakeError, why
from bert_ray.lake.journal import FOLDER, Journal, output_errors
from bert_ray.lake.snapshots import table_around
from bert_ray.lake.tables import local_path, local_target, walk
from bert_ray.lake.units import Unit

# A row group is written once it has this much data in memory: the bound of what a worker holds beside a batch, and
# enough for a reader to skip by.
_ROW_GROUP_BYTES, _ROW_GROUP_ROWS = 64 * 2**20, 128 * 1024
# A part's name: Spark and others begin theirs with "part-" too. The id is that of `Unit.of`.
_PART = re.compile(r"part-([0-9a-f]{20})\.parquet")


def check_place(output: str | os.PathLike[str], source: str | os.PathLike[str]) -> Path:
    """The output directory, absolute, after it was made sure that a table may be written there.

    Raises:
        JobError: output and input lie one inside the other; or the output lies in a Delta or Iceberg table, or holds
            something that is not a run of ours.
        LakeError: the input does not exist.
    """
    read, place = local_path(source), local_target(output)
    check_apart(place, read)
    if (around := table_around(place)) is not None:
        raise JobError(f"the output {place} lies in the table {around}, whose log would not know of it: choose another")
    try:
        found = sorted(os.listdir(place))
    except FileNotFoundError:
        found = []
    except NotADirectoryError as error:
        raise JobError(f"the output {place} is a file, or lies in one: name a directory") from error
    except OSError as error:
        raise LakeError(f"the output {place} cannot be listed: {why(error)}") from error
    # A run that was killed at its very start leaves the journal's directory and nothing in it.
    if set(found) - {FOLDER} and not Journal(place).read_run():
        raise JobError(
            f"the output {place} is not empty and not of an earlier run (it has {found[0]!r}): "
            "choose another, or empty it"
        )
    return place


def check_apart(place: Path, read: Path) -> None:
    """Make sure that of an output and an input, both absolute, neither lies inside the other.

    Raises:
        JobError: one does.
    """
    if place == read:
        raise JobError(f"input and output are the same place, {place}: choose another output")
    if place.is_relative_to(read):
        raise JobError(f"the output {place} lies inside the input {read}, whose next run would read it: choose another")
    if read.is_relative_to(place):
        raise JobError(f"the input {read} lies inside the output {place}: choose an output beside it")


def part_path(output: Path, unit: Unit) -> Path:
    """Where the unit's rows come to stand."""
    return output / unit.partition_directory / f"part-{unit.id}.parquet"


def parts(output: Path) -> dict[str, Path]:
    """The part files that stand in the output, by unit id; files that others have put there are none.

    Raises:
        LakeError: a directory cannot be listed, and what stands in it would be taken for missing.
    """
    # Parts stand in partition directories, which may lie on another disk behind a link.
    files = walk(output, lambda name: "=" in name)
    return {match[1]: path for path in files if (match := _PART.fullmatch(path.name))}


class PartWriter:
    """Writes batches into an open file, zstd-compressed, in row groups of a bounded size."""

    def __init__(self, file: BinaryIO, schema: pa.Schema, output: Path) -> None:
        self._schema, self._output = schema, output
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._held: list[pa.RecordBatch] = []
        self._held_rows = self._held_bytes = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Take a batch of the schema's columns; it reaches the file with its row group."""
        self._held.append(batch)
        self._held_rows += batch.num_rows
        self._held_bytes += batch.nbytes
        if self._held_rows >= _ROW_GROUP_ROWS or self._held_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_batches(self._held, self._schema)
        with output_errors(self._output):
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._held, self._held_rows, self._held_bytes = [], 0, 0

    def close(self) -> None:
        """Write what is held, and the footer."""
        if self._held:
            self._flush()
        with output_errors(self._output):
            self._writer.close()

    def abandon(self) -> None:
        """Leave the file without the footer that would make it look whole."""
        self._held = []
        self._writer.is_open = False  # Else it closes itself when it is collected, into a file closed by then.


@contextlib.contextmanager
def writing(output: Path, path: Path, schema: pa.Schema, metadata: Mapping[str, str]) -> Iterator[PartWriter]:
    """A writer for one part file at `path`, which is safe on the disk when the block ends well.

    Args:
        output: the table it is for, which errors name.
        path: the file, which is not yet there.
        schema: the columns that will be written.
        metadata: the file's own key-value metadata.

    Raises:
        OutputError: the disk is full, or the place may not be written.
    """
    with output_errors(output):
        file = path.open("wb")
    try:
        writer = PartWriter(file, schema.with_metadata(dict(metadata)), output)
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        with output_errors(output):
            file.flush()
            os.fsync(file.fileno())
    finally:
        # Closing flushes, which fails once more on a full disk; what went wrong before is what counts.
        with contextlib.suppress(OSError):
            file.close()
