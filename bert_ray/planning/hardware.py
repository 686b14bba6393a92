"""GPUs: what their makers say of them. Peaks are dense matrix products, without sparsity; memory as it is sold.

Nothing here was measured, and the figures are as commonly quoted: those of A100, H100, H200 and B200 were compared with
pages of third parties, the datasheets that `source` names were not opened for it. Where it matters, give the plan a
measured rate (`--peak-tflops`). What a training reaches of a peak is the plan's `mfu`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as `--gpu` spells it.
        half: matrix-multiply peak in bf16 (fp16 where there is no bf16), FLOP/s.
        fp32: the same in fp32 without TF32, as torch computes it unless told otherwise, FLOP/s.
        memory: bytes.
        bandwidth: of memory, bytes a second.
        link: to the other GPUs of its machine, bytes a second in one direction: NVLink, or PCIe where it has none.
        bf16: whether it multiplies in bf16.
        source: where the figures stand.
    """

    name: str
    half: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    bf16: bool = True
    source: str

    def peak(self, precision: str) -> float:
        """Matrix-multiply peak in `fp32`, `bf16` or `fp16`, FLOP/s."""
        return self.fp32 if precision == "fp32" else self.half


# A vendor's GB and GB/s are powers of ten; H100 and later have the memory that nvidia-smi shows in about these numbers.
_GB, _TERA = 1e9, 1e12


def _gpu(
    name: str, half: float, fp32: float, memory: float, bandwidth: float, link: float, source: str, bf16: bool = True
) -> Gpu:
    """A GPU from TFLOP/s, GB and GB/s."""
    return Gpu(
        name=name,
        half=half * _TERA,
        fp32=fp32 * _TERA,
        memory=memory * _GB,
        bandwidth=bandwidth * _GB,
        link=link * _GB,
        bf16=bf16,
        source=source,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4", 65, 8.1, 16, 320, 16, "NVIDIA T4 datasheet", bf16=False),
        _gpu("v100", 125, 15.7, 32, 900, 150, "NVIDIA V100 datasheet, SXM2 32 GB", bf16=False),
        _gpu("a10", 125, 31.2, 24, 600, 32, "NVIDIA A10 datasheet"),
        _gpu("a100-40", 312, 19.5, 40, 1555, 300, "NVIDIA A100 datasheet, SXM4 40 GB"),
        _gpu("a100", 312, 19.5, 80, 2039, 300, "NVIDIA A100 datasheet, SXM4 80 GB"),
        _gpu("l4", 121, 30.3, 24, 300, 32, "NVIDIA L4 datasheet"),
        _gpu("l40s", 362, 91.6, 48, 864, 32, "NVIDIA L40S datasheet"),
        _gpu("h100", 989.4, 66.9, 80, 3350, 450, "NVIDIA H100 datasheet, SXM5 80 GB"),
        _gpu("h200", 989.4, 66.9, 141, 4800, 450, "NVIDIA H200 datasheet, SXM"),
        _gpu("b200", 2250, 75, 180, 8000, 900, "NVIDIA DGX B200 datasheet, an eighth of the system"),
    )
}
