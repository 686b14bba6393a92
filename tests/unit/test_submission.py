"""What is sent to a cluster, and what is refused before anything is sent."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bert_ray import submission
from bert_ray.config import load_job
from bert_ray.errors import JobError
from bert_ray.inference.job import AnnotateJob
from bert_ray.inference.spark_settings import write_properties
from bert_ray.submission import SubmitOptions, submit
from bert_ray.training.corpus.job import CorpusJob, VocabularyJob
from bert_ray.training.job import TrainJob


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


def test_the_words_are_shared_out() -> None:
    words = ["job.yaml", "--to", "ray", "--wait", "--workers", "3", "env.A=b", "engine=ray", "--address=http://h:1"]
    ours, theirs = submission._split(words)
    assert ours == ["--to", "ray", "--wait", "env.A=b", "--address=http://h:1"]
    assert theirs == ["job.yaml", "--workers", "3", "engine=ray"]
    assert submission._split(["--wait", "false", "--scores"]) == (["--wait", "false"], ["--scores"])
    assert submission._split(["--scores", "to=ray"]) == (["to=ray"], ["--scores"])


def test_a_job_file_is_known_as_the_commands_know_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env=prod").mkdir()
    (tmp_path / "env=prod" / "job.yaml").write_text("input: lake\n")
    (tmp_path / "job.json").write_text('{"data": {"train": "t.parquet"}}')
    ours, theirs = submission._split(["env=prod/job.yaml", "--to", "ray", "env.A=b", "--input", "env=prod/lake"])
    assert (ours, theirs) == (["--to", "ray", "env.A=b"], ["env=prod/job.yaml", "--input", "env=prod/lake"])
    assert submission._kind(theirs) == ("annotate", AnnotateJob)
    assert submission._kind(["--scores", "job.json"]) == ("train", TrainJob)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nightly.job").write_text("input: lake\n")
    assert submission._kind(["nightly.job", "workers=4", "--name", "job.json"]) == ("annotate", AnnotateJob)


def test_no_key_of_a_job_is_taken_for_submissions() -> None:
    from bert_ray.config.keys import list_keys

    ours = {key.name for key in list_keys(SubmitOptions)}
    for cls in (AnnotateJob, CorpusJob, TrainJob, VocabularyJob):
        assert not ours & {key.name.partition(".")[0] for key in list_keys(cls)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no to"),
        (["--to", "ray"], "no job: give a job file"),
        (["--to", "yarn", "job.yaml"], "to takes one of ray, spark"),
        (["--to", "ray", "missing.yaml"], "no job file missing.yaml"),
        (["--to", "ray", "neither.yaml"], "neither.yaml is neither an annotate job .* nor a train job"),
        (["--to", "ray", "job.yaml", "inptu=x"], "did you mean input"),
        (["--to", "ray", "job.yaml"], "no Ray cluster: give --address"),
        (["--to", "spark", "job.yaml"], "no Spark master: give --master"),
        (["--to", "spark", "train.yaml", "--master", "local"], "training runs on Ray"),
        (["--to", "spark", "input=lake", "tokenizer=t", "output=out"], "a corpus is made on Ray"),
        (["--to", "spark", "input=lake", "--min-count", "3", "output=out"], "a vocabulary is made on Ray"),
        (
            ["--to", "spark", "job.yaml", "--master", "yarn", "spark.config.spark.submit.deployMode=cluster"],
            "client mode",
        ),
    ],
)
def test_what_cannot_be_sent_is_refused_first(argv: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("input: lake\nmodel: m\noutput: out\n")
    (tmp_path / "train.yaml").write_text("data: {train: t.parquet}\nmodel: m\noutput: out\n")
    (tmp_path / "neither.yaml").write_text("model: m\noutput: out\n")
    with pytest.raises(JobError, match=message):
        submit(argv)
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_does_not_answer_is_an_error_with_its_address() -> None:
    # Port 9 (discard) is closed on loopback.
    with pytest.raises(JobError, match=r"Ray at http://127\.0\.0\.1:9 did not take the job"):
        submit(["--to", "ray", "--address", "http://127.0.0.1:9", "input=lake", "model=m", "output=out"])


def test_local_paths_become_absolute_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    job = submission._absolute(AnnotateJob(input="lake", model="model", output="s3://bucket/out"))
    assert (job.input, job.model, job.output) == (f"{tmp_path}/lake", f"{tmp_path}/model", "s3://bucket/out")
    words = [
        "data.train=t.parquet",
        "data.validation=/v.parquet",
        "data.replay=general",
        "model=pkg:some/model",
        "output=out",
    ]
    train = submission._absolute(load_job(TrainJob, words))
    assert (train.data.train, train.data.validation) == (f"{tmp_path}/t.parquet", "/v.parquet")
    assert train.data.replay == f"{tmp_path}/general"
    assert (train.model, train.output) == ("pkg:some/model", f"{tmp_path}/out")
    corpus = submission._absolute(CorpusJob(input=["lake", "s3://lake"], tokenizer="model", output="out"))
    assert (corpus.inputs, corpus.tokenizer) == ([f"{tmp_path}/lake", "s3://lake"], f"{tmp_path}/model")
    wider = submission._absolute(VocabularyJob(input="lake", extend="model", output="out"))
    assert (wider.inputs, wider.extend, wider.output) == ([f"{tmp_path}/lake"], f"{tmp_path}/model", f"{tmp_path}/out")
    assert submission._absolute(VocabularyJob(input="lake", output="out")).extend is None


def test_places_of_other_spellings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    job = submission._absolute(AnnotateJob(input="file:/data/lake", model="~/models", output="file:///data/out"))
    assert (job.input, job.model, job.output) == ("file:/data/lake", f"{tmp_path}/models", "file:///data/out")
    assert submission._absolute(AnnotateJob(input="~/a", model="org/name", output="b")).input == f"{tmp_path}/a"


def test_a_record_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(JobError, match=r"cannot write to .*taken.*--record"):
        submission._stage(
            SubmitOptions(to="ray", record="taken"), "annotate", AnnotateJob(input="a", model="m", output="o")
        )


def test_spark_that_is_not_there_is_told_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyspark")
    words = ["--to", "spark", "--master", "local", "input=lake", "model=m", "output=out"]
    with monkeypatch.context() as patch:
        patch.setenv("SPARK_HOME", str(tmp_path))
        with pytest.raises(JobError, match=r"SPARK_HOME is .*, which has no bin/spark-submit"):
            submit(words)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("JAVA_HOME", raising=False)
        with pytest.raises(JobError, match="Spark needs Java 17"):
            submit(words)
    assert not (tmp_path / "runs").exists()


def test_a_driver_that_ends_at_once_has_not_been_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "spark-submit"
    program.write_text("#!/bin/sh\necho starting\necho 'JAVA_HOME is not set' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(submission, "_program", lambda engine: [str(program)])
    monkeypatch.setattr(submission, "_EARLY_SECONDS", 60.0)
    with pytest.raises(JobError, match=r"spark-submit ended at once: JAVA_HOME is not set \(all in .*log\.txt\)"):
        submit(["--to", "spark", "--master", "local", "input=lake", "model=m", "output=out"])


def test_settings_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    path = write_properties(
        tmp_path / "spark.properties", {"spark.executorEnv.KEY": "a\\b=c", "odd:key": "\ntwo\r\nlines"}
    )
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().splitlines() == ["spark.executorEnv.KEY=a\\\\b=c", "odd\\:key=\\ntwo\\r\\nlines"]


def test_sigterm_reaches_the_driver(tmp_path: Path) -> None:
    code = (
        "import sys; from bert_ray import submission; "
        "sys.exit(submission._foreground(['sh', '-c', 'trap \"echo stopped; exit 7\" TERM; echo began; "
        "while :; do sleep 0.1; done'], {}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "began\n"
        process.terminate()
        said, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (said, process.returncode) == ("stopped\n", 143)


def test_what_is_sent_runs_by_itself(tmp_path: Path) -> None:
    options = SubmitOptions(to="spark", record=str(tmp_path / "runs"))
    job = AnnotateJob(input="/lake", model="m", output="/out", keep=["id"], scores=True)
    name, stage = submission._stage(options, "annotate", job)
    assert stage == tmp_path / "runs" / name
    assert stage.stat().st_mode & 0o777 == 0o700
    assert load_job(AnnotateJob, [str(stage / "job.yaml")]) == job
    archive = submission._archive(stage)
    with zipfile.ZipFile(archive) as handle:
        names = handle.namelist()
    assert {"bert_ray/cli.py", "bert_ray/evaluation/templates/report.html"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    # As spark-submit starts it: the archive on the path, nothing of this checkout.
    code = f"import sys; sys.path.insert(0, {str(archive)!r}); import bert_ray; print(bert_ray.__file__)"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(archive))


def said_in_turn(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """`ray job status` says these things, the last one from then on; an hour passes between two of them."""
    left, clock = list(answers), itertools.count(step=3600)

    def asked(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, left.pop(0) if len(left) > 1 else left[0], "")

    monkeypatch.setattr(submission.subprocess, "run", asked)
    monkeypatch.setattr(submission.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: None)


def test_a_job_whose_log_was_cut_off_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running = "Status for job 'one': RUNNING"
    said_in_turn(monkeypatch, running, running, running, "Job 'one' succeeded")
    assert submission._ray_status(["ray"], "http://head:8265", "one") == 0
    assert capsys.readouterr().err.count("the log of one is no longer followed; waiting for its end") == 1
    ended = "Job 'one' failed\nStatus message: Job entrypoint command failed with exit code {}, last logs:\n"
    said_in_turn(monkeypatch, running, ended.format(3) + "failed with exit code 9")
    assert submission._ray_status(["ray"], "http://head:8265", "one") == 3
    # As a shell has it for a process that a signal ended, or as Ray stops one.
    said_in_turn(monkeypatch, ended.format(-9) + "failed with exit code 1")
    assert submission._ray_status(["ray"], "http://head:8265", "one") == 137
    said_in_turn(monkeypatch, "Job 'one' was stopped")
    assert submission._ray_status(["ray"], "http://head:8265", "one") == 143
    said_in_turn(monkeypatch, "Job 'one' failed\nStatus message: no worker for it")
    with pytest.raises(JobError, match="one failed, and not by its own end: no worker for it"):
        submission._ray_status(["ray"], "http://head:8265", "one")
    said_in_turn(monkeypatch, running, "no connection")
    with pytest.raises(JobError, match="Ray does not say how one ended: no connection"):
        submission._ray_status(["ray"], "http://head:8265", "one")
    # A single question that is not answered is none, the first one neither.
    said_in_turn(monkeypatch, "no connection", running, "Job 'one' succeeded")
    assert submission._ray_status(["ray"], "http://head:8265", "one") == 0
    said_in_turn(monkeypatch, running, running, "no connection", running, "Job 'one' succeeded")
    assert submission._ray_status(["ray"], "http://head:8265", "one") == 0


def test_the_named_cluster_wins_over_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client lets the environment win over its --address."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://production:8265")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    from ray.dashboard.utils import get_address_for_submission_client

    for name, value in submission._quiet_ray("http://staging:8265").items():
        monkeypatch.setenv(name, value)
    assert get_address_for_submission_client("http://staging:8265") == "http://staging:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://production:8265")
    lines = submission._follow_ray("one", "http://staging:8265", None).splitlines()
    assert len(lines) == 3
    assert all("RAY_API_SERVER_ADDRESS=http://staging:8265 ray job" in line for line in lines)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://staging:8265")
    assert "RAY_API" not in submission._follow_ray("one", "http://staging:8265", None)


def test_commands_to_paste_are_quoted() -> None:
    job = AnnotateJob(input="in", model="m", output="/data/my out; rm -r x")
    assert submission._progress(job) == ["  done    bert-ray runs status '/data/my out; rm -r x'"]


def test_a_driver_that_a_signal_ended_has_a_shells_status() -> None:
    assert submission._foreground(["sh", "-c", "kill -9 $$"], dict(os.environ)) == 137
