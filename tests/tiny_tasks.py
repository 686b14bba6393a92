"""For every task a tiny bundle that it runs on, and a table to annotate: what tests over all tasks share.

Weights are random and wide, so that outputs differ from row to row; the encoder is conftest's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import TINY_MAX_LENGTH, TINY_SEED, tiny_config, tiny_tokenizer

TEXTS = [
    "the film was good and the staff was nice",
    None,
    "",
    "  \t ",
    "terrible service, never again!",
    "nul \x00 inside, write to a@b.org",
    "émoji 🎬🍿 𝔘 and more",
    "word " * 700,
]
PAIRS = ["a nice film", "x", None, "a great place", "bad food", "", "the same", "word"]


@dataclass(kw_only=True)
class Tiny:
    """A task, ready to annotate.

    Attributes:
        model: bundle reference.
        task: the task to run, where it is not the bundle's own.
        options: of the task.
        columns: the input columns, all of one length.
        type: the annotation's type, as the design declares it.
    """

    model: str
    columns: dict[str, pa.Array]
    type: pa.DataType
    task: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> pa.Table:
        """The inputs with an id."""
        rows = len(next(iter(self.columns.values())))
        return pa.table({"id": pa.array(range(rows), pa.int64()), **self.columns})


LABEL = pa.struct([("label", pa.string()), ("score", pa.float32())])
ENTITIES = pa.list_(
    pa.struct(
        [
            ("start", pa.int32()),
            ("end", pa.int32()),
            ("text", pa.string()),
            ("label", pa.string()),
            ("score", pa.float32()),
        ]
    )
)
ANSWER = pa.struct([("text", pa.string()), ("start", pa.int32()), ("end", pa.int32()), ("score", pa.float32())])


def texts() -> pa.Array:
    """One text a row, every odd kind among them."""
    return pa.array(TEXTS, pa.string())


def pairs() -> pa.Array:
    """Second texts."""
    return pa.array(PAIRS, pa.string())


def save(root: Path, auto: str, card: dict[str, Any], **settings: Any) -> str:
    """A tiny model with a random head as a bundle."""
    import torch
    import transformers

    from bert_ray.model.bundle import save_bundle
    from bert_ray.model.card import Card

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = getattr(transformers, auto)(tiny_config(len(tokenizer), **settings)).eval()
    directory = root / f"tiny {card['task']}"
    save_bundle(directory, model, tokenizer, Card(max_length=TINY_MAX_LENGTH, **card))
    return str(directory)


def names(*labels: str) -> dict[str, Any]:
    """Settings of a configuration with these labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def classification(root: Path, encoder: str) -> Tiny:
    card = {"task": "classification", "labels": ["a", "b", "c"]}
    model = save(root, "BertForSequenceClassification", card, **names("a", "b", "c"))
    return Tiny(model=model, columns={"text": texts()}, type=LABEL)


def multilabel(root: Path, encoder: str) -> Tiny:
    card = {"task": "multi-label", "labels": ["a", "b", "c"]}
    settings = {**names("a", "b", "c"), "problem_type": "multi_label_classification"}
    model = save(root, "BertForSequenceClassification", card, **settings)
    return Tiny(model=model, columns={"text": texts()}, type=pa.list_(LABEL))


def regression(root: Path, encoder: str) -> Tiny:
    card = {"task": "regression", "inputs": ["text", "text_pair"]}
    model = save(root, "BertForSequenceClassification", card, num_labels=1, problem_type="regression")
    return Tiny(model=model, columns={"text": texts(), "text_pair": pairs()}, type=pa.float32())


def entities_bundle(root: Path) -> str:
    tags = ("O", "B-thing", "I-thing", "B-place", "I-place")
    return save(root, "BertForTokenClassification", {"task": "entities", "labels": ["place", "thing"]}, **names(*tags))


def entities(root: Path, encoder: str) -> Tiny:
    return Tiny(model=entities_bundle(root), columns={"text": texts()}, type=ENTITIES)


