"""The demo as a newcomer runs it, on one epoch: it ends well, says what it should, and is quick the second time."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds
import pytest

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


def run(output: Path, cwd: Path) -> tuple[str, float]:
    """Run the demo from a directory that is not the project's; returns what it printed and its seconds."""
    began = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command(output), capture_output=True, text=True, timeout=TIMEOUT_SEC, cwd=cwd, env=environment
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout, time.monotonic() - began


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    output = tmp_path_factory.mktemp("demo")
    said, seconds = run(output, tmp_path_factory.mktemp("elsewhere"))
    return output, said, seconds


def test_every_step_is_told_and_timed(first: tuple[Path, str, float]) -> None:
    _, said, _ = first
    for number in range(1, 6):
        assert re.search(rf"^{number}/5  \S", said, re.MULTILINE), said
    assert len(re.findall(r"^ +\d+\.\d s$", said, re.MULTILINE)) == 5
    assert "GROUP  BY ALL" in said
    assert re.search(r"right, by source: amazon \d+\.\d%, imdb \d+\.\d%, yelp \d+\.\d%", said)


def test_the_summary_tells_what_was_promised(first: tuple[Path, str, float]) -> None:
    output, said, _ = first
    summary = said[said.index("Summary") :]
    accuracy, majority = (float(share) for share in re.findall(r"(\d+\.\d)%", summary)[:2])
    assert majority == 50.0
    assert accuracy >= 80.0
    assert len(re.findall(r"2,001 rows annotated, [\d,]+ rows/s", summary)) == 2
    assert "agree on all 2,001 rows" in summary
    assert f"{output}/models/sentiment" in summary
    assert len(re.findall(r"^ +bert-ray (?:train|annotate|evaluate) ", summary, re.MULTILINE)) == 3


def test_tables_and_bundle_are_there(first: tuple[Path, str, float], uci_lake: Path) -> None:
    from bert_ray.model.bundle import load_bundle

    output = first[0]
    assert load_bundle(output / "models" / "sentiment").card.labels == ["negative", "positive"]
    known = ds.dataset(uci_lake, partitioning="hive").to_table().sort_by("id")
    for engine in ("ray", "spark"):
        table = ds.dataset(output / f"annotated-{engine}", partitioning="hive").to_table().sort_by("id")
        assert table.select(["id", "text", "label", "source"]).equals(known.select(["id", "text", "label", "source"]))
        assert table["sentiment"].null_count == 0


def test_the_second_run_does_nothing_twice(first: tuple[Path, str, float], tmp_path: Path) -> None:
    output, said, seconds = first
    weights = (output / "models" / "sentiment" / "model.safetensors").stat().st_mtime_ns
    again, seconds_again = run(output, tmp_path)
    assert "trained already" in again
    assert (output / "models" / "sentiment" / "model.safetensors").stat().st_mtime_ns == weights
    # The rates are those of the run that did the work.
    rates = [re.findall(r"rows annotated, ([\d,]+) rows/s", text[text.index("Summary") :]) for text in (said, again)]
    assert rates[0] == rates[1]
    assert seconds_again < seconds


def test_interrupted_it_says_how_to_go_on_and_does(first: tuple[Path, str, float], tmp_path: Path) -> None:
    # As if the run had been stopped after training: the annotated tables and what is known of them are gone.
    output = tmp_path / "demo"
    shutil.copytree(first[0] / "models", output / "models")
    facts = json.loads((first[0] / "facts.json").read_text("utf-8"))
    (output / "facts.json").write_text(json.dumps({"train": facts["train"]}), "utf-8")
    process = subprocess.Popen(
        command(output), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    said = ""
    try:
        for line in process.stdout:
            said += line
            if line.startswith("2/5"):
                break
        # The fault has to fall into the work, which begins when the journal does.
        deadline = time.monotonic() + 120
        while not (output / "annotated-ray" / "_bert_ray" / "run.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said += process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 130, said
    assert "make demo goes on from here" in said
    assert "Traceback" not in said
    again, _ = run(output, tmp_path)
    assert "agree on all 2,001 rows" in again
