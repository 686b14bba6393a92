"""Does a model that goes on in a domain know it better? Film reviews, and Chinese food reviews:

    python benchmarks/domains.py                    both, one core
    python benchmarks/domains.py --domain films     MiniLM on IMDB's reviews: about 40 minutes
    python benchmarks/domains.py --domain food      the proof's Chinese BERT on Waimai's reviews: about 10 minutes

Each is measured before and after: the loss of masked tokens on reviews held out, and the accuracy of classifiers that
are fine-tuned on few labels, three seeds. MiniLM has no vocabulary head: what is called before is MiniLM with its head
alone trained, for as many steps. Of food reviews a tenth of the steps' tokens are the Chinese text that the base was
pretrained on (`data.replay`); that base, of `pretrain_proof.py --part chinese`, has seen these reviews among others.
COVID's articles are a part of the proof. Results: benchmarks/results/domains.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pretrain_proof import PRECISION, RUNS, SEEDS, command, fine_tuned, some

RESULTS = common.RESULTS / "domains.json"


def films() -> dict[str, Any]:
    """MiniLM, continued on reviews of IMDB."""
    train, test = (pq.read_table(common.SHARED / "imdb" / f"{part}.parquet") for part in ("train", "test"))
    return continued(
        "films",
        common.MODEL,
        some(train, "text", 8000),
        (some(train, "text", 500, "labels"), some(test, "text", 1000)),
        {"markup": "html"},
        {"steps": 150, "learning_rate": 3e-4, "keep_base": 0.5, "max_length": 256},
        {"max_length": 128, "batch_size": 32, "learning_rate": 1e-4, "epochs": 2},
        head=True,
    )


def food() -> dict[str, Any]:
    """The Chinese BERT of the proof, continued on reviews of Waimai."""
    from quality_cases import by_hash

    place = RUNS / "chinese"
    if not (place / "bert").exists():
        raise SystemExit(f"{place / 'bert'} is not there: python benchmarks/pretrain_proof.py --part chinese makes it")
    from bert_ray.training.corpus.cleaning import clean

    table = pq.read_table(common.SHARED / "waimai_10k" / "all.parquet")
    # Cleaned as in a corpus, which holds out by the same hash as the labels are split by.
    table = table.set_column(
        table.schema.get_field_index("text"), "text", [[clean(text) for text in table["text"].to_pylist()]]
    )
    train, test = by_hash(table, "text")
    return continued(
        "food",
        str(place / "bert"),
        # The corpus holds out the test rows.
        pa.concat_tables([train, test]),
        (some(train, "text", 1000), test),
        {"tokenizer": str(place / "vocabulary"), "words": "jieba", "validation_fraction": 0.2},
        {
            "steps": 200,
            "learning_rate": 3e-4,
            "max_length": 64,
            "data.replay": place / "corpus",
            "data.replay_share": 0.1,
        },
        {"max_length": 64, "batch_size": 32, "learning_rate": 2e-4, "epochs": 3},
    )


def continued(
    name: str,
    base: str,
    texts: pa.Table,
    labelled: tuple[pa.Table, pa.Table],
    corpus: dict[str, Any],
    pretraining: dict[str, Any],
    fine_tuning: dict[str, Any],
    *,
    head: bool = False,
) -> dict[str, Any]:
    """A base before and after it went on: the masked tokens' loss, and what fine-tuning makes of it.

    Args:
        name: of the domain.
        base: reference of the model.
        texts: to go on with, a tenth of them held out where `corpus` does not say otherwise.
        labelled: to fine-tune and to test on.
        corpus: keys of the corpus beside input and output.
        pretraining: keys of the training.
        fine_tuning: likewise.
        head: whether the base has no vocabulary head: the loss before is that of a head trained by itself.
    """
    place, began = RUNS / name, time.process_time()
    shutil.rmtree(place, ignore_errors=True)
    (place / "texts").mkdir(parents=True)
    pq.write_table(texts.select(["text"]), place / "texts" / "texts.parquet")
    keys = {
        "input": place / "texts",
        "output": place / "corpus",
        "validation_fraction": 0.1,
        "tokenizer": base,
    } | corpus
    command("corpus", *(f"{key}={value}" for key, value in keys.items()))
    steps = pretraining["steps"]
    keys = {
        "task": "pretraining",
        "model": base,
        "engine": "local",
        "threads": 1,
        "data.train": place / "corpus",
        "precision": PRECISION,
        "batch_tokens": 4096,
        "evaluate_every": max(1, steps // 2),
        "dropout": 0.0,
        "pretraining.validation_rows": 300,
        **pretraining,
    }
    before: dict[str, Any] = {"freeze_layers": 6} if head else {"steps": 1, "learning_rate": 1e-12, "evaluate_every": 1}
    for output, more in (("before", before), ("bert", {})):
        told = keys | {"output": place / output} | more
        command("train", *(f"{key}={value}" for key, value in told.items()))
    from bert_ray.model.bundle import load_bundle

    loss = {
        when: -load_bundle(str(place / output)).card.metrics["log_likelihood"]
        for when, output in (("before", "before"), ("after", "bert"))
    }
    found: dict[str, Any] = {
        "precision": PRECISION,
        "date": datetime.date.today().isoformat(),
        "base": Path(base).name if Path(base).exists() else base,
        "tokens": steps * 4096,
        "masked_loss": loss | {"fall": 1 - loss["after"] / loss["before"]},
        "labels": len(labelled[0]),
        "test_rows": len(labelled[1]),
        "accuracy": {},
    }
    for when, model in (("before", base), ("after", str(place / "bert"))):
        runs = [fine_tuned(f"{name}-{when}", Path(model), *labelled, seed, fine_tuning)[0] for seed in SEEDS]
        found["accuracy"][when] = {"mean": float(np.mean(runs)), "runs": runs}
        print(f"{name}, {when}: {np.mean(runs):.4f} ({min(runs):.4f} to {max(runs):.4f})", flush=True)
    found["cpu_seconds"] = round(time.process_time() - began)
    return found


DOMAINS = {"films": films, "food": food}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=list(DOMAINS), action="append", help="default: both")
    chosen = parser.parse_args().domain or list(DOMAINS)
    results: dict[str, Any] = {}
    for name in chosen:
        found = DOMAINS[name]()
        results = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | {name: found}
        common.keep("domains", {key: value for key, value in results.items() if key != "machine"})
    common.table(
        "Before and after a model went on in a domain",
        ("domain", "masked loss", "accuracy"),
        [
            (
                name,
                " -> ".join(f"{results[name]['masked_loss'][when]:.3f}" for when in ("before", "after")),
                " -> ".join(f"{results[name]['accuracy'][when]['mean']:.4f}" for when in ("before", "after")),
            )
            for name in chosen
        ],
    )


if __name__ == "__main__":
    main()
