"""Embedding: sentence-transformers' vectors and layout both ways, its losses, training from pairs and from scores."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from bert_ray.errors import BertRayError, BundleError, JobError
from bert_ray.evaluation.evaluate import evaluate
from bert_ray.evaluation.job import EvaluateJob
from bert_ray.inference import local
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.card import Card
from bert_ray.model.tasks.embedding import cosent_loss, in_batch_loss
from bert_ray.model.tasks.numbers import correlations
from bert_ray.model.tasks.retrieval import ranking
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import TrainResult, train

WORDS = ("film", "phone", "food", "place", "service", "product", "battery", "story")


def vectors(model: str, texts: list[str], **options: Any) -> np.ndarray:
    found = local.annotate(pa.table({"text": texts}), model, options=options)["embedding"].combine_chunks()
    return found.flatten().to_numpy().reshape(len(texts), -1)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two texts about the same thing, 16 to each of 8 things."""
    path = tmp_path / "pairs.parquet"
    draw = np.random.default_rng(0)
    first, second, scores = [], [], []
    for row in range(128):
        word, other = draw.choice(WORDS, 2, replace=False)
        alike = bool(row % 2)
        first.append(f"a great {word} {row}")
        second.append(f"the {word if alike else other} was good {row}")
        scores.append(5.0 if alike else 1.0)
    pq.write_table(pa.table({"text": first, "text_pair": second, "score": scores}), path)
    return path


@pytest.fixture
def related(pairs: Path, tmp_path: Path) -> Path:
    """Only the pairs that belong together."""
    table = pq.read_table(pairs)
    path = tmp_path / "related.parquet"
    pq.write_table(table.filter(pa.compute.equal(table["score"], 5.0)), path)
    return path


def run(encoder: Path, output: Path, data: DataOptions, **more: Any) -> TrainResult:
    settings = {"epochs": 6, "batch_size": 16, "learning_rate": 2e-3} | more
    job = TrainJob(
        model=str(encoder), output=str(output), task="embedding", engine="local", threads=1, data=data, **settings
    )
    return train(job, tell=lambda _: None)


def test_losses_are_those_of_their_formulas() -> None:
    torch.manual_seed(0)
    first, second = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    digests = torch.arange(10).view(5, 2)
    expected = F.cross_entropy(20 * first @ second.T, torch.arange(5), reduction="none")
    assert torch.allclose(in_batch_loss(first, second, digests), expected)
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0])
    cosines = 20 * (first * second).sum(1)
    total = 1.0 + sum(
        float((cosines[j] - cosines[i]).exp()) for i in range(5) for j in range(5) if scores[i] > scores[j]
    )
    assert torch.allclose(cosent_loss(first, second, scores), torch.tensor(total).log().expand(5))
    # Without an order there is nothing to learn.
    assert cosent_loss(first, second, torch.ones(5)).tolist() == [0.0] * 5


def test_a_text_in_common_is_no_negative() -> None:
    torch.manual_seed(0)
    first, second = (F.normalize(torch.randn(3, 8), dim=1) for _ in range(2))
    second[1] = second[0]
    digests = torch.tensor([[1, 7], [2, 7], [3, 8]])
    scores = 20 * first @ second.T
    expected = F.cross_entropy(scores[:1, [0, 2]], torch.tensor([0]))
    assert torch.allclose(in_batch_loss(first, second, digests)[0], expected)
    # Nor is one whose text stands in the other column, as in pairs of paraphrases.
    for others in ([[7, 2], [3, 8]], [[2, 1], [3, 8]], [[7, 1], [3, 8]]):
        digests = torch.tensor([[1, 7], *others])
        assert torch.allclose(in_batch_loss(first, second, digests)[0], expected)


def test_losses_are_sentence_transformers_own() -> None:
    losses = pytest.importorskip("sentence_transformers.losses")
    torch.manual_seed(0)
    first, second = (F.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    theirs = losses.MultipleNegativesRankingLoss(None).compute_loss_from_embeddings([first, second], None)
    ours = in_batch_loss(first, second, torch.arange(12).view(6, 2)).mean()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)


