"""Annotation beside its peers, in one run on one machine:

    python benchmarks/annotate.py                         both sections, five rounds each
    python benchmarks/annotate.py --section engine        the engines alone, tokens in memory
    python benchmarks/annotate.py --section engine --dtype bf16   the same in bf16, for a CPU that multiplies it
    python benchmarks/annotate.py --section end_to_end    Parquet in, annotated Parquet out
    python benchmarks/annotate.py --rounds 2 --texts 60 --rows 200      a quick look

MiniLM embeddings of film reviews at 256 tokens. Contestants take turns, each beside the machine's matrix-multiply peak
of that moment; medians over the rounds. In bf16 all compute in it and the peak is bf16's, but ONNX Runtime, which has
fp32 alone on a CPU. Results: benchmarks/results/annotate_*.json.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import common

MAX_LENGTH = 256


def bench_engines(texts: int, rounds: int, dtype: str) -> None:
    """Tokens in memory -> vectors in memory."""
    import numpy as np
    import peers_engine
    import torch

    import bert_ray
    from bert_ray.model.tokenization import Tokenizer

    column, source = common.reviews(texts)
    annotator = bert_ray.load(common.MODEL, dtype=dtype)
    tokenizer = Tokenizer(annotator.bundle.tokenizer(), MAX_LENGTH)
    pieces = tokenizer([column])
    ragged = pieces.tokens
    config = annotator.bundle.config
    flops = common.encoder_flops(
        ragged.lengths,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        feed_forward=config.intermediate_size,
    )
    rows = [ragged.ids[start:stop] for start, stop in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)]
    contestants: dict[str, Callable[[], np.ndarray]] = {"bert_ray": lambda: annotator.outputs_of(pieces).values}
    contestants |= peers_engine.contestants(annotator.bundle.directory, rows, dtype)
    reference = bert_ray.load(common.MODEL).outputs_of(pieces).values
    least = 0.9999 if dtype == "fp32" else 0.999
    worst = {}
    for name, run in contestants.items():  # Also the warm-up.
        vectors = run()
        worst[name] = float((vectors * reference).sum(1).min())
        # A contestant that computes something else, dropout for one, has no place in the table.
        assert worst[name] > least, f"{name}: cosine {worst[name]:.6f} to the model in fp32"
    measured = common.interleaved(contestants, rounds, getattr(torch, common.TYPES[dtype]))
    figures = {}
    for name, runs in measured.items():
        figures[name] = {
            "share_of_peak": common.median([flops / seconds / peak for seconds, peak in runs]),
            "shares": [round(flops / seconds / peak, 3) for seconds, peak in runs],
            "texts_per_second": common.median([len(rows) / seconds for seconds, _ in runs]),
            "lowest_cosine": worst[name],
        }
    peaks = [peak for runs in measured.values() for _, peak in runs]
    common.keep(
        common.result_name("annotate_engine", dtype),
        {
            "dtype": dtype,
            "texts": len(rows),
            "source": source,
            "tokens": int(ragged.offsets[-1]),
            "rounds": rounds,
            "peak_gflops": round(common.median(peaks) / 1e9, 1),
            "engines": figures,
        },
    )
    common.table(
        f"Engines alone: {len(rows)} {source}, {int(ragged.offsets[-1]):,} tokens, "
        f"{dtype}, peak {common.median(peaks) / 1e9:.0f} GFLOP/s",
        ("engine", "share of peak", "lowest to highest", "texts/s", "lowest cosine"),
        [
            (
                name,
                f"{figure['share_of_peak']:.3f}",
                f"{min(figure['shares']):.2f} to {max(figure['shares']):.2f}",
                f"{figure['texts_per_second']:.1f}",
                f"{figure['lowest_cosine']:.7f}",
            )
            for name, figure in sorted(figures.items(), key=lambda item: -item[1]["share_of_peak"])
        ],
    )


def bench_end_to_end(rows: int, rounds: int) -> None:
    """Parquet in, annotated Parquet out. Start-up is what a run over a few rows takes.

    Spark's workers outlive a run and keep the model, Ray's do not: what a further run pays before its first row is what
    a second one over the few rows takes, and that is taken off the time of all rows.
    """
    import peers_end_to_end
    import pyarrow as pa
    import pyarrow.parquet as pq

    column, source = common.reviews(rows)
    scratch = Path(tempfile.mkdtemp(prefix="bert_ray-bench-"))
    try:
        few = peers_end_to_end.FEW_ROWS
        lakes = {}
        for name, size in (("few", few), ("all", len(column))):
            lakes[name] = scratch / name
            lakes[name].mkdir()
            part = -(-size // peers_end_to_end.FILES)
            for index in range(peers_end_to_end.FILES):
                texts = column.slice(index * part, min(part, size - index * part))
                table = pa.table({"id": range(index * part, index * part + len(texts)), "text": texts})
                pq.write_table(table, lakes[name] / f"part-{index}.parquet")
        with peers_end_to_end.sessions(scratch):
            contestants = peers_end_to_end.contestants(scratch)
            speeds: dict[str, list[float]] = {name: [] for name in contestants}
            startups: dict[str, list[float]] = {name: [] for name in contestants}
            for turn in range(rounds):
                for name, run in contestants.items():
                    startup = peers_end_to_end.timed(run, lakes["few"], scratch / "out", few)
                    again = peers_end_to_end.timed(run, lakes["few"], scratch / "out", few)
                    seconds = peers_end_to_end.timed(run, lakes["all"], scratch / "out", len(column))
                    speeds[name].append((len(column) - few) / (seconds - again))
                    startups[name].append(startup)
                print(f"  round {turn + 1} of {rounds}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    figures = {
        name: {
            "rows_per_second": common.median(speeds[name]),
            "all_rounds": [round(speed, 1) for speed in speeds[name]],
            "startup_seconds": common.median(startups[name]),
            "rows_per_second_with_startup": len(column)
            / (common.median(startups[name]) + (len(column) - few) / common.median(speeds[name])),
        }
        for name in contestants
    }
    common.keep(
        "annotate_end_to_end",
        {"rows": len(column), "source": source, "rounds": rounds, "contestants": figures},
    )
    local = figures["bert_ray, local"]["rows_per_second"]
    common.table(
        f"End to end: {len(column)} {source}, Parquet in, annotated Parquet out, 2 threads",
        ("contestant", "rows/s once started", "beside bert_ray, local", "start-up s", "rows/s in all"),
        [
            (
                name,
                f"{figure['rows_per_second']:.1f}",
                f"{figure['rows_per_second'] / local:.2f}",
                f"{figure['startup_seconds']:.1f}",
                f"{figure['rows_per_second_with_startup']:.1f}",
            )
            for name, figure in sorted(figures.items(), key=lambda item: -item[1]["rows_per_second"])
        ],
    )


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=("engine", "end_to_end"), help="default: both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=300, help="reviews for the engines alone")
    parser.add_argument("--dtype", choices=common.TYPES, default="fp32", help="of the engines alone")
    parser.add_argument("--rows", type=int, default=1000, help="reviews end to end")
    options = parser.parse_args()
    common.set_threads(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    if options.section != "end_to_end":
        bench_engines(options.texts, options.rounds, options.dtype)
    if options.section != "engine":
        bench_end_to_end(options.rows, options.rounds)


if __name__ == "__main__":
    main()
