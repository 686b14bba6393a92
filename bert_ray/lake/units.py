"""One unit of work: a Parquet file, or a range of its row groups; and how its rows are read."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from bert_ray.errors import LakeError, why
from bert_ray.lake.files import as_text, printable
from bert_ray.lake.schemas import conform, holds

# What Hive, Spark and pyarrow write for a null partition value.
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"

# A batch ends at this many rows or about this much data, whichever comes first. Rows: enough for the annotator to pack
# rows of like length together. Bytes: what bounds a worker's memory where rows are huge.
_BATCH_ROWS, _BATCH_BYTES = 8192, 32 * 2**20
# Rows that show how large rows are.
_PROBE_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A unit of work, small enough to travel to a worker.

    Attributes:
        id: a function of all else, so that who does the unit again writes the same output file, never a second one.
        path: the file, relative to the table's root, with "/" between its parts.
        row_groups: first and one past the last row group; None where the file's footer could not be read.
        rows: rows in these row groups; None where not known.
        size_bytes, modified_ns: the file's, by which a changed file is told from the one that was planned.
    """

    id: str
    path: str
    row_groups: tuple[int, int] | None
    rows: int | None
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(
        cls, path: str, row_groups: tuple[int, int] | None, rows: int | None, size_bytes: int, modified_ns: int
    ) -> Unit:
        """A unit with the id that belongs to it."""
        told = json.dumps([path, row_groups, size_bytes, modified_ns])
        return cls(
            # 80 bits: among a million units two alike are a matter of 1 in 10^12.
            id=hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:20],
            path=path,
            row_groups=row_groups,
            rows=rows,
            size_bytes=size_bytes,
            modified_ns=modified_ns,
        )

    @property
    def partition_directory(self) -> str:
        """The hive-style directories the file lies in ("a=1/b=2"), "" where there are none."""
        return "/".join(part for part in self.path.split("/")[:-1] if "=" in part)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Unit:
        fields = json.loads(text)
        if fields["row_groups"] is not None:
            fields["row_groups"] = tuple(fields["row_groups"])
        return cls(**fields)

    def __str__(self) -> str:
        if self.row_groups is None:
            return self.path
        start, stop = self.row_groups
        return f"{self.path} (row groups {start} to {stop - 1})" if stop - start > 1 else f"{self.path}"


