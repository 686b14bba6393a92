"""What helps against overfitting: 500 rows of SST-2, each measure alone, and all that help together.

    python benchmarks/overfitting.py                    five seeds each, about 40 minutes on two cores
    python benchmarks/overfitting.py --seeds 1          a quick look
    python benchmarks/overfitting.py --fill models/mlm  also words that this masked language model fills in

Fine-tunes MiniLM and tests on SST-2's own test rows. What has been measured is kept and not repeated:
benchmarks/results/overfitting.json has every run, benchmarks/results/overfitting.md the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS, SEEDS = 500, 5
TOGETHER = "all that help alone, together"
RUNS = common.ROOT / "out" / "overfitting"
RESULTS = common.RESULTS / "overfitting.json"

# No measure: none of the regularisation that a job has by default either.
NONE: dict[str, Any] = {
    "epochs": 5,
    "learning_rate": 1e-4,
    "batch_size": 16,
    "max_length": 128,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}

ALONE: dict[str, dict[str, Any]] = {
    "L1, 1e-7": {"l1": 1e-7},
    "L2 (decoupled weight decay), 0.1": {"weight_decay": 0.1},
    "dropout, 0.1": {"dropout": 0.1},
    "dropout, 0.3": {"dropout": 0.3},
    "label smoothing, 0.1": {"label_smoothing": 0.1},
    "early stopping on a tenth of the rows": {"early_stopping": 2, "validation_fraction": 0.1},
    "layer-wise learning rate, 0.8": {"layer_decay": 0.8},
    "the lowest 3 of 6 layers frozen": {"freeze_layers": 3},
    "the mean of the base's weights and the trained ones": {"keep_base": 0.5},
    "a tenth of the words left out": {"augmentation": {"deletion": 0.1}},
    "a tenth of the words swapped": {"augmentation": {"swap": 0.1}},
    "a tenth of the words misspelled": {"augmentation": {"characters": 0.1}},
}


def accuracy(settings: dict[str, Any], seed: int, place: str, threads: int) -> float:
    """Train on the 500 rows, and test."""
    import torch

    from bert_ray.model.annotator import AnnotatorSpec
    from bert_ray.training.data import read_labelled
    from bert_ray.training.job import AugmentationOptions, DataOptions, TrainJob
    from bert_ray.training.launch import train

    torch.set_num_threads(threads)
    settings = dict(settings)
    fraction = settings.pop("validation_fraction", 0.0)
    augmentation = AugmentationOptions(**settings.pop("augmentation", {}))
    shutil.rmtree(place, ignore_errors=True)
    job = TrainJob(
        model=common.MODEL,
        output=place,
        engine="local",
        threads=threads,
        seed=seed,
        data=DataOptions(train=str(RUNS / "train.parquet"), validation_fraction=fraction, columns={"text": "sentence"}),
        augmentation=augmentation,
        **settings,
    )
    train(job, tell=lambda _: None)
    annotator = AnnotatorSpec(model=place, threads=threads).build()
    table = read_labelled(str(common.SHARED / "sst2" / "test.parquet"), annotator.task, {"text": "sentence"})
    metrics = annotator.task.metrics(annotator.annotate(table.inputs), table.inputs, table.truth)
    shutil.rmtree(place)
    return metrics["accuracy"]


def together(measures: list[dict[str, Any]]) -> dict[str, Any]:
    """All of them; of two strengths of one measure the first."""
    found: dict[str, Any] = {}
    augmentation: dict[str, float] = {}
    for measure in measures:
        augmentation |= measure.get("augmentation", {})
        found = measure | found
    return found | ({"augmentation": augmentation} if augmentation else {})


def mean(runs: dict[str, float]) -> float:
    return statistics.mean(runs.values())


def write_table(results: dict[str, Any]) -> None:
    """benchmarks/results/overfitting.md, from all that has been measured."""
    none = results.get("none", {}).get("runs")
    if not none:
        return
    lines = [
        "# Against overfitting, measured",
        "",
        f"MiniLM fine-tuned on {ROWS} rows of SST-2 ({NONE['epochs']} epochs at {NONE['learning_rate']:g}, batches of "
        f"{NONE['batch_size']}), accuracy on SST-2's 872 test rows: mean over seeds, standard deviation, lowest to",
        "highest. `python benchmarks/overfitting.py`.",
        "",
        "| measure | seeds | accuracy | deviation | lowest to highest | over none, points |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        values = list(found["runs"].values())
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        gain, reach = 100 * (mean(found["runs"]) - mean(none)), f"{min(values):.4f} to {max(values):.4f}"
        lines.append(f"| {name} | {len(values)} | {mean(found['runs']):.4f} | {spread:.4f} | {reach} | {gain:+.1f} |")
    if min(len(found["runs"]) for found in results.values()) < SEEDS or TOGETHER not in results:
        lines += ["", f"Not complete: {SEEDS} seeds of each, and all that help together, are what will tell.", ""]
        (common.RESULTS / "overfitting.md").write_text("\n".join(lines), "utf-8")
        return
    best = max(results, key=lambda name: mean(results[name]["runs"]))
    ahead = 100 * (mean(results[best]["runs"]) - mean(none))
    verdict = "which is" if ahead >= 1.0 else "which is not"
    lines += [
        "",
        f"The best, {best}, is {ahead:.1f} points ahead of none, {verdict} the point or more that was hoped for.",
        "Which measures help, and which is the best, was judged by these test rows too. Seeds decide the order of",
        "rows, the head's first weights and the noise; the 500 rows are always the same.",
        "",
    ]
    (common.RESULTS / "overfitting.md").write_text("\n".join(lines), "utf-8")


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, with a thread each")
    parser.add_argument("--fill", help="a masked language model with the tokenizer of MiniLM")
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(common.SHARED / "sst2" / "train.parquet")
    rows = np.random.default_rng(0).choice(len(table), ROWS, replace=False)
    pq.write_table(table.take(pa.array(rows)), RUNS / "train.parquet")
    results = json.loads(RESULTS.read_text())["measures"] if RESULTS.exists() else {}
    alone = dict(ALONE)
    if options.fill:
        alone["a tenth of the words filled in"] = {"augmentation": {"substitution": 0.1, "model": options.fill}}
    measure_all({"none": {}} | alone, results, options)
    helping = [
        measure for name, measure in alone.items() if mean(results[name]["runs"]) > mean(results["none"]["runs"])
    ]
    measure_all({TOGETHER: together(helping)}, results, options)
    print((common.RESULTS / "overfitting.md").read_text())


def measure_all(measures: dict[str, dict[str, Any]], results: dict[str, Any], options: argparse.Namespace) -> None:
    """Every measure with every seed, some at a time; each is kept as it ends."""
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        waiting = {}
        for seed in range(options.seeds):
            for place, (name, measure) in enumerate(measures.items()):
                found = results.setdefault(name, {"settings": measure, "runs": {}})
                if found["settings"] != measure:  # What helps alone has changed.
                    found |= {"settings": measure, "runs": {}}
                if str(seed) not in found["runs"]:
                    output = str(RUNS / f"run-{len(measures)}-{place}-{seed}")
                    waiting[pool.submit(accuracy, NONE | measure, seed, output, 1)] = name, seed
        for count, future in enumerate(as_completed(waiting), 1):
            name, seed = waiting[future]
            results[name]["runs"][str(seed)] = future.result()
            results[name]["date"] = datetime.date.today().isoformat()
            print(f"{count}/{len(waiting)} {name}, seed {seed}: {future.result():.4f}", flush=True)
            common.keep("overfitting", {"measures": results})
            write_table({name: found for name, found in results.items() if found["runs"]})


if __name__ == "__main__":
    main()
