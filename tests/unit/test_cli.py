"""The command itself: what it prints and which status it ends with. As a process where a process shows more than a
call of `main` does; each process imports what it needs anew.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray import __version__, cli

ROOT = Path(__file__).resolve().parents[2]


def bert_ray(*argv: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bert_ray", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The error of a command that must end with status 2, without a traceback."""

    def run(*argv: object, cwd: Path | None = None) -> str:
        monkeypatch.chdir(cwd or Path.cwd())
        capsys.readouterr()
        status = cli.main([*map(str, argv)])
        told = capsys.readouterr()
        assert status == cli.AT_FAULT, told.out + told.err
        assert "Traceback" not in told.err
        last = told.err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return run


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "lake" / "part.parquet"
    path.parent.mkdir()
    rows = {"text": ["a great film", None, "the worst food"], "label": ["positive", "negative", "negative"]}
    pq.write_table(pa.table(rows), path)
    return path.parent


def test_help_and_version() -> None:
    shown = bert_ray("--help")
    assert shown.returncode == 0
    assert all(f"bert-ray {name}" in shown.stdout for name in cli.COMMANDS)
    assert bert_ray("--version").stdout.strip() == f"bert-ray {__version__}"
    assert bert_ray().returncode == cli.AT_FAULT


def test_the_page_lists_every_command_and_exit_status() -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert re.findall(r"^bert-ray (\w+)", page.split("```")[1], re.MULTILINE) == list(cli.COMMANDS)
    statuses = re.findall(r"^ {4}(\d+) ", cli.__doc__ or "", re.MULTILINE)
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == statuses


