"""Checkpoints of a training run: directories that become visible whole and are checked when read.

    <run>/checkpoints/step-00000500/
      state.safetensors   weights and optimiser moments by parameter name, fp32; RNG states
      position.json       where the run is, its history, and size and checksum of the file above; written last

A directory of the user's choice (`checkpoint.directory`) has beside them run.json: whose they are.

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
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from pyarrow import fs
from safetensors.torch import load_file, save_file

from bert_ray.errors import JobError, LakeError, why
from bert_ray.lake.files import sync, write_json
from bert_ray.model.bundle import WRITE_ERRORS
from bert_ray.stores import open_store
from bert_ray.training.job import is_uri
from bert_ray.training.run_directory import RUN_FILE

if TYPE_CHECKING:
    from bert_ray.training.job import TrainJob

STATE_FILE = "state.safetensors"
POSITION_FILE = "position.json"

# What a checkpoint that was torn or altered shows by; any other error tells of the disk or the store, not of it.
_TORN = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError)

# What the name of a step's second checkpoint ends with; it is sorted behind the first.
_AGAIN = ".again"

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
        """Copy a file from it.

        Raises:
            FileNotFoundError: it is not there.
            OSError: the store does not give it, or the copy cannot be written.
        """
        if self.system.get_file_info(f"{self.root}/{name}").type != fs.FileType.File:
            raise FileNotFoundError(f"{name} is missing")
        fs.copy_files(
            f"{self.root}/{name}",
            str(target),
            source_filesystem=self.system,
            destination_filesystem=fs.LocalFileSystem(),
        )

    def remove(self, name: str) -> None:
        self.system.delete_dir(f"{self.root}/{name}")

    def read(self, name: str) -> str:
        with self.system.open_input_stream(f"{self.root}/{name}") as stream:
            return bytes(stream.read()).decode()

    def write(self, name: str, text: str) -> None:
        with self.system.open_output_stream(f"{self.root}/{name}") as stream:
            stream.write(text.encode())

    def unlink(self, name: str) -> None:
        self.system.delete_file(f"{self.root}/{name}")


class Checkpoints:
    """The checkpoints of one run. One process writes; all may read."""

    def __init__(self, directory: str | Path, keep: int) -> None:
        """Use `directory`, made at the first save; the `keep` newest checkpoints are kept.

        Raises:
            JobError: it names no store that is known.
            LakeError: it is on a store that does not answer.
        """
        self.where, self.keep = str(directory), keep
        # Name -> what `latest` found wrong with it.
        self.damaged: dict[str, str] = {}
        self._store = None
        if is_uri(self.where):
            try:
                system, root = open_store(self.where)
            except pa.ArrowInvalid as error:
                raise JobError(f"checkpoint.directory {self.where} cannot be used: {error}") from error
            except OSError as error:
                raise LakeError(f"checkpoint.directory {self.where} does not answer: {error}") from error
            if isinstance(system, fs.LocalFileSystem):
                directory = root
            else:
                self._store = _Store(system=system, root=root.rstrip("/"))
        self.directory = Path(directory)

    def begun(self) -> dict[str, Any] | None:
        """Whose checkpoints these are, as `begin` was told; {} where nothing says so, None where nothing lies here.

        Raises:
            LakeError: the store that they lie on does not answer.
        """
        try:
            if RUN_FILE in self._names():
                text = (self.directory / RUN_FILE).read_text("utf-8") if not self._store else self._store.read(RUN_FILE)
                return dict(json.loads(text))
            return {} if self.names() else None
        except OSError as error:
            raise LakeError(f"the checkpoints in {self.where} cannot be listed: {error}") from error
        except ValueError:
            return {}

    def begin(self, run: dict[str, Any]) -> None:
        """Say whose checkpoints will lie here, before there are any.

        Raises:
            LakeError: it cannot be written.
        """
        try:
            if self._store is not None:
                self._store.write(RUN_FILE, json.dumps(run, indent=1))
                return
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / RUN_FILE, run)
        except OSError as error:
            raise LakeError(f"checkpoint.directory {self.where} cannot be written: {error}") from error

    def save(self, step: int, state: dict[str, torch.Tensor], position: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all, also through a kill or a power cut; then drop damaged and oldest.

        Raises:
            LakeError: it cannot be written (the disk is full, say), and those before it are as they were; or it is
                written, and older ones cannot be removed.
        """
        name = f"step-{step:08d}"
        try:
            # A run that was stopped between a step and what follows it comes to the same step again. Both stand, until
            # the new one is whole.
            if name in self.whole():
                name += _AGAIN
            if self._store is None:
                self._save(name, state, position)
            else:
                with tempfile.TemporaryDirectory(prefix="bert_ray-checkpoint-") as here:
                    _write(Path(here), state, position)
                    for file in (STATE_FILE, POSITION_FILE):  # In this order: the second makes it a checkpoint.
                        self._store.put(Path(here, file), f"{name}/{file}")
        except WRITE_ERRORS as error:
            raise self.failed(f"checkpoint {name} to {self.where}", error, name) from error
        self.damaged.pop(name, None)
        try:
            self._prune(name)
        except OSError as error:
            raise LakeError(
                f"{name} is written, but checkpoints before it cannot be removed from {self.where}: {why(error)}. When "
                "that is mended, the same command goes on"
            ) from error

    def failed(self, what: str, error: Exception, name: str | None = None) -> LakeError:
        """The error that `what` could not be written, which says where the run goes on from; `name` is not whole."""
        try:
            before = [other for other in self.whole() if other != name]
            last = f"the last whole checkpoint is {before[-1]}" if before else "there is no checkpoint before it"
        except OSError as silent:
            last = f"those before it cannot be listed ({silent})"
        return LakeError(
            f"cannot write {what}: {why(error)}; {last}. When that is mended, the same command goes on from there"
        )

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; None where there is none. `damaged` then says what was passed over.

        Raises:
            LakeError: the disk or the store that they lie on does not answer, or there is no room for a copy.
        """
        self.damaged = {}
        try:
            names = self.names()
        except OSError as error:
            raise LakeError(f"the checkpoints in {self.where} cannot be listed: {error}") from error
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
            except _TORN as error:
                self.damaged[name] = f"checkpoint {self.where}/{name} is damaged and skipped: {error}"
                continue
            except OSError as error:
                raise LakeError(
                    f"checkpoint {self.where}/{name} cannot be read: {error}; when that is mended, the same command "
                    "goes on from there (delete the checkpoint to go on from the one before)"
                ) from error
            return Checkpoint(directory=directory, position=position, skipped=list(self.damaged.values()), copy=copy)
        return None

    def remove(self) -> None:
        """Drop all checkpoints: the run has ended. Whose they are goes last: a kill in between can be made good.

        Raises:
            LakeError: the disk or the store that they lie on does not answer.
        """
        try:
            for name in self.names():
                self._drop(name)
            if RUN_FILE in self._names():
                if self._store is not None:
                    self._store.unlink(RUN_FILE)
                else:
                    (self.directory / RUN_FILE).unlink()
        except OSError as error:
            raise LakeError(
                f"the checkpoints in {self.where} cannot be removed: {error}; when that is mended, the same command "
                "does it"
            ) from error

    def _save(self, name: str, state: dict[str, torch.Tensor], position: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".new-*"):  # What a killed writer left.
            shutil.rmtree(left, ignore_errors=True)
        fresh = self.directory / f".new-{name}"
        with _gone_on_error(fresh):
            fresh.mkdir()
            _write(fresh, state, position)
            final = self.directory / name
            if final.exists():  # A damaged one.
                shutil.rmtree(final)
            os.replace(fresh, final)
        sync(self.directory)

    def _prune(self, fresh: str) -> None:
        # Damaged ones have later steps than what is written after them: they would outlive it. So may the one that a
        # step left which is written again.
        others = [name for name in self.whole() if name != fresh]
        for old in [*self.damaged, *others[: max(0, len(others) - self.keep + 1)]]:
            self._drop(old)
        self.damaged = {}

    def _drop(self, name: str) -> None:
        if self._store is None:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        else:
            self._store.remove(name)

    def names(self) -> list[str]:
        """The checkpoints that lie here, the oldest first, damaged or not."""
        return [name for name in self._names() if name.startswith("step-")]

    def whole(self) -> list[str]:
        """Those of `names` that `latest` has not found damaged."""
        return [name for name in self.names() if name not in self.damaged]

    def _names(self) -> list[str]:
        if self._store is not None:
            return self._store.names()
        try:
            # Not by glob, to which a directory that cannot be listed is an empty one.
            return sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return []


def checkpoints_of(job: TrainJob, directory: Path) -> Checkpoints:
    """Those of the run in `directory`."""
    return Checkpoints(job.checkpoint.directory or directory / "checkpoints", job.checkpoint.keep)


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
