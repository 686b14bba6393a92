"""The data sets of `quality.py`: which rows are trained on, which are tested on, and with what settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

Split = tuple[pa.Table, pa.Table]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table.

    Attributes:
        title: the data, to read.
        task: what is trained.
        measure: the metric compared, as the task names it.
        also: another one, which the table shows beside it.
        split: gives the rows to train on and those to test on.
        columns: table columns by the task's inputs and truths.
        settings: of the training, ours and the reference's alike; None: nothing is trained, the base model is asked.
        options: of the task.
        test_task: another task that the trained bundle is tested by.
        pairs: gives pairs of texts that the base's embedding is fine-tuned on first; None: it stays as it comes.
        least: the aim; None: no more than the reference's.
        reference: a function of quality_references, or None.
        base: the model that everything starts from.
        given: a reference figure that was measured before, with how; it stands in where no reference runs.
        beside: another case, from MiniLM, whose figure of ours stands in instead.
        cut: whether pairs are told apart by the cosine of their embeddings, cut by a tenth of the rows to train on.
        tfidf: whether TF-IDF with logistic regression can do the task.
        minutes: about how long ours takes on two cores, one seed.
    """

    title: str
    task: str
    measure: str
    split: Callable[[], Split]
    columns: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] | None = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    least: float | None = None
    test_task: str | None = None
    pairs: Callable[[], pa.Table] | None = None
    reference: str | None = None
    base: str = common.MODEL
    given: tuple[float, str] | None = None
    beside: str = ""
    also: str = ""
    cut: bool = False
    tfidf: bool = False
    minutes: float = 5.0


def read(*path: str) -> pa.Table:
    """A table of the full data sets."""
    return pq.read_table(common.SHARED.joinpath(*path))


def files(folder: str, train: str = "train", test: str = "test") -> Split:
    """A data set that is split already."""
    return read(folder, f"{train}.parquet"), read(folder, f"{test}.parquet")


def by_hash(table: pa.Table, column: str, share: float = 0.2) -> Split:
    """Rows whose value in `column` hashes below `share` are tested on: equal values fall on one side."""
    values = table[column].to_pylist()
    hashes = [int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest(), "big") for value in values]
    tested = np.array(hashes, np.float64) < share * 2**64
    return table.filter(pa.array(~tested)), table.filter(pa.array(tested))


def demo() -> Split:
    """1,000 bundled sentences, and the 2,001 others of the demo's lake."""
    lake = pads.dataset(common.ROOT / "jobs" / "demo" / "lake", format="parquet", partitioning="hive")
    return pq.read_table(common.ROOT / "jobs" / "demo" / "train.parquet"), lake.to_table(columns=["text", "label"])


def stsb(lang: str) -> Split:
    """STS benchmark in one language."""
    train, test = files("stsb")
    return tuple(table.filter(pc.equal(table["lang"], lang)).drop_columns(["lang"]) for table in (train, test))  # type: ignore[return-value]


def wnut_types() -> Split:
    """WNUT-17 sentences and the entity types that stand in each."""

    def one(table: pa.Table) -> pa.Table:
        texts = [" ".join(tokens) for tokens in table["tokens"].to_pylist()]
        labels = [sorted({tag[2:] for tag in tags if tag != "O"}) for tags in table["tags"].to_pylist()]
        return pa.table({"text": texts, "label": pa.array(labels, pa.list_(pa.string()))})

    train, test = files("wnut17")
    return one(train), one(test)


def translation(source: str, target: str) -> Split:
    """Tatoeba pairs in one direction."""
    train, test = files("tatoeba_zh_en")
    return tuple(  # type: ignore[return-value]
        pa.table({"text": table[source], "translation": table[target]}) for table in (train, test)
    )


def few(folder: str, examples: int) -> Split:
    """So many rows of each label to learn from, drawn with a fixed seed."""
    train, test = files(folder)
    draw, labels = np.random.default_rng(0), np.array(train["label"].to_pylist())
    rows = [draw.choice(np.flatnonzero(labels == label), examples, replace=False) for label in sorted(set(labels))]
    return train.take(pa.array(np.concatenate(rows))), test


def faq() -> Split:
    """English question/answer pairs; the same questions are asked, and their own answers are right."""
    table = read("covid_faq", "all.parquet")
    table = table.filter(pc.equal(table["lang"], "en")) if "en" in table["lang"].to_pylist() else table
    table = table.append_column("id", pa.array([str(row) for row in range(len(table))]))
    return table.select(["id", "question", "answer"]), table.select(["question", "id"])


