"""Does making a corpus take constant memory? Words by the million through `bert-ray corpus`, its memory once a second.

    python benchmarks/corpus.py                  50 million words, about 15 minutes on two cores
    python benchmarks/corpus.py --words 2000000  a quick look

The documents are sentences of IMDB's reviews, drawn anew for each document, so that no two are duplicates. Keeps
benchmarks/results/corpus.json with the curve, and draws it in benchmarks/results/corpus.svg.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Documents of a file, and sentences of a document (IMDB's reviews have about ten).
FILE_DOCUMENTS, SENTENCES = 10_000, 10
ROW_GROUP = 5_000
SAMPLE_SEC = 1.0
# Ten times the words may take this much more memory at its highest: a whole shard, twice, and some 40 bytes a document.
MOST_GROWTH_MIB = 150
STAGES = ("read and clean", "tokenise", "write shards")


def write_lake(place: Path, words: int) -> int:
    """Files of documents of about so many words; returns how many words they have."""
    texts, source = common.reviews(25_000, split="train")
    print(f"sentences of {source}", flush=True)
    sentences = [
        sentence
        for text in texts.to_pylist()
        for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"<[^>]+>", " ", text))
        if sentence.strip()
    ]
    sizes = np.array([len(sentence.split()) for sentence in sentences])
    draw = np.random.default_rng(0)
    written = number = 0
    place.mkdir(parents=True)
    while written < words:
        chosen = draw.integers(0, len(sentences), (FILE_DOCUMENTS, SENTENCES))
        # The last file has as many as are still needed.
        ends = written + np.cumsum(sizes[chosen].sum(1))
        chosen = chosen[: int(np.searchsorted(ends, words)) + 1]
        documents = [" ".join(sentences[item] for item in row) for row in chosen.tolist()]
        pq.write_table(pa.table({"text": documents}), place / f"{number:04}.parquet", row_group_size=ROW_GROUP)
        written += int(sizes[chosen].sum())
        number += 1
    return written


def memory_mib(pid: int) -> tuple[float, float]:
    """A process's resident memory, and its part that is not of mapped files, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split(":")[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return tuple(float(found[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def measure(lake: Path, output: Path, tokenizer: str) -> dict[str, Any]:
    """Run the command, and look at its memory until it ends."""
    log = output.with_suffix(".log")
    curve: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "bert_ray", "corpus", "--input", str(lake), "--output", str(output)]
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--tokenizer", tokenizer], stderr=file, stdout=file)
        while process.poll() is None:
            try:
                whole, own = memory_mib(process.pid)
            except (KeyError, FileNotFoundError):  # It ends.
                break
            stages = [stage for line in log.read_text().splitlines() for stage in STAGES if line.startswith(stage)]
            curve.append(
                {
                    "seconds": round(time.perf_counter() - began, 1),
                    "stage": stages[-1] if stages else "start",
                    "resident_mib": round(whole, 1),
                    "own_mib": round(own, 1),
                }
            )
            time.sleep(SAMPLE_SEC)
    if process.wait():
        sys.exit(log.read_text())
    print(log.read_text()[log.read_text().index("corpus ") :] if "corpus " in log.read_text() else "", flush=True)
    return {"seconds": round(time.perf_counter() - began, 1), "curve": curve}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """The curves."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for run in runs:
        seconds = [point["seconds"] for point in run["curve"]]
        axes.plot(seconds, [point["own_mib"] for point in run["curve"]], label=f"{run['words'] / 1e6:,.1f} M words")
    axes.set(xlabel="seconds", ylabel="MiB, without mapped files", ylim=(0, None), title="bert-ray corpus: memory")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=50_000_000)
    parser.add_argument("--tokenizer", default=common.MODEL)
    options = parser.parse_args()
    runs = []
    # A tenth beside the whole: constant is what does not grow with the text.
    for words in (options.words // 10, options.words):
        with tempfile.TemporaryDirectory(prefix="bert_ray-corpus-") as scratch:
            lake, output = Path(scratch, "lake"), Path(scratch, "corpus")
            written = write_lake(lake, words)
            found = measure(lake, output, options.tokenizer)
            shutil.rmtree(output)
        peaks = {
            stage: max((point["own_mib"] for point in found["curve"] if point["stage"] == stage), default=0.0)
            for stage in STAGES
        }
        runs.append(
            {"words": written, "words_per_second": round(written / found["seconds"]), "peak_mib": peaks, **found}
        )
    common.table(
        "Memory of `bert-ray corpus` (MiB, without mapped files), at its highest in each stage",
        ("words", "words/s", *STAGES),
        [
            (
                f"{run['words']:,}",
                f"{run['words_per_second']:,}",
                *(f"{run['peak_mib'][stage]:,.0f}" for stage in STAGES),
            )
            for run in runs
        ],
    )
    growth = max(runs[1]["peak_mib"].values()) - max(runs[0]["peak_mib"].values())
    print(f"ten times the words: {growth:+,.0f} MiB ({'constant' if growth <= MOST_GROWTH_MIB else 'NOT constant'})")
    path = common.keep("corpus", {"growth_mib": round(growth, 1), "runs": runs})
    draw(runs, path.with_suffix(".svg"))
    print(f"kept in {path}", flush=True)


if __name__ == "__main__":
    main()
