"""The demo as a newcomer runs it, on one epoch: stopped in the middle, gone on with, then begun once more."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from tests.lakes import receipts

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SEC = 540

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java: install openjdk-17-jre-headless"),
]


def command(output: Path) -> list[str]:
    # One epoch in big steps is enough to beat the majority; the demo's own settings take three times as long.
    overrides = [f"output={output}/models/sentiment", "epochs=1", "learning_rate=2e-4"]
    return [sys.executable, str(ROOT / "jobs" / "demo" / "demo.py"), *overrides]


def run(output: Path, cwd: Path) -> str:
    """Run the demo from a directory that is not the project's; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command(output), capture_output=True, text=True, timeout=TIMEOUT_SEC, cwd=cwd, env=environment
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def stop(output: Path, at: Callable[[str], bool], then: Callable[[], Any] | None = None) -> tuple[str, int]:
    """Run the demo, stop it by Ctrl-C at a line that it prints, or once `then` holds after it.

    Returns:
        what it printed, its exit status.
    """
    process = subprocess.Popen(
        command(output), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    said = ""
    try:
        for line in process.stdout:
            said += line
            if at(line):
                break
        while then and process.poll() is None and not then():
            time.sleep(0.02)
        assert process.poll() is None, said
        os.killpg(process.pid, signal.SIGINT)
        said += process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return said, process.returncode


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """The demo, stopped while it annotates with Spark: where, what it printed, its exit status.

    tests/integration/bad_input/test_lakes.py stops Ray in the same way.
    """
    output = tmp_path_factory.mktemp("demo")
    annotated = output / "annotated-spark"
    said, status = stop(
        output, lambda line: "annotate on spark" in line and "starting" in line, then=lambda: receipts(annotated)
    )
    assert "3/5" in said, said
    assert sum(note["rows"] for note in receipts(annotated)) < 2001, "it came too late"
    return output, said, status


@pytest.fixture(scope="module")
def first(interrupted: tuple[Path, str, int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo, gone on with to its end."""
    output = interrupted[0]
    said = run(output, tmp_path_factory.mktemp("elsewhere"))
    return output, said


def test_interrupted_it_says_how_to_go_on(interrupted: tuple[Path, str, int]) -> None:
    _, said, status = interrupted
    assert status == 130, said
    assert re.search(r"epoch 1/1  step \d+/\d+  loss ", said), said
    assert "annotated 2,001 rows" in said
    assert "make demo goes on from here" in said
    assert "Traceback" not in said


def test_every_step_is_told_and_timed(first: tuple[Path, str]) -> None:
    _, said = first
    for number in range(1, 6):
        assert re.search(rf"^{number}/5  \S", said, re.MULTILINE), said
    assert len(re.findall(r"^ +took \d+\.\d s$", said, re.MULTILINE)) == 5
    assert "GROUP  BY ALL" in said
    assert re.search(r"accuracy by source: amazon \d+\.\d%, imdb \d+\.\d%, yelp \d+\.\d%", said)


def test_the_summary_tells_what_was_promised(first: tuple[Path, str]) -> None:
    output, said = first
    summary = said[said.index("Summary") :]
    accuracy, majority = (float(share) for share in re.findall(r"(\d+\.\d)%", summary)[:2])
    assert majority == 50.0
    assert accuracy >= 80.0
    assert len(re.findall(r"2,001 rows annotated, [\d,]+ rows/s", summary)) == 2
    assert "yes: the labels of all 2,001 rows" in summary
    assert f"{output}/models/sentiment" in summary
    assert len(re.findall(r"^ +bert-ray (?:train|annotate|evaluate) ", summary, re.MULTILINE)) == 3


def test_tables_and_bundle_are_there(first: tuple[Path, str], uci_lake: Path) -> None:
    from bert_ray.model.bundle import load_bundle

    output = first[0]
    assert load_bundle(output / "models" / "sentiment").card.labels == ["negative", "positive"]
    known = ds.dataset(uci_lake, partitioning="hive").to_table().sort_by("id")
    for engine in ("ray", "spark"):
        table = ds.dataset(output / f"annotated-{engine}", partitioning="hive").to_table().sort_by("id")
        assert table.select(["id", "text", "label", "source"]).equals(known.select(["id", "text", "label", "source"]))
        assert table["sentiment"].null_count == 0


def test_what_is_done_is_not_done_again(first: tuple[Path, str]) -> None:
    output, said = first
    # By the run that went on after the interruption: what was trained and annotated before it.
    assert "trained already" in said
    assert said.count("annotated already") == 1
    # Ray's rate is that of the run that did the work.
    notes = receipts(output / "annotated-ray")
    seconds = max(note["began"] + note["seconds"] for note in notes) - min(note["began"] for note in notes)
    rates = re.findall(r"^ +ray +2,001 rows annotated, ([\d,]+) rows/s", said, re.MULTILINE)
    assert rates == [f"{2001 / seconds:,.0f}"]
    # By a run after that: all of it. It is stopped where it would ask the model again.
    weights = (output / "models" / "sentiment" / "model.safetensors").stat().st_mtime_ns
    again, status = stop(output, lambda line: line.startswith("5/5"))
    assert status == 130, again
    assert "trained already" in again
    assert again.count("annotated already") == 2
    assert "yes: 2,001 rows, all labels equal" in again
    assert (output / "models" / "sentiment" / "model.safetensors").stat().st_mtime_ns == weights
    assert receipts(output / "annotated-ray") == notes
