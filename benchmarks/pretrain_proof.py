"""Does pretraining here make a better BERT? At most 90 minutes of one core's time in all:

    python benchmarks/pretrain_proof.py                     every part
    python benchmarks/pretrain_proof.py --missing           go on: those alone that the results do not have
    python benchmarks/pretrain_proof.py --part english      a small BERT on IMDB, then 2,000 labels
    python benchmarks/pretrain_proof.py --part chinese      the same on Chinese text, then three tasks
    python benchmarks/pretrain_proof.py --part domain       MiniLM continued on COVID-QA's articles

A small BERT has 4 layers of 256, 4 heads, and a vocabulary of its own. Vocabulary, corpus, pretraining and fine-tuning
run by the commands that users have, in one process of one thread; in bf16 where the CPU multiplies it, for more steps
then. Tests are on rows that no part has trained on; of large test sets on so many in an order by hash. LCQMC's pairs
are told apart by the cosine of their embeddings, fine-tuned on the labels; the cut is set on a tenth of them, held out.
Results: benchmarks/results/pretrain_proof.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pairs import held_out, model_accuracy

common.set_threads(1)

PRECISION = common.fast_precision()
# Of pretraining: what fits the 90 minutes.
STEPS = {"english": 1400, "chinese": 6600} if PRECISION == "bf16" else {"english": 1200, "chinese": 1200}

RUNS = common.PROOF
RESULTS = common.RESULTS / "pretrain_proof.json"
SHAPE = {"layers": 4, "hidden_size": 256, "heads": 4, "max_positions": 256}
PRETRAINING = {
    "precision": PRECISION,
    "batch_tokens": 4096,
    "learning_rate": 1e-3,
    "max_length": 64,
    "dropout": 0.0,
    "warmup": 0.08,
    "schedule": "trapezoidal",
    "pretraining.mask_rate": 0.3,
    "pretraining.validation_rows": 500,
}
SEEDS = (0, 1, 2)
# What is aimed at: accuracy over random weights', the fall of the masked tokens' loss, minutes of one core in all.
AHEAD, FALL, MINUTES = 0.03, 0.15, 90


def command(*words: str) -> float:
    """Run `bert-ray …` in this process; gives the CPU seconds it took."""
    from bert_ray.cli import main

    began = time.process_time()
    status = main(list(words))
    if status:
        raise SystemExit(f"bert-ray {' '.join(words)}: exit status {status}")
    return time.process_time() - began


def some(table: pa.Table, column: str, rows: int, salt: str = "") -> pa.Table:
    """So many rows, in an order by the hash of a column: the same ones each time, of all labels."""
    import hashlib

    keys = [hashlib.blake2b(f"{salt}{text}".encode()).digest() for text in table[column].to_pylist()]
    order = sorted(range(len(table)), key=keys.__getitem__)[:rows]
    return table.take(pa.array(order))


def prepared(place: Path, texts: Path, **corpus: str) -> dict[str, float]:
    """Vocabulary and corpus of the texts, in `place`; CPU seconds of each."""
    return {
        "vocabulary": command("vocabulary", f"input={texts}", f"output={place / 'vocabulary'}", "size=8000"),
        "corpus": command(
            "corpus",
            f"input={texts}",
            f"tokenizer={place / 'vocabulary'}",
            f"output={place / 'corpus'}",
            *(f"{key}={value}" for key, value in corpus.items()),
        ),
    }


def pretraining(train: Path, output: Path, steps: int, more: dict[str, Any]) -> float:
    """Pretrain on a corpus as all parts do, but for `more`; gives the CPU seconds it took."""
    keys = {
        "task": "pretraining",
        "engine": "local",
        "threads": 1,
        "data.train": train,
        "output": output,
        "steps": steps,
        "evaluate_every": max(1, steps // 8),
        **PRETRAINING,
        **more,
    }
    return command("train", *(f"{key}={value}" for key, value in keys.items()))


def pretrained(name: str, texts: Path, **corpus: str) -> dict[str, float]:
    """Vocabulary, corpus and a small BERT from the texts; CPU seconds of each."""
    place = RUNS / name
    spent = prepared(place, texts, **corpus)
    new = {"model": "new", **{f"architecture.{key}": value for key, value in SHAPE.items()}}
    spent["pretraining"] = pretraining(
        place / "corpus", place / "bert", STEPS[name], new | {"architecture.start": "cooccurrence"}
    )
    # The same model, with the same vocabulary, that has learned nothing: one step at a rate of nearly nothing.
    nothing = {"learning_rate": 1e-12, "architecture.start": "random"}
    pretraining(place / "corpus", place / "random", 1, new | nothing)
    return spent


def fine_tuned(
    name: str, model: Path, train: pa.Table, test: pa.Table, seed: int, settings: dict[str, Any]
) -> tuple[float, float]:
    """Accuracy on `test` of a model trained on `train` from `model`; and CPU seconds.

    Pairs are told apart by the cosine of their embeddings; a tenth of `train` is held out to choose where it is cut.
    """
    began = time.process_time()
    place, path = RUNS / f"{name}-{model.name}-{seed}", RUNS / f"{name}-train.parquet"
    rest = train.slice(0, 0)
    if settings.get("task") == "embedding":
        rest, train = held_out(train)
    pq.write_table(train, path)
    keys = {
        "model": model,
        "output": place,
        "engine": "local",
        "threads": 1,
        "seed": seed,
        "data.train": path,
        "data.validation_fraction": 0,
        "precision": PRECISION,
        **settings,
    }
    command("train", *(f"{key}={value}" for key, value in keys.items()))
    accuracy = model_accuracy(str(place), rest, test, 1) if len(rest) else label_accuracy(place, test)
    shutil.rmtree(place)
    return accuracy, time.process_time() - began


def label_accuracy(model: Path, test: pa.Table) -> float:
    """Accuracy of a classifier."""
    from bert_ray.model.annotator import AnnotatorSpec
    from bert_ray.training.data import read_labelled

    path = RUNS / "test.parquet"
    pq.write_table(test, path)
    annotator = AnnotatorSpec(model=str(model), threads=1).build()
    table = read_labelled(str(path), annotator.task)
    return annotator.task.metrics(annotator.annotate(table.inputs), table.inputs, table.truth)["accuracy"]


def tfidf(train: pa.Table, test: pa.Table) -> float:
    """Accuracy of TF-IDF with logistic regression; two texts are joined."""
    from sklearn.metrics import accuracy_score

    from bert_ray.planning.tfidf import fit_tfidf

    def texts(table: pa.Table) -> list[str]:
        pair = table["text_pair"].to_pylist() if "text_pair" in table.column_names else [""] * len(table)
        return [f"{one} {other}".strip() for one, other in zip(table["text"].to_pylist(), pair, strict=True)]

    model = fit_tfidf(texts(train), [str(label) for label in train["label"].to_pylist()], 0)
    return float(accuracy_score([str(label) for label in test["label"].to_pylist()], model.predict(texts(test))))


def compared(
    name: str,
    base: str,
    train: pa.Table,
    test: pa.Table,
    settings: dict[str, Any],
    keep: dict[str, Any],
    **own: dict[str, Any],
) -> None:
    """Every seed from random weights and from the pretrained ones of `base`, into `keep`.

    `own` are settings of `random` and `pretrained` alone: weights that know nothing need a higher rate for longer.
    """
    row = keep.setdefault(name, {"random": {}, "pretrained": {}, "train_rows": len(train), "test_rows": len(test)})
    row["tfidf"] = tfidf(train, test)
    for seed in SEEDS:
        for kind, start in (("random", "random"), ("pretrained", "bert")):
            more = settings | own.get(kind, {})
            accuracy, seconds = fine_tuned(name, RUNS / base / start, train, test, seed, more)
            row[kind][str(seed)] = {"accuracy": accuracy, "cpu_seconds": round(seconds)}
            print(f"{name}, {kind}, seed {seed}: {accuracy:.4f}", flush=True)


def english(found: dict[str, Any]) -> None:
    """IMDB's texts, then 2,000 of its labels."""
    texts = RUNS / "english-texts"
    texts.mkdir(parents=True, exist_ok=True)
    train = pq.read_table(common.SHARED / "imdb" / "train.parquet", columns=["text", "label"])
    pq.write_table(some(train, "text", 18_000), texts / "imdb.parquet")
    found["cpu_seconds"] = pretrained("english", texts, markup="html")
    test = pq.read_table(common.SHARED / "imdb" / "test.parquet", columns=["text", "label"])
    # Rates and epochs of each are those that were best on the first 1,000 test rows, of one seed.
    compared(
        "imdb",
        "english",
        some(train, "text", 2000, "labels"),
        some(test, "text", 3000).slice(1000),
        {"batch_size": 32, "max_length": 128},
        found,
        random={"epochs": 4, "learning_rate": 2e-4},
        pretrained={"epochs": 2, "learning_rate": 1e-4},
    )


