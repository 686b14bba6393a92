"""Checkpoints of a training run: directories that become visible whole and are checked when read.

    <run>/checkpoints/step-00000500/
      state.safetensors   weights and optimiser moments by parameter name, fp32; RNG states
      position.json       where the run is, its history, and size and checksum of the file above

They do not depend on the engine, the ZeRO stage or the number of workers: a run may be resumed with others.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STATE_FILE = "state.safetensors"
POSITION_FILE = "position.json"

_CHUNK_BYTES = 16 * 2**20


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """One whole checkpoint.

    Attributes:
        directory: where it lies.
        position: what `save` was given.
        skipped: newer checkpoints that were damaged, each with the reason.
    """

    directory: Path
    position: dict[str, Any]
    skipped: list[str]

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU."""
        return load_file(self.directory / STATE_FILE)


class Checkpoints:
    """The checkpoints of one run. One process writes; all may read."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Use `directory`, made at the first save; the `keep` newest checkpoints are kept."""
        self.directory = directory
        self.keep = keep

    def save(self, step: int, state: dict[str, torch.Tensor], position: dict[str, Any]) -> Path:
        """Write a checkpoint, whole or not at all, also through a kill or a power cut; then drop the oldest."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".new-*"):  # What a killed writer left.
            shutil.rmtree(left, ignore_errors=True)
        fresh = self.directory / f".new-{step:08d}"
        fresh.mkdir()
        path = fresh / STATE_FILE
        save_file({name: value.contiguous() for name, value in state.items()}, path)
        file = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        (fresh / POSITION_FILE).write_text(json.dumps({"position": position, "file": file}), "utf-8")
        for name in (STATE_FILE, POSITION_FILE):
            _sync(fresh / name)
        _sync(fresh)
        final = self.directory / f"step-{step:08d}"
        if final.exists():  # A resumed run saves again where a damaged one lies.
            shutil.rmtree(final)
        os.replace(fresh, final)
        _sync(self.directory)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; None where there is none."""
        skipped: list[str] = []
        for directory in reversed(self._all()):
            try:
                position = _read(directory)
            except (OSError, ValueError, KeyError) as error:
                skipped.append(f"checkpoint {directory} is damaged and skipped: {error}")
                continue
            return Checkpoint(directory=directory, position=position, skipped=skipped)
        return None

    def _all(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))


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


def _sync(path: Path) -> None:
    """Bring a file or a directory's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
