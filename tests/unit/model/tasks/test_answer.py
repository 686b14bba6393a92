"""Answers: the same as plain transformers gives on the same weights; windows, bad rows, metrics, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchmetrics.functional import text as peer

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model.annotator import Annotator, AnnotatorSpec
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.card import Card
from bert_ray.model.tasks import get_task
from bert_ray.model.tasks.answer_metrics import best_threshold, exact_match, f1, mean_scores
from tests.conftest import TINY_SEED, tiny_config, tiny_tokenizer
from tests.unit.model.tasks.pipelines import answers_of

MAX_LENGTH, OVERLAP, MAX_ANSWER = 160, 32, 12
OPTIONS = {"overlap": OVERLAP, "max_answer_tokens": MAX_ANSWER}
ANSWER = get_task(Card(task="answer"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random start and end logits, and windows of 160 tokens."""
    import torch
    from transformers import BertForQuestionAnswering

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = BertForQuestionAnswering(tiny_config(len(tokenizer))).eval()
    directory = tmp_path_factory.mktemp("answer") / "bundle"
    card = Card(task="answer", inputs=["question", "context"], max_length=MAX_LENGTH, options=OPTIONS)
    save_bundle(directory, model, tokenizer, card)
    return directory


@pytest.fixture(scope="module")
def contexts(uci_sample: pa.Table) -> list[str]:
    """60 contexts of one review, 20 of many, and some odd ones."""
    texts = uci_sample["text"].to_pylist()
    long = [" ".join(texts[start : start + 30]) for start in range(0, 200, 10)]
    return texts[:60] + long + ["émoji 🎬🍿 𝔘 and 中文字 here", "x", "a\x00b", "word " * 1000]


def asked(contexts: list[str]) -> dict[str, list[str]]:
    return {"question": [f"what was {text.split()[0]} like?" for text in contexts], "context": contexts}


def annotate(bundle: Path, rows: dict[str, Any], **options: Any) -> list[Any]:
    columns = {name: pa.array(values, pa.string()) for name, values in rows.items()}
    annotator = AnnotatorSpec(model=str(bundle), options=options).build()
    return annotator(pa.table(columns))["answer"].to_pylist()


def test_answers_are_transformers_own(bundle: Path, contexts: list[str]) -> None:
    rows = asked(contexts)
    expected = answers_of(bundle, rows, MAX_LENGTH, **OPTIONS)
    found = annotate(bundle, rows)
    assert len({answer["text"] for answer in found}) > 40
    for context, answer, other in zip(contexts, found, expected, strict=True):
        assert (answer["text"], answer["start"], answer["end"]) == (other["text"], other["start"], other["end"])
        assert answer["score"] == pytest.approx(other["score"], rel=1e-3)
        assert context[answer["start"] : answer["end"]] == answer["text"]


def test_null_answers_are_transformers_own(bundle: Path, contexts: list[str]) -> None:
    rows = asked(contexts)
    expected = [answer["text"] for answer in answers_of(bundle, rows, MAX_LENGTH, impossible=True, **OPTIONS)]
    found = [answer and answer["text"] for answer in annotate(bundle, rows, null_threshold=0.0)]
    assert found == expected


def test_the_threshold_says_how_much_null_must_be_ahead(bundle: Path, contexts: list[str]) -> None:
    rows = asked(contexts[::3])
    assert set(annotate(bundle, rows, null_threshold=-1e6)) == {None}
    assert annotate(bundle, rows, null_threshold=1e6) == annotate(bundle, rows)
    counts = [annotate(bundle, rows, null_threshold=value).count(None) for value in (-10.0, -5.0, 0.0, 5.0)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 1


def test_logits_of_distilbert_are_transformers_own(tmp_path: Path) -> None:
    import torch
    from transformers import DistilBertConfig, DistilBertForQuestionAnswering

    tokenizer = tiny_tokenizer()
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=2, hidden_dim=64, num_labels=2)
    model = DistilBertForQuestionAnswering(config).eval()
    model.save_pretrained(tmp_path / "distil")
    tokenizer.save_pretrained(tmp_path / "distil")
    annotator = Annotator(load_bundle(tmp_path / "distil"))
    assert annotator.task.kind == "answer"  # Told by the architecture in config.json.
    outputs = annotator.outputs([pa.array(["what was good?"]), pa.array(["the film was good"])])
    with torch.inference_mode():
        encoded = tokenizer("what was good?", "the film was good", return_tensors="pt")
        expected = model(input_ids=encoded["input_ids"])
    np.testing.assert_allclose(outputs.values[:, 0], expected.start_logits[0], atol=1e-5)
    np.testing.assert_allclose(outputs.values[:, 1], expected.end_logits[0], atol=1e-5)


