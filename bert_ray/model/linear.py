"""Linear layers for inference on a CPU, their weights packed once for the library that multiplies fastest there.

Shapes: T rows of the input, K its width, N the output's width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn import functional as F

# Rows of a tile on a CPU. Measured beside 256 and 1,024 in benchmarks/LOG.md.
TILE_TOKENS = 512
# In half precision oneDNN compiles a kernel for every number of rows that it has not seen (some 3 ms each, as much as
# the product itself): rows are filled up to a multiple of this, so that it sees few.
HALF_ROWS = 64
# Products by which two libraries are compared when a model loads.
_TRIES = 5


class Linear:
    """y = x Wᵀ + b, x (T, K), with W (N, K) packed for the library that is fastest at it.

    Packing and the packed products are private operators of torch (they serve its own compiler), so their absence is no
    error.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight.detach().contiguous()
        self.bias = bias
        if weight.dtype == torch.float32:
            self.library = _fastest(*self.weight.shape)
        else:  # MKL has no packed product in half precision.
            self.library = "onednn" if multiplies(weight.dtype) else "torch"
        self._packed = _PACK[self.library](self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.library == "onednn":
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        if self.library == "mkl" and x.shape[0] == TILE_TOKENS:
            return torch.ops.mkl._mkl_linear(x, self._packed, self.weight, self.bias, TILE_TOKENS)
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU(x Wᵀ + b), the exact form."""
        if self.library == "onednn":
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "gelu", [], "none")
        return torch.ops.aten.gelu_(self(x))

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Product and sum, x Wᵀ + b + other (T, N); by oneDNN in one pass, rounded once."""
        if self.library == "onednn":
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self.bias, "add")
        return self(x) + other


_PACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "onednn": lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, TILE_TOKENS),
    "mkl": lambda weight: torch.ops.mkl._mkl_reorder_linear_weight(weight, TILE_TOKENS),
    "torch": lambda weight: weight,
}


def fill_rows(x: torch.Tensor) -> torch.Tensor:
    """(T, D) with rows of zeros below, so that their number is a multiple of HALF_ROWS."""
    return F.pad(x, (0, 0, 0, -len(x) % HALF_ROWS))


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in a type by instructions of its own, as torch's oneDNN says.

    bf16 with AVX-512-BF16 or AMX, fp16 with AVX-512-FP16 or AMX-FP16; fp32 always. AMX makes about eight times fp32's
    rate (benchmarks/LOG.md).
    """
    if dtype == torch.float32:
        return True
    probe = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    return probe is not None and _has_onednn() and bool(getattr(torch.ops.mkldnn, probe)())


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@lru_cache
def _fastest(rows: int, columns: int) -> str:
    """Which library multiplies a tile by a matrix of this shape fastest here, tried out: some ten milliseconds.

    MKL is the faster one on Intel's processors, oneDNN on AMD's (by up to a fifth, benchmarks/LOG.md).
    """
    known = ["torch"]
    if torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear"):
        known.append("mkl")
    if _has_onednn():
        known.append("onednn")
    if len(known) == 1:
        return known[0]
    x, weight = torch.ones(TILE_TOKENS, columns), torch.ones(rows, columns)
    packed = {name: _PACK[name](weight) for name in known[1:]}
    products = {
        "mkl": lambda: torch.ops.mkl._mkl_linear(x, packed["mkl"], weight, None, TILE_TOKENS),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, packed["onednn"], None, "none", [], ""),
    }
    seconds = {name: float("inf") for name in packed}
    for _ in range(_TRIES):  # In turn, and the best of each: a neighbour on the machine disturbs both alike.
        for name in packed:
            start = time.perf_counter()
            products[name]()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)