def chinese_texts(texts: Path) -> dict[str, tuple[pa.Table, pa.Table]]:
    """Write all Chinese training texts to a lake; gives the labelled sets they stem from, to train and to test on."""
    from quality_cases import by_hash

    texts.mkdir(parents=True, exist_ok=True)
    read = lambda *path: pq.read_table(common.SHARED.joinpath(*path))  # noqa: E731
    waimai = by_hash(read("waimai_10k", "all.parquet"), "text")
    tnews = read("tnews", "train.parquet"), read("tnews", "test.parquet")
    lcqmc = read("lcqmc", "train.parquet"), read("lcqmc", "test.parquet")
    stsb = read("stsb", "train.parquet")
    stsb = stsb.filter(pc.equal(stsb["lang"], "zh"))
    sources = {
        "waimai": waimai[0]["text"],
        "tnews": tnews[0]["text"],
        "lcqmc": pa.chunked_array([*lcqmc[0]["text"].chunks, *lcqmc[0]["text_pair"].chunks]),
        "tatoeba": read("tatoeba_zh_en", "train.parquet")["zh"],
        "stsb": pa.chunked_array([*stsb["text"].chunks, *stsb["text_pair"].chunks]),
        "xquad": pc.unique(read("xquad", "zh.parquet")["context"]),
    }
    for name, column in sources.items():
        pq.write_table(pa.table({"text": column}), texts / f"{name}.parquet")
    return {"waimai_10k": waimai, "tnews": tnews, "lcqmc": lcqmc}


