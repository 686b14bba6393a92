"""Bad lakes, tables and outputs: each has its stated outcome, and the rest of the job goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BundleError, ColumnError, JobError, LakeError
from bert_ray.inference import bulk, runs
from bert_ray.inference.job import AnnotateJob
from tests.lakes import assert_same_table, journal_names, make_lake, read_output

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def job(lake: Path, model: Path, out: Path, **more: Any) -> AnnotateJob:
    return AnnotateJob(**{"input": str(lake), "model": str(model), "output": str(out), "name": "sentiment", **more})


def one_file(folder: Path, **columns: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder


def labels(out: Path) -> list[str | None]:
    return [row["label"] if row else None for row in read_output(out)["sentiment"].to_pylist()]


# Texts


def test_odd_texts_each_have_their_outcome(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    surrogate = b"lone \xed\xa0\x80 surrogate"  # What U+D800 becomes where a writer does not refuse it.
    odd = [None, b"", b"  \t\n", b"nul \x00 here", surrogate, b"\xff\xfe", "🎬🍿 𝔘".encode(), b"the film was good"]
    raw = pa.array(odd, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)  # Not validated, as in Parquet.
    lake = one_file(tmp_path / "lake", id=list(range(len(odd))), text=text)
    summary = bulk.run(job(lake, tiny_bundle, out))
    assert (summary.exit_status, summary.rows) == (0, len(odd))
    assert [label is None for label in labels(out)] == [True, True, True, False, False, False, False, False]
    # The input's bytes are as they were.
    assert read_output(out)["text"].cast(pa.binary()).to_pylist() == odd


def test_ten_megabytes_in_one_row(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    big = "the film was good " * (10 * 2**20 // 18)
    lake = one_file(tmp_path / "lake", id=[0, 1, 2], text=["short", big, "the film was good " * 600])
    assert bulk.run(job(lake, tiny_bundle, out)).exit_status == 0
    table = read_output(out)
    assert table["text"][1].as_py() == big
    found = table["sentiment"].to_pylist()
    # Both are cut at the model's length, and are the same up to there.
    assert found[1]["score"] == pytest.approx(found[2]["score"], abs=1e-5)


# Columns and types


def test_a_missing_column_names_the_near_ones(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    lake = one_file(tmp_path / "lake", id=[1], review_text=["a"], rating=[3])
    with pytest.raises(ColumnError, match=r"review_text"):
        bulk.run(job(lake, tiny_bundle, out, column="reviews_text"))
    assert not out.exists()


def test_a_column_of_the_wrong_type(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    lake = one_file(tmp_path / "lake", id=[1], text=[3.5])
    with pytest.raises(ColumnError, match=r"'text' is double, not text.*--column"):
        bulk.run(job(lake, tiny_bundle, out))


@pytest.mark.parametrize("kind", [pa.string(), pa.null()])
def test_a_column_of_nulls(tmp_path: Path, out: Path, tiny_bundle: Path, kind: pa.DataType) -> None:
    lake = one_file(tmp_path / "lake", id=[1, 2], text=pa.array([None, None], kind))
    assert bulk.run(job(lake, tiny_bundle, out)).exit_status == 0
    assert labels(out) == [None, None]


def test_keep_names_a_column_that_is_not_there(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    lake = one_file(tmp_path / "lake", id=[1], text=["a"])
    with pytest.raises(ColumnError, match=r"keep: .*'txet'.*text"):
        bulk.run(job(lake, tiny_bundle, out, keep=["txet"]))


# Files


def test_no_rows(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    lake = one_file(tmp_path / "lake", id=pa.array([], pa.int64()), text=pa.array([], pa.string()))
    summary = bulk.run(job(lake, tiny_bundle, out))
    assert (summary.exit_status, summary.rows, summary.done) == (0, 0, 1)
    assert read_output(out).schema.names == ["id", "text", "sentiment"]


def test_no_files(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    (tmp_path / "lake").mkdir()
    with pytest.raises(LakeError, match="holds no Parquet files"):
        bulk.run(job(tmp_path / "lake", tiny_bundle, out))
    with pytest.raises(LakeError, match="there is no"):
        bulk.run(job(tmp_path / "nothing", tiny_bundle, out))


def test_damaged_files_fail_their_units_and_the_others_go_on(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    lake = make_lake(tmp_path / "lake")
    whole = (lake / "source=s0" / "f0.parquet").read_bytes()
    (lake / "source=s0" / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (lake / "source=s0" / "zero.parquet").touch()
    (lake / "source=s1" / "letter.parquet").write_text("Dear all, this is not Parquet.")
    summary = bulk.run(job(lake, tiny_bundle, out))
    assert (summary.exit_status, summary.failed, summary.rows) == (1, 3, 48)
    assert read_output(out)["id"].to_pylist() == list(range(48))
    report = runs.failures(out)
    assert report.exit_status == 1
    for name in ("half", "zero", "letter"):
        assert f"{name}.parquet cannot be read" in report.text
    assert "3 failed" in runs.status(out).text
    assert "runs failures" in str(summary)


@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_on_error_fail_stops_an_engine_at_the_first(
    engine: str, tmp_path: Path, out: Path, tiny_bundle: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue({"ray": "ray_session", "spark": "spark"}[engine])
    lake = make_lake(tmp_path / "lake", partitions=1, files=150, group=12, repeat=60)
    damaged = lake / "source=s0" / "f0.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    summary = bulk.run(job(lake, tiny_bundle, out, engine=engine, unit_rows=12, on_error="fail"))
    assert (summary.exit_status, summary.failed) == (1, 1)
    assert "f0.parquet cannot be read" in summary.stopped
    assert summary.left > 0, "every unit was tried after the failure"
    # Nor do the engine's workers go on with what nobody waits for any more.
    assert len(journal_names(out, "receipts")) < summary.units / 2
    assert "f0.parquet cannot be read" in runs.failures(out).text


def test_names_that_are_not_utf_8(
    tmp_path: Path, out: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = tmp_path / "lake"
    folder = lake / os.fsdecode(b"source=caf\xe9")
    one_file(lake / "plain", id=[0, 1], text=["good", "bad"]).rename(folder)
    (folder / "a.parquet").rename(folder / os.fsdecode(b"\xff.parquet"))
    (folder / os.fsdecode(b"half\xff.parquet")).write_bytes(b"PAR1")
    summary = bulk.run(job(lake, tiny_bundle, out))
    assert (summary.failed, summary.rows) == (1, 2)
    part = next(part for part in (out / folder.name).iterdir())
    with part.open("rb") as file:
        assert pq.read_metadata(file).metadata[b"bert_ray.source"] == rb"source=caf\xe9/\xff.parquet"
    told = capsys.readouterr().out + runs.status(out).text + runs.failures(out).text
    assert told.count(rf"{lake}/source=caf\xe9/half\xff.parquet cannot be read") == 2
    told.encode()
    assert bulk.run(job(lake, tiny_bundle, out)).skipped == 1


def test_only_damaged_files(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "a.parquet").touch()
    with pytest.raises(LakeError, match=r"none of the 1 files.*a\.parquet"):
        bulk.run(job(tmp_path / "lake", tiny_bundle, out))


def test_files_whose_schemas_differ_but_fit(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    pq.write_table(pa.table({"id": pa.array([1], pa.int32()), "text": ["a"]}), lake / "a.parquet")
    newer = {"text": pa.array(["b"], pa.large_string()), "id": pa.array([2], pa.int64()), "stars": [5]}
    pq.write_table(pa.table(newer), lake / "b.parquet")
    assert bulk.run(job(lake, tiny_bundle, out)).exit_status == 0
    table = read_output(out)
    assert table.schema.names == ["id", "text", "stars", "sentiment"]
    assert table.select(["id", "text", "stars"]).to_pylist() == [
        {"id": 1, "text": "a", "stars": None},
        {"id": 2, "text": "b", "stars": 5},
    ]


def test_a_file_whose_schema_does_not_fit_fails_alone(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), lake / "a.parquet")
    pq.write_table(pa.table({"id": ["x"], "text": ["b"]}), lake / "b.parquet")
    pq.write_table(pa.table({"id": [3], "body": ["c"]}), lake / "c.parquet")
    summary = bulk.run(job(lake, tiny_bundle, out))
    assert (summary.exit_status, summary.done, summary.failed) == (1, 1, 2)
    text = runs.failures(out).text
    assert "b.parquet: column 'id' is string, in the rest of the table it is int64" in text
    assert "c.parquet has no column 'text'" in text


# Places


def test_an_output_that_is_not_ours(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    lake = make_lake(tmp_path / "lake")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(JobError, match=r"not empty.*notes\.txt"):
        bulk.run(job(lake, tiny_bundle, out))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_input_and_output_one_inside_the_other(tmp_path: Path, tiny_bundle: Path) -> None:
    lake = make_lake(tmp_path / "data" / "lake")
    with pytest.raises(JobError, match="inside the input"):
        bulk.run(job(lake, tiny_bundle, lake / "out"))
    with pytest.raises(JobError, match="inside the output"):
        bulk.run(job(lake, tiny_bundle, tmp_path / "data"))


@pytest.fixture
def small_disk(disk_of: Callable[[str], Path]) -> Path:
    """A file system of 300 KiB."""
    return disk_of("300k")


@pytest.mark.parametrize("engine", ["local", "ray", "spark"])
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(
    engine: str, tmp_path: Path, small_disk: Path, tiny_bundle: Path, request: pytest.FixtureRequest
) -> None:
    if engine != "local":
        request.getfixturevalue({"ray": "ray_session", "spark": "spark"}[engine])
    lake = tmp_path / "lake"
    lake.mkdir()
    random = np.random.default_rng(7)
    for index in range(8):  # 8 x 80 KB that do not compress.
        noise = ["".join(chr(code) for code in random.integers(97, 123, 4000)) for _ in range(20)]
        ids = list(range(20 * index, 20 * index + 20))
        pq.write_table(pa.table({"id": ids, "text": noise}), lake / f"{index}.parquet")
    asked = job(lake, tiny_bundle, small_disk / "out", engine=engine, workers=1)
    summary = bulk.run(asked)
    assert summary.exit_status == 1
    assert "No space left on device" in summary.stopped
    assert 0 < summary.done < 8
    assert summary.left > 0, "every unit was tried, though none could be written"
    written = read_output(small_disk / "out").num_rows
    assert written >= 20 * summary.done
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert bulk.run(asked).exit_status == 0
    bulk.run(job(lake, tiny_bundle, tmp_path / "undisturbed"))
    assert_same_table(read_output(small_disk / "out"), read_output(tmp_path / "undisturbed"))
    assert journal_names(small_disk / "out", "failures") == []


# The model


def test_an_altered_bundle_starts_nothing(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    from bert_ray.model.bundle import load_bundle, save_bundle

    lake = make_lake(tmp_path / "lake")
    source = load_bundle(str(tiny_bundle))
    saved = tmp_path / "bundle"
    save_bundle(saved, source.model(), source.tokenizer(), source.card)
    assert bulk.run(job(lake, saved, out)).exit_status == 0
    config = saved / "config.json"
    config.write_text(config.read_text().replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    with pytest.raises(BundleError, match=r"config\.json"):
        bulk.run(job(lake, saved, tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    (saved / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"(missing: |no )model\.safetensors"):
        bulk.run(job(lake, saved, tmp_path / "again"))


# The one who reads what is printed


def test_a_reader_that_goes_away_does_not_make_a_run_that_failed_look_done(
    tmp_path: Path, out: Path, tiny_bundle: Path
) -> None:
    lake = make_lake(tmp_path / "lake")
    (lake / "source=s0" / "f0.parquet").write_bytes(b"not parquet")
    assert bulk.run(job(lake, tiny_bundle, out)).exit_status == 1
    command = [sys.executable, "-m", "bert_ray.cli", "runs", "failures", str(out)]
    # The command has ended, and its status is known, where the last lines find no reader; else there is none.
    for unbuffered, status in (("", 1), ("1", 141)):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "wb") as pipe:
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            ended = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, env=environment, check=False)
        assert (ended.returncode, ended.stderr) == (status, b"")


# Ctrl-C


# The local engine: tests/unit/test_cli.py.
@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(engine: str, tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    if engine == "spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    lake = make_lake(tmp_path / "lake", files=30, group=12, repeat=60)
    command = [sys.executable, "-m", "bert_ray.cli", "annotate", "--input", str(lake), "--model", str(tiny_bundle)]
    command += ["--output", str(out), "--name", "sentiment", "--engine", engine, "--unit_rows", "12"]
    # A process group of its own, all of which gets the signal, as from a terminal.
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: len(journal_names(out, "receipts")) >= 2, process)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    done = len(journal_names(out, "receipts"))
    assert 2 <= done < 60, "the run was over before the signal came"
    assert f"bert-ray runs resume {out}" in told
    assert "Traceback" not in told
    assert runs.resume(out, engine="local").exit_status == 0
    assert read_output(out)["id"].to_pylist() == list(range(720))


def wait_for(condition: Any, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before its time"
        assert time.monotonic() < until
        time.sleep(0.01)
