"""What holds for every task: declared types, rows and nulls, and that the engines agree (promises 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bert_ray.inference import bulk, local
from bert_ray.inference.job import AnnotateJob
from bert_ray.model.annotator import AnnotatorSpec, forget_built
from bert_ray.model.packing import PackedBatch
from bert_ray.model.tasks import TASKS
from bert_ray.model.tasks.base import Task
from bert_ray.model.tasks.classification import Classification
from tests.lakes import assert_same_table, read_output
from tests.tiny_tasks import MAKERS, Tiny

Make = Callable[[str], Tiny]


def here(it: Tiny, table: pa.Table | None = None) -> pa.Table:
    return local.annotate(
        it.table if table is None else table, it.model, task=it.task, options=it.options, name="annotation"
    )


def floats(value: Any) -> Iterator[float]:
    """All floating-point numbers in an annotation, however deep."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from floats(item)


def test_every_task_has_its_tiny_bundle() -> None:
    assert sorted(MAKERS) == sorted(TASKS)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_type_rows_and_nulls(kind: str, tiny: Make) -> None:
    it = tiny(kind)
    found = here(it)
    assert found.schema.field("annotation").type == it.type
    assert found.drop_columns(["annotation"]).equals(it.table)
    annotations = found["annotation"].to_pylist()
    for row, values in enumerate(zip(*(array.to_pylist() for array in it.columns.values()), strict=True)):
        if None in values:
            assert annotations[row] is None, f"row {row}: null in, null out"
    assert any(item is not None for item in annotations)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_neighbours_make_no_difference(kind: str, tiny: Make) -> None:
    """A row alone, and all rows in another order, get the annotations that they get together."""
    it = tiny(kind)
    together = here(it)
    order = list(reversed(range(len(together))))
    assert_same_table(together, here(it, it.table.take(order)).sort_by("id"), "annotation")
    for row in (0, 4):
        assert_same_table(together.slice(row, 1), here(it, it.table.slice(row, 1)), "annotation")


def test_a_model_that_reads_few_tokens_computes_no_others_and_says_the_same(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: set[str] = set()
    narrowed = Task.narrowed
    for kind in sorted(MAKERS):
        it = tiny(kind)

        def noted(task: Task, batch: PackedBatch, targets: Any = None, kind: str = kind) -> PackedBatch:
            found = narrowed(task, batch, targets)
            if found.read is not None:
                few.add(kind)
                assert len(found.read) < len(batch.input_ids)
            return found

        with monkeypatch.context() as patched:
            patched.setattr(Task, "narrowed", noted)
            found = here(it)
            patched.setattr(Task, "narrowed", lambda task, batch, targets=None: batch)
            forget_built()
            assert_same_table(here(it), found, "annotation")
        forget_built()
    assert few >= {"classification", "multi-label", "regression", "fill-mask"}


def test_a_head_of_one_s_own_over_other_tokens_is_given_all(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It derives from a task that reads first tokens, and reads last ones: by where they stand among all."""

    class Last(Classification):
        seen: ClassVar[list[int]] = []

        def forward(self, model: Any, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
            self.seen.append(len(hidden) - len(batch.input_ids))
            return model.classifier(hidden[batch.cu_seqlens[1:].long() - 1])

    it = tiny("classification")
    monkeypatch.setitem(TASKS, "last", Last)
    found = local.annotate(it.table, it.model, task="last", name="annotation")
    assert len(found) == len(it.table)
    assert set(Last.seen) == {0}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_half_precision_on_a_cpu(kind: str, dtype: str, tiny: Make) -> None:
    it = tiny(kind)
    spec = AnnotatorSpec(model=it.model, task=it.task, options=it.options, name="annotation", device="cpu", dtype=dtype)
    annotator = spec.build()
    assert annotator.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    found = annotator(it.table)
    assert all(math.isfinite(value) for value in floats(found["annotation"].to_pylist()))
    assert found.schema.field("annotation").type == it.type
    half, full = found["annotation"].to_pylist(), here(it)["annotation"].to_pylist()
    assert [item is None for item in half] == [item is None for item in full]
    if kind in ("embedding", "similarity", "regression"):  # Of others rounding may decide what is said.
        assert list(floats(half)) == pytest.approx(list(floats(full)), abs=0.05)
        assert half != full, "it was computed in fp32"


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_no_rows(kind: str, tiny: Make) -> None:
    it = tiny(kind)
    found = here(it, it.table.slice(0, 0))
    assert found.num_rows == 0
    assert found.schema.field("annotation").type == it.type


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_ray_agrees(kind: str, tiny: Make, ray_session: None) -> None:
    import ray
    import ray.data

    from bert_ray.inference import ray_data

    ray.data.DataContext.get_current().enable_progress_bars = False
    it = tiny(kind)
    # One actor: each is a process that imports torch and transformers, and a second one would say the same.
    settings = {"task": it.task, "options": it.options, "name": "annotation", "batch_rows": 3, "workers": 1}
    dataset = ray_data.annotate(ray.data.from_arrow(it.table), it.model, **settings)
    tables = [ray.get(reference) for reference in dataset.to_arrow_refs()]
    assert_same_table(here(it), pa.concat_tables(tables).sort_by("id"), "annotation")


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_spark_agrees(kind: str, tiny: Make, spark: Any) -> None:
    from bert_ray.inference import spark as on_spark

    it = tiny(kind)
    frame = on_spark.annotate(
        spark.createDataFrame(it.table), it.model, task=it.task, options=it.options, name="annotation"
    )
    assert_same_table(here(it), frame.toArrow().sort_by("id"), "annotation")


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_in_bulk_on_spark_what_is_said_here(kind: str, tiny: Make, spark: Any, tmp_path: Path) -> None:
    """Through files: what a task says, however nested, is written and read back as it was."""
    it = tiny(kind)
    (tmp_path / "lake").mkdir()
    pq.write_table(it.table, tmp_path / "lake" / "rows.parquet", row_group_size=3)
    job = AnnotateJob(
        input=str(tmp_path / "lake"),
        model=it.model,
        output=str(tmp_path / "out"),
        task=it.task,
        options=it.options,
        name="annotation",
        engine="spark",
        unit_rows=3,
    )
    summary = bulk.run(job)
    assert (summary.exit_status, summary.rows, summary.done) == (0, 8, 3)
    assert_same_table(here(it), read_output(tmp_path / "out"), "annotation")
