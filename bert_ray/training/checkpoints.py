"""Checkpoints of a training run: directories that become visible whole and are checked when read.

    <run>/checkpoints/step-00000500/
      state.safetensors   weights and optimiser moments by parameter name, fp32; RNG states
      position.json       where the run is, its history, and size and checksum of the file above; written last

They do not depend on the engine, the ZeRO stage or the number of workers: a run may be resumed with others. They may
lie on an object store, which knows no renaming: there a checkpoint is one when its position.json is.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bert_ray.errors import JobError
from bert_ray.lake.files import sync

STATE_FILE = "state.safetensors"
POSITION_FILE = "position.json"

_CHUNK_BYTES = 16 * 2**20


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """One whole checkpoint.

    Attributes:
        directory: where it lies; for one on a store, its copy on this machine.
        position: what `save` was given.
        skipped: newer checkpoints that were damaged, each with the reason.
        copy: keeps that copy until the checkpoint is let go of.
    """

    directory: Path
    position: dict[str, Any]
    skipped: list[str]
    copy: Any = None

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU."""
        return load_file(self.directory / STATE_FILE)


@dataclass(kw_only=True, slots=True)
class _Store:
    """A directory on an object store."""

    system: fs.FileSystem
    root: str

    def names(self) -> list[str]:
        """What lies in it."""
        infos = self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def put(self, source: Path, name: str) -> None:
        fs.copy_files(
            str(source),
            f"{self.root}/{name}",
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=self.system,
        )

    def get(self, name: str, target: Path) -> None:
        fs.copy_files(
            f"{self.root}/{name}",
            str(target),
            source_filesystem=self.system,
            destination_filesystem=fs.LocalFileSystem(),
        )

    def remove(self, name: str) -> None:
        self.system.delete_dir(f"{self.root}/{name}")


class Checkpoints:
    """The checkpoints of one run. One process writes; all may read."""

    def __init__(self, directory: str | Path, keep: int) -> None:
        """Use `directory`, made at the first save; the `keep` newest checkpoints are kept.

        Raises:
            JobError: it is on a store that cannot be reached.
        """
        self.where, self.keep = str(directory), keep
        self._store = None
        if "://" in self.where:
            try:
                system, root = fs.FileSystem.from_uri(self.where)
            except (OSError, ValueError) as error:
                raise JobError(f"checkpoint.directory {self.where} cannot be used: {error}") from error
            if isinstance(system, fs.LocalFileSystem):
                directory = root
            else:
                self._store = _Store(system=system, root=root.rstrip("/"))
        self.directory = Path(directory)

    def save(self, step: int, state: dict[str, torch.Tensor], position: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all, also through a kill or a power cut; then drop the oldest.

        Raises:
            JobError: it cannot be written (the disk is full, say); those before it are as they were.
        """
        name = f"step-{step:08d}"
        try:
            if self._store is None:
                self._save(name, state, position)
            else:
                with tempfile.TemporaryDirectory(prefix="bert_ray-checkpoint-") as here:
                    _write(Path(here), state, position)
                    for file in (STATE_FILE, POSITION_FILE):  # In this order: the second makes it a checkpoint.
                        self._store.put(Path(here, file), f"{name}/{file}")
            self._prune()
        except (OSError, SafetensorError) as error:
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            before = [other for other in self._all() if other != name]
            last = f"the last whole one is {before[-1]}" if before else "there is none before it"
            raise JobError(
                f"cannot write checkpoint {name} to {self.where}: {why}; {last}. When that is mended, the same command "
                "goes on from there"
            ) from error

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; None where there is none.

        Raises:
            JobError: the store that they lie on does not answer.
        """
        skipped: list[str] = []
        try:
            names = self._all()
        except OSError as error:
            raise JobError(f"the checkpoints in {self.where} cannot be listed: {error}") from error
        for name in reversed(names):
            copy = None
            try:
                if self._store is None:
                    directory = self.directory / name
                else:
                    copy = tempfile.TemporaryDirectory(prefix="bert_ray-checkpoint-")
                    directory = Path(copy.name)
                    for file in (POSITION_FILE, STATE_FILE):
                        self._store.get(f"{name}/{file}", directory / file)
                position = _read(directory)
            except (OSError, ValueError, KeyError) as error:
                skipped.append(f"checkpoint {self.where}/{name} is damaged and skipped: {error}")
                continue
            return Checkpoint(directory=directory, position=position, skipped=skipped, copy=copy)
        return None

    def remove(self) -> None:
        """Drop all checkpoints: the run has ended."""
        if self._store is not None:
            for name in self._all():
                self._store.remove(name)
        elif self.directory.exists():
            for name in self._all():
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def _save(self, name: str, state: dict[str, torch.Tensor], position: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".new-*"):  # What a killed writer left.
            shutil.rmtree(left, ignore_errors=True)
        fresh = self.directory / f".new-{name}"
        with _gone_on_error(fresh):
            fresh.mkdir()
            _write(fresh, state, position)
            final = self.directory / name
            if final.exists():  # A resumed run saves again where a damaged one lies.
                shutil.rmtree(final)
            os.replace(fresh, final)
        sync(self.directory)

    def _prune(self) -> None:
        for old in self._all()[: -self.keep]:
            if self._store is None:
                shutil.rmtree(self.directory / old, ignore_errors=True)
            else:
                self._store.remove(old)

    def _all(self) -> list[str]:
        if self._store is not None:
            return [name for name in self._store.names() if name.startswith("step-")]
        return sorted(path.name for path in self.directory.glob("step-*"))


def _write(directory: Path, state: dict[str, torch.Tensor], position: dict[str, Any]) -> None:
    path = directory / STATE_FILE
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    file = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    (directory / POSITION_FILE).write_text(json.dumps({"position": position, "file": file}), "utf-8")
    for name in (STATE_FILE, POSITION_FILE):
        sync(directory / name)
    sync(directory)


@contextmanager
def _gone_on_error(directory: Path) -> Iterator[None]:
    """A directory half written takes the room that the next attempt needs."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _read(directory: Path) -> dict[str, Any]:
    record = json.loads((directory / POSITION_FILE).read_text("utf-8"))
    position, file = record["position"], record["file"]
    path = directory / STATE_FILE
    if path.stat().st_size != file["bytes"]:
        raise ValueError(f"{STATE_FILE} has {path.stat().st_size} bytes of {file['bytes']}")
    if _crc32(path) != file["crc32"]:
        raise ValueError(f"{STATE_FILE} has another checksum than when it was written")
    return dict(position)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value
