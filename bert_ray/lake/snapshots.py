"""Tables whose directory holds more than their rows: which of its Parquet files count now.

A Delta table keeps the files that an update, a deletion or a compaction has replaced; only its log tells them from
those that count. Iceberg, Hudi and Spark's streams do so too, and their logs are not read yet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from bert_ray.errors import LakeError
from bert_ray.lake.units import partition_values

DELTA_LOG, METADATA = "_delta_log", "metadata"
# An Iceberg table's metadata, by a catalog's numbers or a file system's.
_ICEBERG = re.compile(r"(v?\d+|\d+-.+?)(\.gz)?\.metadata\.json")
# Folders of logs, by which files may not count, and whose they are.
_LOGS = {DELTA_LOG: "Delta table", ".hoodie": "Hudi table", "_spark_metadata": "table of a Spark stream"}
LOG_FOLDERS = tuple(_LOGS)
# Features of a Delta table by which its files do not tell all: rows that are deleted, columns of other names.
_BEYOND_FILES = ("deletionVectors", "columnMapping")


def is_delta(path: Path) -> bool:
    """Whether a directory is a Delta table."""
    return os.path.isdir(path / DELTA_LOG)


def check_whole(path: Path) -> None:
    """Raise a LakeError where replaced rows would be read with others: a table of a kind that is not read, or a part of
    one.
    """
    if is_delta(path):
        return
    if (kind := _kind_of(path)) is not None:
        article = "an" if kind[0] in "AEIOU" else "a"
        raise LakeError(f"{path} is {article} {kind}, which is not read: write its rows as Parquet, and give that")
    if (around := table_around(path)) is not None:
        raise LakeError(
            f"{path} lies in the {_kind_of(around)} {around}, whose log says which of its rows count: give that"
        )


def table_around(path: Path) -> Path | None:
    """The table with a log of its own that a path lies in."""
    return next((place for place in path.parents if _kind_of(place) is not None), None)


def kind_of(names: Collection[str], metadata: Collection[str]) -> str | None:
    """What kind of table with a log a directory is, by the names in it and those in its folder `metadata`."""
    if any(map(_ICEBERG.fullmatch, metadata)):
        return "Iceberg table"
    return next((kind for log, kind in _LOGS.items() if log in names), None)


def _kind_of(path: Path) -> str | None:
    logs = [log for log in _LOGS if os.path.isdir(path / log)]
    metadata = path / METADATA
    return kind_of(logs, [file.name for file in metadata.glob("*.metadata.json")] if os.path.isdir(metadata) else [])


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