@pytest.mark.parametrize(
    ("words", "teaches"),
    [
        (["annotate"], ["--input TEXT", "--engine local|ray|spark", "bert-ray annotate jobs/annotate.yaml"]),
        (["train"], ["--data.train TEXT", "--zero-stage 0|1|2|3", "bert-ray train jobs/finetune.yaml"]),
        (["corpus"], ["--near.threshold X", "--words tokenizer|jieba", "bert-ray corpus jobs/corpus.yaml"]),
        (["vocabulary"], ["--extend TEXT", "--size N", "bert-ray vocabulary --input lake/"]),
        (["evaluate"], ["usage: bert-ray evaluate MODEL TABLE", "--label TEXT", "--mistakes N"]),
        (["submit"], ["--to ray|spark", "--wait true|false", "bert-ray submit jobs/annotate.yaml --to ray"]),
        (["choose"], ["usage: bert-ray choose TABLE", "--models [A, B]", "--budget-minutes X"]),
        (["plan"], ["usage: bert-ray plan JOB", "--gpu t4|v100", "--network-gbps X"]),
        (["runs"], ["status", "failures", "resume"]),
        (["runs", "resume"], ["--engine local|ray|spark", "bert-ray runs resume OUTPUT"]),
    ],
)
def test_each_command_teaches(words: list[str], teaches: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert cli.main([*words, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    shown = capsys.readouterr().out
    assert not [text for text in teaches if text not in shown]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from bert_ray.cli import main\n"
        "try: main(['annotate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'ray', 'pyspark', 'deepspeed', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_misspelt_command_names_the_near_one() -> None:
    done = bert_ray("anotate")
    assert done.returncode == cli.AT_FAULT
    assert done.stderr == "error: no command 'anotate'; did you mean annotate?\n"


def test_a_misspelt_key_names_file_line_and_the_near_key(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("input: lake\nmodel: m\nouput: out\n")
    error = refused("annotate", "job.yaml", cwd=tmp_path)
    assert error == "error: job.yaml:3: unknown key 'ouput'; did you mean output?"


def test_a_wrong_type_names_file_and_line(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("data:\n  train: x.parquet\nmodel: m\noutput: out\nepochs: three\n")
    error = refused("train", "job.yaml", cwd=tmp_path)
    assert error == "error: job.yaml:5: epochs takes an integer, not 'three' (text)"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["annotate", "nowhere.yaml"], "nowhere.yaml"),
        (["annotate", "--input", "nowhere/lake", "--model", "m", "--output", "out"], "nowhere/lake"),
        (["evaluate", "m", "nowhere.parquet"], "nowhere.parquet"),
        (["runs", "status", "nowhere"], "nowhere"),
        (["submit", "nowhere.yaml", "--to", "ray"], "nowhere.yaml"),
    ],
)
def test_a_path_that_does_not_exist_is_named(refused: Refused, tmp_path: Path, argv: list[str], named: str) -> None:
    assert named in refused(*argv, cwd=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_exist_is_named(refused: Refused, table: Path, tmp_path: Path) -> None:
    error = refused("annotate", "--input", table, "--model", "./nowhere", "--output", tmp_path / "out")
    assert "nowhere" in error


def test_annotate_status_and_failures(
    table: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (table / "cut.parquet").write_bytes((table / "part.parquet").read_bytes()[:300])
    done = bert_ray("annotate", "--input", table, "--model", tiny_bundle, "--output", out)
    assert done.returncode == cli.FAILED, done.stderr
    assert cli.main(["runs", str(out)]) == cli.FAILED
    capsys.readouterr()
    assert cli.main(["runs", "failures", str(out)]) == cli.FAILED
    assert "cut.parquet" in capsys.readouterr().out
    (table / "cut.parquet").write_bytes((table / "part.parquet").read_bytes())
    assert cli.main(["runs", "resume", str(out), "--threads", "1"]) == cli.DONE
    assert cli.main(["runs", "status", str(out)]) == cli.DONE
    assert pq.read_table(out, columns=["sentiment"]).num_rows == 6


def test_evaluate_prints_name_value_lines_and_the_report(table: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    done = bert_ray("evaluate", tiny_bundle, table, "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    values = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.count(" ") == 1)
    assert {"accuracy", "macro_f1", "majority_accuracy", "majority_macro_f1", "rows"} <= set(values)
    assert 0.0 <= float(values["accuracy"]) <= 1.0
    assert (values["rows"], values["rows_without_text"]) == ("2", "1")
    assert "confusion matrix" in done.stdout
    assert Path(values["report"]).is_file()


def interrupted(words: list[object], begun: Callable[[], bool], within_sec: float) -> str:
    """Run a command, stop it by Ctrl-C once it has begun, see that it ends as it should; what it said of that."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bert_ray", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + within_sec
    while not begun() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, errors
    assert "Traceback" not in errors
    return errors


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, tiny_bundle: Path) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    texts = pa.table({"text": [f"a great film number {number}" + " so very nice" * 20 for number in range(100)]})
    for number in range(40):
        pq.write_table(texts.append_column("part", pa.array([number] * 100)), lake / f"{number}.parquet")
    words = ["annotate", "--input", lake, "--model", tiny_bundle, "--output", tmp_path / "out"]
    receipts = tmp_path / "out" / "_bert_ray" / "receipts"
    errors = interrupted(words, lambda: receipts.is_dir() and any(receipts.iterdir()), 90)
    assert "bert-ray annotate --input" in errors
    assert f"bert-ray runs resume {tmp_path / 'out'}" in errors
    done = len(list(receipts.iterdir()))
    assert 0 < done < 40  # The interruption came in the middle.
    assert cli.main([*map(str, words)]) == cli.DONE
    assert len(list(receipts.iterdir())) == 40


def test_ctrl_c_in_training_says_how_to_go_on(tmp_path: Path, tiny_encoder: Path, uci_train: Path) -> None:
    words = ["train", "--model", tiny_encoder, "--output", tmp_path / "model", "--data.train", uci_train]
    words += ["--engine", "local", "--threads", 1, "--epochs", 200, "--checkpoint.every_steps", 5]
    checkpoints = tmp_path / "model.run" / "checkpoints"
    errors = interrupted(words, lambda: bool(list(checkpoints.glob("step-*"))), 120)
    assert "stopped" in errors
    assert f"bert-ray train --model {tiny_encoder}" in errors
    # It came in the middle: there is a checkpoint to go on from, and no bundle yet.
    assert list(checkpoints.glob("step-*"))
    assert not (tmp_path / "model").exists()


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(argv: object) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "annotate", cli.Command(broken, "annotate"))
    assert cli.main(["annotate"]) == cli.BUG
    errors = capsys.readouterr().err
    assert "ZeroDivisionError: a bug" in errors
    assert "this is a bug" in errors


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lacking(argv: object) -> int:
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed.runtime")

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(lacking, "train"))
    assert cli.main(["train"]) == cli.AT_FAULT
    assert "pip install 'bert-ray[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(("unbuffered", "status"), [("", cli.DONE), ("1", cli.CUT_OFF)])
def test_a_reader_that_leaves_early_is_no_error(unbuffered: str, status: int) -> None:
    # `bert-ray --help | true`: the pipe is closed before anything is printed. With a buffer the command is at its end
    # when that is seen.
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bert_ray", "--help"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=environment, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("name", ["annotate", "train"])
def test_the_entry_points_in_jobs_run_from_anywhere(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"usage: bert-ray {name}" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_no_room_for_what_is_printed(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bert_ray", *words]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        both = subprocess.run(command, stdout=full, stderr=full, timeout=60)
    assert result.returncode == both.returncode == cli.AT_FAULT
    assert result.stderr.startswith("error: No space left on device")
    assert len(result.stderr.splitlines()) == 1


def test_a_terminal_that_lacks_a_character_shows_the_others() -> None:
    words = [sys.executable, "-m", "bert_ray.cli", "train", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert rb"\u2026" in done.stdout
