"""Tables as lists of units: a directory of Parquet files, hive-partitioned or flat, one such file, or a Delta table.

A further format (Iceberg) is a class with the attributes of `Table` and a line in `open_table`: it lists the
data files of a snapshot as units and gives a reader that knows what of them counts.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from bert_ray.errors import LakeError, why
from bert_ray.lake.files import as_text, printable
from bert_ray.lake.schemas import holds, merge, plain
from bert_ray.lake.snapshots import LOG_FOLDERS, METADATA, active_files, check_whole, is_delta, kind_of
from bert_ray.lake.units import ParquetReader, Unit, open_parquet, partition_values

if TYPE_CHECKING:
    import pyarrow.dataset as pads

_SUFFIXES = (".parquet", ".parq", ".pq")
_MAGIC = b"PAR1"
# Numbers as they are written, without zeros or signs that would be lost.
_WHOLE_NUMBER = re.compile("0|-?[1-9][0-9]*")
# Footers are read side by side: on a network file system each costs a round trip or two.
_FOOTER_THREADS = 16


class Reader(Protocol):
    """What a worker holds to read units; picklable and small."""

    @property
    def schema(self) -> pa.Schema: ...

    def read(
        self, unit: Unit, columns: Sequence[str], required: Sequence[str] = ()
    ) -> Generator[pa.RecordBatch, None, None]: ...


class Table(Protocol):
    """A table of text, whatever its format."""

    @property
    def name(self) -> str: ...

    @property
    def schema(self) -> pa.Schema: ...

    @property
    def partitions(self) -> tuple[str, ...]: ...

    def units(self, max_rows: int) -> list[Unit]: ...

    def reader(self) -> Reader: ...


@dataclass(frozen=True, slots=True)
class _File:
    """A data file as planning sees it; schema and rows per row group are None where its footer cannot be read."""

    path: str
    size_bytes: int
    modified_ns: int
    schema: pa.Schema | None
    group_rows: tuple[int, ...] | None


class ParquetTable:
    """A directory of Parquet files.

    A file belongs to the table if its name ends in .parquet, .parq or .pq, or it begins as a Parquet file does. Names
    that begin with "_" or "." are skipped with all below them, as Spark does (of "_" those alone that have no "=").

    Attributes:
        name: the path, absolute.
        schema: all files' columns (see `schemas.merge`), then the partition columns, which are strings as the
            directories spell them.
        partitions: the partition columns' names.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.root = path.parent if path.is_file() else path
        self._paths = [path] if path.is_file() else sorted(_data_files(path))
        if not self._paths:
            raise LakeError(f"{path} holds no Parquet files: name the directory that has them, or one file")

    @property
    def paths(self) -> list[Path]:
        """Its data files, in order."""
        return self._paths

    @cached_property
    def _files(self) -> list[_File]:
        with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
            return list(threads.map(lambda path: _look_at(path, self.root), self._paths))

    @cached_property
    def partitions(self) -> tuple[str, ...]:
        inside = {name for file in self._files for name in (file.schema.names if file.schema else ())}
        # A partition column may stand in the files as well: then the file's own values count.
        return tuple(dict.fromkeys(n for file in self._files for n in partition_values(file.path) if n not in inside))

    @cached_property
    def schema(self) -> pa.Schema:
        schemas = [file.schema for file in self._files if file.schema is not None]
        if not schemas:
            raise LakeError(
                f"none of the {len(self._files)} files of {self.name} can be read as Parquet, "
                f"the first is {printable(self.root / self._files[0].path)}"
            )
        whole = plain(schemas[0])
        if len(set(whole.names)) < len(whole):
            twice = next(name for name in whole.names if whole.names.count(name) > 1)
            raise LakeError(f"{self.name}: the files have two columns named {twice!r}: rename one")
        for other in schemas[1:]:
            if not other.equals(schemas[0]):
                whole = merge(whole, other)
        for name in self.partitions:
            whole = whole.append(pa.field(name, pa.string()))
        return whole

    def units(self, max_rows: int) -> list[Unit]:
        """The table's units in path order: runs of row groups of at most `max_rows` rows, one row group at least."""
        return [unit for file in self._files for unit in _units_of(file, max_rows)]

    def reader(self) -> ParquetReader:
        """What a worker needs to read these units."""
        return ParquetReader(root=str(self.root), schema=self.schema)