def mask(root: Path, encoder: str) -> Tiny:
    span = [("start", pa.int32()), ("end", pa.int32()), ("label", pa.string()), ("score", pa.float32())]
    kind = pa.struct([("text", pa.string()), ("spans", pa.list_(pa.struct(span)))])
    return Tiny(model=entities_bundle(root), task="mask", columns={"text": texts()}, type=kind)


def answer(root: Path, encoder: str) -> Tiny:
    card = {"task": "answer", "inputs": ["question", "context"]}
    model = save(root, "BertForQuestionAnswering", card)
    return Tiny(model=model, columns={"question": pairs(), "context": texts()}, type=ANSWER)


def faq(root: Path, encoder: str) -> Tiny:
    from bert_ray.model.tasks.faq import build_index

    pairs = {"question": ["a good film?", "bad food?", "where?"], "answer": ["yes", "no", "here"]}
    bundle = build_index(encoder, pa.table(pairs), root / "tiny faq")
    kind = pa.struct([("answer", pa.string()), ("score", pa.float32()), ("id", pa.string()), ("question", pa.string())])
    dialogues = [text if text is None else ["hello", text] for text in TEXTS]
    return Tiny(model=bundle.reference, columns={"question": pa.array(dialogues, pa.list_(pa.string()))}, type=kind)


def embedding(root: Path, encoder: str) -> Tiny:
    return Tiny(model=encoder, columns={"text": texts()}, type=pa.list_(pa.float32(), 32))


def similarity(root: Path, encoder: str) -> Tiny:
    columns = {"text": texts(), "text_pair": pairs()}
    return Tiny(model=encoder, task="similarity", columns=columns, type=pa.float32())


def fill_mask(root: Path, encoder: str) -> Tiny:
    model = save(root, "BertForMaskedLM", {"task": "fill-mask"})
    masked = [text if index in (1, 2) else f"{text} a [MASK] one, [MASK]" for index, text in enumerate(TEXTS)]
    masked[0] = None
    kind = pa.list_(pa.struct([("token", pa.string()), ("score", pa.float32())]))
    return Tiny(model=model, columns={"text": pa.array(masked, pa.string())}, type=kind)


def zero_shot(root: Path, encoder: str) -> Tiny:
    options = {"labels": ["film", "food", "phone"]}
    return Tiny(model=encoder, task="zero-shot", options=options, columns={"text": texts()}, type=LABEL)


def translation(root: Path, encoder: str) -> Tiny:
    from bert_ray.model.bundle import load_bundle
    from bert_ray.model.tasks.translation_start import make_start

    said = pa.array(["der Film war gut", "das Essen, 很好。"])
    bundle = make_start(
        load_bundle(encoder), pa.array(TEXTS).drop_null()[:2], said, layers=2, vocabulary=100, output=root / "tiny both"
    )
    options = {"beams": 2, "max_target_tokens": 12}
    return Tiny(model=bundle.reference, options=options, columns={"text": texts()}, type=pa.string())


def few_shot(root: Path, encoder: str) -> Tiny:
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    path = root / "few.parquet"
    rows = [(f"a great film {row}", "good") for row in range(10)] + [(f"bad food {row}", "bad") for row in range(10)]
    pq.write_table(pa.table({"text": [row[0] for row in rows], "label": [row[1] for row in rows]}), path)
    data = DataOptions(train=str(path), validation_fraction=0.0)
    job = TrainJob(model=encoder, output=str(root / "few shot"), engine="local", task="few-shot", data=data, threads=1)
    train(job, tell=lambda _: None)
    return Tiny(model=job.output, columns={"text": texts()}, type=LABEL)


# Task -> what makes its Tiny from a directory to write to and the tiny encoder's directory.
MAKERS: dict[str, Callable[[Path, str], Tiny]] = {
    "answer": answer,
    "classification": classification,
    "embedding": embedding,
    "entities": entities,
    "few-shot": few_shot,
    "faq": faq,
    "fill-mask": fill_mask,
    "mask": mask,
    "multi-label": multilabel,
    "regression": regression,
    "similarity": similarity,
    "translation": translation,
    "zero-shot": zero_shot,
}
