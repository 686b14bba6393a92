"""Which template zero-shot labels want, and what a few examples a label give, on real news.

    python benchmarks/zero_shot.py               # about two minutes on two cores
    python benchmarks/zero_shot.py --rows 300    # a look

Templates, temperature and the multilabel measure are compared on AG News' training rows; the test rows see what was
chosen, and the few-shot heads, alone. Results: benchmarks/results/zero_shot.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import softmax
from sklearn import metrics

if TYPE_CHECKING:
    from bert_ray.model.annotator import Annotator

NAMES = ["World", "Sports", "Business", "Sci/Tech"]
DESCRIPTIONS = {
    "World": "world news, politics, conflicts and governments",
    "Sports": "sports, matches, teams and players",
    "Business": "business, companies, markets and the economy",
    "Sci/Tech": "science and technology, computers, software and the internet",
}
TEMPLATES: dict[str, list[str]] = {
    "{}": ["{}"],
    "This text is about {}.": ["This text is about {}."],
    "This example is {}.": ["This example is {}."],
    "{} news": ["{} news"],
    "The topic of this text is {}.": ["The topic of this text is {}."],
    "This is about {}.": ["This is about {}."],
    "A text about {}.": ["A text about {}."],
    "about the three": ["This text is about {}.", "A text about {}.", "The topic of this text is {}."],
    "name and two": ["{}", "This text is about {}.", "{} news"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="rows of each table")
    rows = parser.parse_args().rows
    common.set_threads(2)
    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import load_bundle
    from bert_ray.model.tasks.zero_shot import TEMPLATE, unit

    annotator = Annotator(load_bundle(common.MODEL))

    def embed(texts: list[str]) -> np.ndarray:
        return unit(annotator.annotate([pa.array(texts)]).flatten().to_numpy().reshape(len(texts), -1))

    def labels(templates: list[str], phrases: list[str]) -> np.ndarray:
        return unit(np.mean([embed([item.replace("{}", phrase) for phrase in phrases]) for item in templates], axis=0))

    train = pq.read_table(common.SHARED / "ag_news" / "train.parquet")
    tried = train.take(pa.array(np.random.default_rng(0).permutation(len(train))[:rows]))
    texts = tried["text"].to_pylist()
    truth = np.array([NAMES.index(label) for label in tried["label"].to_pylist()])
    vectors = embed(texts)
    phrasings = {"names": NAMES, "descriptions": list(DESCRIPTIONS.values())}
    phrasings["names: descriptions"] = [f"{name}: {text}" for name, text in DESCRIPTIONS.items()]
    table = []
    for title, templates in TEMPLATES.items():
        found = [f"{accuracy(vectors @ labels(templates, phrases).T, truth):.3f}" for phrases in phrasings.values()]
        table.append([title, *found])
    show(["template", *phrasings], table)

    cosines = vectors @ labels([TEMPLATE], NAMES).T
    show(
        ["temperature", "log-loss", "mean score"],
        [
            [f"{t}", f"{log_loss(cosines / t, truth):.3f}", f"{softmax(cosines / t, axis=1).max(1).mean():.3f}"]
            for t in (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2)
        ],
    )

    # Two texts in one: both labels are right.
    half = len(texts) // 2
    pairs, both = (
        embed([f"{a} {b}" for a, b in zip(texts[:half], texts[half:], strict=False)]),
        np.zeros((half, 4), int),
    )
    both[np.arange(half), truth[:half]] = both[np.arange(half), truth[half : 2 * half]] = 1
    single = np.eye(4, dtype=int)[truth]
    table = []
    for threshold in (0.15, 0.2, 0.25, 0.3, 0.35, 0.4):
        found = [
            f"{micro_f1(x @ labels([TEMPLATE], NAMES).T, threshold, y):.3f}"
            for x, y in ((vectors, single), (pairs, both))
        ]
        table.append([f"{threshold}", *found])
    show(["multilabel threshold", "micro F1, one text", "micro F1, two texts in one"], table)

    test = pq.read_table(common.SHARED / "ag_news" / "test.parquet")
    test = test.take(pa.array(np.random.default_rng(1).permutation(len(test))[:rows]))
    table = []
    for title, options in {"names": {"labels": NAMES}, "descriptions": {"labels": DESCRIPTIONS}}.items():
        table.append([f"zero-shot, {title}", f"{zero_shot(test, options):.3f}"])
    for each in (8, 16, 32, 64):
        found = [few_shot(train, test, each, seed) for seed in range(3)]
        accuracies, seconds = zip(*found, strict=True)
        table.append(
            [
                f"few-shot, {each} a label",
                f"{np.mean(accuracies):.3f} ± {np.std(accuracies):.3f} ({max(seconds):.1f} s)",
            ]
        )
    show(["AG News, test rows", "accuracy"], table)
    if rows >= 1000:  # Fewer are a look.
        common.keep("zero_shot", {"rows": rows, "tables": _TABLES})


def zero_shot(test: pa.Table, options: dict[str, object]) -> float:
    from bert_ray.model.annotator import AnnotatorSpec

    annotator = AnnotatorSpec(model=common.MODEL, task="zero-shot", options=options).build()
    return measured(annotator, test)


def few_shot(train: pa.Table, test: pa.Table, each: int, seed: int) -> tuple[float, float]:
    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import load_bundle
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train as run

    draw, known = np.random.default_rng(seed), np.array(train["label"].to_pylist())
    rows = np.concatenate([draw.choice(np.flatnonzero(known == name), each, replace=False) for name in NAMES])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "few.parquet"
        pq.write_table(train.take(pa.array(rows)), path)
        data = DataOptions(train=str(path))
        job = TrainJob(
            model=common.MODEL, output=f"{directory}/model", task="few-shot", engine="local", data=data, seed=seed
        )
        started = time.perf_counter()
        run(job, tell=lambda _: None)
        seconds = time.perf_counter() - started
        return measured(Annotator(load_bundle(job.output)), test), seconds


def measured(annotator: Annotator, test: pa.Table) -> float:
    annotations = annotator.annotate([test["text"]])
    return annotator.task.metrics(annotations, [test["text"]], [test["label"].combine_chunks()])["accuracy"]


# What was shown, by its first column's head.
_TABLES: dict[str, list[dict[str, str]]] = {}


def accuracy(scores: np.ndarray, truth: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == truth).mean())


def log_loss(logits: np.ndarray, truth: np.ndarray) -> float:
    return float(metrics.log_loss(truth, softmax(logits, axis=1), labels=range(logits.shape[1])))


def micro_f1(cosines: np.ndarray, threshold: float, truth: np.ndarray) -> float:
    """Labels whose score reaches the threshold beside those that are right, (B, C) each."""
    from bert_ray.model.tasks.zero_shot import TEMPERATURE

    return float(metrics.f1_score(truth == 1, softmax(cosines / TEMPERATURE, axis=1) >= threshold, average="micro"))


def show(head: list[str], rows: list[list[str]]) -> None:
    """Print a table, and keep it."""
    _TABLES[head[0]] = [dict(zip(head, row, strict=True)) for row in rows]
    common.table(head[0], tuple(head), [tuple(row) for row in rows])


if __name__ == "__main__":
    main()
