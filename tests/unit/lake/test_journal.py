from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bert_ray.errors import LakeError
from bert_ray.lake.journal import Journal, OutputError
from tests.lakes import journal_names


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "out")
    journal.write_run({"units": 2})
    return journal


def test_a_unit_becomes_visible_with_its_receipt(journal: Journal) -> None:
    assert journal.start("u1", "s") == 0
    assert journal.started() == {"u1"}
    with journal.temporary("u1") as temporary:
        temporary.write_text("rows")
        journal.commit("u1", temporary, journal.output / "a=1" / "part-u1.parquet", {"rows": 3})
    assert (journal.output / "a=1" / "part-u1.parquet").read_text() == "rows"
    assert journal.receipt("u1") == {"rows": 3, "output": "a=1/part-u1.parquet", "bytes": 4}
    assert journal.has_receipt("u1")
    assert journal.started() == set()
    assert journal_names(journal.output, "tmp") == []


def test_a_part_and_its_directories_reach_the_disk_before_its_receipt(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(journal.output))
        fsync(descriptor)

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", sync)
    with journal.temporary("u1") as temporary:
        temporary.write_text("rows")
        journal.commit("u1", temporary, journal.output / "a=1" / "b=2" / "part-u1.parquet", {"rows": 3})
    # Each directory that was made, in the one that holds it; then the part's place; then the receipt and its place.
    assert [path.as_posix() for path in synced[:3]] == [".", "a=1", "a=1/b=2"]
    receipt, place = synced[3:]
    assert (receipt.parent.name, place.name) == ("tmp", "receipts")


def test_starts_of_one_session_count(journal: Journal) -> None:
    assert [journal.start("u", "one"), journal.start("u", "one"), journal.start("u", "two")] == [0, 1, 0]
    journal.fail("u", {"error": "no", "file": "f"})
    assert journal.start("u", "one") == 0


def test_a_receipt_ends_a_failure(journal: Journal) -> None:
    journal.fail("u", {"error": "half a file", "file": "f", "row_groups": None})
    assert [note["error"] for note in journal.failures()] == ["half a file"]
    with journal.temporary("u") as temporary:
        temporary.touch()
        journal.commit("u", temporary, journal.output / "p", {})
    assert journal.failures() == []


@pytest.mark.parametrize("place", ["../kept", "{root}/kept"])
def test_a_receipt_that_names_a_file_elsewhere_takes_none(journal: Journal, tmp_path: Path, place: str) -> None:
    (tmp_path / "kept").write_text("a book")
    with journal.temporary("u") as temporary:
        temporary.touch()
        journal.commit("u", temporary, journal.output / "part-u.parquet", {})
    receipt = journal.root / "receipts" / "u.json"
    receipt.write_text(json.dumps(journal.receipt("u") | {"output": place.format(root=tmp_path)}))
    with pytest.raises(LakeError, match=r"u\.json was altered: it names .*kept"):
        journal.discard("u")
    assert (tmp_path / "kept").exists()


def test_discard_takes_output_and_receipt(journal: Journal) -> None:
    with journal.temporary("u") as temporary:
        temporary.touch()
        journal.commit("u", temporary, journal.output / "part-u.parquet", {})
    journal.discard("u")
    assert not (journal.output / "part-u.parquet").exists()
    assert journal.receipts() == set()


def test_sweep_takes_what_the_dead_left_and_nothing_else(journal: Journal) -> None:
    dead = "from bert_ray.lake.journal import Journal; import os, sys; j = Journal(sys.argv[1])\n"
    dead += "with j.temporary('u') as t:\n t.touch(); print(t.name, flush=True); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", dead, str(journal.output)], capture_output=True, text=True)
    assert killed.returncode == -9
    other_host = f"u.elsewhere.example.{os.getpid()}.00"
    (journal.root / "tmp" / other_host).touch()
    lives = f"u.{socket.gethostname()}.{os.getppid()}.00"
    (journal.root / "tmp" / lives).touch()
    assert killed.stdout.strip() in journal_names(journal.output, "tmp")
    journal.sweep()
    assert journal_names(journal.output, "tmp") == sorted([other_host, lives])
    os.utime(journal.root / "tmp" / other_host, (0, 0))
    journal.sweep()
    assert journal_names(journal.output, "tmp") == [lives]


def test_a_run_of_another_layout_is_refused(journal: Journal) -> None:
    (journal.root / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(LakeError, match="format 99"):
        journal.read_run()
    (journal.root / "run.json").write_text("{")
    with pytest.raises(LakeError, match="cannot be read"):
        journal.read_run()


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write to"):
        Journal(tmp_path / "file" / "out").write_run({})


def test_a_directory_that_was_removed_is_made_again(journal: Journal) -> None:
    for unit in ("u1", "u2"):
        with journal.temporary(unit) as temporary:
            temporary.write_text("rows")
            journal.commit(unit, temporary, journal.output / "a=1" / f"part-{unit}.parquet", {"rows": 3})
        shutil.rmtree(journal.output / "a=1")
    assert journal.receipts() == {"u1", "u2"}


def test_sweep_takes_what_the_same_process_number_left(journal: Journal) -> None:
    """In a container that is started again a driver has the number of the one that was killed."""
    left = journal.root / "tmp" / f"u.{socket.gethostname()}.{os.getpid()}.00"
    left.touch()
    journal.sweep()
    assert not left.exists()


def test_a_part_reaches_another_disk(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a partition's directory is a link to one, a rename does not."""
    plain, refused = os.replace, []

    def across(source: Any, target: Any) -> None:
        if Path(source).parent.name == "tmp" and Path(target).parent.name == "source=a":
            refused.append(target)
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        plain(source, target)

    monkeypatch.setattr(os, "replace", across)
    (journal.output / "source=a").mkdir()
    killed = journal.output / "source=a" / f".u.{socket.gethostname()}.{os.getpid()}.00"
    killed.touch()  # In the midst of such a copy.
    with journal.temporary("u") as temporary:
        temporary.write_text("rows")
        journal.commit("u", temporary, journal.output / "source=a" / "part-u.parquet", {"rows": 1})
    assert refused
    assert (journal.output / "source=a" / "part-u.parquet").read_text() == "rows"
    assert [path.name for path in (journal.output / "source=a").iterdir()] == ["part-u.parquet"]
    assert journal.receipt("u")["output"] == "source=a/part-u.parquet"