def test_retrieval_counts_places() -> None:
    first = np.eye(3, dtype=np.float32)
    second = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0.5]], np.float32)
    found = ranking(first, second, np.array([1, 2, 3]))
    assert found.metrics() == {"mrr": pytest.approx((1 + 1 / 3 + 1 / 2) / 3), "recall@1": pytest.approx(1 / 3)}
    assert found.places.tolist() == [1, 3, 2]
    assert found.nearest[1:].tolist() == [2, 1]
    assert found.own.tolist() == [1.0, 0.0, 0.5]
    assert found.other.tolist() == [0.0, 1.0, 1.0]
    # Equal texts count as one: of two left, the other one is the nearest.
    twice = ranking(first, second, np.array([1, 2, 1]))
    assert (twice.candidates, twice.nearest.tolist()) == (2, [1, 0, 1])
    # Where every text has the same vector, nothing is found.
    same = np.ones((4, 2), np.float32)
    assert ranking(same, same, np.arange(4)).metrics()["recall@1"] == 0.0
    alone = ranking(same[:1], same[:1], np.zeros(1))
    assert (alone.metrics()["mrr"], alone.nearest.tolist()) == (1.0, [0])
    # A vector of an overflow has the last place, and takes none from others.
    apart = np.eye(4, dtype=np.float32)
    apart[0] = np.nan
    assert ranking(apart, apart, np.arange(4)).places.tolist() == [4, 1, 1, 1]


def test_pairs_are_measured_as_in_training(tiny_encoder: Path, related: Path, tmp_path: Path) -> None:
    """`bert-ray evaluate` on the very rows that training has judged by."""
    table = pq.read_table(related)
    paths = {name: tmp_path / f"{name}.parquet" for name in ("train", "validation")}
    pq.write_table(table.slice(0, 48), paths["train"])
    # One has no pair, one is its own, one is blank, one pair stands there twice.
    more = pa.table({"text": ["alone", "same", " "], "text_pair": [None, "same", "a"]}, table.select([0, 1]).schema)
    judged = pa.concat_tables([table.slice(48), table.slice(48, 1)]).select([0, 1])
    pq.write_table(pa.concat_tables([judged, more]), paths["validation"])
    data = DataOptions(train=str(paths["train"]), validation=str(paths["validation"]))
    result = run(tiny_encoder, tmp_path / "model", data)
    job = EvaluateJob(model=str(result.bundle), table=str(paths["validation"]), output=str(tmp_path / "report"))
    found = evaluate(job)
    assert found.figures == pytest.approx({name: result.metrics[name] for name in ("mrr", "recall@1")}, abs=1e-6)
    assert 0.1 < found.figures["mrr"] < 1.0
    assert (found.rows, found.without_label, found.faulty) == (
        len(judged),
        1,
        {"a blank text": 1, "the same text twice": 1},
    )
    # The more rows, the lower: no two tables' figures can be compared.
    assert "on this table" not in found.fit.words
    assert not found.warnings
    learned = evaluate(replace(job, table=str(paths["train"])))
    assert "48 of the 48 rows also stand in the training data" in learned.warnings[0]
    assert {section.key for section in found.sections} == {"places", "mistakes", "right"}
    first = found.section("mistakes").cases[0]
    assert not first.right
    assert first.said != first.so
    assert table["text_pair"][48 + first.row % 16].as_py() == first.so


def test_pairs_teach_what_belongs_together(tiny_encoder: Path, related: Path, tmp_path: Path) -> None:
    data = DataOptions(train=str(related), validation_fraction=0.25)
    result = run(tiny_encoder, tmp_path / "model", data, epochs=12)
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    assert result.metrics["mrr"] > 0.5
    card = load_bundle(result.bundle).card
    assert (card.task, card.inputs) == ("embedding", ["text"])


