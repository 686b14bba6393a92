"""Pretraining beside the Hugging Face Trainer, and what feeds it, in one run on one machine:

    python benchmarks/pretrain.py                              five rounds, MiniLM's shape, IMDB's texts
    python benchmarks/pretrain.py --rounds 2 --steps 3         a quick look
    python benchmarks/pretrain.py --section loader             how fast rows are read
    python benchmarks/pretrain.py --section resume             how soon the last step of 50 million words is at hand
    python benchmarks/pretrain.py --section workers            two workers of a thread each beside one, on Ray

The same corpus, model, vocabulary, threads and tokens of a step; masked language modelling at 15 %, AdamW, clipping at
1, fp32, dropout 0.1 also of attention weights, as transformers' BERT has it; once more ours as its jobs have it,
without the latter. The Trainer has DataCollatorForLanguageModeling, and rows as run_mlm.py makes them: `blocks` are all
texts end to end, cut into full rows of 512; `lines` are texts of their own, cut at 512 and padded. What counts is real
tokens per second; set-up and evaluation are left out on both sides.

Share of the peak: model FLOPs (bert_ray/model/flops.py: 6 N T + attention, the vocabulary's head over masked tokens
alone, Kaplan et al., arXiv 2001.08361) over the fp32 matrix-multiply peak measured beside each round. A head over all
tokens, as the Trainer's model computes it, is no model FLOP: nobody asks for it. Results:
benchmarks/results/pretrain.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import common

LENGTH = 512
MASKED = 0.15
# Of the corpus that a resume is timed on, about.
WORDS = 50_000_000


def make(texts: list[str], corpus: Path, *more: str) -> None:
    """A corpus of the texts in MiniLM's vocabulary, by the command that users have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from bert_ray.cli import main

    corpus.parent.mkdir(parents=True, exist_ok=True)
    path = corpus.parent / "texts.parquet"
    pq.write_table(pa.table({"text": texts}), path)
    words = (f"input={path}", f"tokenizer={common.MODEL}", f"output={corpus}", "validation_fraction=0", "markup=html")
    words += more
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = main(["corpus", *words])
    assert status == 0, f"exit status {status}"


