"""A bundle over labelled tables of every kind."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BundleError, ColumnError, JobError, LakeError
from bert_ray.evaluation import evaluate as room
from bert_ray.evaluation.evaluate import Evaluation, _lines, evaluate
from bert_ray.evaluation.job import EvaluateJob
from bert_ray.model.bundle import load_bundle, save_bundle
from tests.tiny_tasks import MAKERS

TEXTS = ["a great film", "the worst food ever", "so happy with it", "what a waste of money"]
LABELS = ["positive", "negative", "positive", "negative"]


def run(tmp_path: Path, bundle: Path, rows: dict[str, object], /, **options: object) -> Evaluation:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(rows), path)
    settings = {"model": str(bundle), "table": str(path), "output": str(tmp_path / "report"), **options}
    return evaluate(EvaluateJob(**settings))  # type: ignore[arg-type]


def test_the_figures_are_those_of_the_annotations(tmp_path: Path, tiny_bundle: Path, uci_sample: pa.Table) -> None:
    import bert_ray

    path = tmp_path / "table.parquet"
    pq.write_table(uci_sample, path)
    result = evaluate(EvaluateJob(model=str(tiny_bundle), table=str(path), output=str(tmp_path)))
    said = bert_ray.load(str(tiny_bundle))(uci_sample)["sentiment"].combine_chunks().field("label").to_pylist()
    right = [one == other for one, other in zip(said, uci_sample["label"].to_pylist(), strict=True)]
    assert result.rows == 300
    assert result.figures["accuracy"] == pytest.approx(sum(right) / 300)
    mistakes = result.section("mistakes").cases
    assert len(mistakes) == 20
    scores = [float(item.detail.removesuffix(" %")) for item in mistakes]
    assert scores == sorted(scores, reverse=True)
    for item in mistakes:
        row = uci_sample.slice(item.row, 1).to_pylist()[0]
        assert ((("text", row["text"]),), row["label"]) == (item.texts, item.so)
        assert said[item.row] == item.said != item.so


def test_batches_make_no_difference(
    tmp_path: Path, tiny_bundle: Path, uci_sample: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(uci_sample, path)
    job = EvaluateJob(model=str(tiny_bundle), table=str(path), output=str(tmp_path), mistakes=5)
    whole = evaluate(job)
    monkeypatch.setattr(room, "_BATCH_ROWS", 7)
    parts = evaluate(job)
    assert parts.figures == whole.figures
    assert [item.row for item in parts.section("mistakes").cases] == [
        item.row for item in whole.section("mistakes").cases
    ]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([1, 0, 1, 0], pa.int64()),
        pa.array([1, 0, 1, 0], pa.uint8()),
        pa.array([True, False, True, False]),
        pa.array(LABELS).dictionary_encode(),
        pa.array(LABELS, pa.large_string()),
    ],
)
def test_labels_by_name_or_position(tmp_path: Path, tiny_bundle: Path, labels: pa.Array) -> None:
    expected = run(tmp_path, tiny_bundle, {"text": TEXTS, "label": LABELS})
    found = run(tmp_path, tiny_bundle, {"text": TEXTS, "label": labels})
    assert found.figures == expected.figures
    assert [row[1] for row in found.section("labels").rows] == [2, 2]


def test_nulls_and_blanks_are_counted_and_left_out(tmp_path: Path, tiny_bundle: Path) -> None:
    columns = {"text": [*TEXTS, None, "  ", "no label", None], "label": [*LABELS, "positive", "negative", None, None]}
    result = run(tmp_path, tiny_bundle, columns)
    assert (result.rows, result.without_text, result.without_label) == (4, 2, 2)
    assert "rows 4\nrows_without_label 2\nrows_without_text 2" in result.text()
    kept = json.loads(result.metrics.read_text())
    assert (kept["rows"], kept["rows_without_text"], kept["rows_without_label"]) == (4, 2, 2)
    assert kept["accuracy"] == result.figures["accuracy"]
    assert kept["confusion"] == result.section("confusion").counts.tolist()
    assert [item["label"] for item in kept["labels"]] == ["negative", "positive"]


def test_a_hive_directory_and_other_column_names(tmp_path: Path, tiny_bundle: Path, uci_lake: Path) -> None:
    whole = evaluate(EvaluateJob(model=str(tiny_bundle), table=str(uci_lake), output=str(tmp_path)))
    assert whole.rows > 2000
    named = run(tmp_path, tiny_bundle, {"review": TEXTS, "stars": LABELS}, column="review", label="stars")
    assert named.rows == 4


def test_a_column_of_the_annotations_name_is_no_hindrance(tmp_path: Path, tiny_bundle: Path) -> None:
    # A table that was annotated before can be measured.
    assert run(tmp_path, tiny_bundle, {"text": TEXTS, "sentiment": TEXTS, "label": LABELS}).rows == 4


@pytest.mark.parametrize(
    ("columns", "options", "error", "message"),
    [
        ({"text": TEXTS, "labels": LABELS}, {}, ColumnError, r"no label column 'label'; did you mean 'labels'\?"),
        ({"texts": TEXTS, "label": LABELS}, {}, ColumnError, r"no column 'text' .* did you mean 'texts'\?"),
        ({"text": [1, 2, 3, 4], "label": LABELS}, {}, ColumnError, "'text' is int64, not text"),
        ({"text": TEXTS, "label": ["good", *LABELS[1:]]}, {}, ColumnError, r"unknown labels \['good'\]"),
        ({"text": TEXTS, "label": [0, 1, 2, 0]}, {}, ColumnError, r"unknown labels \['2'\]"),
        ({"text": TEXTS, "label": [0.5, 1.0, 0.0, 0.0]}, {}, ColumnError, "label column is double"),
        ({"text": TEXTS, "label": pa.nulls(4)}, {}, LakeError, "none of its 4 rows has both"),
        ({"text": pa.nulls(4), "label": LABELS}, {}, LakeError, "none of its 4 rows has both"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}, {}, LakeError, "none of its 0 rows"),
        ({"text": LABELS}, {"label": "text"}, ColumnError, "both column 'text'"),
        ({"text": TEXTS, "label": LABELS}, {"columns": {"texts": "text"}}, ColumnError, "columns names 'texts'"),
        ({"text": TEXTS, "label": LABELS}, {"column": "a", "columns": {"text": "b"}}, JobError, "both given"),
        ({"text": TEXTS, "label": LABELS}, {"mistakes": -1}, JobError, "mistakes is -1"),
    ],
)
def test_bad_input_has_a_stated_outcome(
    tmp_path: Path, tiny_bundle: Path, columns: dict[str, object], options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, tiny_bundle, columns, **options)
    assert not (tmp_path / "report").exists()


def test_a_label_that_the_model_does_not_know_is_found_before_annotating(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_annotate", lambda *_: pytest.fail("it annotates"))
    with pytest.raises(ColumnError, match="unknown labels"):
        run(tmp_path, tiny_bundle, {"text": TEXTS, "label": ["good", *LABELS[1:]]})


def test_an_output_that_cannot_be_written_is_found_before_annotating(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_annotate", lambda *_: pytest.fail("it was annotated"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(JobError, match=rf"output {place} cannot be written: .*--output"):
            run(tmp_path, tiny_bundle, {"text": ["good"], "label": ["positive"]}, output=str(place))


def test_the_baseline_is_that_of_the_table(tmp_path: Path, tiny_bundle: Path) -> None:
    values = run(tmp_path, tiny_bundle, {"text": TEXTS, "label": ["negative", *LABELS[1:]]}).values()
    assert (values["majority_label"], values["majority_accuracy"]) == ("negative", 0.75)


def test_bad_tables_are_named(tmp_path: Path, tiny_bundle: Path) -> None:
    def attempt(path: Path) -> None:
        evaluate(EvaluateJob(model=str(tiny_bundle), table=str(path), output=str(tmp_path / "report")))

    (tmp_path / "empty").mkdir()
    (tmp_path / "not.parquet").write_text("hello")
    (tmp_path / "half").mkdir()
    pq.write_table(pa.table({"text": TEXTS, "label": LABELS}), tmp_path / "half" / "a.parquet")
    whole = (tmp_path / "half" / "a.parquet").read_bytes()
    (tmp_path / "half" / "b.parquet").write_bytes(whole[: len(whole) // 2])
    for name in ("nowhere.parquet", "empty", "not.parquet", "half"):
        with pytest.raises(LakeError, match=name):
            attempt(tmp_path / name)


def test_a_model_that_nothing_here_measures_is_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    bundle = load_bundle(tiny_encoder)
    card = replace(bundle.card, options={"loss": "cosine"})
    learned = save_bundle(tmp_path / "model", bundle.model(), bundle.tokenizer(), card)
    with pytest.raises(BundleError, match=r"annotates with embedding.*--task similarity"):
        run(tmp_path, learned.directory, {"text": TEXTS, "label": LABELS})


def test_a_report_that_cannot_be_written_is_no_bug(tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "report" / "report.html").mkdir(parents=True)
    with pytest.raises(JobError, match="report cannot be written: Is a directory"):
        run(tmp_path, tiny_bundle, {"text": TEXTS, "label": LABELS})


def test_scores_that_are_no_numbers_are_told(tmp_path: Path, tiny_bundle: Path) -> None:
    import torch

    bundle = load_bundle(tiny_bundle)
    model = bundle.model()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    broken = save_bundle(tmp_path / "model", model, bundle.tokenizer(), replace(bundle.card, files={}, fingerprint=""))
    with pytest.raises(BundleError, match="gives scores that are no numbers"):
        run(tmp_path, broken.directory, {"text": TEXTS, "label": LABELS})


def test_a_label_is_for_one_truth(tmp_path: Path, tiny_encoder: Path) -> None:
    model = MAKERS["answer"](tmp_path, str(tiny_encoder)).model
    rows = {
        "question": ["who"],
        "context": ["the waiter"],
        "answer_text": ["waiter"],
        "answer_start": [4],
        "gold": ["the"],
    }
    with pytest.raises(JobError, match=r"label is 'gold', but task answer has several truths: .* columns\.answer_text"):
        run(tmp_path, Path(model), rows, label="gold")


def test_a_table_whose_name_is_no_utf_8_is_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.parquet"
    Path(os.fsdecode(path)).write_bytes(b"")
    job = EvaluateJob(model=str(tiny_bundle), table=os.fsdecode(path), output=str(tmp_path / "report"))
    with pytest.raises(LakeError, match=r"caf.*\.parquet is no UTF-8: give"):
        evaluate(job)


def test_labels_of_several_lines_print_no_further_figure() -> None:
    assert _lines({"constant_label": "x\naccuracy 1.0\x1b]0;title\x07 好 é"}) == [
        "constant_label x\\naccuracy 1.0\\x1b]0;title\\x07 好 é"
    ]