@pytest.mark.parametrize("engine_batches", [1, 2])
def test_scores_teach_cosines(tiny_encoder: Path, pairs: Path, tmp_path: Path, engine_batches: int) -> None:
    data = DataOptions(train=str(pairs), validation_fraction=0.25, columns={"label": "score"})
    # Pairs are compared with those of their own micro-batch; without dropout few of them teach the same for every seed.
    settings = {
        "batch_size": 16 * engine_batches,
        "gradient_accumulation": engine_batches,
        "dropout": 0.0,
        "epochs": 10,
    }
    result = run(tiny_encoder, tmp_path / "model", data, options={"loss": "cosine"}, **settings)
    assert result.metrics["spearman"] > 0.6
    table = pq.read_table(pairs)
    said = local.annotate(table, str(result.bundle), task="similarity")["similarity"].to_numpy()
    assert correlations(said.astype(float), table["score"].combine_chunks())["spearman"] > 0.6


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ({"text": ["a", "b"]}, {}, "no column 'text_pair'"),
        ({"text": ["a", "b"], "text_pair": ["a", "b"]}, {}, "none of its 2 rows can be used"),
        ({"text": ["a", "b"], "text_pair": ["c", "d"]}, {"labels": ["x", "y"]}, "has no labels"),
        ({"text": ["a", "b"], "text_pair": ["c", "d"]}, {"label_smoothing": 0.1}, "label_smoothing"),
        ({"text": ["a", "b"], "text_pair": ["c", "d"]}, {"options": {"loss": "triplet"}}, "options.loss"),
        ({"text": ["a"], "text_pair": ["c"], "label": ["x"]}, {"options": {"loss": "cosine"}}, "numbers"),
        (
            {"text": ["a"] * 2, "text_pair": ["c"] * 2, "label": [1, 1]},
            {"options": {"loss": "cosine"}},
            "scores that differ",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    tiny_encoder: Path, tmp_path: Path, table: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(BertRayError, match=message):
        run(tiny_encoder, tmp_path / "model", DataOptions(train=str(path), validation_fraction=0.0), **settings)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False)])
def test_sentence_transformers_reads_our_bundle_and_we_read_its(
    tiny_encoder: Path, tmp_path: Path, pooling: str, normalize: bool
) -> None:
    base = load_bundle(str(tiny_encoder))
    card = Card(
        task="embedding", max_length=20, pooling=pooling, normalize=normalize, options={"prompt": "a great film "}
    )
    ours = save_bundle(tmp_path / "ours", base.model(), base.tokenizer(), card)
    texts = ["the food was good", "", "phone " * 40]
    found = vectors(ours.reference, texts)
    # As a directory of sentence-transformers' it says the same: pooling, length, prompt.
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "ours", plain)
    (plain / "bert_ray.json").unlink()
    read = load_bundle(str(plain)).card
    assert (read.pooling, read.normalize, read.max_length, read.options) == (pooling, normalize, 20, card.options)
    assert np.array_equal(vectors(str(plain), texts), found)
    assert json.loads((plain / "config_sentence_transformers.json").read_text())["default_prompt_name"] == "default"
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(tmp_path / "ours"), device="cpu").encode(texts)
    assert np.allclose(theirs, found, atol=1e-5)


@pytest.mark.parametrize("default", ["passage", None])
def test_what_sentence_transformers_saved_is_read(tiny_encoder: Path, tmp_path: Path, default: str | None) -> None:
    library = pytest.importorskip("sentence_transformers")
    prompts = {"query": "a great film ", "passage": "bad food "}
    theirs = library.SentenceTransformer(str(tiny_encoder), device="cpu", prompts=prompts, default_prompt_name=default)
    theirs.save(str(tmp_path / "theirs"))
    assert not (tmp_path / "theirs" / "bert_ray.json").exists()
    texts = ["the food was good", "", "phone " * 40]
    assert np.allclose(theirs.encode(texts), vectors(str(tmp_path / "theirs"), texts), atol=1e-5)
    named = vectors(str(tmp_path / "theirs"), texts, prompt=prompts["query"])
    assert np.allclose(theirs.encode(texts, prompt_name="query"), named, atol=1e-5)
    assert not np.allclose(vectors(str(tmp_path / "theirs"), texts), named, atol=1e-2)