class DeltaTable(ParquetTable):
    """The active files of a Delta table's latest version."""

    def __init__(self, path: Path) -> None:
        """List them.

        Raises:
            LakeError: see `snapshots.active_files`.
        """
        self.name, self.root = str(path), path
        self._paths = active_files(path)


def open_table(path: str | os.PathLike[str]) -> Table:
    """The table at a path: a directory with Parquet files at any depth, one Parquet file, or a Delta table.

    Raises:
        LakeError: nothing is there, it holds no Parquet files, it is an Iceberg table, or it is in a store that is not
            read.
    """
    place = local_path(path)
    check_whole(place)
    return DeltaTable(place) if is_delta(place) else ParquetTable(place)


def parquet_dataset(path: str | os.PathLike[str], filesystem: fs.FileSystem | None = None) -> pads.Dataset:
    """A Parquet file or directory as Arrow's dataset, of the same files as `open_table` has, with all their columns.

    Args:
        path: local, or of `filesystem`.
        filesystem: a store's.

    Raises:
        LakeError: a Delta table that cannot be read, a table of another log (Iceberg, Hudi, Spark's streams), a part of
            either, a directory that cannot be listed, a pipe, or a file whose name is no UTF-8, which Arrow's datasets
            do not take.
        pa.ArrowException, OSError: what is there cannot be read as Parquet, or a column's types do not go together.
    """
    import pyarrow.dataset as pads  # It brings pandas with it where that is installed: half a second.

    if filesystem is not None and not isinstance(filesystem, fs.LocalFileSystem):
        return _of_one_schema(_stored_dataset(os.fspath(path), filesystem))
    place = Path(os.path.realpath(path))
    check_whole(place)
    if not place.is_dir():
        return pads.dataset(place, format="parquet")
    # Listed here: Arrow takes what begins with _ for no data, a partition's directory too.
    files = active_files(place) if is_delta(place) else _data_files(place)
    named = [os.fspath(file) for file in files]
    for name in named:
        if as_text(name) != name:
            raise LakeError(f"{printable(name)} has a name that is no UTF-8: give it another")
        if not os.path.isfile(name) and os.path.exists(name):  # Opening a pipe would wait for who writes to it.
            raise LakeError(f"{name} is no file: remove it")
    base = os.fspath(place)
    partitioning = _partitioning([os.path.relpath(name, base) for name in named], lambda: pq.read_schema(named[0]))
    return _of_one_schema(pads.dataset(named, format="parquet", partitioning=partitioning, partition_base_dir=base))


def _stored_dataset(path: str, filesystem: fs.FileSystem) -> pads.Dataset:
    """As `parquet_dataset` has a local one: no file that a table's log has replaced, none passed over for its name."""
    import pyarrow.dataset as pads

    root = PurePosixPath(path)
    for place in (root, *root.parents):
        if place.name and (kind := _kind_on_store(str(place), filesystem, place == root)):
            raise LakeError(
                f"{place} is a {kind} on a store, which is not read: write its rows as Parquet, and give that"
            )
    if filesystem.get_file_info(path).type != fs.FileType.Directory:
        return pads.dataset(path, filesystem=filesystem, format="parquet")
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    # An empty one marks a directory or the end of a job.
    whole = sorted((info for info in found if info.is_file and info.size != 0), key=lambda info: info.path)
    inside = {os.path.relpath(info.path, path): info for info in whole}
    data = [name for name in inside if all(map(is_data, name.split("/")))]
    files = [inside[name] for name in data]
    partitioning = _partitioning(data, lambda: pq.read_schema(files[0].path, filesystem=filesystem))
    return pads.dataset(
        files, filesystem=filesystem, format="parquet", partitioning=partitioning, partition_base_dir=path
    )


def _kind_on_store(place: str, filesystem: fs.FileSystem, asked: bool) -> str | None:
    """What kind of table with a log lies there; what is around the place that was asked for may not be looked at."""
    try:
        infos = filesystem.get_file_info([f"{place}/{log}" for log in LOG_FOLDERS])
        metadata = filesystem.get_file_info(fs.FileSelector(f"{place}/{METADATA}", allow_not_found=True))
    except OSError:
        if asked:
            raise
        return None
    logs = [info.base_name for info in infos if info.type == fs.FileType.Directory]
    return kind_of(logs, [info.base_name for info in metadata])


