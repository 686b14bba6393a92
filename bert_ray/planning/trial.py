"""What is done with one candidate: trained until its time is up, asked, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import re
import resource
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bert_ray.errors import JobError

if TYPE_CHECKING:
    from bert_ray.planning.job import ChooseJob
    from bert_ray.training.loop import StepEvent

# What budgets are measured by, seconds.
clock = time.monotonic

# Rows that tell how fast a model is before it has learned.
_PROBE_ROWS = 16


class TimeUp(Exception):
    """A training was stopped under way; the message says after how many steps."""


def forward_seconds(job: ChooseJob, reference: str, texts: np.ndarray) -> float:
    """Seconds that a model needs to read a text, measured on a few.

    Args:
        job: max_length, threads.
        reference: any bundle with an encoder.
        texts: strings, (N,).

    Raises:
        BundleError: it cannot be used.
    """
    from bert_ray.model.annotator import Annotator, AnnotatorSpec
    from bert_ray.model.bundle import load_bundle

    bundle = load_bundle(reference)
    length = min(job.max_length, bundle.card.max_length)
    card = replace(bundle.card, task="embedding", labels=[], options={}, max_length=length)
    annotator = Annotator(replace(bundle, card=card), AnnotatorSpec(model=reference, threads=job.threads))
    few = pa.array(texts[:: -(-len(texts) // _PROBE_ROWS)], pa.large_string())
    annotator.annotate([few[:1]])  # Warms up.
    start = time.perf_counter()
    annotator.annotate([few])
    return (time.perf_counter() - start) / len(few)


def train_bundle(
    job: ChooseJob, reference: str, fine_tuned: bool, texts: np.ndarray, labels: np.ndarray, until: float
) -> str:
    """Train a candidate; the bundle of its turn before is replaced when the new one is finished.

    Args:
        job: what to do.
        reference: the base model.
        fine_tuned: all of its weights; else a head on frozen embeddings, which is not stopped under way.
        texts: strings, (N,).
        labels: their labels, strings (N,).
        until: when to stop, by `clock`.

    Returns:
        the bundle's directory.

    Raises:
        TimeUp: it was stopped.
        JobError, BundleError: the training failed.
    """
    from bert_ray.model.architectures import max_positions
    from bert_ray.model.bundle import load_bundle, put_in_place
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    def stop(event: StepEvent) -> None:
        if clock() > until:
            raise TimeUp(f"stopped after {event.step:,} steps on {len(texts):,} rows")

    # By number: two models may have one name.
    name = f"{job.models.index(reference) + 1}_{reference.rstrip('/').rpartition('/')[2]}"
    place = Path(job.output) / ("fine-tuned" if fine_tuned else "frozen") / name
    new = Path(f"{place}.next")
    run = Path(f"{new}.run")
    for old in (new, run):
        shutil.rmtree(old, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = place.with_suffix(".parquet")
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string()), "label": pa.array(labels, pa.string())}), rows)
    try:
        train(
            TrainJob(
                model=reference,
                output=str(new),
                engine="local",
                task="classification" if fine_tuned else "few-shot",
                # Named, since the few rows of a first turn may look as if their column held no labels.
                labels=sorted(set(labels)),
                data=DataOptions(train=str(rows), validation_fraction=0.0),
                epochs=job.epochs,
                learning_rate=job.learning_rate,
                max_length=min(job.max_length, max_positions(load_bundle(reference).config)),
                seed=job.seed,
                threads=job.threads,
            ),
            callbacks=[stop],
            tell=lambda _: None,
        )
    finally:
        shutil.rmtree(run, ignore_errors=True)
    put_in_place(new, place)
    return str(place)


def annotate(model: str, texts: np.ndarray, threads: int | None) -> list[str]:
    """What a trained bundle says of texts (N,): N labels."""
    from bert_ray.model.annotator import Annotator, AnnotatorSpec
    from bert_ray.model.bundle import load_bundle

    # Built anew each time: `AnnotatorSpec.build` would hold the model of every turn.
    annotator = Annotator(load_bundle(model), AnnotatorSpec(model=model, threads=threads))
    # A blank text has no annotation, and no label is right for it.
    return [item and item["label"] for item in annotator.annotate([pa.array(texts, pa.large_string())]).to_pylist()]


def measure(model: Any, texts: np.ndarray, threads: int | None) -> tuple[float, float]:
    """Rows per second, and the peak memory (MB) of a process of its own that does nothing but annotate.

    Args:
        model: a bundle's directory, or a fitted pipeline.
        texts: more than 8.
        threads: torch threads; None: all cores.

    Raises:
        JobError: that process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_measure, model, texts, threads).result()
        except BrokenProcessPool as error:
            raise JobError(
                "the process that measures speed was killed, perhaps for lack of memory; or this is a script without "
                "`if __name__ == '__main__':`, which such a process would run once more"
            ) from error


def _measure(model: Any, texts: np.ndarray, threads: int | None) -> tuple[float, float]:
    if isinstance(model, str):
        from bert_ray.model.annotator import AnnotatorSpec

        annotator = AnnotatorSpec(model=model, threads=threads).build()
        annotator.annotate([pa.array(texts[:8], pa.large_string())])  # Warms up.
        start = time.perf_counter()
        annotator.annotate([pa.array(texts[8:], pa.large_string())])
    else:
        start = time.perf_counter()
        model.predict(list(texts[8:]))
    seconds = time.perf_counter() - start
    return (len(texts) - 8) / seconds, _peak_mb()


def _peak_mb() -> float:
    """This process's own peak memory. On Linux, ru_maxrss begins at the peak of the process that started this one."""
    try:
        (kib,) = re.findall(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text("ascii", "replace"), re.M)
        return int(kib) / 1024
    except (OSError, ValueError):  # No Linux: there it counts from the start of the process; on macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
