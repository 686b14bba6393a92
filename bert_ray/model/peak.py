"""How fast a device multiplies matrices: what a share of the peak is a share of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# Square matrices: large enough for the best rate, on a CPU small enough for a cloud core's cache.
_CPU_SIZE, _GPU_SIZE = 1024, 8192
# Products at least, and seconds: the first ones are slow, and in bf16 six are over before a busy core turns to them.
_PRODUCTS, _SECONDS = 6, 0.1


def matmul_rate(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The matrix-multiply rate right now, FLOP/s: the best of some products of 2 n³ operations, by `clock`."""
    device = torch.device(device)
    size = _CPU_SIZE if device.type == "cpu" else _GPU_SIZE
    # A generator of its own: measuring must not change what a training draws.
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=draw, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    times: list[float] = []
    while len(times) < _PRODUCTS or sum(times) < _SECONDS:
        _wait(device)
        start = clock()
        torch.mm(a, b, out=out)
        _wait(device)
        times.append(clock() - start)
    return 2 * size**3 / min(times)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device is a GPU that multiplies bf16 itself: older ones have it emulated, slower than fp32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
