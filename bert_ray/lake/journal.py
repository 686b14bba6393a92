"""What a run has done, in files that outlive every process: OUT/_bert_ray/.

    run.json            the plan: input, settings, model, number of units and rows, each session that worked on it
    receipts/ID.json    the unit is done: its output file stands whole at its place
    failures/ID.json    the unit was tried and failed: which file, why
    started/ID          a line for each start of the unit; gone once the unit has a receipt or a failure
    tmp/                files being written; what a killed process left here is swept by the next run

Readers of Parquet directories skip names that begin with "_", so OUT is a plain table. A unit's way: a line in started,
its output under tmp, fsync, rename to its place, fsync of the directory, then the receipt in the same manner. Killed
before the rename nothing is to be seen; killed between rename and receipt the unit is done again and its file, which
has the same name, replaced.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_ray.errors import JobError, LakeError, why
from bert_ray.lake.files import printable, sync

FOLDER = "_bert_ray"
# The journal's layout; one that a later version cannot read is refused by name rather than misread.
FORMAT = 1
# A file in tmp whose writer was on another machine is taken for abandoned after a day.
_FOREIGN_AGE_SEC = 24 * 3600.0


class OutputError(LakeError):
    """The output cannot be written (disk full, no permission): no other unit would fare better."""


class Journal:
    """The journal of one output table."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.root = self.output / FOLDER

    # The run

    def read_run(self) -> dict[str, Any]:
        """What run.json says; {} where the directory has no run.

        Raises:
            LakeError: it was written by a version that keeps another layout, or is damaged.
        """
        path = self.root / "run.json"
        try:
            run = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            raise LakeError(
                f"{path} cannot be read ({error}): remove {self.output} or choose another output"
            ) from error
        if run.get("format") != FORMAT:
            raise LakeError(
                f"{path} is of format {run.get('format')}, this version reads {FORMAT}: choose another output"
            )
        return run

    def write_run(self, run: dict[str, Any]) -> None:
        """Create the journal's directories where they are missing, and write run.json.

        Raises:
            OutputError: the output cannot be written.
        """
        with output_errors(self.output):
            for name in ("receipts", "failures", "started", "tmp"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        self._write(self.root / "run.json", {"format": FORMAT, **run})

    # Units

    def start(self, unit_id: str, session: str) -> int:
        """Note that a session begins the unit; returns how often that session has begun it before.

        A number above 0 means that workers died over it: an end of any other kind clears the note.
        """
        path = self.root / "started" / unit_id
        with output_errors(self.output), path.open("a+") as file:
            file.seek(0)
            before = sum(line.split()[:1] == [session] for line in file)
            file.write(f"{session} {socket.gethostname()} {os.getpid()} {time.time():.0f}\n")
        return before

    @contextlib.contextmanager
    def temporary(self, unit_id: str) -> Iterator[Path]:
        """A path in tmp for the unit's output; what stands there at the end is removed."""
        # No ".parquet" in the name: tools that glob for it do not know about "_".
        path = self.root / "tmp" / f"{unit_id}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def commit(self, unit_id: str, temporary: Path, destination: Path, receipt: dict[str, Any]) -> None:
        """Make a finished output file visible, and write the receipt.

        Raises:
            OutputError: the output cannot be written.
        """
        with output_errors(self.output):
            _make_directories(self.output, destination.parent)
            size_bytes = temporary.stat().st_size
            _move(temporary, destination)
            sync(destination.parent)
        where = destination.relative_to(self.output).as_posix()
        self._write(self.root / "receipts" / f"{unit_id}.json", {**receipt, "output": where, "bytes": size_bytes})
        self.clear(unit_id)

    def fail(self, unit_id: str, failure: dict[str, Any]) -> None:
        """Note why the unit failed."""
        self._write(self.root / "failures" / f"{unit_id}.json", {"unit": unit_id, **failure})
        (self.root / "started" / unit_id).unlink(missing_ok=True)

    def clear(self, unit_id: str) -> None:
        """Forget that the unit was begun, and that it failed."""
        for folder, name in (("started", unit_id), ("failures", f"{unit_id}.json")):
            (self.root / folder / name).unlink(missing_ok=True)

    def has_receipt(self, unit_id: str) -> bool:
        return (self.root / "receipts" / f"{unit_id}.json").exists()

    def receipt(self, unit_id: str) -> dict[str, Any]:
        return self._read(self.root / "receipts" / f"{unit_id}.json")

    def failure(self, unit_id: str) -> dict[str, Any]:
        return self._read(self.root / "failures" / f"{unit_id}.json")

    def receipts(self) -> set[str]:
        """The ids of the units that are done."""
        return self._names("receipts")

    def failed(self) -> set[str]:
        """The ids of the units that were tried and failed."""
        return self._names("failures")

    def started(self) -> set[str]:
        """The ids of the units that were begun and have neither receipt nor failure: under way, or cut off."""
        return self._names("started")

    def failures(self) -> list[dict[str, Any]]:
        """What failed and why, in the order of the files' names."""
        notes = [note for unit_id in self.failed() if (note := self.failure(unit_id))]
        return sorted(notes, key=lambda note: (note.get("file", ""), note.get("row_groups") or [], note["unit"]))

    # Housekeeping

    def discard(self, unit_id: str) -> None:
        """Take a unit back: its output file first, the receipt last, so that a kill in between leaves no loose file."""
        note, receipt = self.receipt(unit_id), self.root / "receipts" / f"{unit_id}.json"
        written = Path(note["output"]) if note else None
        if written and (written.is_absolute() or ".." in written.parts):
            raise LakeError(f"{receipt} was altered: it names {written}, which is no file of this output; remove it")
        with output_errors(self.output):
            if written:
                (self.output / written).unlink(missing_ok=True)
            receipt.unlink(missing_ok=True)
            self.clear(unit_id)

    def sweep(self) -> None:
        """Remove from tmp what processes left that are no more."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / "tmp") as entries:
            for entry in entries:
                _remove_abandoned(Path(entry.path))

    # Files

    def _names(self, folder: str) -> set[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return {entry.name.removesuffix(".json") for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except OSError as error:
            raise LakeError(f"{self.root / folder} cannot be listed: {why(error)}") from error

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        except OSError as error:
            raise LakeError(f"{path} cannot be read: {why(error)}") from error

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        with output_errors(self.output), self.temporary(path.name.removesuffix(".json")) as temporary:
            with temporary.open("w") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)


def refuse_another_job(output: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that the run that an output holds is the one that is asked for.

    Args:
        output: for the message.
        earlier: settings that decide what is written, as they were.
        now: as they are.

    Raises:
        JobError: they differ; the message says where.
    """
    differences = []
    for key, value in now.items():
        was = earlier.get(key)
        # A part's columns stand in an order, which equal dictionaries need not have.
        if was == value and (key != "output columns" or list(was) == list(value)):
            continue
        if isinstance(was, dict) and isinstance(value, dict):
            differences += [
                f"{key}: {name} was {was.get(name, 'not there')}, is {value.get(name, 'not there')}"
                for name in {**was, **value}
                if was.get(name) != value.get(name)
            ]
            if was == value:
                differences.append(
                    f"{key}: were in the order {', '.join(was)}, are in {', '.join(value)}; --keep gives the order"
                )
        else:
            differences.append(f"{key} was {was}, is {value}")
    if differences:
        raise JobError(
            f"the output {output} holds a run of another job ({'; '.join(differences)}): "
            "give that job again to go on with it, or choose another output"
        )


@contextlib.contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Turn the operating system's errors into one that names the output and the remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to {printable(output)}: {why(error)}. "
            "When that is mended, the same command goes on where this run stopped"
        ) from error


