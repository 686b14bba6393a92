"""The task that docs/adding-a-task.md adds works as the page says: its code and its commands are run word for word."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray import cli
from bert_ray.inference import local
from bert_ray.model.bundle import load_bundle
from bert_ray.model.tasks import TASKS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-task.md"
WORDS = {1: "terrible", 2: "bad", 3: "nice", 4: "great", 5: "excellent"}


@pytest.fixture
def stars(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {"__name__": "bert_ray.model.tasks.stars"}
    exec(compile(code, str(PAGE), "exec"), names)
    monkeypatch.setitem(TASKS, "stars", names["Stars"])


def commands() -> dict[str, list[str]]:
    """The page's commands: name -> its words."""
    text = PAGE.read_text("utf-8").replace("\\\n", " ")
    lines = (shlex.split(line) for line in re.findall(r"^bert-ray (.*)$", text, re.MULTILINE))
    return {name: words for name, *words in lines}


def reviews(rows: int, seed: int) -> pa.Table:
    labels = np.random.default_rng(seed).integers(1, 6, rows).tolist()
    texts = [f"the film was {WORDS[label]} {seed} {row}" for row, label in enumerate(labels)]
    return pa.table({"text": texts, "stars": labels})


def on_spark(words: list[str], directory: Path) -> pa.Table:
    """The page's command as it stands, by a bert_ray that has the task in the two places that the page names."""
    pytest.importorskip("pyspark")
    shutil.copytree(ROOT / "bert_ray", directory / "path" / "bert_ray", ignore=shutil.ignore_patterns("__pycache__"))
    tasks = directory / "path" / "bert_ray" / "model" / "tasks"
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tasks / "stars.py").write_text(code)
    with (tasks / "__init__.py").open("a") as file:
        file.write('\nfrom bert_ray.model.tasks.stars import Stars\n\nTASKS["stars"] = Stars\n')
    output = ["output=on_spark", "spark.master=local[1]", "threads=1"]
    done = subprocess.run(
        [sys.executable, "-m", "bert_ray.cli", "annotate", *words, *output],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory / "path")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 rows in 1 units on spark" in done.stdout
    return pq.read_table(directory / "on_spark")


@pytest.mark.slow
def test_the_page_s_commands_work(
    stars: None, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is added but what makes the runs small: a tiny encoder, one process before the engine's."""
    monkeypatch.chdir(tmp_path)
    Path("jobs").mkdir()
    shutil.copy(ROOT / "jobs" / "finetune.yaml", "jobs")
    pq.write_table(reviews(150, 0), "reviews.parquet")
    pq.write_table(reviews(40, 1), "test.parquet")
    table = pa.table({"text": ["the film was terrible 1", None, " ", "the film was excellent 2"]})
    Path("lake").mkdir()
    pq.write_table(table, "lake/part.parquet")
    page = commands()
    assert list(page) == ["train", "annotate", "evaluate"]

    small = [f"model={tiny_encoder}", "engine=local", "threads=1", "epochs=12", "batch_size=16", "learning_rate=3e-3"]
    assert cli.main(["train", *page["train"], *small]) == cli.DONE
    card = load_bundle("models/stars").card
    assert (card.task, card.name, card.labels) == ("stars", "stars", ["1", "2", "3", "4", "5"])
    assert set(card.metrics) == {"within_one", "mean_error"}
    assert card.metrics["within_one"] > 0.6

    assert cli.main(["annotate", *page["annotate"], "engine=local", "threads=1"]) == cli.DONE
    found = pq.read_table("out")["stars"]
    assert found.type == pa.float32()
    low, missing, blank, high = found.to_pylist()
    assert missing is None
    assert blank is None
    assert 1 <= low < high <= 5
    assert local.annotate(table, "models/stars")["stars"].to_pylist() == pytest.approx(found.to_pylist())
    spark = on_spark(page["annotate"], tmp_path)
    assert spark["stars"].to_pylist() == pytest.approx(found.to_pylist())

    capsys.readouterr()
    assert cli.main(["evaluate", *page["evaluate"], "--threads", "1"]) == cli.DONE
    assert re.search(r"^within_one (0\.[6-9]|1\.0)", capsys.readouterr().out, re.MULTILINE)