def chinese(found: dict[str, Any]) -> None:
    """All Chinese training texts, then three tasks."""
    texts = RUNS / "chinese-texts"
    sets = chinese_texts(texts)
    found["cpu_seconds"] = pretrained("chinese", texts, words="jieba")
    settings = {"batch_size": 32, "learning_rate": 2e-4, "max_length": 64}
    for name, labels in (("waimai_10k", 1000), ("tnews", 5000)):
        train, test = sets[name]
        more = settings | {"epochs": 3}
        compared(name, "chinese", some(train, "text", labels), some(test, "text", 3000), more, found)
    # Epochs, and how the cut is chosen, were looked at on the first 3,000 test rows.
    train, test = (some(table, "text", 6000) for table in sets["lcqmc"])
    more = settings | {"epochs": 3, "task": "embedding", "options.loss": "cosine", "data.columns.label": "label"}
    compared("lcqmc", "chinese", train, test.slice(3000), more, found)


def domain(found: dict[str, Any]) -> None:
    """MiniLM, continued on COVID-QA's articles; retrieval on COVID FAQ before and after."""
    import quality
    from quality_cases import CASES

    place, texts = RUNS / "domain", RUNS / "domain-texts"
    texts.mkdir(parents=True, exist_ok=True)
    articles = pc.unique(pq.read_table(common.SHARED / "covid_qa" / "all.parquet")["context"])
    pq.write_table(pa.table({"text": articles}), texts / "articles.parquet")
    spent = command(
        "corpus", f"input={texts}", f"tokenizer={common.MODEL}", f"output={place / 'corpus'}", "validation_fraction=0.1"
    )
    keys = {
        "task": "pretraining",
        "model": common.MODEL,
        "engine": "local",
        "threads": 1,
        "data.train": place / "corpus",
        "output": place / "bert",
        "steps": 150,
        "precision": PRECISION,
        "batch_tokens": 4096,
        "evaluate_every": 75,
        "learning_rate": 3e-4,
        "keep_base": 0.5,
        "max_length": 256,
        "dropout": 0.0,
        "pretraining.validation_rows": 300,
    }
    # What MiniLM itself says: it has no vocabulary head of its own, so that head alone is trained first.
    spent += command(
        "train", *(f"{key}={value}" for key, value in (keys | {"output": place / "head", "freeze_layers": 6}).items())
    )
    spent += command("train", *(f"{key}={value}" for key, value in keys.items()))
    from bert_ray.model.bundle import load_bundle

    loss = {name: -load_bundle(str(place / name)).card.metrics["log_likelihood"] for name in ("head", "bert")}
    found["masked_loss"] = {"before": loss["head"], "after": loss["bert"], "fall": 1 - loss["bert"] / loss["head"]}
    case = CASES["covid_faq"]
    found["cpu_seconds"] = {"all": spent}
    found["retrieval"] = {}
    train, test = case.split()
    for name, model in (("before", common.MODEL), ("after", str(place / "bert"))):
        how = quality.Run(0, "fp32", 1)
        quality.forget(f"domain-{name}", how)  # Of an earlier measurement, from another base.
        figures = quality.ours(f"domain-{name}", case, train, test, how, base=model)
        found["retrieval"][name] = {key: figures["metrics"][key] for key in ("recall@1", "mrr")}


PARTS = {"english": english, "chinese": chinese, "domain": domain}


def measured_rows(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, list[float]]]]:
    """What has been fine-tuned: part, data, its figures, and the accuracies from random weights and from pretrained."""
    for part in ("english", "chinese"):
        for name, row in results.get(part, {}).items():
            if isinstance(row, dict) and row.get("pretrained"):
                kinds = ("random", "pretrained")
                yield part, name, row, {kind: [run["accuracy"] for run in row[kind].values()] for kind in kinds}