def _make_directories(above: Path, directory: Path) -> None:
    """Make a directory below another so that it outlives a power cut.

    Those that another process has made are synced as well: it may not have come to that yet.
    """
    if directory == above or (directory in _lasting and directory.is_dir()):
        return
    _make_directories(above, directory.parent)
    directory.mkdir(exist_ok=True)
    sync(directory.parent)
    _lasting.add(directory)


# Directories that this process knows to be on the disk.
_lasting: set[Path] = set()


def _move(file: Path, destination: Path) -> None:
    """Rename a file over what stands there; by a copy where a partition's directory is a link to another disk."""
    try:
        os.replace(file, destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = destination.with_name(f".{file.name}")  # Nobody else's.
        for other in destination.parent.glob(f".{file.name.partition('.')[0]}.*"):
            _remove_abandoned(other)
        try:
            shutil.copyfile(file, beside)
            sync(beside)
            os.replace(beside, destination)
        finally:
            beside.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove a file that a process was writing which is no more; its name ends with host, process and a random word.

    Whoever asks is writing none yet: in a container that was started again it has the number of the one that was
    killed.
    """
    parts = path.name.lstrip(".").split(".")
    host, pid = ".".join(parts[1:-2]), parts[-2] if len(parts) > 2 else ""
    with contextlib.suppress(OSError):
        if host == socket.gethostname() and pid.isdigit():
            gone = int(pid) == os.getpid() or not _alive(int(pid))
        else:
            gone = time.time() - path.stat().st_mtime > _FOREIGN_AGE_SEC
        if gone:
            path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
