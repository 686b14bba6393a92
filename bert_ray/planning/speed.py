"""Time of an optimiser step on n workers, and how it grows and shrinks with n.

    step = passes × computing + optimiser + waiting for the network

Computing is matrix products at a share of the device's peak (the plan's `mfu`, of a pass that fills the device), but
never less than what launching its kernels takes. The optimiser is bound by memory's bandwidth: it reads and writes
each number a few times. Waiting is `network.exposed_sec`. Loading data, evaluation and checkpoints are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bert_ray.model.flops import computed_flops
from bert_ray.planning.network import Fabric, exposed_sec
from bert_ray.planning.workload import Workload

# Kernels of one layer, forward and backward, counted in `model/encoder.py`: about 20 and twice as many; and what one
# takes to launch from Python. An assumption; it matters where a pass has a few hundred tokens.
_LAYER_KERNELS, _LAUNCH_SEC = 60, 5e-6
# Bytes that move for each parameter. AdamW in one kernel reads weight, gradient and two moments and writes three: 28;
# clipping reads the gradient for its norm and scales it: 12. LAMB goes over its update and the weight three times
# more, for its decay, its norms and its step: 28.
_OPTIMIZER_BYTES = {"adamw": 40, "lamb": 68}
# What copies reach of memory's bandwidth.
_BANDWIDTH_SHARE = 0.8
# Offload: PCIe 4.0 x16 in one direction (32 GB/s, of which copies reach about three quarters), and one worker's part
# of a server's memory bandwidth. Assumptions.
_PCIE, _HOST_BANDWIDTH = 24e9, 25e9
_FP32 = 4


@dataclass(kw_only=True, frozen=True, slots=True)
class Rate:
    """How fast one device is.

    Attributes:
        peak: matrix-multiply rate, FLOP/s.
        mfu: share of it that model FLOPs reach in a pass, without network and optimiser.
        bandwidth: of its memory, bytes a second.
        launches: whether kernels are launched to a device that waits for them.
    """

    peak: float
    mfu: float
    bandwidth: float
    launches: bool = True


@dataclass(kw_only=True, frozen=True, slots=True)
class Step:
    """A predicted step.

    Attributes:
        workers: n.
        tokens: of the step, over all workers.
        computing, optimizer, network: seconds of the busiest worker; the network's where it waits.
        mfu: model FLOPs utilisation of the whole step, network and optimiser included.
    """

    workers: int
    tokens: float
    computing: float
    optimizer: float
    network: float
    mfu: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.computing + self.optimizer + self.network

    @property
    def tokens_per_second(self) -> float:
        """Over all workers."""
        return self.tokens / self.seconds

    @property
    def network_share(self) -> float:
        """Share of the step in which workers wait for the network."""
        return self.network / self.seconds


def predict(work: Workload, workers: int, rate: Rate, fabric: Fabric) -> Step:
    """One step on so many workers."""
    passed = work.passes(workers)
    flops = computed_flops(
        work.dims, passed.tokens, passed.squares, passed.asked, recompute=work.recompute, read=passed.read
    )
    each = flops / (rate.peak * rate.mfu)
    if rate.launches:
        each = max(each, work.dims.layers * _LAYER_KERNELS * _LAUNCH_SEC)
    computing = passed.times * each
    optimizer = _optimizer_sec(work, workers, rate)
    if work.offload == "parameters":  # The share of the weights, up, for the forward and for the backward pass.
        computing += passed.times * 2 * _FP32 * work.parameters / workers / _PCIE
    network = exposed_sec(work, workers, passed.times, each, fabric)
    seconds = computing + optimizer + network
    model = work.model_flops(work.step_tokens)
    return Step(
        workers=workers,
        tokens=work.step_tokens,
        computing=computing,
        optimizer=optimizer,
        network=network,
        mfu=model / (workers * rate.peak * seconds),
    )


def _optimizer_sec(work: Workload, workers: int, rate: Rate) -> float:
    """Of the share that one worker updates."""
    mine = work.parameters / (workers if work.zero_stage else 1)
    moved = _OPTIMIZER_BYTES[work.optimizer] * mine
    if work.offload == "none":
        return moved / (rate.bandwidth * _BANDWIDTH_SHARE)
    # Gradients down, weights up.
    return moved / _HOST_BANDWIDTH + 2 * _FP32 * mine / _PCIE


def speed_up(
    work: Workload, counts: Sequence[int], rate: Rate, fabric: Fabric, *, grow_from: int | None = None
) -> list[float]:
    """Tokens a second of n workers over those of one, for each n of `counts`.

    Args:
        work: what is trained.
        counts: numbers of workers.
        rate: of each.
        fabric: between them.
        grow_from: the step grows with the workers, and has the job's size at so many; None: it stays as it is.
    """
    found, alone = [], None
    for workers in (1, *counts):
        step = predict(grown(work, workers / grow_from) if grow_from else work, workers, rate, fabric)
        alone = alone or step.tokens_per_second
        found.append(step.tokens_per_second / alone)
    return found[1:]


def grown(work: Workload, times: float) -> Workload:
    """The same with a step of so many times the tokens, and of the micro-batches."""
    micro = None if work.micro_batches is None else max(1, round(work.micro_batches * times))
    return replace(work, step_tokens=max(work.row_tokens, work.step_tokens * times), micro_batches=micro)


def limit(work: Workload, rate: Rate, fabric: Fabric, share: float, most: int, *, grow_from: int | None = None) -> int:
    """The fewest workers that wait for the network for more than `share` of a step; 0: none, up to `most`."""
    for workers in range(2, most + 1):
        step = predict(grown(work, workers / grow_from) if grow_from else work, workers, rate, fabric)
        if step.network_share > share:
            return workers
    return 0
