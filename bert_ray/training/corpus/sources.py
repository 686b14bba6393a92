"""Where a corpus's documents come from: Parquet, Delta and plain text, as parts that workers read."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from bert_ray.errors import ColumnError, JobError, LakeError
from bert_ray.lake.files import printable
from bert_ray.lake.snapshots import check_whole, is_delta
from bert_ray.lake.tables import DeltaTable, ParquetTable, local_path
from bert_ray.lake.units import ParquetReader, Unit
from bert_ray.model.tokenization import is_text, to_python_strings
from bert_ray.training.corpus.job import ReadingOptions
from bert_ray.training.corpus.text import TextReader, spans_of, text_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A unit of work, small enough to travel to a worker.

    Attributes:
        id: a function of all else, so that who does the part again writes the same file.
        source: which input it belongs to.
        unit: the file, or row groups of it.
        span: bytes of a plain-text file; None: the whole of the unit.
    """

    id: str
    source: int
    unit: Unit
    span: tuple[int, int] | None = None

    @classmethod
    def of(cls, source: int, unit: Unit, span: tuple[int, int] | None = None) -> Part:
        """A part with the id that belongs to it."""
        told = json.dumps([source, unit.id, span])
        return cls(id=hashlib.sha256(told.encode()).hexdigest()[:20], source=source, unit=unit, span=span)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Part:
        fields = json.loads(text)
        unit = Unit.from_json(json.dumps(fields["unit"]))
        return cls(id=fields["id"], source=fields["source"], unit=unit, span=fields["span"] and tuple(fields["span"]))


class Reader(Protocol):
    """Reads parts of one source; small and picklable, it travels to the workers."""

    def read(self, part: Part) -> Iterator[tuple[list[str | None], int]]:
        """The documents of a part in order, a batch at a time, null where a table has none; and in how many of a
        batch bytes were replaced.

        Raises:
            LakeError: the file cannot be read, or not as it was planned; the message says what to do.
        """


class Source(Protocol):
    """One place that documents come from."""

    @property
    def name(self) -> str: ...

    def files(self) -> list[Path]: ...

    def parts(self, number: int, unit_rows: int, unit_bytes: int) -> list[Part]: ...

    def reader(self) -> Reader: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _TableReader:
    """Texts of a table's columns."""

    parquet: ParquetReader
    columns: tuple[str, ...]
    bad_bytes: str

    def read(self, part: Part) -> Iterator[tuple[list[str | None], int]]:
        row = 0
        for batch in self.parquet.read(part.unit, self.columns, required=self.columns):
            for name in self.columns:
                yield self._texts(part, name, batch.column(name), row)
            row += batch.num_rows

    def _texts(self, part: Part, name: str, column: pa.Array, row: int) -> tuple[list[str | None], int]:
        try:
            # The cleaner's door: as at the tokenizer's, text leaves Arrow here.
            return column.to_pylist(), 0
        except UnicodeDecodeError as error:
            bad = _undecodable(column)
            if self.bad_bytes == "replace":
                return to_python_strings(column), len(bad)
            path = Path(self.parquet.root, str(part.unit))
            raise LakeError(
                f"{printable(path)}: column {name!r} holds bytes that are no UTF-8 "
                f"(0x{error.object[error.start]:02x} in row "
                f"{row + bad[0]:,} of these, counted from 0): write it as UTF-8, or give reading.bad_bytes=replace to "
                "have U+FFFD in its place"
            ) from None