# Windows.


def pieces_of(bundle: Path, rows: dict[str, list[str]], **options: Any) -> Any:
    found = load_bundle(bundle)
    task = get_task(found.card, found.config, options=options)
    tokenize = task.tokenizer(found.tokenizer())
    return task.encode(tokenize, [pa.array(values, pa.large_string()) for values in rows.values()])


def test_a_context_of_many_pages_is_read_whole(bundle: Path, uci_sample: pa.Table) -> None:
    context = " ".join(uci_sample["text"].to_pylist() * 4)
    assert len(context) > 60_000
    rows = {"question": ["what?"], "context": [context]}
    pieces = pieces_of(bundle, rows)
    assert len(pieces) > 100
    assert pieces.tokens.lengths.max() == MAX_LENGTH
    covered = np.zeros(len(context), bool)
    for start, end in pieces.spans[pieces.sources == 1]:
        covered[start:end] = True
    assert not any(mark.isalnum() for mark, seen in zip(context, covered, strict=True) if not seen)
    (answer,) = annotate(bundle, rows)
    assert context[answer["start"] : answer["end"]] == answer["text"]


def test_stretches_of_contexts_make_no_difference(
    bundle: Path, contexts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bert_ray.model.tasks import answer

    whole = pieces_of(bundle, asked(contexts))
    monkeypatch.setattr(answer, "_TOKENIZED_BYTES", 5_000)
    parts = pieces_of(bundle, asked(contexts))
    for name in ("rows", "spans", "sources"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    for name in ("ids", "types", "offsets"):
        np.testing.assert_array_equal(getattr(whole.tokens, name), getattr(parts.tokens, name))


@pytest.mark.parametrize("max_length", [5, 16, 64, MAX_LENGTH])
def test_a_question_longer_than_the_model_is_cut(bundle: Path, max_length: int) -> None:
    found = load_bundle(bundle)
    found.card.max_length = max_length
    annotator = Annotator(found)
    long, context = "why was it so? " * 500, "the film was good " * 100
    # What is cut off is the end, whatever stands there; the beginning is asked.
    questions = [long, long[: len(long) // 2] + "never mind", "film " + long, "why?"]
    rows = pa.table({"question": questions, "context": [context] * len(questions)})
    answers = annotator(rows)["answer"].to_pylist()
    for answer in answers:
        assert context[answer["start"] : answer["end"]] == answer["text"]
    assert answers[0] == answers[1]
    tokenize = annotator.task.tokenizer(found.tokenizer())
    read = [
        annotator.task.encode(tokenize, [pa.array([text], pa.large_string()) for text in (question, context)])
        for question in questions
    ]
    assert read[0].tokens.ids.tolist() == read[1].tokens.ids.tolist()
    assert read[0].tokens.ids.tolist() != read[2].tokens.ids.tolist()


def test_a_model_too_short_for_pairs_says_so(bundle: Path) -> None:
    found = load_bundle(bundle)
    found.card.max_length = 4
    with pytest.raises(BundleError, match="no room for a question and a context"):
        Annotator(found)


def test_nothing_to_answer_from_is_null(bundle: Path) -> None:
    contexts = ["", "  \n ", "\x01\x02", None, "the film"]
    found = annotate(bundle, {"question": ["why?"] * 5, "context": contexts})
    assert found[:4] == [None] * 4
    assert found[4] is not None
    assert annotate(bundle, {"question": ["", None, " \t"], "context": ["the film"] * 3}) == [None] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "truncate"}, "always reads a long context in windows"),
        ({"max_answer_tokens": 0}, "max_answer_tokens is 0"),
        ({"max_question_tokens": 0}, "max_question_tokens is 0"),
        ({"null_windows": 0.0}, "null_windows is 0.0"),
        ({"max_answer_tokens": 30.5}, r"max_answer_tokens is 30\.5; give a whole number"),
        ({"null_threshold": "high"}, "null_threshold is 'high'; give a number or null"),
        ({"scores": 1}, "scores is 1; give true or false"),
        ({"overlap": True}, "overlap is True; give a whole number"),
        ({"null_treshold": 1.0}, "did you mean 'null_threshold'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        get_task(Card(task="answer"), options=options)


# Rows to learn from.


def squad(contexts: list[str], seed: int = 0) -> dict[str, list[Any]]:
    """Rows whose answer is some words of the context; every fifth has none."""
    random = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"question": [], "context": [], "answer_text": [], "answer_start": []}
    for number, context in enumerate(contexts):
        start = int(random.integers(0, len(context)))
        start = context.rfind(" ", 0, start) + 1
        end = context.find(" ", min(start + 15, len(context)))
        text = context[start : end if end > 0 else len(context)].rstrip() if number % 5 else None
        rows["question"].append(f"what number {number}?")
        rows["context"].append(context)
        rows["answer_text"].append(text or None)
        rows["answer_start"].append(start if text else None)
    return rows


def examples_of(bundle: Path, rows: dict[str, list[Any]], **options: Any) -> tuple[Any, Any]:
    found = load_bundle(bundle)
    task = get_task(found.card, found.config, options=options)
    truth = [pa.array(rows["answer_text"], pa.string()), pa.array(rows["answer_start"], pa.int32())]
    truth, inputs = task.read_truth(truth, [pa.array(rows[name]) for name in task.inputs])
    return task, task.examples(task.tokenizer(found.tokenizer()), inputs, truth)


def run_qa_targets(bundle: Path, rows: dict[str, list[Any]]) -> list[tuple[int, int]]:
    """transformers' examples/pytorch/question-answering/run_qa.py, `prepare_train_features`, by its description."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    windows = tokenizer(
        rows["question"],
        rows["context"],
        truncation="only_second",
        max_length=MAX_LENGTH,
        stride=OVERLAP,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found = []
    for window, row in enumerate(windows["overflow_to_sample_mapping"]):
        text, start = rows["answer_text"][row], rows["answer_start"][row]
        context = [place for place, source in enumerate(windows.sequence_ids(window)) if source == 1]
        spans = windows["offset_mapping"][window]
        if text is None or spans[context[0]][0] > start or spans[context[-1]][1] < start + len(text):
            found.append((0, 0))
            continue
        first = max(place for place in context if spans[place][0] <= start)
        last = min(place for place in context if spans[place][1] >= start + len(text))
        found.append((first, last))
    return found


def test_targets_are_those_of_run_qa(bundle: Path, contexts: list[str]) -> None:
    rows = squad(contexts[:80])
    _, examples = examples_of(bundle, rows)
    expected = run_qa_targets(bundle, rows)
    assert examples.targets.values.tolist() == [list(pair) for pair in expected]
    inside = sum(pair != (0, 0) for pair in expected)
    assert sum(text is not None for text in rows["answer_text"]) <= inside < len(examples) < 1000


def test_blanks_at_an_answers_ends_are_no_part_of_it(bundle: Path) -> None:
    context = "the food was great "
    plain = {"question": ["how?"], "context": [context], "answer_text": ["great"], "answer_start": [13]}
    _, expected = examples_of(bundle, plain)
    assert (expected.targets.values > 0).all()
    for text, start in (("great ", 13), (" great", 12), (" great ", 12)):
        _, found = examples_of(bundle, plain | {"answer_text": [text], "answer_start": [start]})
        assert found.targets.values.tolist() == expected.targets.values.tolist()


def test_loss_is_transformers_own(bundle: Path, contexts: list[str]) -> None:
    import torch

    from bert_ray.model.encoder import encode
    from bert_ray.model.packing import pack_rows

    task, examples = examples_of(bundle, squad(contexts[50:65]))
    model = load_bundle(bundle).model()
    windows = np.arange(len(examples))[::-1].copy()
    batch = pack_rows(examples.pieces.tokens, windows)
    targets = torch.from_numpy(examples.targets.take(windows))
    losses, outputs = task.losses(model, encode(model, batch), batch, targets)
    assert outputs.shape == (len(batch.input_ids), 2)
    for window, loss in zip(windows, losses, strict=True):
        tokens = slice(*examples.pieces.tokens.offsets[window : window + 2])
        ids, types = (torch.from_numpy(part[tokens].astype(np.int64))[None] for part in _ids_and_types(examples))
        start, end = torch.from_numpy(examples.targets.values[window])[:, None]
        expected = model(input_ids=ids, token_type_ids=types, start_positions=start, end_positions=end).loss
        assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    task.learning.label_smoothing = 0.1
    smooth = task.loss(outputs, targets, batch)
    for part, target, loss in zip(outputs.split(batch.lengths), targets, smooth, strict=True):
        expected = torch.nn.functional.cross_entropy(part.T, target, label_smoothing=0.1)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    losses.sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def _ids_and_types(examples: Any) -> tuple[np.ndarray, np.ndarray]:
    return examples.pieces.tokens.ids, examples.pieces.tokens.types


def test_fewer_windows_without_the_answer(bundle: Path, contexts: list[str]) -> None:
    rows = squad(contexts[60:])
    task, examples = examples_of(bundle, rows, null_windows=0.2)
    fewer, again = task.for_training(examples), task.for_training(examples)
    answers, left = (int((part.targets.values[:, 1] > 0).sum()) for part in (examples, fewer))
    assert answers == left
    assert 0.05 < (len(fewer) - left) / (len(examples) - answers) < 0.5
    assert set(fewer.pieces.rows.tolist()) == set(range(len(rows["context"])))
    assert fewer.digest() == again.digest()
    assert fewer.targets.values.shape == (len(fewer), 2)
    assert len(fewer.pieces.spans) == len(fewer.pieces.sources) == len(fewer.pieces.tokens.ids)
    whole, same = examples_of(bundle, rows)
    assert whole.for_training(same) is same


def test_no_rows_make_no_examples(bundle: Path) -> None:
    task, examples = examples_of(bundle, {name: [] for name in (*ANSWER.inputs, *ANSWER.truths)}, null_windows=0.5)
    assert len(examples) == len(task.for_training(examples)) == 0
    assert examples.targets.values.shape == (0, 2)


def write(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    from bert_ray.training.data import read_labelled

    context = "the film was good 🎬 and long"
    rows = [
        (context, "good", 13),
        (context, "long", 24),  # Code points: the emoji is one.
        (context, "good", 12),
        (context, "good", 200),
        (context, "long lost", 24),
        (context, "the", -1),
        (context, "film", None),
        (context, None, None),
        (context, "", 3),
        ("  ", None, None),
        (None, None, None),
    ]
    path = write(
        tmp_path / "table.parquet",
        question=["why?"] * len(rows),
        context=[row[0] for row in rows],
        answer_text=[row[1] for row in rows],
        answer_start=[row[2] for row in rows],
    )
    table = read_labelled(path, ANSWER)
    assert table.truth[0].to_pylist() == ["good", "long", None, None]
    (note,) = table.notes
    assert "7 of 11 rows left out" in note
    assert "1 with an answer that does not stand at answer_start (first: row 2)" in note
    assert "3 with an answer that reaches outside the context (first: row 3)" in note
    assert "1 with an answer but no answer_start (null) (first: row 6)" in note
    assert "1 with a blank context" in note
    assert "1 with no context (null)" in note


@pytest.mark.parametrize("starts", [["13"], [13.5], [True]])
def test_offsets_are_whole_numbers(tmp_path: Path, starts: list[Any]) -> None:
    from bert_ray.training.data import read_labelled

    path = write(
        tmp_path / "t.parquet", question=["q"], context=["the film was good"], answer_text=["good"], answer_start=starts
    )
    with pytest.raises(ColumnError, match="not whole numbers"):
        read_labelled(path, ANSWER)


def test_covid_qa_has_234_answers_beside_their_offset(shared_data: Path) -> None:
    from bert_ray.training.data import read_labelled

    table = read_labelled(str(shared_data / "covid_qa" / "all.parquet"), ANSWER)
    assert len(table.inputs[0]) == 1_380 - 234
    assert "234 of 1380 rows left out" in table.notes[0]
    assert "answer_start" in table.notes[0]


# Metrics.


@pytest.mark.parametrize(
    ("said", "so", "exact", "overlap"),
    [
        ("The Denver Broncos!", "denver broncos", 1.0, 1.0),
        ("in the city of Paris", "Paris", 0.0, 0.4),
        ("1990s", "1990", 0.0, 0.0),
        ("北京市", "北京", 0.0, 0.8),
        ("北京。", "北京", 1.0, 1.0),
        (None, None, 1.0, 1.0),
        ("something", None, 0.0, 0.0),
        (None, "something", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),
        ("a b b", "b b c", 0.0, 2 / 2.5),
        ("“北京”", "北京", 1.0, 1.0),
        ("北京·上海…", "北京上海", 1.0, 1.0),
        ("《〈红楼梦〉》", "红楼梦", 1.0, 1.0),
        ("《1984》", "1984。", 1.0, 1.0),
        ("“Paris”", "Paris", 0.0, 0.0),
    ],
)
def test_squad_metrics(said: str | None, so: str | None, exact: float, overlap: float) -> None:
    assert exact_match(said, so) == exact
    assert f1(said, so) == pytest.approx(overlap)


def test_squad_metrics_are_a_kept_library_s() -> None:
    """On text in Latin script, of answers that are there: torchmetrics' SQuAD, which follows the official script."""
    draw = np.random.default_rng(0)
    words = [
        "The",
        "a",
        "an",
        "city",
        "of",
        "Paris,",
        "paris",
        "in",
        "1990s",
        "(1990)",
        "--",
        "U.S.",
        "don't",
        "theatre",
    ]
    scores = set()
    for _ in range(300):
        said, so = (" ".join(draw.choice(words, draw.integers(1, 6))) for _ in range(2))
        wanted = peer.squad(
            [{"prediction_text": said, "id": "0"}], [{"answers": {"answer_start": [0], "text": [so]}, "id": "0"}]
        )
        assert f1(said, so) == pytest.approx(float(wanted["f1"]) / 100, abs=1e-6), (said, so)
        assert exact_match(said, so) == float(wanted["exact_match"]) / 100, (said, so)
        scores.add(round(f1(said, so), 3))
    assert len(scores) > 10


def test_mean_scores_tell_nulls_apart() -> None:
    found = mean_scores(["x", None, "y", None], ["x", "z", None, None])
    assert found == {"f1": 0.5, "exact_match": 0.5, "answerable_f1": 0.5, "null_accuracy": 0.5}
    assert mean_scores(["x"], ["x"]) == {"f1": 1.0, "exact_match": 1.0}


def test_the_best_threshold_is_the_best() -> None:
    random = np.random.default_rng(3)
    for rows in (1, 2, 50):
        for _ in range(20):
            differences = np.round(random.normal(size=rows), 1)
            differences[random.random(rows) < 0.1] = np.inf
            unanswered = (random.random(rows) < 0.4).astype(float)
            answered = np.where((unanswered > 0) | np.isinf(differences), 0.0, random.random(rows))

            def gain(threshold: float) -> float:
                return float(np.where(differences > threshold, unanswered, answered).sum())  # noqa: B023

            candidates = [-1e9, 1e9, *(value + 1e-6 for value in differences if np.isfinite(value))]
            assert gain(best_threshold(differences, answered, unanswered)) == pytest.approx(max(map(gain, candidates)))


# The whole way.


@pytest.fixture
def digits() -> Callable[[int], dict[str, list[Any]]]:
    """Contexts in which the one number is the answer; every fourth has none."""
    words = "film food place service phone price staff story sound battery".split()

    def make(rows: int) -> dict[str, list[Any]]:
        random = np.random.default_rng(1)
        table: dict[str, list[Any]] = {"question": [], "context": [], "answer_text": [], "answer_start": []}
        for row in range(rows):
            parts = list(random.choice(words, size=int(random.integers(4, 12))))
            place = int(random.integers(0, len(parts)))
            text = str(random.integers(0, 10)) if row % 4 else None
            if text:
                parts.insert(place, text)
            table["question"].append("how many?")
            table["context"].append(" ".join(parts))
            table["answer_text"].append(text)
            table["answer_start"].append(len(" ".join([*parts[:place], ""])) if text else None)
        return table

    return make


def test_training_finds_answers_and_the_threshold(
    tiny_encoder: Path, tmp_path: Path, digits: Callable[[int], dict[str, list[Any]]]
) -> None:
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    job = TrainJob(
        model=str(tiny_encoder),
        output=str(tmp_path / "out"),
        task="answer",
        options={"overlap": 16},
        engine="local",
        threads=1,
        data=DataOptions(train=write(tmp_path / "train.parquet", **digits(400)), validation_fraction=0.2),
        epochs=4,
        batch_size=16,
        learning_rate=3e-3,
    )
    result = train(job, tell=lambda _: None)
    assert result.metrics["f1"] > 0.9
    assert result.baseline == pytest.approx(0.25, abs=0.1)
    assert {"exact_match", "answerable_f1", "null_accuracy"} <= set(result.metrics)
    card = load_bundle(result.bundle).card
    assert isinstance(card.options["null_threshold"], float)
    found = annotate(
        result.bundle,
        {"question": ["how many?"] * 2, "context": ["service price 7 phone film", "service price phone film"]},
    )
    assert (found[0]["text"], found[0]["start"], found[0]["end"]) == ("7", 14, 15)
    assert 0.0 < found[0]["score"] <= 1.0
    assert found[1] is None