def _partitioning(paths: list[str], first: Callable[[], pa.Schema]) -> Any:
    """Arrow's hive partitioning, which takes values for numbers where all of a name's can be: 0111 for 111, 0x1F for
    31. Here they are numbers where they are written as numbers are, and else text, as the directories spell it.

    Args:
        paths: of the files, from the table's root on.
        first: gives the columns of one of them; what stands there too is theirs.
    """
    import pyarrow.dataset as pads

    values: dict[str, set[str]] = {}
    for path in paths:
        for name, value in partition_values(path).items():
            values.setdefault(name, set()).update([] if value is None else [value])
    whole = {name: all(map(_WHOLE_NUMBER.fullmatch, found)) for name, found in values.items()}
    if all(whole.values()):
        return "hive"
    own, kinds = set(first().names), []
    for name, found in values.items():
        if name not in own:
            small = whole[name] and found and all(abs(int(value)) < 2**31 for value in found)
            kinds.append(pa.field(name, pa.int32() if small else pa.string()))
    return pads.partitioning(pa.schema(kinds), flavor="hive")


def _of_one_schema(dataset: pads.Dataset) -> pads.Dataset:
    """A directory with the columns of all of its files, where Arrow alone takes the first file's for the others'.

    Raises:
        pa.ArrowException: a column's types do not go together.
    """
    import pyarrow.dataset as pads

    schemas = [fragment.physical_schema for fragment in dataset.get_fragments()]
    if all(schema.equals(schemas[0]) for schema in schemas):
        return dataset
    # The first file may have a column as null, or not at all; or as views of text, where another has text.
    files = plain(schemas[0])
    for other in schemas[1:]:
        files = merge(files, other)
    for item in (item for schema in schemas for item in schema):
        if not holds(known := files.field(item.name), item):
            raise pa.ArrowInvalid(f"column {item.name!r} is {known.type} in a file, and {item.type} in another")
    partitions = [field for field in dataset.schema if field.name not in files.names]
    # Not by replace_schema, which refuses text in another layout that reading casts.
    fragments, whole = list(dataset.get_fragments()), pa.schema([*files, *partitions])
    return pads.FileSystemDataset(fragments, whole, dataset.format, dataset.filesystem)


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path or file: URI, absolute and with links resolved.

    Raises:
        LakeError: it does not exist, or is in a store of another kind.
    """
    found = local_target(path)
    try:
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise LakeError(f"there is no {found}: the input is a directory of files, or one file") from None
    except OSError as error:
        raise LakeError(f"{found} cannot be looked at: {why(error)}") from error
    return found


def local_target(path: str | os.PathLike[str]) -> Path:
    """As `local_path`, for a path that need not exist yet."""
    text = os.fspath(path)
    parts = urlsplit(text)
    if parts.scheme == "file":
        text = unquote(parts.path)
    elif "://" in text:
        raise LakeError(f"{path}: tables in {parts.scheme} stores are not read; copy or mount it and give that path")
    return Path(os.path.realpath(os.path.expanduser(text)))


def walk(directory: Path, enter: Callable[[str], bool]) -> Iterator[Path]:
    """The files below a directory, links followed; of directories those whose name `enter` is true of.

    Raises:
        LakeError: a directory cannot be listed, or is a link to what is not there (a disk that is not mounted), or two
            partitions are one by way of a link; what stands in it would be passed over in silence.
    """

    def refuse(error: OSError) -> None:
        raise LakeError(f"{printable(error.filename)} cannot be listed: {why(error)}") from error

    seen: dict[str, str] = {}
    for folder, below, names in os.walk(directory, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:  # A link that leads back up, or one more name of what stands here also by its own.
            other = os.path.relpath(seen[real], directory)
            own = real == os.path.normpath(os.path.join(os.path.realpath(directory), other))
            up = Path(seen[real]) in Path(folder).parents
            if not (own or up) and _partitions_differ(Path(seen[real]), Path(folder), directory):
                raise LakeError(
                    f"{printable(seen[real])} and {printable(folder)} are one directory by way of a link, whose rows "
                    "cannot be of both partitions: remove the link"
                )
            below.clear()
            continue
        seen[real] = folder
        # Links last: what stands here also by a name of its own is found by that one, on every file system.
        below[:] = sorted(filter(enter, below), key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        for name in names:
            path = Path(folder, name)
            if enter(name) and _names_directory(name) and os.path.islink(path) and not os.path.exists(path):
                raise LakeError(
                    f"{printable(path)} is a link to {printable(os.readlink(path))}, which is not there: mount it, or "
                    "remove the link"
                )
            yield path


def once(files: Iterable[Path], directory: Path) -> list[Path]:
    """These files of a directory without links to others of them (`latest.parquet`), whose rows would count twice.

    Raises:
        LakeError: such a link stands in another partition than its file.
    """
    found = list(files)
    linked = [path.is_symlink() for path in found]
    if not any(linked):
        return found
    own = {os.path.realpath(path): path for path, link in zip(found, linked, strict=True) if not link}
    kept = []
    for path, link in zip(found, linked, strict=True):
        file = own.get(os.path.realpath(path)) if link else None
        if file is None:  # A link to what is no file of this table, as those of a cache of files are, is its only name.
            kept.append(path)
        elif _partitions_differ(path.parent, file.parent, directory):
            raise LakeError(
                f"{printable(file)} and {printable(path)} are one file by way of a link, whose rows cannot be of both "
                "partitions: remove the link"
            )
    return kept


def _partitions_differ(one: Path, other: Path, directory: Path) -> bool:
    """Whether the directories of two paths below `directory` name different partitions."""
    named = ([name for name in path.relative_to(directory).parts if "=" in name] for path in (one, other))
    return next(named) != next(named)


def _names_directory(name: str) -> bool:
    """Whether a link to nothing led to a directory, by its name. A file's unit will say that it is gone."""
    if name.lower().endswith((*_SUFFIXES, ".txt", ".txt.gz")):
        return False
    return "=" in name or all(suffix[1:].isdigit() for suffix in Path(name).suffixes)