def partition_values(path: str) -> dict[str, str | None]:
    """The values that a path's hive-style directories spell: {"source": "imdb"} for "source=imdb/part-0.parquet"."""
    values: dict[str, str | None] = {}
    for part in as_text(path).split("/")[:-1]:
        name, sign, value = part.partition("=")
        if sign and name:
            values[unquote(name)] = None if value == _HIVE_NULL else unquote(value)
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetReader:
    """Reads units of a Parquet table; small and picklable, it travels to the workers.

    Attributes:
        root: the directory that the units' paths start from.
        schema: the table's schema, which every batch has, whatever its file's own types are.
    """

    root: str
    schema: pa.Schema

    def read(
        self, unit: Unit, columns: Sequence[str], required: Sequence[str] = ()
    ) -> Generator[pa.RecordBatch, None, None]:
        """The unit's rows in order, a few thousand at a time.

        Args:
            unit: the unit.
            columns: the columns to give, in this order; partition columns may be among them. A column that this file
                lacks (another file of the table has it) is null.
            required: those that the file or its directory must have.

        Raises:
            LakeError: the file is damaged, is gone, has changed since it was planned, lacks a required column or has
                one that does not fit the table's.
        """
        path = Path(self.root, unit.path)
        told = printable(path)
        target = pa.schema([self.schema.field(name) for name in columns])
        constants = partition_values(unit.path)
        try:
            status = path.stat()
            _unchanged(told, status, unit)
            if not stat.S_ISREG(status.st_mode):  # Opening a pipe would wait for who writes to it.
                raise LakeError(f"{told} is no file: remove it, and run again")
            # As bytes: Arrow takes no str whose name is not UTF-8.
            with pa.OSFile(os.fsencode(path)) as source, open_parquet(source) as file:
                _ = file.schema_arrow.names  # They may be no UTF-8.
                if unit.row_groups is None:  # Its columns are not in the table's schema, its rows in no unit's range.
                    raise LakeError(f"{told} could not be read when the run was planned, and now it can: run again")
                found = file.schema_arrow
                self._check(told, found, target, constants, required)
                wanted = [name for name in columns if name in found.names]
                # By name alone a plain column "a.b" and the field b of a struct a are alike: conform() picks.
                only = None if set(wanted) >= set(found.names) else wanted
                for group in range(*unit.row_groups):
                    rows = _batch_rows(file, group, only)
                    for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=only):
                        try:
                            whole = conform(batch, target, constants)
                        except pa.ArrowInvalid as error:
                            raise LakeError(f"{told}: {_one_line(error)}") from error
                        yield whole
            # Else another run, which has the file as it is now, and this one would both write its rows.
            _unchanged(told, path.stat(), unit)
        except FileNotFoundError:
            raise LakeError(f"{told} is gone, or this machine does not see it") from None
        except UnicodeDecodeError as error:
            raise LakeError(f"{told} has a column whose name is no UTF-8. Replace the file and run again") from error
        except (pa.ArrowException, OSError) as error:
            raise LakeError(f"{told} cannot be read: {_one_line(error)}. Replace the file and run again") from error

    @staticmethod
    def _check(
        path: str,
        found: pa.Schema,
        target: pa.Schema,
        constants: dict[str, str | None],
        required: Sequence[str],
    ) -> None:
        for name in required:
            if name not in found.names and name not in constants:
                raise LakeError(
                    f"{path} has no column {name!r}, as other files of the table have: it has {found.names}"
                )
        for field in target:
            indices = found.get_all_field_indices(field.name)
            if len(indices) > 1:
                raise LakeError(f"{path} has {len(indices)} columns named {field.name!r}: rename all but one")
            if indices:
                kind = found.field(indices[0]).type
                if not holds(field, found.field(indices[0])):
                    raise LakeError(
                        f"{path}: column {field.name!r} is {kind}, in the rest of the table it is {field.type}: "
                        "rewrite the file with that type"
                    )


def _unchanged(told: str, status: os.stat_result, unit: Unit) -> None:
    if (status.st_size, status.st_mtime_ns) != (unit.size_bytes, unit.modified_ns):
        raise LakeError(f"{told} changed after the run had begun: run again to take it as it is now")


def open_parquet(source: pa.NativeFile) -> pq.ParquetFile:
    """A file as planning and workers read it, with the same types.

    INT96 timestamps, as Spark and Hive write them, are read in microseconds: in nanoseconds, Arrow's own way, years
    before 1678 and after 2261 wrap around, and Spark does not read what is written of them.
    """
    return pq.ParquetFile(source, coerce_int96_timestamp_unit="us")


def _batch_rows(file: pq.ParquetFile, group: int, columns: list[str] | None) -> int:
    """How many rows of a row group to take at a time, by their size as the footer has it and as the first ones are.

    A footer counts a text that many rows share once: of such rows a few show what they are when read.
    """
    about = file.metadata.row_group(group)
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, about.total_byte_size // max(1, about.num_rows))))
    few = min(rows, _PROBE_ROWS)
    if few == 1 or about.num_rows <= few:
        return rows
    probe = next(file.iter_batches(batch_size=few, row_groups=[group], columns=columns), None)
    if probe is None or not len(probe):
        return rows
    return max(1, min(rows, _BATCH_BYTES // max(1, probe.get_total_buffer_size() // len(probe))))


def _one_line(error: BaseException) -> str:
    return " ".join(why(error).split()) or type(error).__name__
