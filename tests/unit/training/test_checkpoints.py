"""Checkpoints appear whole, the oldest go, and a damaged one is passed over for the one before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from bert_ray.errors import JobError, LakeError
from bert_ray.training.checkpoints import POSITION_FILE, STATE_FILE, Checkpoints


def saved(directory: Path, *steps: int, keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, {"weight/a": torch.full((4, 4), float(step))}, {"step": step})
    return checkpoints


def test_the_newest_is_read_back(tmp_path: Path) -> None:
    found = saved(tmp_path, 1, 20, 3).latest()
    assert found is not None
    assert found.position == {"step": 20}
    assert found.state()["weight/a"][0, 0] == 20
    assert found.skipped == []


def test_none_where_nothing_was_saved(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "missing", 2).latest() is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "why"),
    [
        (STATE_FILE, truncate, "bytes of"),
        (STATE_FILE, flip, "checksum"),
        (STATE_FILE, Path.unlink, "No such file"),
        (POSITION_FILE, truncate, "damaged"),
        (POSITION_FILE, Path.unlink, "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, file: str, damage: object, why: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / file)
    found = checkpoints.latest()
    assert found is not None
    assert found.position == {"step": 1}
    assert why in found.skipped[0]


def test_one_that_the_disk_does_not_give_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next save would delete it."""
    checkpoints = saved(tmp_path, 1, 2)

    def fail(directory: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(directory))

    with monkeypatch.context() as patch:
        patch.setattr("bert_ray.training.checkpoints._read", fail)
        with pytest.raises(LakeError, match=r"step-00000002 cannot be read: .*Input/output error"):
            checkpoints.latest()
    assert not checkpoints.damaged
    found = checkpoints.latest()
    assert found is not None and found.position == {"step": 2}


def test_damaged_ones_go_before_what_is_written_after_them(tmp_path: Path) -> None:
    saved(tmp_path, 7, 8, 9)
    for path in tmp_path.glob(f"*/{STATE_FILE}"):
        truncate(path)
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.latest() is None
    assert list(checkpoints.damaged) == ["step-00000009", "step-00000008", "step-00000007"]
    for step in (1, 2, 3):
        checkpoints.save(step, {"weight/a": torch.zeros(1)}, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = Checkpoints(tmp_path, 2).latest()
    assert found is not None
    assert found.position == {"step": 3}


def test_whose_they_are(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new", 2)
    assert checkpoints.begun() is None
    checkpoints.begin({"seed": 1})
    checkpoints.save(1, {"weight/a": torch.zeros(1)}, {"step": 1})
    assert Checkpoints(tmp_path / "new", 2).begun() == {"seed": 1}
    checkpoints.remove()
    assert checkpoints.begun() is None
    assert not list((tmp_path / "new").iterdir())
    assert saved(tmp_path / "old", 1).begun() == {}


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    left = tmp_path / ".new-step-00000002"
    left.mkdir()
    (left / STATE_FILE).write_bytes(b"torn")
    found = checkpoints.latest()
    assert found is not None and found.position == {"step": 1}
    checkpoints.save(2, {"weight/a": torch.zeros(1)}, {"step": 2})
    assert not list(tmp_path.glob(".new-*"))


def test_a_step_that_is_saved_again_stands_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped before an epoch's end is evaluated, and its step saved once more."""
    checkpoints = saved(tmp_path, 3, keep=1)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bert_ray.training.checkpoints._write", killed)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 3, keep=1)
    found = checkpoints.latest()
    assert found is not None and found.position == {"step": 3}
    checkpoints.save(3, {"weight/a": torch.zeros(1)}, {"step": 3, "evaluated": True})
    found = checkpoints.latest()
    assert found is not None and found.position == {"step": 3, "evaluated": True}
    assert len(checkpoints.names()) == 1
    # Once more, where it was stopped there twice.
    checkpoints.save(3, {"weight/a": torch.zeros(1)}, {"step": 3, "evaluated": "again"})
    found = checkpoints.latest()
    assert found is not None and found.position == {"step": 3, "evaluated": "again"}
    assert len(checkpoints.names()) == 1
    checkpoints.save(4, {"weight/a": torch.zeros(1)}, {"step": 4})
    assert checkpoints.names() == ["step-00000004"]


def test_a_disk_that_does_not_answer_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the run would begin anew, and prune what it does not see."""
    checkpoints = saved(tmp_path, 1, 2)

    def fail(directory: Path) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(directory))

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        for ask in (checkpoints.latest, checkpoints.begun):
            with pytest.raises(LakeError, match=r"cannot be listed: .*Input/output error"):
                ask()
        with pytest.raises(LakeError, match=r"cannot write checkpoint step-00000003 .*cannot be listed"):
            saved(tmp_path, 3)
        with pytest.raises(LakeError, match="cannot be removed"):
            checkpoints.remove()
    assert checkpoints.names() == ["step-00000001", "step-00000002"]


def test_a_store_that_is_none_and_one_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="gopher://there cannot be used"):
        Checkpoints("gopher://there", 1)

    class Silent:
        @staticmethod
        def from_uri(uri: str) -> None:
            raise OSError("no route to host")

    monkeypatch.setattr(fs, "FileSystem", Silent)
    with pytest.raises(LakeError, match="s3://there does not answer: no route to host"):
        Checkpoints("s3://there", 1)


def test_old_ones_that_cannot_be_removed_do_not_make_the_new_one_unwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a store whose rules let nobody delete."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Checkpoints, "_drop", refused)
    with pytest.raises(LakeError, match=r"step-00000003 is written, but .* cannot be removed .*Permission denied"):
        saved(tmp_path, 1, 2, 3, keep=2)
    found = Checkpoints(tmp_path, 2).latest()
    assert found is not None and found.position == {"step": 3}


def test_its_files_reach_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    appeared: list[bool] = []
    fsync, replace = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def moved(source: Path, target: Path) -> None:
        files = [Path(source, name).stat().st_ino for name in (STATE_FILE, POSITION_FILE)]
        appeared.append({*files, Path(source).stat().st_ino} <= synced)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", moved)
    saved(tmp_path, 1)
    assert appeared == [True]
    assert tmp_path.stat().st_ino in synced, "its name in the directory"