def ours(
    scratch: Path, tokens: int, steps: int, threads: int, attention_dropout: float, workers: int = 0
) -> tuple[float, float]:
    """Real tokens per second by the loop, in this process or by so many workers of Ray Train; model FLOPs per token."""
    from bert_ray.training.job import DataOptions, PretrainingOptions, TrainJob
    from bert_ray.training.launch import train

    shutil.rmtree(scratch / "model", ignore_errors=True)
    job = TrainJob(
        task="pretraining",
        model=common.MODEL,
        output=str(scratch / "model"),
        engine="ray" if workers else "local",
        workers=max(1, workers),
        threads=threads,
        data=DataOptions(train=str(scratch / "corpus")),
        steps=steps,
        batch_tokens=tokens,
        evaluate_every=steps,
        max_length=LENGTH,
        learning_rate=1e-4,
        dropout=0.1,
        attention_dropout=attention_dropout,
        pretraining=PretrainingOptions(mask_rate=MASKED),
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        speed = train(job).tokens_per_second
    return speed, flops_per_token(scratch, job)


def flops_per_token(scratch: Path, job: Any) -> float:
    """Model FLOPs of the corpus's rows, by token."""
    import numpy as np

    from bert_ray.model.bundle import load_bundle
    from bert_ray.model.flops import dims_of, training_flops
    from bert_ray.training.corpus_source import Rows
    from bert_ray.training.masking import budget
    from bert_ray.training.shards import Documents

    rows = Rows(Documents(scratch / "corpus", "train"), LENGTH - 2)
    lengths = rows.lengths + 2
    asked = float(budget(rows.lengths, MASKED).sum())
    dims = dims_of(load_bundle(job.model).config)
    squares = float((lengths.astype(np.float64) ** 2).sum())
    return training_flops(dims, lengths.sum(), squares, asked, read=asked) / lengths.sum()


def trainer(scratch: Path, tokens: int, steps: int, threads: int, kind: str) -> tuple[float, float]:
    """Real tokens per second by transformers.Trainer, as run_mlm.py sets it up, and model FLOPs per token."""
    import torch
    from peers_trainer import trainer_seconds
    from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

    from bert_ray.model.flops import dims_of, training_flops
    from bert_ray.model.references import resolve

    torch.set_num_threads(threads)
    source = resolve(common.MODEL)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForMaskedLM.from_pretrained(source)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
    texts = json.loads((scratch / "texts.json").read_text())
    encoded = tokenizer(texts, add_special_tokens=kind == "lines", truncation=kind == "lines", max_length=LENGTH)
    if kind == "blocks":
        flat = [
            token for ids in encoded["input_ids"] for token in [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        ]
        rows = [flat[start : start + LENGTH] for start in range(0, len(flat) - LENGTH + 1, LENGTH)]
    else:
        rows = encoded["input_ids"]
    # Rows of a step so that it has as many tokens as ours, padding not counted.
    mean = sum(map(len, rows)) / len(rows)
    batch = max(1, round(tokens / mean))
    rows = (rows * (1 + batch * steps // len(rows)))[: batch * steps]

    seconds = trainer_seconds(
        model,
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows],
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED),
        scratch,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-4,
    )
    count = sum(map(len, rows))
    squares = float(sum(len(row) ** 2 for row in rows))
    return count / seconds, training_flops(dims_of(model.config), count, squares, MASKED * count) / count


def speed(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every contestant in turn."""
    contestants: dict[str, tuple[Any, Any]] = {
        "bert_ray": (ours, 0.1),
        "bert_ray, attention_dropout 0": (ours, 0.0),
        "Trainer, blocks": (trainer, "blocks"),
        "Trainer, lines": (trainer, "lines"),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    arguments = (scratch, options.tokens, options.steps, options.threads)
    for turn in range(options.rounds):
        for name, runs in measured.items():
            before = common.peak_flops()
            run, own_argument = contestants[name]
            rate, flops = common.isolated(run, *arguments, own_argument)
            runs.append((rate, rate * flops / ((before + common.peak_flops()) / 2)))
        print(f"  round {turn + 1} of {options.rounds}", flush=True)
    own = measured["bert_ray"]
    found, lines = {}, []
    for name, runs in measured.items():
        ratios = [one[0] / other[0] for one, other in zip(own, runs, strict=True)]
        found[name] = {
            "tokens_per_second": common.median([rate for rate, _ in runs]),
            "share_of_peak": common.median([share for _, share in runs]),
            "bert_ray_is_faster_by": common.median(ratios),
            "ratios": [round(ratio, 2) for ratio in ratios],
        }
        figures = found[name]
        lines.append(
            (
                name,
                f"{figures['tokens_per_second']:.0f}",
                f"{figures['share_of_peak']:.3f}",
                f"{figures['bert_ray_is_faster_by']:.2f}",
            )
        )
    common.table(
        f"Pretraining MiniLM's shape, {options.tokens:,} tokens a step, {options.threads} threads",
        ("trainer", "real tokens/s", "share of peak", "bert_ray beside it"),
        lines,
    )
    return found


def workers(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Two workers of one thread each beside one, the same step, by Ray Train and DeepSpeed."""
    found: dict[str, list[float]] = {"one worker": [], "two workers": []}
    for turn in range(options.rounds):
        for count, runs in zip((1, 2), found.values(), strict=True):
            rate, _ = common.isolated(ours, scratch, options.tokens, options.steps, 1, 0.0, count)
            runs.append(rate)
        print(f"  round {turn + 1} of {options.rounds}", flush=True)
    shares = [two / (2 * one) for one, two in zip(*found.values(), strict=True)]
    lines = [(name, f"{common.median(rates):.0f}") for name, rates in found.items()]
    common.table(
        "Workers of one thread", ("what", "real tokens/s"), [*lines, ("share", f"{common.median(shares):.2f}")]
    )
    rates = {name: common.median(values) for name, values in found.items()}
    return {"tokens_per_second": rates, "share_of_twice_one": common.median(shares), "shares": shares}


def loader(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rows read, masked and laid end to end, tokens per second of one thread."""
    from bert_ray.model.bundle import load_bundle
    from bert_ray.training.corpus_source import CorpusSource, Rows, marks_of
    from bert_ray.training.job import DataOptions, PretrainingOptions, TrainJob
    from bert_ray.training.shards import Documents

    job = TrainJob(
        task="pretraining",
        model=common.MODEL,
        output="unused",
        data=DataOptions(train=str(scratch / "corpus")),
        batch_tokens=options.tokens,
        steps=10**6,
    )
    marks = marks_of(load_bundle(common.MODEL).tokenizer(), common.MODEL)
    found: dict[str, Any] = {}
    for name, chosen in (("tokens", PretrainingOptions()), ("words", PretrainingOptions(whole_words=True))):
        job.pretraining = chosen
        source = CorpusSource(Rows(Documents(scratch / "corpus", "train"), LENGTH - 2), marks, job)
        source.batch(source.select(0), 0)
        start, count = time.perf_counter(), 0
        for step in range(1, 101):
            samples = source.select(step)
            batch, _ = source.batch(samples, step)
            count += len(batch.input_ids)
        found[f"{name}_per_second"] = count / (time.perf_counter() - start)
    common.table("Reading, one thread", ("what", "figure"), [(name, f"{value:,.3g}") for name, value in found.items()])
    return found


def resume(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """How long a start at the last step of a large corpus takes: all that its size could make slow.

    Model and vocabulary are loaded, each shard's hash is checked, the rows are laid out and the step's batch is made;
    what depends on the model alone (weights and moments of the checkpoint, torch's first step) is left out.
    """
    import torch

    from bert_ray.model.bundle import load_bundle
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.pretraining import corpus_data
    from bert_ray.training.shards import read_manifest

    texts, place = json.loads((scratch / "texts.json").read_text()), scratch / "large"
    times = -(-WORDS // sum(len(text.split()) for text in texts))
    make(texts * times, place, "duplicates=none")
    manifest = read_manifest(place).splits["train"]
    job = TrainJob(
        task="pretraining",
        model=common.MODEL,
        output="unused",
        data=DataOptions(train=str(place)),
        batch_tokens=options.tokens,
    )
    seconds = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        base = load_bundle(common.MODEL)
        data, _ = corpus_data(job, base)
        source, _ = data.sources(job, base, base.card, torch.device("cpu"))
        batch, _ = source.batch(source.select(source.steps - 1), source.steps - 1)
        assert len(batch.input_ids) > 0
        seconds.append(time.perf_counter() - start)
    figures = {"words": manifest.words, "tokens": manifest.tokens, "step": source.steps}
    print(f"the last of {source.steps:,} steps of {manifest.words:,} words: {common.median(seconds):.2f} s", flush=True)
    return figures | {"seconds": common.median(seconds), "rounds": seconds}


SECTIONS = {"speed": speed, "loader": loader, "resume": resume, "workers": workers}


def main() -> None:
    """Measure the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps of each run")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--section", choices=list(SECTIONS), action="append", help="default: all")
    options = parser.parse_args()
    common.set_threads(options.threads)
    path = common.RESULTS / "pretrain.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    texts = common.reviews(2000, split="train")[0].to_pylist()
    scratch = Path(tempfile.mkdtemp(prefix="bert_ray-bench-"))
    try:
        make(texts, scratch / "corpus")
        (scratch / "texts.json").write_text(json.dumps(texts))
        for name, section in SECTIONS.items():
            if not options.section or name in options.section:
                settings = {"rounds": options.rounds, "steps": options.steps, "tokens": options.tokens}
                threads = 1 if name == "workers" else options.threads  # Of each worker.
                settings |= {"threads": threads}
                found = {"machine": common.machine(), "settings": settings, **section(scratch, options)}
                # What a CPU of another kind has measured stays beside it.
                vector = found["machine"]["vector"]
                other = figures.get(name, {}).get("machine", {}).get("vector", vector) != vector
                figures[f"{name}, {vector}" if other else name] = found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    common.keep("pretrain", {name: value for name, value in figures.items() if name != "machine"})


if __name__ == "__main__":
    main()
