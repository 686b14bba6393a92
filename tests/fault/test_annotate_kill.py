"""Promise 5: SIGKILL of any process at any moment, and the table is that of an undisturbed run.

Each test first asserts that the kill fell in the middle, then compares.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bert_ray.inference import bulk
from bert_ray.inference.job import AnnotateJob, SparkOptions
from tests.conftest import SPARK_DAEMON
from tests.lakes import assert_same_table, journal_names, make_lake, read_output, receipts
from tests.processes import begin, drive, ended, kill_at, wait_for

UNITS, ROWS = 40, 480


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Long texts: a unit takes long enough for a kill to find it under way.
    return make_lake(tmp_path_factory.mktemp("fault") / "lake", files=UNITS // 2, rows=12, group=12, repeat=60)


@pytest.fixture(scope="module")
def undisturbed(lake: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert bulk.run(job(lake, tiny_bundle, output, "local")).exit_status == 0
    table = read_output(output)
    assert table["id"].to_pylist() == list(range(ROWS))
    return table


def job(lake: Path, model: Path, output: Path, engine: Any) -> AnnotateJob:
    return AnnotateJob(
        input=str(lake),
        model=str(model),
        output=str(output),
        engine=engine,
        name="sentiment",
        unit_rows=12,
        spark=SparkOptions(config={"spark.python.daemon.module": SPARK_DAEMON}),  # Of a session of the driver's own.
    )


def driver(asked: AnnotateJob, fault: Callable[[], None] | None = None) -> BaseProcess:
    if asked.engine == "spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    return begin(drive, bulk.run, asked, fault)


def assert_in_the_middle(output: Path) -> int:
    done = len(journal_names(output, "receipts"))
    assert 0 < done < UNITS, "the kill came too early or too late"
    return done


@pytest.mark.parametrize(("kind", "when"), [("part", "before"), ("part", "after"), ("receipt", "before")])
def test_driver_killed_at_a_chosen_point_of_a_commit(
    kind: str, when: str, lake: Path, tiny_bundle: Path, tmp_path: Path, undisturbed: pa.Table
) -> None:
    output = tmp_path / "out"
    # In its fourth commit.
    path = {"part": "/part-", "receipt": "/receipts/"}[kind]
    process = driver(job(lake, tiny_bundle, output, "local"), partial(kill_at, path, 4, when))
    assert ended(process) == -signal.SIGKILL
    assert len(journal_names(output, "receipts")) == 3
    parts = list(output.rglob("part-*.parquet"))
    assert len(parts) == (3 if (kind, when) == ("part", "before") else 4)
    assert len(journal_names(output, "tmp")) == (0 if (kind, when) == ("part", "after") else 1)
    # What stands there is a table in itself: no reader of it sees half a file.
    assert read_output(output).num_rows == 12 * len(parts)
    summary = bulk.run(job(lake, tiny_bundle, output, "local"))
    assert (summary.exit_status, summary.skipped) == (0, 3)
    assert_same_table(read_output(output), undisturbed)
    assert journal_names(output, "tmp") == []
    assert len(list(output.rglob("part-*.parquet"))) == UNITS


@pytest.mark.parametrize(("begun", "finished"), [("ray", "spark"), ("spark", "ray")])
def test_driver_killed_on_one_engine_and_finished_on_the_other(
    begun: str,
    finished: str,
    lake: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    undisturbed: pa.Table,
    request: pytest.FixtureRequest,
) -> None:
    output = tmp_path / "out"
    process = driver(job(lake, tiny_bundle, output, begun))
    wait_for(lambda: len(journal_names(output, "receipts")) >= 2, process)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    assert_in_the_middle(output)
    request.getfixturevalue({"ray": "ray_session", "spark": "spark"}[finished])
    # One worker: another would take its start of seconds and say the same.
    summary = bulk.run(replace(job(lake, tiny_bundle, output, finished), workers=1))
    assert summary.exit_status == 0
    assert summary.skipped > 0
    assert summary.skipped + summary.done == UNITS
    assert {note["engine"] for note in receipts(output)} == {begun, finished}
    assert_same_table(read_output(output), undisturbed)


def kill_a_worker(output: Path) -> tuple[str, int] | None:
    """Kill a worker that is at a unit; which unit, and the worker's process. None: try again.

    It is stopped first, and killed only if it is still at that unit then: it might have ended it meanwhile.
    """
    if len(journal_names(output, "receipts")) < 2 or not (found := under_way(output)):
        return None
    unit, pid = found
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        return None
    until = time.monotonic() + 10
    while _state(pid) not in "TZX" and time.monotonic() < until:  # In a system call it stops a moment later.
        time.sleep(0.001)
    if found != under_way(output, unit) or f"{unit}.json" in journal_names(output, "receipts"):
        os.kill(pid, signal.SIGCONT)
        return None
    os.kill(pid, signal.SIGKILL)
    return found


def _state(pid: int) -> str:
    """A process's state as /proc has it: R running, S sleeping, T stopped, Z dead, X gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def under_way(output: Path, *units: str) -> tuple[str, int] | None:
    """A unit (of these, or any) that a worker is at, and the worker's process."""
    for unit in units or journal_names(output, "started"):
        try:
            words = (output / "_bert_ray" / "started" / unit).read_text().split()
        except FileNotFoundError:  # It ended meanwhile.
            continue
        if len(words) == 4:
            return unit, int(words[2])
    return None


