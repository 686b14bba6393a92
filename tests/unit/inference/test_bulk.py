from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BundleError, ColumnError, EngineError, JobError, LakeError
from bert_ray.inference import bulk, runs
from bert_ray.inference.bulk import Plan, Summary
from bert_ray.inference.job import AnnotateJob, SparkOptions
from bert_ray.inference.work import Outcome, annotate_unit
from bert_ray.lake import lock
from bert_ray.lake.journal import Journal
from bert_ray.lake.lock import exclusive
from bert_ray.options import RayOptions
from tests.lakes import assert_same_table, journal_names, make_lake, read_output, receipts


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    return make_lake(tmp_path / "lake")


@pytest.fixture
def job(lake: Path, tmp_path: Path, tiny_bundle: Path) -> AnnotateJob:
    return AnnotateJob(
        input=str(lake), model=str(tiny_bundle), output=str(tmp_path / "out"), unit_rows=4, name="sentiment"
    )


def changed(job: AnnotateJob, **changes: Any) -> AnnotateJob:
    return dataclasses.replace(job, **changes)


def begin(job: AnnotateJob) -> None:
    """As a run does that is killed in its first unit."""
    plan = bulk.prepare(job)
    Journal(job.output).start(plan.todo[0].id, plan.work.session)


def test_a_run_that_did_nothing_gives_way_to_another(job: AnnotateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine could not begin."""
    from bert_ray.inference import local

    def refuse(*_: Any) -> Iterator[Outcome]:
        raise JobError("64 workers are asked for")

    with monkeypatch.context() as patch:
        patch.setattr(local, "run_units", refuse)
        with pytest.raises(JobError, match="64 workers"):
            bulk.run(job)
    assert bulk.run(changed(job, name="mood", unit_rows=8)).exit_status == 0
    assert "mood" in read_output(Path(job.output)).schema.names


def test_a_run_writes_the_table_that_was_promised(job: AnnotateJob, capsys: pytest.CaptureFixture[str]) -> None:
    summary = bulk.run(job)
    assert (summary.exit_status, summary.rows, summary.units, summary.done, summary.skipped) == (0, 48, 12, 12, 0)
    assert 0 < summary.startup_seconds <= summary.seconds
    out = Path(job.output)
    table = read_output(out)
    assert table.schema.names == ["id", "text", "sentiment", "source"]
    assert table["id"].to_pylist() == list(range(48))
    assert table.schema.field("sentiment").type == pa.struct([("label", pa.string()), ("score", pa.float32())])
    assert {part.parent.name for part in out.rglob("part-*.parquet")} == {"source=s0", "source=s1"}
    part = pq.ParquetFile(next(out.rglob("part-*.parquet")))
    assert part.schema_arrow.names == ["id", "text", "sentiment"]
    meta = {key.decode(): value.decode() for key, value in part.metadata.metadata.items() if b"bert_ray" in key}
    assert meta["bert_ray.task"] == "classification"
    assert len(meta["bert_ray.fingerprint"]) == 64
    assert meta["bert_ray.source"].startswith("source=s")
    assert part.metadata.row_group(0).column(0).compression == "ZSTD"
    shown = capsys.readouterr()
    assert "annotated 48 rows in 12 units on local" in shown.out
    assert "12/12 units" in shown.err


def test_a_second_run_does_nothing(job: AnnotateJob) -> None:
    bulk.run(job)
    before = {path: path.stat().st_mtime_ns for path in Path(job.output).rglob("part-*")}
    summary = bulk.run(job)
    assert (summary.exit_status, summary.done, summary.skipped) == (0, 0, 12)
    assert {path: path.stat().st_mtime_ns for path in Path(job.output).rglob("part-*")} == before


def test_the_units_size_does_not_change_the_table(job: AnnotateJob, tmp_path: Path) -> None:
    bulk.run(job)
    other = changed(job, output=str(tmp_path / "other"), unit_rows=1000)
    assert bulk.run(other).units == 4
    assert_same_table(read_output(Path(job.output)), read_output(Path(other.output)))


def test_keep(job: AnnotateJob) -> None:
    bulk.run(changed(job, keep=["id"], scores=True))
    table = read_output(Path(job.output))
    assert table.schema.names == ["id", "sentiment", "source"]
    assert table.schema.field("sentiment").type.field("scores").type == pa.map_(pa.string(), pa.float32())
    with pytest.raises(ColumnError, match=r"'texts'.*text"):
        bulk.prepare(changed(job, keep=["texts"], output=job.output + "2"))


def test_a_column_that_is_not_kept_does_not_clash(job: AnnotateJob) -> None:
    with pytest.raises(ColumnError, match="--name"):
        bulk.prepare(changed(job, name="id"))
    bulk.run(changed(job, name="id", keep=["text"]))
    assert read_output_names(Path(job.output)) == {"text", "id", "source"}


def read_output_names(output: Path) -> set[str]:
    return set(pq.read_table(output).schema.names)


def test_another_column_and_a_partition_column(job: AnnotateJob, lake: Path) -> None:
    bulk.run(changed(job, column="source"))  # The partition's own text, though no file has it.
    labels = read_output(Path(job.output))["sentiment"].combine_chunks().field("label")
    assert labels.null_count == 0
    assert len(labels.unique()) <= 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"unit_rows": 8}, "unit_rows was 4, is 8"),
        ({"name": "mood"}, "mood"),
        ({"keep": ["id"]}, "text was string, is not there"),
        ({"scores": True}, "scores"),
        ({"column": "source"}, "text was text, is source"),
        ({"dtype": "bf16"}, "dtype was auto, is bf16"),
        ({"options": {"overflow": "head_tail"}}, "options: overflow was truncate, is head_tail"),
    ],
)
def test_another_job_in_the_same_output_is_refused(job: AnnotateJob, change: dict[str, Any], named: str) -> None:
    begin(job)
    with pytest.raises(JobError, match="choose another output") as error:
        bulk.prepare(changed(job, **change))
    assert named in str(error.value)


def test_columns_in_another_order_are_refused(job: AnnotateJob) -> None:
    begin(changed(job, keep=["id", "text"]))
    bulk.prepare(changed(job, keep=["id", "text"]))
    with pytest.raises(JobError, match="output columns: were in the order id, text, sentiment, are in text, id, sent"):
        bulk.prepare(changed(job, keep=["text", "id"]))


def test_what_was_cut_off_comes_last(job: AnnotateJob) -> None:
    plan = bulk.prepare(job)
    assert len(plan.todo) > 2
    first, *others = plan.todo
    Journal(Path(job.output)).start(first.id, "a session that was killed")
    assert bulk.prepare(job).todo == [*others, first]


def test_directories_of_the_annotation_s_name_are_refused(job: AnnotateJob) -> None:
    for path in list(Path(job.input).rglob("*.parquet")):
        # The files have the column as well, so that it is theirs; it is not kept.
        table = pq.read_table(path, partitioning=None)
        place = path.parent / "Sentiment=x"
        place.mkdir(exist_ok=True)
        pq.write_table(table.append_column("Sentiment", pa.array(["x"] * len(table))), place / path.name)
        path.unlink()
    with pytest.raises(ColumnError, match="directories are partitioned by 'Sentiment'"):
        bulk.prepare(changed(job, keep=["id"]))


def test_what_is_told_to_be_typed_can_be_pasted(job: AnnotateJob, tmp_path: Path, capsys: Any) -> None:
    job = changed(job, output=str(tmp_path / "my out"))
    bulk.prepare(job)
    report = runs.status(job.output)
    assert f"bert-ray runs resume '{tmp_path}/my out'" in report.text


def test_another_model_in_the_same_output_is_refused(job: AnnotateJob, tiny_encoder: Path) -> None:
    begin(job)
    with pytest.raises(JobError, match="model's fingerprint was"):
        bulk.prepare(changed(job, model=str(tiny_encoder)))


def test_other_labels_in_the_same_output_are_refused(job: AnnotateJob, tiny_encoder: Path) -> None:
    asked = changed(job, model=str(tiny_encoder), task="zero-shot", options={"labels": ["food", "film"]})
    begin(asked)
    bulk.prepare(asked)
    with pytest.raises(JobError, match=r"labels was \['food', 'film'\], is \['food', 'phone'\]"):
        bulk.prepare(changed(asked, options={"labels": ["food", "phone"]}))


def test_a_run_that_did_not_note_its_task_and_options_is_gone_on_with(job: AnnotateJob) -> None:
    bulk.prepare(job)
    path = Path(job.output) / "_bert_ray" / "run.json"
    run = json.loads(path.read_text())
    assert run["settings"].pop("task") == "classification"
    assert run["settings"].pop("options")["overflow"] == "truncate"
    path.write_text(json.dumps(run))
    assert bulk.run(job).exit_status == 0
    assert json.loads(path.read_text())["settings"]["options"]["overflow"] == "truncate"


def test_a_second_run_at_the_same_time_is_refused(job: AnnotateJob) -> None:
    held = Path(job.output) / "_bert_ray" / "lock"
    held.parent.mkdir(parents=True)
    held.write_text("process 1 on elsewhere")  # What a killed process left is no obstacle.
    assert bulk.run(job).exit_status == 0
    with exclusive(held, "the table"):
        with pytest.raises(LakeError, match=rf"another process works on the table .*process {os.getpid()} on"):
            bulk.run(job)
        # How far it is may be asked all the while.
        assert runs.status(job.output).exit_status == 0
    assert not held.exists()


def test_a_file_system_without_locks_is_no_obstacle(job: AnnotateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def flock(handle: int, how: int) -> None:
        asked.append(how)
        raise OSError(lock.errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    assert bulk.run(job).exit_status == 0
    assert asked


def test_new_files_are_annotated(job: AnnotateJob, lake: Path) -> None:
    bulk.run(job)
    pq.write_table(pa.table({"id": [100], "text": ["late"]}), lake / "source=s0" / "late.parquet")
    summary = bulk.run(job)
    assert (summary.done, summary.skipped) == (1, 12)
    assert read_output(Path(job.output))["id"].to_pylist() == [*range(48), 100]


def test_files_changed_or_gone_after_they_were_annotated_are_an_error(job: AnnotateJob, lake: Path) -> None:
    bulk.run(job)
    file = lake / "source=s1" / "f0.parquet"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(JobError, match=r"s1/f0\.parquet is gone"):
        bulk.prepare(job)
    file.write_bytes(content)
    with pytest.raises(JobError, match=r"s1/f0\.parquet is changed"):
        bulk.prepare(job)


def test_a_file_that_failed_and_was_mended_is_done_anew(job: AnnotateJob, lake: Path) -> None:
    file = lake / "source=s0" / "f1.parquet"
    content = file.read_bytes()
    # The last of three row groups is damaged, the footer is whole: two of its units succeed.
    start = pq.read_metadata(file).row_group(2).column(1).data_page_offset
    file.write_bytes(content[:start] + b"\xff" * 40 + content[start + 40 :])
    summary = bulk.run(job)
    assert (summary.exit_status, summary.failed, summary.done) == (1, 1, 11)
    assert "f1.parquet" in summary.failures[0]["error"]
    report = runs.failures(job.output)
    assert report.exit_status == 1
    assert "row groups 2 to 2" in report.text
    file.write_bytes(content)
    assert bulk.run(job).exit_status == 0
    assert read_output(Path(job.output))["id"].to_pylist() == list(range(48))
    assert runs.failures(job.output) == (f"{job.output}: no unit has failed", 0)


def test_a_part_that_somebody_removed_is_written_again(job: AnnotateJob) -> None:
    bulk.run(job)
    next(Path(job.output).rglob("part-*")).unlink()
    assert bulk.run(job).done == 1
    assert read_output(Path(job.output)).num_rows == 48


def test_a_part_without_a_receipt_of_a_file_that_changed_goes(job: AnnotateJob, lake: Path) -> None:
    bulk.run(job)
    out = Path(job.output)
    note = next(note for note in receipts(out) if note["file"] == "source=s0/f0.parquet")
    # As a kill between rename and receipt leaves it, for every unit of the file; then the file is written anew.
    for name in journal_names(out, "receipts"):
        path = out / "_bert_ray" / "receipts" / name
        if json.loads(path.read_text())["file"] == note["file"]:
            path.unlink()
    (lake / note["file"]).write_bytes((lake / note["file"]).read_bytes())
    assert bulk.run(job).done == 3
    assert read_output(out)["id"].to_pylist() == list(range(48))


def test_what_others_put_into_the_output_stays(job: AnnotateJob) -> None:
    bulk.run(job)
    theirs = Path(job.output) / "source=s0" / "part-00000-5d9f2c1e-7c5a-4b52-9a70-2f6f3d1f0b11-c000.snappy.parquet"
    theirs.write_bytes(b"theirs")
    assert bulk.run(job).skipped == 12
    assert theirs.read_bytes() == b"theirs"


def test_a_partition_moved_behind_a_link_counts_as_done(job: AnnotateJob, tmp_path: Path) -> None:
    bulk.run(job)
    partition = Path(job.output) / "source=s1"
    partition.rename(tmp_path / "elsewhere")
    partition.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up=1").symlink_to(job.output)
    assert (bulk.run(job).done, len(receipts(Path(job.output)))) == (0, 12)


def test_a_unit_committed_while_a_run_begins_stays(job: AnnotateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bulk.prepare(job)
    listed = bulk.parts

    def parts(output: Path) -> dict[str, Path]:
        found = listed(output)
        assert annotate_unit(plan.work, plan.todo[0]).state == "done"  # By a worker of a driver that was killed.
        return found

    monkeypatch.setattr(bulk, "parts", parts)
    assert len(bulk.prepare(job).todo) == 11
    assert len(list(Path(job.output).rglob("part-*"))) == 1


def test_a_unit_that_is_done_has_not_failed(job: AnnotateJob) -> None:
    bulk.run(job)
    journal = Journal(job.output)
    unit = min(journal.receipts())
    # As a kill right after the receipt leaves it, where the unit had failed before.
    journal.fail(unit, {"file": "f", "row_groups": None, "error": "was damaged"})
    assert runs.status(job.output).exit_status == 0
    assert runs.failures(job.output).exit_status == 0
    assert bulk.run(job).exit_status == 0
    assert journal.failed() == set()


def test_what_ended_while_the_engine_was_stopped_counts(job: AnnotateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_units(plan: Plan, watch: Any) -> Iterator[Outcome]:
        yield annotate_unit(plan.work, plan.todo[0])
        for unit in plan.todo[1:3]:
            assert annotate_unit(plan.work, unit).state == "done"
        raise EngineError("gave up")

    monkeypatch.setattr(bulk, "load_engine", lambda name: SimpleNamespace(run_units=run_units))
    summary = bulk.run(job)
    assert (summary.exit_status, summary.done, summary.rows, summary.left) == (1, 3, 12, 9)
    assert "12: 3 done, 0 failed, 9 to do" in runs.status(job.output).text


def test_on_error_fail_stops_at_the_first(job: AnnotateJob, lake: Path) -> None:
    (lake / "source=s0" / "f0.parquet").write_bytes(b"not parquet")
    summary = bulk.run(changed(job, on_error="fail"))
    assert (summary.exit_status, summary.failed, summary.done, summary.left) == (1, 1, 0, 9)
    assert "f0.parquet" in summary.stopped
    assert "runs resume" in str(summary)


def test_a_bundle_that_changes_under_a_run_stops_it(job: AnnotateJob, tiny_bundle: Path, tmp_path: Path) -> None:
    plan = bulk.prepare(job)
    spec = dataclasses.replace(plan.work.annotator, fingerprint="0" * 64)
    work = dataclasses.replace(plan.work, annotator=spec)
    outcome = annotate_unit(work, plan.todo[0])
    assert (outcome.state, outcome.lasting) == ("failed", True)
    assert "fingerprint" in outcome.error
    # The process has learned that the session is hopeless: it tries no other unit of it.
    assert annotate_unit(work, plan.todo[1]).state == "left"


def test_a_lock_is_let_go_of_where_its_note_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "write", full)
    for _ in range(2):
        with exclusive(tmp_path / "lock", "the table"):
            assert (tmp_path / "lock").stat().st_size == 0
            with pytest.raises(LakeError, match="it has not said which"), exclusive(tmp_path / "lock", "the table"):
                pass


def test_two_inputs_may_be_one_column(job: AnnotateJob, tiny_encoder: Path) -> None:
    columns = {"text": "text", "text_pair": "text"}
    summary = bulk.run(changed(job, model=str(tiny_encoder), task="similarity", columns=columns, name="alike"))
    assert (summary.exit_status, summary.rows) == (0, 48)
    scores = [score for score in read_output(Path(job.output))["alike"].to_pylist() if score is not None]
    assert scores and min(scores) > 0.999


def test_a_run_goes_on_in_the_precision_that_it_began_with(job: AnnotateJob) -> None:
    """`auto` is another one on another device: begun where it is bf16, gone on with where it is fp32."""
    plan = bulk.prepare(job)
    assert plan.work.annotator.dtype == "auto"
    there = dataclasses.replace(plan.work, annotator=dataclasses.replace(plan.work.annotator, dtype="bf16"))
    assert annotate_unit(there, plan.todo[0]).state == "done"
    here = bulk.prepare(job)
    assert annotate_unit(here.work, here.todo[0]).state == "done"
    journal = Journal(job.output)
    assert [journal.receipt(unit)["dtype"] for unit in journal.receipts()] == ["bf16", "bf16"]


def test_a_unit_over_which_workers_die_is_given_up(job: AnnotateJob) -> None:
    plan = bulk.prepare(job)
    journal = Journal(job.output)
    for _ in range(3):
        journal.start(plan.todo[0].id, plan.work.session)
    outcome = annotate_unit(plan.work, plan.todo[0])
    assert outcome.state == "failed"
    assert "3 workers died" in outcome.error
    # The next session tries it again.
    assert bulk.run(job).exit_status == 0


def test_status_and_resume(job: AnnotateJob, capsys: pytest.CaptureFixture[str]) -> None:
    plan = bulk.prepare(job)
    for unit in plan.todo[:5]:
        annotate_unit(plan.work, unit)
    report = runs.status(job.output)
    assert report.exit_status == 1
    assert "12: 5 done, 0 failed, 7 to do" in report.text
    assert "20 of 48 written" in report.text
    assert runs.resume(job.output, threads=1) == ("", 0)
    assert "7 units on local" in capsys.readouterr().out
    assert runs.status(job.output).exit_status == 0
    with pytest.raises(JobError, match="holds no run"):
        runs.status(Path(job.output).parent / "elsewhere")


def test_a_missing_model_starts_nothing(job: AnnotateJob) -> None:
    with pytest.raises(BundleError):
        bulk.run(changed(job, model="no/such/model"))
    assert not Path(job.output).exists()


def test_a_language_that_the_vocabulary_cannot_spell_is_told(
    job: AnnotateJob, lake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bulk.prepare(job).warnings == []
    for file in lake.rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        table = table.set_column(1, "text", pa.array(["味道很好，送餐快"] * len(table)))
        pq.write_table(table, file)
    damaged = lake / "source=s0" / "f0.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    summary = bulk.run(changed(job, output=job.output + "2"))
    (warning,) = summary.warnings
    assert "column 'text': 100% of the tokens are unknown to the model's vocabulary" in warning
    shown = capsys.readouterr()
    assert f"warning: {warning}" in shown.err
    assert f"warning  {warning}" in shown.out
    # It is a warning: the rows are annotated all the same.
    assert (summary.exit_status, summary.failed, summary.rows) == (1, 1, 36)


def test_summary_in_words() -> None:
    summary = Summary(
        engine="ray", output="/o", annotation="column s: string", units=9, done=5, skipped=1, failed=1, rows=50
    )
    summary.seconds, summary.startup_seconds = 12.0, 2.0
    summary.failures = [{"error": "a.parquet cannot be read"}]
    text = str(summary)
    for part in ("50 rows in 5 units on ray", "5.0 rows/s", "skipped  1", "failed   1", "a.parquet", "left     2"):
        assert part in text


def test_a_part_reaches_the_disk_before_it_appears(job: AnnotateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bulk.prepare(job)
    synced: set[int] = set()
    moved: dict[str, bool] = {}
    fsync, replace = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def put(source: Path, target: Path) -> None:
        moved[Path(target).name] = os.stat(source).st_ino in synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", put)
    unit = plan.todo[0]
    assert annotate_unit(plan.work, unit).state == "done"
    assert {name: moved[name] for name in (f"part-{unit.id}.parquet", f"{unit.id}.json")} == {
        f"part-{unit.id}.parquet": True,
        f"{unit.id}.json": True,
    }


def test_what_failed_in_this_session_is_not_tried_twice(job: AnnotateJob, lake: Path) -> None:
    """A task that is tried again has units that were told as failed: what is told stays true."""
    plan = bulk.prepare(job)
    unit = plan.todo[0]
    whole = (lake / unit.path).read_bytes()
    (lake / unit.path).write_bytes(b"")
    first = annotate_unit(plan.work, unit)
    assert first.state == "failed"
    (lake / unit.path).write_bytes(whole)
    os.utime(lake / unit.path, ns=(unit.modified_ns, unit.modified_ns))
    assert annotate_unit(plan.work, unit) == first
    assert bulk.run(job).exit_status == 0


def test_a_secret_of_sparks_is_not_noted(job: AnnotateJob) -> None:
    """run.json stands with the table, and is read by whoever reads that."""
    config = {"spark.hadoop.fs.s3a.secret.key": "hush", "spark.executor.memory": "2g"}
    bulk.run(changed(job, spark=SparkOptions(config=config)))
    noted = (Path(job.output) / "_bert_ray" / "run.json").read_text()
    assert "hush" not in noted
    assert "2g" in noted
    with pytest.raises(JobError, match=r"spark\.config\.spark\.hadoop\.fs\.s3a\.secret\.key is a secret"):
        runs.resume(job.output, engine="spark")
    assert runs.resume(job.output).exit_status == 0  # Another engine does not need it; that there is one stays noted.
    with pytest.raises(JobError, match=r"s3a\.secret\.key is a secret"):
        runs.resume(job.output, engine="spark")


def test_another_users_settings_of_spark_are_not_taken(job: AnnotateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk.run(changed(job, spark=SparkOptions(config={"spark.driver.extraJavaOptions": "-javaagent:theirs.jar"})))
    started: list[AnnotateJob] = []
    monkeypatch.setattr(runs, "run", lambda job: started.append(job) or SimpleNamespace(exit_status=0))
    runs.resume(job.output, engine="spark")
    assert started[0].spark.config == {"spark.driver.extraJavaOptions": "-javaagent:theirs.jar"}
    journal = Path(job.output) / "_bert_ray" / "run.json"
    if os.getuid() == 0:
        try:
            os.chown(journal, 12345, 12345)
        except OSError:
            pytest.skip("there are no other users here")
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(
        JobError, match=r"spark\.config\.spark\.driver\.extraJavaOptions stands in a journal that another"
    ):
        runs.resume(job.output, engine="spark")
    runs.resume(job.output, engine="spark", spark=SparkOptions(config={"spark.driver.extraJavaOptions": "-ea"}))
    assert started[1].spark.config == {"spark.driver.extraJavaOptions": "-ea"}
    runs.resume(job.output, engine="local")
    assert started[2].spark.config == {}, "they would be noted as this user's"


@pytest.mark.parametrize(("engine", "key"), [("ray", "ray.address"), ("spark", "spark.master")])
def test_what_ran_on_a_cluster_goes_on_there(
    job: AnnotateJob, monkeypatch: pytest.MonkeyPatch, engine: str, key: str
) -> None:
    """Not on the machine, a login node perhaps, where somebody types the command."""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(SparkOptions, "submitted", staticmethod(lambda: True))
    other = {"ray": {"spark": SparkOptions(master="spark://h:7077")}, "spark": {"ray": RayOptions(address="auto")}}
    begin(changed(job, engine=engine, **other[engine]))
    started: list[AnnotateJob] = []
    monkeypatch.setattr(runs, "run", lambda job: started.append(job) or SimpleNamespace(exit_status=0))
    runs.resume(job.output)  # Within a job of the cluster, as the first one was.
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(SparkOptions, "submitted", staticmethod(lambda: False))
    with pytest.raises(JobError, match=rf"was on a cluster .*--{key} 'local"):
        runs.resume(job.output)
    here = {"ray": RayOptions(address="local")} if engine == "ray" else {"spark": SparkOptions(master="local[2]")}
    runs.resume(job.output, **here)
    runs.resume(job.output, engine="local")
    assert len(started) == 3


def test_a_files_name_does_not_command_the_terminal(
    job: AnnotateJob, lake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lake / "source=s0" / "x\x1b]0;theirs\x07\n  all is well.parquet").write_bytes(b"no parquet")
    assert bulk.run(job).exit_status == 1
    report = runs.failures(job.output).text
    shown = capsys.readouterr()
    for text in (report, shown.out, shown.err):
        assert "\x1b" not in text
        assert "\n  all is well" not in text
    assert r"x\x1b]0;theirs\x07\n  all is well.parquet" in report
