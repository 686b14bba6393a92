"""Which rows a step sees, and which worker computes them. Pure functions of seed, epoch and lengths.

The rows of a step do not depend on the number of workers: a run may be resumed with another number and goes on with
the same rows in the same order.

Shapes: B rows of one optimiser step.
"""

from __future__ import annotations

import hashlib
import heapq
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bert_ray.training.job import TrainJob

# Batch-size warm-up begins with a batch's eighth (as GPT-3 and MosaicBERT have it, a small part), or the longest row.
SMALLEST_BATCH = 8


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `rows` rows in an epoch: a permutation, int64 (rows,)."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def shares(rows: np.ndarray, tokens: np.ndarray, parts: int) -> list[np.ndarray]:
    """Share the rows of a step out in `parts` parts of about equally many tokens.

    Longest first, each to the part with the fewest tokens so far (Graham's LPT rule: at most 4/3 of the best
    possible largest part). Rows of a part come out longest first, so that rows of equal length, which attention
    computes together, stand side by side.

    Args:
        rows: int64 (B,), row numbers.
        tokens: int64 (B,), of each of them.
        parts: micro-batches of all workers.

    Returns:
        `parts` int64 arrays; some are empty where B < parts.
    """
    order = np.argsort(-tokens, kind="stable")
    ordered = rows[order]
    if parts == 1:
        return [ordered]
    chosen: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for row, length in zip(ordered.tolist(), tokens[order].tolist(), strict=True):
        load, part = loads[0]
        chosen[part].append(row)
        heapq.heapreplace(loads, (load + length, part))
    return [np.array(part, np.int64) for part in chosen]


def micro_batches_of_step(job: TrainJob, world: int) -> tuple[int, int]:
    """In how many micro-batches a step is computed: over all workers, and on each of them.

    With `micro_batches` their number, and so the noise of each, does not depend on the number of workers.
    """
    if job.micro_batches is None:
        return world * job.gradient_accumulation, job.gradient_accumulation
    return job.micro_batches, -(-job.micro_batches // world)


def mean_batch(warmup: float, first: float = 1 / SMALLEST_BATCH) -> float:
    """The mean of a run's steps' tokens as a share of `batch_tokens`.

    They rise on a line in the first `warmup` of the run, from the share `first` of it.
    """
    return 1 - warmup * (1 - first) / 2


def smallest_step(batch_tokens: int, longest: int, share: float) -> float:
    """Tokens of the first step of a batch-size warm-up.

    In as many as the longest row has a row begins, also of the share of a step that is not replayed.
    """
    return min(batch_tokens, max(batch_tokens / SMALLEST_BATCH, (longest + 2) / share))


def noise_seed(seed: int, step: int, micro_batch: int) -> int:
    """The seed of dropout for one micro-batch of one step, below 2^63: noise is a function of the position."""
    name = f"{seed}/{step}/{micro_batch}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def held_out(texts: list[str], fraction: float) -> np.ndarray:
    """Which texts belong to validation, bool (len(texts),): those whose hash falls into the first `fraction`.

    A function of the text alone: equal texts fall on the same side, and rows added later do not move the others.
    """
    limit = int(fraction * 2**64)
    hashes = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(value, "big") < limit for value in hashes), bool, len(texts))