def sample(split: Split, train: int, test: int | None = None) -> Split:
    """So many rows of each, drawn with a fixed seed; test None: all that there are."""
    draw = np.random.default_rng(0)

    def drawn(table: pa.Table, rows: int | None) -> pa.Table:
        return table if rows is None else table.take(pa.array(draw.permutation(len(table))[:rows]))

    return drawn(split[0], train), drawn(split[1], test)


def answer_stands(row: dict[str, Any]) -> bool:
    """Whether a row's answer stands in its context at its offset."""
    return row["context"].startswith(row["answer_text"], int(row["answer_start"]))


def covid_passages() -> pa.Table:
    """COVID-QA's questions, each with the passage around its answer, where that stands at its offset."""
    rows = []
    for row in read("covid_qa", "all.parquet").to_pylist():
        if answer_stands(row):
            start, context = int(row["answer_start"]), row["context"]
            rows.append({"text": row["question"], "text_pair": context[max(0, start - 200) : start + 400]})
    return pa.Table.from_pylist(rows)


# Characters: three windows of 384 tokens or so, of which one or two hold the answer and the others teach what none is.
PASSAGE = 3000


def covid_qa() -> Split:
    """COVID-QA split by document: passages of 3,000 characters that hold the answers; and whole articles to test on.

    Where in its passage an answer stands is drawn: were it always the middle, that is what a model would learn.
    Answers that do not stand at their offsets are still among them: whoever reads the rows has to leave them out.
    """
    train, test = by_hash(read("covid_qa", "all.parquet"), "context")
    rows, draw = [], np.random.default_rng(0)
    for row in train.to_pylist():
        room = max(1, PASSAGE - len(row["answer_text"] or ""))
        begin = max(0, int(row["answer_start"]) - int(draw.integers(room)))
        passage = row["context"][begin : begin + PASSAGE]
        rows.append(row | {"context": passage, "answer_start": int(row["answer_start"]) - begin})
    return pa.Table.from_pylist(rows, schema=train.schema), test


LANGUAGES = {"en": "English", "zh": "Chinese"}


def tatoeba(source: str, target: str, epochs: int | None = None) -> Case:
    """Tatoeba, translated: in an hour's time, or in so many epochs beside the same from random weights."""
    title, short = f"Tatoeba, {LANGUAGES[source]} to {LANGUAGES[target]}", epochs is not None
    settings = {"learning_rate": 5e-4, "batch_size": 64, "max_length": 128, "label_smoothing": 0.1}
    return Case(
        title=f"{title}, after {epochs} epochs; beside it the same from random weights" if short else title,
        task="translation",
        measure="bleu",
        also="chrf",
        split=lambda: translation(source, target),
        options={"source_language": source, "target_language": target},
        settings={"epochs": epochs or 6, **settings},
        least=None if short else 10.0,
        reference="from_random_weights" if short else None,
        minutes=10 if short else 30,
    )


def from_chinese(name: str, minutes: float) -> Case:
    """A case from the Chinese BERT of chinese.py; beside it the same from MiniLM."""
    chinese = _from(CASES[name], common.CHINESE, "a Chinese BERT", "benchmarks/chinese.py", minutes)
    return replace(chinese, reference=None, beside=name)


def from_small_chinese(name: str, minutes: float) -> Case:
    """A case from the Chinese BERT of pretrain_proof.py, which wants a higher rate; beside it the same from MiniLM."""
    case = CASES[name]
    settings = {"epochs": case.settings["epochs"], "learning_rate": 2e-4, "max_length": 64} if case.settings else None
    small = _from(case, common.SMALL_CHINESE, "a small Chinese BERT", "make pretrain-proof", minutes)
    return replace(small, settings=settings, reference=None, beside=name)


def _from(case: Case, base: Path, name: str, made_by: str, minutes: float) -> Case:
    def split() -> Split:
        if not base.exists():
            raise FileNotFoundError(f"there is no {base}: run {made_by}")
        return case.split()

    return replace(case, title=f"{case.title}, from {name}", base=str(base), split=split, minutes=minutes)


