"""How fast a device multiplies matrices: what a share of the peak is a share of."""

from __future__ import annotations

import time

import torch

# Square matrices: large enough for the best rate, on a CPU small enough for a cloud core's cache.
_CPU_SIZE, _GPU_SIZE = 1024, 8192
_PRODUCTS = 6


def matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """The matrix-multiply rate right now, FLOP/s: the best of a few products, 2 n³ operations each."""
    device = torch.device(device)
    size = _CPU_SIZE if device.type == "cpu" else _GPU_SIZE
    # A generator of its own: measuring must not change what a training draws.
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=draw, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(_PRODUCTS):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
