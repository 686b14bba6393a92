"""Accuracy on full data sets, beside the Hugging Face Trainer's on the same machine kind:

    python benchmarks/quality.py                  both cases
    python benchmarks/quality.py --case uci       1,000 sentences of three sources, a minute
    python benchmarks/quality.py --case sst2      the whole of SST-2, tens of minutes on two cores

Trains from MiniLM with the settings below and evaluates on rows that were not trained on. Results:
benchmarks/results/quality.json, one entry per case, kept over runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from typing import Any

import common

# Where runs and bundles lie: a run that was stopped goes on from its checkpoint.
RUNS = common.ROOT / "out" / "quality"

# The Trainer's figures: transformers 5.23, fused AdamW, batch 32; SST-2: one epoch at 5e-5; UCI: three at 1e-4.
CASES: dict[str, dict[str, Any]] = {
    "uci": {
        "train": common.ROOT / "jobs" / "demo" / "train.parquet",
        "test": common.ROOT / "jobs" / "demo" / "lake",
        "columns": {"text": "text", "label": "label"},
        "settings": {"epochs": 3, "learning_rate": 1e-4, "seed": 7},
        "trainer": 0.9145,
    },
    "sst2": {
        "train": common.SHARED / "sst2" / "train.parquet",
        "test": common.SHARED / "sst2" / "test.parquet",
        "columns": {"text": "sentence", "label": "label"},
        "settings": {"epochs": 2, "learning_rate": 1e-4, "seed": 0},
        "trainer": 0.8796,
    },
}


def measure(name: str, case: dict[str, Any], fresh: bool, threads: int | None) -> dict[str, Any]:
    """Train, evaluate, tell."""
    from bert_ray.evaluation.evaluate import evaluate
    from bert_ray.evaluation.job import EvaluateJob
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    output = RUNS / name
    if fresh:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(f"{output}.run", ignore_errors=True)
    data = DataOptions(
        train=str(case["train"]), validation_fraction=0.0, text=case["columns"]["text"], label=case["columns"]["label"]
    )
    job = TrainJob(
        model=common.MODEL,
        output=str(output),
        engine="local",
        threads=threads,
        labels=["negative", "positive"],
        max_length=256,
        data=data,
        **case["settings"],
    )
    start = time.monotonic()
    trained = train(job)
    seconds = time.monotonic() - start
    found = evaluate(
        EvaluateJob(
            model=str(output),
            table=str(case["test"]),
            column=case["columns"]["text"],
            label=case["columns"]["label"],
            output=f"{output}.evaluation",
        )
    )
    figures = {"trained_on": trained.train_rows, "settings": case["settings"], "train_seconds": round(seconds)}
    figures |= {"tokens_per_second": round(trained.tokens_per_second), "trainer_accuracy": case["trainer"]}
    return figures | {"tested_on": found.scores.rows} | found.scores.figures()


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), help="default: all whose data is there")
    parser.add_argument("--fresh", action="store_true", help="train again where a run has ended already")
    parser.add_argument("--threads", type=int, help="default: all cores")
    options = parser.parse_args()
    path = common.RESULTS / "quality.json"
    results = json.loads(path.read_text())["cases"] if path.exists() else {}
    for name, case in CASES.items():
        if options.case in (None, name) and case["train"].exists():
            results[name] = measure(name, case, options.fresh, options.threads)
            common.keep("quality", {"cases": results})
    common.table(
        "Accuracy on rows not trained on",
        ("data", "trained on", "accuracy", "Trainer", "majority"),
        [
            (
                name,
                f"{figure['trained_on']:,} rows",
                f"{figure['accuracy']:.4f}",
                f"{figure['trainer_accuracy']:.4f}",
                f"{figure['majority_accuracy']:.4f}",
            )
            for name, figure in results.items()
        ],
    )


if __name__ == "__main__":
    main()
