"""Fine-tuning beside the Hugging Face Trainer, in one run on one machine:

    python benchmarks/train.py                       SST-2 and IMDB, five rounds
    python benchmarks/train.py --rounds 2 --steps 5  a quick look

The same model, rows per batch, dropout and optimiser (AdamW, clipping at 1) in fp32 on the same rows. What counts is
real tokens per second, padding not counted, over the same stretch of an epoch; set-up and evaluation are left out on
both sides. Share of the peak: 3 x the operations of a forward pass (Kaplan et al., arXiv 2001.08361, section 2.1), over
the fp32 matrix-multiply peak measured beside each round. Results: benchmarks/results/train.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common


@dataclass(frozen=True)
class Case:
    """One data set and its batch."""

    name: str
    folder: str
    text: str
    max_length: int
    batch: int


CASES = (Case("SST-2", "sst2", "sentence", 256, 32), Case("IMDB", "imdb", "text", 512, 8))


def ours(texts: list[str], labels: list[int], case: Case, scratch: Path) -> float:
    """Real tokens per second of one epoch by the plain loop."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    pq.write_table(pa.table({"text": texts, "label": labels}), scratch / "train.parquet")
    shutil.rmtree(scratch / "model", ignore_errors=True)
    shutil.rmtree(scratch / "model.run", ignore_errors=True)
    job = TrainJob(
        model=common.MODEL,
        output=str(scratch / "model"),
        engine="local",
        threads=torch.get_num_threads(),
        data=DataOptions(train=str(scratch / "train.parquet"), validation_fraction=0.0),
        epochs=1,
        batch_size=case.batch,
        max_length=case.max_length,
        learning_rate=5e-5,
        dropout=0.1,
        attention_dropout=0.1,
        clip=1.0,
        seed=0,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = train(job)
    return result.tokens_per_second


def trainer(texts: list[str], labels: list[int], case: Case, scratch: Path) -> float:
    """The same by transformers.Trainer, as its examples set it up."""
    from peers_trainer import trainer_seconds
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    from bert_ray.model.references import resolve

    directory = resolve(common.MODEL)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2)
    encoded = tokenizer(texts, truncation=True, max_length=case.max_length)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
    ]

    seconds = trainer_seconds(
        model,
        rows,
        DataCollatorWithPadding(tokenizer),
        scratch,
        num_train_epochs=1,
        per_device_train_batch_size=case.batch,
        learning_rate=5e-5,
    )
    return sum(len(row["input_ids"]) for row in rows) / seconds


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of each run")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    common.set_threads(options.threads)
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from bert_ray.model.bundle import load_bundle
    from bert_ray.model.tokenization import Tokenizer

    torch.set_num_threads(options.threads)
    bundle = load_bundle(common.MODEL)
    figures, lines = {}, []
    scratch = Path(tempfile.mkdtemp(prefix="bert_ray-bench-"))
    for case in CASES:
        path = common.SHARED / case.folder / "train.parquet"
        if path.exists():
            table = pq.read_table(path)
            # Spread over the file: the reviews of one film stand together in some versions of these sets.
            chosen = np.random.default_rng(0).permutation(len(table))[: case.batch * options.steps]
            column, labels = (
                table[case.text].combine_chunks().take(chosen),
                table["label"].combine_chunks().take(chosen),
            )
        else:
            column, _ = common.reviews(case.batch * options.steps, split="train")
            labels = [index % 2 for index in range(len(column))]
        texts, labels = column.to_pylist(), [int(str(label)) for label in labels]
        lengths = Tokenizer(bundle.tokenizer(), case.max_length)([column]).tokens.lengths
        # Ours reads the first token of each text alone; the Trainer computes all of the last layer.
        flops = {
            name: 3
            * common.encoder_flops(
                lengths,
                layers=bundle.config.num_hidden_layers,
                hidden=bundle.config.hidden_size,
                feed_forward=bundle.config.intermediate_size,
                read=read,
            )
            for name, read in (("bert_ray", len(lengths)), ("Hugging Face Trainer", None))
        }
        measured: dict[str, list[tuple[float, float]]] = {"bert_ray": [], "Hugging Face Trainer": []}
        for turn in range(options.rounds):
            for name, run in (("bert_ray", ours), ("Hugging Face Trainer", trainer)):
                before = common.peak_flops()
                speed = common.isolated(run, texts, labels, case, scratch)
                seconds = float(lengths.sum()) / speed
                measured[name].append((speed, flops[name] / seconds / ((before + common.peak_flops()) / 2)))
            print(f"  {case.name}: round {turn + 1} of {options.rounds}", flush=True)
        ratios = [a / b for (a, _), (b, _) in zip(*measured.values(), strict=True)]
        figures[case.name] = {
            "rows": len(texts),
            "tokens": int(lengths.sum()),
            "batch": case.batch,
            "max_length": case.max_length,
            "ratio": common.median(ratios),
            "ratios": [round(ratio, 2) for ratio in ratios],
        } | {
            name: {
                "tokens_per_second": common.median([speed for speed, _ in runs]),
                "share_of_peak": common.median([share for _, share in runs]),
            }
            for name, runs in measured.items()
        }
        for name in measured:
            figure = figures[case.name][name]
            lines.append(
                (
                    f"{case.name}, {case.batch} rows a step, {case.max_length} tokens at most",
                    name,
                    f"{figure['tokens_per_second']:.0f}",
                    f"{figure['share_of_peak']:.3f}",
                    f"{common.median(ratios):.2f}" if name == "bert_ray" else "1",
                )
            )
    shutil.rmtree(scratch, ignore_errors=True)
    common.keep("train", {"rounds": options.rounds, "steps": options.steps, "cases": figures})
    common.table(
        f"Fine-tuning: real tokens per second, {options.threads} threads",
        ("data", "trainer", "real tokens/s", "share of peak", "beside Trainer"),
        lines,
    )


if __name__ == "__main__":
    main()