def test_a_directory_that_wants_texts_in_lower_case_has_them_so(tiny_encoder: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    library.SentenceTransformer(str(tiny_encoder), device="cpu").save(str(tmp_path / "theirs"))
    # A tokenizer that tells capitals apart, of a model that was trained without them.
    settings = tmp_path / "theirs" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_lower_case": False}))
    texts = ["the food was GOOD", "The FOOD was good"]
    apart = vectors(str(tmp_path / "theirs"), texts)
    assert not np.allclose(*apart, atol=1e-3)
    limits = tmp_path / "theirs" / "sentence_bert_config.json"
    limits.write_text(json.dumps(json.loads(limits.read_text()) | {"do_lower_case": True}))
    theirs = library.SentenceTransformer(str(tmp_path / "theirs"), device="cpu").encode(texts)
    found = vectors(str(tmp_path / "theirs"), texts)
    assert np.allclose(theirs, found, atol=1e-5)
    assert np.allclose(*found, atol=1e-5)
    # What is saved as a bundle of ours says so as well.
    read = load_bundle(str(tmp_path / "theirs"))
    ours = save_bundle(tmp_path / "ours", read.model(), read.tokenizer(), read.card)
    assert np.allclose(vectors(ours.reference, texts), found, atol=1e-5)


def test_what_modules_say_comes_before_what_the_weights_were(tiny_encoder: Path, tmp_path: Path) -> None:
    base = load_bundle(str(tiny_encoder))
    card = Card(task="embedding", max_length=20, pooling="cls")
    directory = Path(save_bundle(tmp_path / "model", base.model(), base.tokenizer(), card).reference)
    (directory / "bert_ray.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    assert load_bundle(str(directory)).card.task == "embedding"
    modules = json.loads((directory / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(BundleError, match=r"modules\.json has a module Dense"):
        load_bundle(str(directory))


def test_a_prompt_is_read_before_every_text(tiny_encoder: Path) -> None:
    model = str(tiny_encoder)
    assert np.allclose(vectors(model, ["food"], prompt="bad "), vectors(model, ["bad food"]), atol=1e-6)


def test_a_long_text_in_windows_is_their_mean(tiny_encoder: Path, tmp_path: Path) -> None:
    base = load_bundle(tiny_encoder)
    card = Card(task="embedding", max_length=6, normalize=True, options={"overflow": "windows", "overlap": 0})
    model = save_bundle(tmp_path / "windows", base.model(), base.tokenizer(), card).reference
    long = ["food place film story film phone place", "phone was good", "story food was good film"]
    windows = base.tokenizer()(long, max_length=6, stride=0, truncation=True, return_overflowing_tokens=True)
    assert len(windows["input_ids"]) > 3  # Else there is nothing to see.
    whole = [base.tokenizer().decode(ids, skip_special_tokens=True) for ids in windows["input_ids"]]
    of = np.array(windows["overflow_to_sample_mapping"])
    each = vectors(model, whole)
    expected = np.stack([each[of == row].mean(axis=0) for row in range(3)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors(model, long), expected, atol=1e-5)
    pairs = pa.table({"text": [long[0], long[0], "food"], "text_pair": [long[2], long[0], long[1]]})
    cosines = local.annotate(pairs, model, task="similarity")["similarity"].to_numpy()
    food = vectors(model, ["food"])[0]
    wanted = [expected[0] @ expected[2], 1.0, food @ expected[1]]
    np.testing.assert_allclose(cosines, wanted, atol=1e-5)


def test_training_reads_no_windows(tiny_encoder: Path, related: Path, tmp_path: Path) -> None:
    data = DataOptions(train=str(related), validation_fraction=0.25)
    with pytest.raises(JobError, match=r"options\.overflow is 'windows'.*give truncate or head_tail"):
        run(tiny_encoder, tmp_path / "model", data, options={"overflow": "windows"})


def test_training_takes_the_prompt_over(tiny_encoder: Path, related: Path, tmp_path: Path) -> None:
    base = load_bundle(str(tiny_encoder))
    card = Card(task="embedding", max_length=64, options={"prompt": "query: "})
    prompted = save_bundle(tmp_path / "prompted", base.model(), base.tokenizer(), card)
    data = DataOptions(train=str(related), validation_fraction=0.0)
    result = run(Path(prompted.reference), tmp_path / "model", data, epochs=1)
    assert load_bundle(result.bundle).card.options["prompt"] == "query: "
    # Other tasks on the bundle take what concerns them, and nothing of how it was trained.
    labels = {"labels": ["film", "food"]}
    found = local.annotate(pa.table({"text": ["a film"]}), str(result.bundle), task="zero-shot", options=labels)
    assert found["zero-shot"].to_pylist()[0]["label"] in labels["labels"]
