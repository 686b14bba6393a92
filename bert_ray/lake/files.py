"""What several kinds of files need: to be on the disk, and to be told apart."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from bert_ray.errors import harmless


def sync(path: Path) -> None:
    """Bring a file, or a directory's entries, to the disk, so that a rename in it outlives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no such call for directories.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Bring a directory, and all that is in it, to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def put_in_place(fresh: Path, place: Path) -> None:
    """Rename a directory when all of it is on the disk: what is found in its place is whole, also after a power cut."""
    sync_tree(fresh)
    os.replace(fresh, place)
    sync(place.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all, also through a kill or a power cut."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def as_text(path: str | os.PathLike[str]) -> str:
    """A path as text that can be stored: bytes of it that are not UTF-8 stand in hex."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def printable(path: str | os.PathLike[str]) -> str:
    """A path for messages: what a terminal would obey, or take for the next line, stands in hex too."""
    return harmless(as_text(path), lines=False)


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