def is_data(name: str) -> bool:
    """Whether a file or a directory holds data by its name, as Spark has it: not what begins with a dot, or with _
    unless it is a partition's directory (`_year=2026`).
    """
    return not name.startswith(".") and (not name.startswith("_") or "=" in name)


def _data_files(directory: Path) -> list[Path]:
    """In path order."""
    found = (
        path
        for path in walk(directory, is_data)
        if is_data(path.name) and (path.name.lower().endswith(_SUFFIXES) or _begins_as_parquet(path))
    )
    return once(sorted(found, key=os.fspath), directory)


def _begins_as_parquet(path: Path) -> bool:
    try:
        # A pipe or a socket among the files would make open() wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except FileNotFoundError:
        return False
    except OSError:  # Its unit will say why it cannot be read: passed over, its rows would be missing in silence.
        return True


def _look_at(path: Path, root: Path) -> _File:
    relative = path.relative_to(root).as_posix()
    try:
        status = path.stat()
    except OSError:  # A dangling link, or a file removed since the listing: its unit will say so.
        return _File(relative, 0, 0, None, None)
    unread = _File(relative, status.st_size, status.st_mtime_ns, None, None)
    if not stat.S_ISREG(status.st_mode):  # Opening a pipe would wait for who writes to it.
        return unread
    try:
        with pa.OSFile(os.fsencode(path)) as file:  # As bytes: Arrow takes no str whose name is not UTF-8.
            opened = open_parquet(file)
            schema, footer = opened.schema_arrow, opened.metadata
        groups = tuple(footer.row_group(index).num_rows for index in range(footer.num_row_groups))
        _ = schema.names  # They may be no UTF-8.
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return unread
    return _File(relative, status.st_size, status.st_mtime_ns, schema, groups)


def _units_of(file: _File, max_rows: int) -> Iterator[Unit]:
    def unit(groups: tuple[int, int] | None, rows: int | None) -> Unit:
        return Unit.of(file.path, groups, rows, file.size_bytes, file.modified_ns)

    if file.group_rows is None:
        yield unit(None, None)
        return
    start, rows = 0, 0
    for index, more in enumerate(file.group_rows):
        if index > start and rows + more > max_rows:
            yield unit((start, index), rows)
            start, rows = index, 0
        rows += more
    yield unit((start, len(file.group_rows)), rows)
