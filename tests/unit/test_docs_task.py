"""The task that docs/adding-a-task.md adds works as the page says: its code is run word for word."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.inference import local
from bert_ray.model.tasks import TASKS
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import train

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-task.md"


@pytest.fixture
def stars(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {"__name__": "bert_ray.model.tasks.stars"}
    exec(compile(code, str(PAGE), "exec"), names)
    monkeypatch.setitem(TASKS, "stars", names["Stars"])


def test_the_page_s_task_trains_and_annotates(stars: None, tiny_encoder: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    words = {1: "terrible", 2: "bad", 3: "nice", 4: "great", 5: "excellent"}
    labels = [int(draw.integers(1, 6)) for _ in range(150)]
    texts = [f"the film was {words[label]} {row}" for row, label in enumerate(labels)]
    path = tmp_path / "reviews.parquet"
    pq.write_table(pa.table({"text": texts, "stars": labels}), path)
    data = DataOptions(train=str(path), validation_fraction=0.2, columns={"label": "stars"})
    job = TrainJob(
        model=str(tiny_encoder),
        output=str(tmp_path / "model"),
        data=data,
        task="stars",
        engine="local",
        epochs=12,
        batch_size=16,
        learning_rate=3e-3,
        threads=1,
    )
    result = train(job, tell=lambda _: None)
    assert set(result.metrics) == {"within_one", "mean_error"}
    assert result.metrics["within_one"] > 0.6
    table = pa.table({"text": ["the film was terrible 1", None, " ", "the film was excellent 2"]})
    found = local.annotate(table, job.output)["stars"]
    assert found.type == pa.float32()
    low, missing, blank, high = found.to_pylist()
    assert missing is None
    assert blank is None
    assert 1 <= low < high <= 5