CASES: dict[str, Case] = {
    "uci": Case(
        title="UCI sentences, 1,000 -> 2,001 others",
        task="classification",
        measure="accuracy",
        split=demo,
        settings={"epochs": 3, "learning_rate": 1e-4},
        least=0.90,
        reference="sequences",
        tfidf=True,
        minutes=1,
    ),
    "sst2": Case(
        title="SST-2, whole train -> test",
        task="classification",
        measure="accuracy",
        split=lambda: files("sst2"),
        columns={"text": "sentence"},
        settings={"epochs": 2, "learning_rate": 1e-4},
        least=0.89,
        given=(0.8796, "Trainer, 1 epoch at 5e-5"),
        reference="sequences",
        tfidf=True,
        minutes=17,
    ),
    "ag_news": Case(
        title="AG News, 10,001 -> test",
        task="classification",
        measure="accuracy",
        split=lambda: files("ag_news"),
        settings={"epochs": 2, "learning_rate": 1e-4},
        least=0.90,
        given=(0.9009, "Trainer, 2 epochs at 5e-5"),
        reference="sequences",
        tfidf=True,
        minutes=12,
    ),
    "imdb": Case(
        title="IMDB, 20,000 -> test, texts to 512 tokens (ours: of their beginning and end)",
        task="classification",
        measure="accuracy",
        split=lambda: files("imdb"),
        settings={"epochs": 2, "learning_rate": 1e-4, "max_length": 512, "batch_size": 16},
        options={"overflow": "head_tail"},
        least=0.91,
        reference="sequences",
        tfidf=True,
        minutes=130,
    ),
    "imdb_1000": Case(
        title="IMDB, 1,000 -> 2,000 of test, the first 512 tokens",
        task="classification",
        measure="accuracy",
        split=lambda: sample(files("imdb"), 1000, 2000),
        settings={"epochs": 3, "learning_rate": 1e-4, "max_length": 512, "batch_size": 16},
        reference="sequences",
        tfidf=True,
        minutes=8,
    ),
    "sms_spam": Case(
        title="SMS spam, split by hash 80/20",
        task="classification",
        measure="f1",
        split=lambda: by_hash(read("sms_spam", "all.parquet"), "text"),
        settings={"epochs": 3, "learning_rate": 1e-4},
        least=0.97,
        reference="sequences",
        tfidf=True,
        minutes=4,
    ),
    "waimai_10k": Case(
        title="Waimai (Chinese), split by hash 80/20",
        task="classification",
        measure="accuracy",
        split=lambda: by_hash(read("waimai_10k", "all.parquet"), "text"),
        settings={"epochs": 3, "learning_rate": 1e-4},
        reference="sequences",
        tfidf=True,
        minutes=8,
    ),
    "tnews": Case(
        title="TNEWS (Chinese), 15 topics",
        task="classification",
        measure="accuracy",
        split=lambda: files("tnews"),
        settings={"epochs": 2, "learning_rate": 1e-4},
        reference="sequences",
        tfidf=True,
        minutes=20,
    ),
    "tnews_8000": Case(
        title="TNEWS (Chinese), 15 topics, 8,000 -> test",
        task="classification",
        measure="accuracy",
        split=lambda: sample(files("tnews"), 8000),
        settings={"epochs": 3, "learning_rate": 1e-4},
        reference="sequences",
        tfidf=True,
        minutes=6,
    ),
    "lcqmc": Case(
        title="LCQMC (Chinese), pairs",
        task="classification",
        measure="accuracy",
        split=lambda: files("lcqmc"),
        columns={"text_pair": "text_pair"},
        settings={"epochs": 3, "learning_rate": 1e-4},
        reference="sequences",
        minutes=8,
    ),
    "stsb_en": Case(
        title="STS benchmark, English, regression head",
        task="regression",
        measure="spearman",
        split=lambda: stsb("en"),
        columns={"label": "score", "text_pair": "text_pair"},
        settings={"epochs": 4, "learning_rate": 1e-4},
        reference="sequences",
        minutes=8,
    ),
    "stsb_zh": Case(
        title="STS benchmark, Chinese, regression head",
        task="regression",
        measure="spearman",
        split=lambda: stsb("zh"),
        columns={"label": "score", "text_pair": "text_pair"},
        settings={"epochs": 4, "learning_rate": 1e-4},
        reference="sequences",
        minutes=8,
    ),
    "wnut17": Case(
        title="WNUT-17 train -> test",
        task="entities",
        measure="f1",
        split=lambda: files("wnut17"),
        columns={"text": "tokens", "label": "tags"},
        settings={"epochs": 4, "learning_rate": 1e-4, "batch_size": 16},
        least=0.42,
        reference="tokens",
        minutes=5,
    ),
    "wnut17_types": Case(
        title="which entity types a WNUT-17 sentence holds",
        task="multi-label",
        measure="micro_f1",
        split=wnut_types,
        settings={"epochs": 6, "learning_rate": 2e-4},
        tfidf=True,
        minutes=5,
    ),
    "xquad_en": Case(
        title="XQuAD English, split by context",
        task="answer",
        measure="f1",
        also="exact_match",
        split=lambda: by_hash(read("xquad", "en.parquet"), "context"),
        settings={"epochs": 4, "learning_rate": 1e-4, "batch_size": 16, "max_length": 384},
        reference="questions",
        minutes=12,
    ),
    "covid_qa": Case(
        title="COVID-QA, split by document; whole articles, 22,000 characters on average, to test on",
        task="answer",
        measure="f1",
        also="exact_match",
        split=covid_qa,
        settings={"epochs": 2, "learning_rate": 1e-4, "batch_size": 16, "max_length": 384},
        reference="questions",
        minutes=40,
    ),
    "stsb_cosine": Case(
        title="STS benchmark, English, cosine of the embeddings as they come",
        task="similarity",
        measure="spearman",
        split=lambda: stsb("en"),
        columns={"label": "score"},
        settings=None,
        reference="cosines",
        minutes=1,
    ),
    "stsb_cosine_tuned": Case(
        title="STS benchmark, English, cosine of the embeddings, fine-tuned on the scores",
        task="embedding",
        measure="spearman",
        split=lambda: stsb("en"),
        columns={"label": "score"},
        options={"loss": "cosine"},
        settings={"epochs": 4, "learning_rate": 5e-5},
        test_task="similarity",
        reference="cosines_tuned",
        minutes=8,
    ),
    "stsb_zh_cosine": Case(
        title="STS benchmark, Chinese, cosine of the embeddings, fine-tuned on the scores",
        task="embedding",
        measure="spearman",
        split=lambda: stsb("zh"),
        columns={"label": "score"},
        options={"loss": "cosine"},
        settings={"epochs": 4, "learning_rate": 1e-4},
        test_task="similarity",
        reference="cosines_tuned",
        minutes=8,
    ),
    "lcqmc_cosine": Case(
        title="LCQMC (Chinese), pairs told apart by the cosine of their embeddings, fine-tuned on the labels",
        task="embedding",
        measure="accuracy",
        split=lambda: files("lcqmc"),
        columns={"label": "label"},
        options={"loss": "cosine"},
        settings={"epochs": 3, "learning_rate": 2e-4},
        test_task="similarity",
        cut=True,
        reference="cosines_tuned",
        minutes=6,
    ),
    "ag_news_zero_shot": Case(
        title="AG News, zero-shot",
        task="zero-shot",
        measure="accuracy",
        split=lambda: files("ag_news"),
        options={
            "labels": {
                "World": "world news, politics, conflicts and governments",
                "Sports": "sports, matches, teams and players",
                "Business": "business, companies, markets and the economy",
                "Sci/Tech": "science and technology, computers, software and the internet",
            }
        },
        settings=None,
        least=0.65,
        minutes=4,
    ),
    "ag_news_few_shot": Case(
        title="AG News, a head on frozen embeddings, 64 examples a label",
        task="few-shot",
        measure="accuracy",
        split=lambda: few("ag_news", 64),
        least=0.84,
        minutes=5,
    ),
    "covid_faq": Case(
        title="COVID FAQ: the right answer to each question",
        task="faq",
        measure="recall@1",
        also="mrr",
        split=faq,
        options={"match": "answer"},
        reference="retrieval",
        minutes=1,
    ),
    "covid_faq_tuned": Case(
        title="the same, the embedding fine-tuned on COVID-QA's questions and passages",
        task="faq",
        measure="recall@1",
        also="mrr",
        split=faq,
        pairs=covid_passages,
        options={"match": "answer"},
        reference="retrieval",
        minutes=6,
    ),
    "en_zh": tatoeba("en", "zh"),
    "zh_en": tatoeba("zh", "en"),
    "en_zh_short": tatoeba("en", "zh", epochs=2),
    "zh_en_short": tatoeba("zh", "en", epochs=2),
}
CASES |= {
    f"{name}_chinese": from_chinese(name, minutes)
    for name, minutes in (
        ("waimai_10k", 8),
        ("tnews_8000", 7),
        ("lcqmc", 9),
        ("lcqmc_cosine", 6),
        ("stsb_zh", 9),
        ("stsb_zh_cosine", 8),
    )
}
CASES |= {
    f"{name}_small_chinese": from_small_chinese(name, minutes)
    for name, minutes in (("waimai_10k", 5), ("tnews_8000", 3), ("lcqmc_cosine", 4), ("stsb_zh_cosine", 3))
}