@contextlib.contextmanager
def killer(output: Path) -> Iterator[list[tuple[str, int]]]:
    """While the block runs in this process, kills one worker; gives the unit that it was at, and its process."""
    killed: list[tuple[str, int]] = []
    over = threading.Event()

    def kill_one() -> None:
        while not over.is_set() and not killed:
            if found := kill_a_worker(output):
                killed.append(found)
            time.sleep(0.005)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def assert_done_again(output: Path, unit: str, killed: int, undisturbed: pa.Table) -> None:
    again = {note["unit"]: note["pid"] for note in receipts(output)}[unit]
    assert again != killed, "the unit was finished by the process that was to be killed"
    assert_same_table(read_output(output), undisturbed)
    assert len(list(output.rglob("part-*.parquet"))) == UNITS


def test_ray_worker_killed_and_its_unit_done_again(
    lake: Path, tiny_bundle: Path, tmp_path: Path, undisturbed: pa.Table, ray_session: None
) -> None:
    output = tmp_path / "out"
    with killer(output) as killed:
        summary = bulk.run(job(lake, tiny_bundle, output, "ray"))
    ((unit, pid),) = killed
    assert pid != os.getpid(), "that was the driver"
    assert summary.exit_status == 0, "Ray did not start another worker"
    assert_done_again(output, unit, pid, undisturbed)


def test_spark_worker_killed_and_its_unit_done_again(
    lake: Path, tiny_bundle: Path, tmp_path: Path, undisturbed: pa.Table
) -> None:
    """In a driver of its own, whose session tries again."""
    output = tmp_path / "out"
    process = driver(job(lake, tiny_bundle, output, "spark"))
    try:
        unit, pid = wait_for(lambda: kill_a_worker(output), process)
        assert_in_the_middle(output)
        assert pid != process.pid, "that was the driver"
        assert ended(process) == 0, "Spark did not start another worker"
    finally:
        process.kill()
    assert_done_again(output, unit, pid, undisturbed)


def test_worker_killed_in_a_spark_session_that_does_not_retry(
    lake: Path, tiny_bundle: Path, tmp_path: Path, undisturbed: pa.Table, spark: Any
) -> None:
    """The user's own session on local[2] gives up at the first dead worker: the run says so, and a re-run ends it."""
    output = tmp_path / "out"
    with killer(output) as killed:
        summary = bulk.run(job(lake, tiny_bundle, output, "spark"))
    assert killed
    assert_in_the_middle(output)
    assert summary.exit_status == 1
    assert "Spark gave up: " in summary.stopped
    assert "Python worker exited" in summary.stopped
    assert bulk.run(job(lake, tiny_bundle, output, "spark")).exit_status == 0
    assert_same_table(read_output(output), undisturbed)