class _TableSource:
    """A Parquet directory, or the active files of a Delta table."""

    def __init__(self, table: ParquetTable, columns: Sequence[str], bad_bytes: str) -> None:
        self.name, self._table = table.name, table
        self._columns = tuple(name for name in columns if name in table.schema.names)
        self._bad_bytes = bad_bytes
        if not self._columns:
            raise ColumnError(
                f"{table.name} has no column {' and none named '.join(map(repr, columns))}, it has "
                f"{', '.join(table.schema.names)}: name its text columns with columns"
            )
        for name in self._columns:
            if not is_text(kind := table.schema.field(name).type):
                raise ColumnError(f"{table.name}: column {name!r} is {kind}, not text: name another with columns")

    def files(self) -> list[Path]:
        return self._table.paths

    def parts(self, number: int, unit_rows: int, unit_bytes: int) -> list[Part]:
        return [Part.of(number, unit) for unit in self._table.units(unit_rows)]

    def reader(self) -> Reader:
        return _TableReader(parquet=self._table.reader(), columns=self._columns, bad_bytes=self._bad_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextParts:
    """A `TextReader` of parts."""

    text: TextReader

    def read(self, part: Part) -> Iterator[tuple[list[str | None], int]]:
        return self.text.read(part.unit, part.span)


class _TextSource:
    """Plain-text files."""

    def __init__(self, path: Path, files: list[Path], options: ReadingOptions) -> None:
        self.name, self._files, self._options = str(path), files, options
        self._root = path.parent if path.is_file() else path

    def files(self) -> list[Path]:
        return self._files

    def parts(self, number: int, unit_rows: int, unit_bytes: int) -> list[Part]:
        found = []
        for path in self._files:
            try:
                size, modified = (status := path.stat()).st_size, status.st_mtime_ns
            except OSError:  # A dangling link, or a file removed since the listing: its unit will say so.
                size = modified = 0
            unit = Unit.of(path.relative_to(self._root).as_posix(), None, None, size, modified)
            found += [Part.of(number, unit, span) for span in spans_of(path, size, self._options, unit_bytes)]
        return found

    def reader(self) -> Reader:
        return _TextParts(text=TextReader(root=str(self._root), options=self._options))


def open_sources(places: Sequence[str], columns: Sequence[str], options: ReadingOptions) -> list[Source]:
    """The sources of documents at some places.

    Raises:
        LakeError: a place does not exist, or has no files of its format.
        ColumnError: a table has none of the columns, or not as text.
        JobError: one place holds another, whose documents would be read twice.
    """
    paths = [local_path(place) for place in places]
    sources = [_open(path, columns, options) for path in paths]
    seen: dict[str, Path] = {}
    for place, source in zip(paths, sources, strict=True) if len(paths) > 1 else ():
        real = {os.path.realpath(file) for file in source.files()}
        for file in seen.keys() & real:
            raise JobError(
                f"input has {printable(file)} twice, in {printable(seen[file])} and in {printable(place)}: leave out "
                "the one or the other"
            )
        seen |= dict.fromkeys(real, place)
    return sources


def parts_of(sources: Sequence[Source], unit_rows: int, unit_bytes: int) -> list[Part]:
    """The parts of all sources, in their order: of about so many rows of a table, or so many bytes of plain text."""
    return [part for number, source in enumerate(sources) for part in source.parts(number, unit_rows, unit_bytes)]


def _open(path: Path, columns: Sequence[str], options: ReadingOptions) -> Source:
    form = _format(path) if options.format == "auto" else options.format
    if form == "text":
        if not (files := text_files(path)):
            raise LakeError(f"{path} holds no files named .txt or .txt.gz: name the directory that has them, or one")
        return _TextSource(path, files, options)
    check_whole(path)
    # A Delta table is one whatever its format is said to be: its directory holds what was replaced, too.
    table = DeltaTable(path) if form == "delta" or is_delta(path) else ParquetTable(path)
    return _TableSource(table, columns, options.bad_bytes)


def _format(path: Path) -> str:
    """What a place looks like."""
    if is_delta(path):
        return "delta"
    if path.is_file():
        return "text" if path.name.lower().endswith((".txt", ".txt.gz")) else "parquet"
    try:
        ParquetTable(path)
    except LakeError:
        if text_files(path):
            return "text"
        raise LakeError(
            f"{path} holds no Parquet files and none named .txt or .txt.gz: name the directory that has them"
        ) from None
    if texts := text_files(path):
        print(
            f"warning: {path} is read as Parquet; it holds {len(texts):,} files of plain text too, such as "
            f"{printable(texts[0].relative_to(path))}, which are left out: if they are documents, name them as inputs "
            "of their own, or give reading.format=text",
            file=sys.stderr,
            flush=True,
        )
    return "parquet"


def _undecodable(column: pa.Array) -> list[int]:
    """The places of the texts that are no UTF-8."""
    found = []
    for place, raw in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            (raw or b"").decode("utf-8")
        except UnicodeDecodeError:
            found.append(place)
    return found