def missed(results: dict[str, Any]) -> list[str]:
    """What was aimed at and is not reached by what has been measured, a line each."""
    found = []
    for part, name, row, accuracies in measured_rows(results):
        mean = {kind: np.mean(values) for kind, values in accuracies.items()}
        if mean["pretrained"] < mean["random"] + AHEAD:
            found.append(f"{name}: less than {100 * AHEAD:.0f} points ahead of random weights.")
        if part == "chinese" and mean["pretrained"] <= row["tfidf"]:
            found.append(f"{name}: not ahead of TF-IDF.")
    if domain := results.get("domain"):
        if domain["masked_loss"]["fall"] < FALL:
            found.append(f"domain: the loss of masked tokens falls by less than {FALL:.0%}.")
        if domain["retrieval"]["after"]["recall@1"] < domain["retrieval"]["before"]["recall@1"]:
            found.append("domain: retrieval falls.")
    if sum(results.get(name, {}).get("all_cpu_seconds", 0) for name in PARTS) > 60 * MINUTES:
        found.append(f"CPU time: more than {MINUTES} minutes of one core.")
    return found


def write_table(results: dict[str, Any]) -> None:
    """benchmarks/results/pretrain_proof.md."""
    lines = [
        "# Pretraining, proved",
        "",
        "A BERT of 4 layers of 256 with its own vocabulary of 8,000, pretrained here, then fine-tuned on labels: test",
        "accuracy, mean of three seeds and from the lowest to the highest, beside the same model from random weights",
        "and TF-IDF with logistic regression on the same labels. On IMDB each has the rate and the epochs that were",
        "best on other test rows. LCQMC's pairs are told apart by the cosine of their embeddings, fine-tuned on the",
        "labels. `make pretrain-proof`.",
        "",
        "| data | labels | test rows | random weights | pretrained | ahead by (points) | TF-IDF |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, name, row, values in measured_rows(results):
        mean = {kind: sum(found) / len(found) for kind, found in values.items()}
        shown = {kind: f"{mean[kind]:.4f} ({min(found):.4f} to {max(found):.4f})" for kind, found in values.items()}
        lines.append(
            f"| {name} | {row['train_rows']:,} | {row['test_rows']:,} | {shown['random']} | "
            f"{shown['pretrained']} | {100 * (mean['pretrained'] - mean['random']):+.1f} | {row['tfidf']:.4f} |"
        )
    if found := results.get("domain"):
        loss, asked = found["masked_loss"], found["retrieval"]
        lines += [
            "",
            "MiniLM continued on COVID-QA's articles: loss of masked tokens on articles held out "
            f"{loss['before']:.3f} before (its new vocabulary head alone trained), {loss['after']:.3f} after "
            f"({100 * loss['fall']:.0f} % less); COVID FAQ recall@1 {asked['before']['recall@1']:.4f} before, "
            f"{asked['after']['recall@1']:.4f} after.",
        ]
    lines.append("")
    for part, found in results.items():
        if tokens := found.get("pretraining_tokens"):
            lines.append(f"Pretrained on {tokens / 1e6:.1f} million tokens ({part}), in {found['precision']}.")
    if all("all_cpu_seconds" in results.get(name, {}) for name in PARTS):
        spent = sum(results[name]["all_cpu_seconds"] for name in PARTS)
        lines += ["", f"CPU time: {spent / 60:.0f} minutes of one core."]
    lines += [f"{part}: {found['note']}." for part, found in results.items() if "note" in found]
    reached = "What was aimed at is reached, with the labels, rates and epochs told above."
    lines += ["", *([f"- {line}" for line in missed(results)] or [reached])]
    lines.append("")
    (common.RESULTS / "pretrain_proof.md").write_text("\n".join(lines), "utf-8")


def main() -> int:
    """Run the parts asked for; 1 where something that was aimed at is not reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="default: all")
    parser.add_argument("--missing", action="store_true", help="leave out what the results have already")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        if options.part and name not in options.part:
            continue
        if name in results and options.missing:
            print(f"{name}: measured on {results[name]['date']}", flush=True)
            continue
        if not options.missing:  # Else what a run that was stopped has made is gone on with.
            shutil.rmtree(RUNS / name, ignore_errors=True)
        found: dict[str, Any] = {"precision": PRECISION, "date": datetime.date.today().isoformat()}
        if name in STEPS:
            found["pretraining_tokens"] = STEPS[name] * PRETRAINING["batch_tokens"]
        began = time.process_time()
        part(found)
        # All of it: everything runs in this process.
        found["all_cpu_seconds"] = round(time.process_time() - began)
        results[name] = found
        common.keep("pretrain_proof", {key: value for key, value in results.items() if key != "machine"})
        write_table(results)
    for line in missed(results):
        print(f"not reached: {line}", flush=True)
    return int(bool(missed(results)))


if __name__ == "__main__":
    sys.exit(main())
