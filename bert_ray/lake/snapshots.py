"""Tables whose directory holds more than their rows: which of its Parquet files count now.

A Delta table keeps the files that an update, a deletion or a compaction has replaced; only its log tells them from
those that count. Iceberg, Hudi and Spark's streams do so too, and their logs are not read yet.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from bert_ray.errors import LakeError
from bert_ray.lake.units import partition_values

DELTA_LOG = "_delta_log"
# An Iceberg table's metadata, by a catalog's numbers or a file system's.
_ICEBERG = re.compile(r"(v?\d+|\d+-.+?)(\.gz)?\.metadata\.json")
# Of others that keep files whose rows do not count, or count in another file.
_LOGS = {".hoodie": "a Hudi table", "_spark_metadata": "what a stream of Spark's writes (it has _spark_metadata)"}
# Features of a Delta table by which its files do not tell all: rows that are deleted, columns of other names.
_BEYOND_FILES = ("deletionVectors", "columnMapping")


def is_delta(path: Path) -> bool:
    """Whether a directory is a Delta table."""
    return os.path.isdir(path / DELTA_LOG)


def check_whole(path: Path) -> None:
    """Raise a LakeError where replaced rows would be read with others: a table of a kind that is not read, or a part of
    one.
    """
    if _is_iceberg(path):
        raise LakeError(f"{path} is an Iceberg table, which is not read: write its rows as Parquet, and give that")
    for name, kind in _LOGS.items():
        if os.path.isdir(path / name):
            raise LakeError(f"{path} is {kind}, which is not read: write its rows as Parquet, and give that")
    if is_delta(path):
        return
    if (around := table_around(path)) is not None:
        kind = "Delta" if is_delta(around) else "Iceberg"
        raise LakeError(f"{path} lies in the {kind} table {around}, whose log says which of its rows count: give that")


def is_log(path: str) -> bool:
    """Whether a file is of a log that tells which files of a table count, by its path from the table's root on."""
    *folders, name = path.split("/")
    return (folders[:1] == ["metadata"] and bool(_ICEBERG.fullmatch(name))) or any(map(_LOGS.__contains__, folders[:1]))


def table_around(path: Path) -> Path | None:
    """The Delta or Iceberg table that a path lies in."""
    return next((place for place in path.parents if is_delta(place) or _is_iceberg(place)), None)


def _is_iceberg(path: Path) -> bool:
    place = path / "metadata"
    return os.path.isdir(place) and any(_ICEBERG.fullmatch(file.name) for file in place.glob("*.metadata.json"))


def active_files(path: Path) -> list[Path]:
    """The data files of a Delta table's latest version, in order, below `path`.

    Raises:
        LakeError: it has no rows, cannot be read, or uses what its files do not tell; or deltalake is not installed.
    """
    try:
        import deltalake
    except ImportError as error:
        raise LakeError(f"{path} is a Delta table: pip install 'bert-ray[delta]'") from error
    try:
        table = deltalake.DeltaTable(path)
        beyond = set(table.protocol().reader_features or ()) & set(_BEYOND_FILES)
        # By reader version 2 a table has no list of features.
        if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
            beyond.add("columnMapping")
        if beyond:
            raise LakeError(
                f"{path} uses Delta's {' and '.join(sorted(beyond))}, which is not read: write the table anew "
                "without it (for deletion vectors: REORG TABLE … APPLY (PURGE))"
            )
        partitions = set(table.metadata().partition_columns)
        root, files = f"{table.table_uri.rstrip('/')}/".removeprefix("file://"), []
        for uri in table.file_uris():
            # The root as deltalake spells it, %-encoded; what is behind it is a plain path.
            if not uri.removeprefix("file://").startswith(root):
                raise LakeError(f"{path} has a file elsewhere, {uri}, which is not read: write the table anew")
            inside = uri.removeprefix("file://").removeprefix(root)
            if lacking := partitions - set(partition_values(inside)):
                raise LakeError(
                    f"{path}: the path of {inside} does not say its {' and '.join(sorted(lacking))}, by which the "
                    "table is partitioned, and that would be lost: write it anew without delta.randomizeFilePrefixes"
                )
            files.append(path / inside)
    except (deltalake.exceptions.DeltaError, OSError, ValueError) as error:
        raise LakeError(f"{path} cannot be read as a Delta table: {' '.join(str(error).split())}") from error
    if not files:
        raise LakeError(f"the Delta table {path} has no rows")
    return sorted(files)
