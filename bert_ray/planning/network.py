"""What the network costs a step: volumes of ZeRO's stages, time of a ring, and how much hides behind computing.

A ring all-reduce of S bytes among n workers sends and receives 2 (n - 1) / n S at each of them, half of it to reduce
and scatter, half to gather, in 2 (n - 1) rounds (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for
clusters of workstations, J. Parallel Distrib. Comput. 69, 2009, section 3). In a cluster of machines of g GPUs the ring
is made in three: reduced and scattered inside each machine, all-reduced between machines, where each GPU has 1 / g of
the data and of the machine's network, gathered inside again.

Volumes (Rajbhandari et al., arXiv 1910.02054, section 7), in units of (n - 1) / n S, S the bytes of all gradients:

    stage  a step of one pass   of p passes
    0      2                    2
    1      2                    2
    2      2                    p + 1          DeepSpeed reduces what each pass gives (runtime/engine.py)
    3      3                    3 p            weights gathered forward and backward, gradients scattered

S is 4 bytes a parameter: `training/deepspeed.py` communicates in fp32, whatever precision products have. Stages 0 and
1 reduce when the backward pass has ended; from stage 2 on gradients are reduced bucket by bucket while the pass goes
on, as in Li et al., PyTorch Distributed, arXiv 2006.15704, section 3.2.3. Stage 3's gathers are waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bert_ray.planning.workload import Workload

# Elements of a bucket, as `training/deepspeed.py` sets it.
_BUCKET_ELEMENTS = 64 * 2**20
# Shares of a pass: one forward, two backward (`model/flops.py`).
_BACKWARD = 2 / 3


@dataclass(kw_only=True, frozen=True, slots=True)
class Fabric:
    """How GPUs are connected.

    Attributes:
        node_gpus: g, GPUs of one machine.
        inside: bytes a second that a GPU sends to the others of its machine.
        between: bytes a second that a machine sends to others, all its network cards together.
        inside_sec: latency of a round inside a machine.
        between_sec: latency of a round between machines.
        line_share: what of a link's rate a collective reaches.
    """

    node_gpus: int
    inside: float
    between: float
    inside_sec: float = 5e-6
    between_sec: float = 2e-5
    line_share: float = 0.8


def half_ring_sec(size: float, workers: int, fabric: Fabric) -> float:
    """Seconds of a reduce-scatter, or of an all-gather, of `size` bytes: half an all-reduce.

    Machines are full but for the last one; a cluster that is no multiple of `node_gpus` counts as if all were alike.
    """
    if workers <= 1:
        return 0.0
    inside = min(workers, fabric.node_gpus)
    machines = math.ceil(workers / fabric.node_gpus)
    seconds = 0.0
    if inside > 1:
        seconds += (inside - 1) / inside * size / (fabric.inside * fabric.line_share)
        seconds += (inside - 1) * fabric.inside_sec
    if machines > 1:
        seconds += (machines - 1) / machines * size / (fabric.between * fabric.line_share)
        # A ring would have m - 1 rounds; NCCL takes a tree where that is faster: log2 m up, and as many down.
        seconds += math.ceil(math.log2(machines)) * fabric.between_sec
    return seconds


def all_reduce_sec(size: float, workers: int, fabric: Fabric) -> float:
    """Seconds of an all-reduce of `size` bytes."""
    return 2.0 * half_ring_sec(size, workers, fabric)


def overlapped_sec(ready: Sequence[float], each: Sequence[float]) -> float:
    """When the last of a row of messages has arrived, in seconds.

    Simulates a queue: message i is ready at `ready[i]`, takes `each[i]`, and waits for those before it.
    """
    now = 0.0
    for start, seconds in zip(ready, each, strict=True):
        now = max(now, start) + seconds
    return now


def exposed_sec(work: Workload, workers: int, passes: int, pass_sec: float, fabric: Fabric) -> float:
    """Seconds of a step in which a worker waits for the network.

    Args:
        work: what is trained.
        workers: n.
        passes: of one worker in a step.
        pass_sec: seconds of one pass, forward and backward.
        fabric: the network.
    """
    if workers <= 1:
        return 0.0
    size = float(work.gradient_bytes * work.parameters)
    if work.zero_stage < 2:
        return all_reduce_sec(size, workers, fabric)
    buckets = max(1, math.ceil(work.parameters / _BUCKET_ELEMENTS))
    backward = pass_sec * _BACKWARD
    # Gradients come evenly over the backward pass; a bucket leaves when it is full.
    ready = [backward * (number + 1) / buckets for number in range(buckets)]
    each = [half_ring_sec(size / buckets, workers, fabric)] * buckets
    reduced = passes * (overlapped_sec(ready, each) - backward)
    gathered = half_ring_sec(size, workers, fabric)
    return reduced + gathered * (1 if work.zero_stage == 2 else 2 * passes)
