"""Runs that others have published, and what the plan says of them: how far off it is, with inputs and sources.

    for item in comparisons(): print(item.run, item.predicted, item.published, item.deviation)

The published figures are their authors'; none of these runs was made here. `docs/plan.md` shows the table, and a test
holds the page to what is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bert_ray.model.flops import Dims, parameters, training_flops
from bert_ray.planning.hardware import GPUS
from bert_ray.planning.network import Fabric
from bert_ray.planning.speed import Rate, Step, predict
from bert_ray.planning.workload import Workload

BERT_BASE = Dims(layers=12, hidden=768, heads=12, feed_forward=3072, vocabulary=30_522)
BERT_LARGE = Dims(layers=24, hidden=1024, heads=16, feed_forward=4096, vocabulary=30_528)

# DeepSpeed, deepspeed.ai/2020/05/27/fastest-bert-training.html: samples a second of one V100 at 128 and 512 tokens,
# and the TFLOP/s that its authors count for them.
DEEPSPEED_RATES = {128: (272.0, 64.0), 512: (52.0, 53.0)}
# The same page's table 1: GPUs -> minutes; and deepspeed.ai/tutorials/bert-pretraining: samples of the two phases (of
# the second 18 to 22 million), steps of 64 K and 32 K rows, in passes of 64 and 8 rows.
DEEPSPEED_MINUTES = {16: 33 * 60 + 13.0, 64: 8 * 60 + 41.0, 256: 144.0, 1024: 44.0}
_DEEPSPEED_PHASES = ((128, 403e6, 65_536, 64), (512, 20e6, 32_768, 8))
# NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT/README.md of March 2020, "Pre-training on multiple NVIDIA
# DGX-2H": tokens of a row -> (rows of a step, rows of a pass, rows a second by machines of 16 V100).
NVIDIA_ROWS_PER_SECOND = {
    128: (65_536, 64, {1: 3379.2, 4: 12_709.88, 16: 51_937.28, 64: 188_088.32}),
    512: (32_768, 8, {1: 625.66, 4: 2386.38, 16: 9932.8, 64: 37_478.4}),
}
# MLPerf Training 3.0, BERT on 8 H100 in one machine (developer.nvidia.com/deep-learning-performance-training-inference/
# training), minutes. Samples to the target: the mean of the reference runs at batch size 448 (mlcommons/logging,
# rcp_checker/training_3.1.0/rcps_bert.json). Half of their 512 tokens are padding, which submissions leave out (Krell
# et al., arXiv 2107.02027, abstract). 48 rows on each GPU, as NVIDIA's configuration for 8 H100 is named.
MLPERF_MINUTES, _MLPERF_SAMPLES, _MLPERF_TOKENS, _MLPERF_STEP_ROWS = 5.349, 2_410_630.0, 256.0, 384
# MosaicML's baseline, a Hugging Face BERT-Base (Portes et al., arXiv 2312.17482, section 3; mosaicml/examples,
# benchmarks/bert/README.md): 70,000 steps of 4,096 rows of 128 tokens on 8 A100 of 80 GB, hours. Its vocabulary head
# runs over all tokens.
MOSAIC_HOURS, _MOSAIC_STEPS, _MOSAIC_ROWS, _MOSAIC_TOKENS = 11.5, 70_000, 4096, 128
# The plan's own default.
_MFU = 0.4
_MASKED = 0.15
# A DGX-2 has 16 GPUs and eight cards of 100 Gbit/s for its network (NVIDIA DGX-2 datasheet).
_DGX2 = Fabric(node_gpus=16, inside=GPUS["v100"].link, between=8 * 100e9 / 8)


@dataclass(kw_only=True, frozen=True, slots=True)
class Comparison:
    """One published figure beside the plan's.

    Attributes:
        run: what was trained on what.
        unit: of both figures.
        predicted: by the plan.
        published: by the run's authors.
    """

    run: str
    unit: str
    predicted: float
    published: float

    @property
    def deviation(self) -> float:
        """Of the prediction, as a share of the published figure."""
        return self.predicted / self.published - 1


def comparisons() -> Iterator[Comparison]:
    """All of them."""
    for tokens, (samples, teraflops) in DEEPSPEED_RATES.items():
        yield Comparison(
            run=f"DeepSpeed, BERT-large at {tokens} tokens on one V100: operations",
            unit="TFLOP/s",
            predicted=samples * _row_flops(BERT_LARGE, tokens) / 1e12,
            published=teraflops,
        )
    for gpus, minutes in DEEPSPEED_MINUTES.items():
        yield Comparison(
            run=f"DeepSpeed, BERT-large on {gpus:,} V100",
            unit="min",
            predicted=deepspeed_minutes(gpus),
            published=minutes,
        )
    for tokens, (_, _, measured) in NVIDIA_ROWS_PER_SECOND.items():
        for machines, rows in measured.items():
            if machines > 1:
                yield Comparison(
                    run=f"NVIDIA, BERT-large at {tokens} tokens: {machines * 16:,} V100 over 16",
                    unit="times",
                    predicted=nvidia_speed_up(tokens, machines),
                    published=rows / measured[1],
                )
    yield Comparison(
        run="MLPerf 3.0, BERT-large on 8 H100", unit="min", predicted=mlperf_minutes(), published=MLPERF_MINUTES
    )
    yield Comparison(
        run="MosaicML's Hugging Face BERT-base on 8 A100",
        unit="h",
        predicted=mosaic_hours(),
        published=MOSAIC_HOURS,
    )


def deepspeed_minutes(gpus: int) -> float:
    """Both phases on so many V100, from the rate of one."""
    minutes = 0.0
    for tokens, samples, step_rows, pass_rows in _DEEPSPEED_PHASES:
        rate = _v100(DEEPSPEED_RATES[tokens][0], tokens)
        step = _large_step(tokens, step_rows, pass_rows, gpus, rate)
        minutes += samples / step_rows * step.seconds / 60
    return minutes


def nvidia_speed_up(tokens: int, machines: int) -> float:
    """Rows a second of so many DGX-2H over those of one."""
    step_rows, pass_rows, measured = NVIDIA_ROWS_PER_SECOND[tokens]
    rate = _v100(measured[1] / 16, tokens)
    one, many = (_large_step(tokens, step_rows, pass_rows, 16 * count, rate) for count in (1, machines))
    return one.seconds / many.seconds


def mlperf_minutes() -> float:
    """Training alone; the published time holds evaluations too."""
    work = _work(BERT_LARGE, _MLPERF_TOKENS, _MLPERF_STEP_ROWS, optimizer="lamb")
    step = predict(work, 8, _rate("h100"), _one_machine("h100"))
    return _MLPERF_SAMPLES / _MLPERF_STEP_ROWS * step.seconds / 60


def mosaic_hours() -> float:
    """Padding is computed, as it was: all rows count with 128 tokens."""
    work = _work(BERT_BASE, _MOSAIC_TOKENS, _MOSAIC_ROWS, asked_share=1.0)
    step = predict(work, 8, _rate("a100"), _one_machine("a100"))
    return _MOSAIC_STEPS * step.seconds / 3600


def _row_flops(dims: Dims, tokens: float) -> float:
    return training_flops(dims, tokens, tokens**2, _MASKED * tokens)


def _v100(rows_per_second: float, tokens: int) -> Rate:
    """A V100 that trains BERT-large at a known rate."""
    gpu = GPUS["v100"]
    mfu = rows_per_second * _row_flops(BERT_LARGE, tokens) / gpu.half
    return Rate(peak=gpu.half, mfu=mfu, bandwidth=gpu.bandwidth)


def _large_step(tokens: int, step_rows: int, pass_rows: int, gpus: int, rate: Rate) -> Step:
    work = _work(BERT_LARGE, tokens, step_rows, optimizer="lamb", accumulation=step_rows // (pass_rows * gpus))
    return predict(work, gpus, rate, _DGX2)


def _work(
    dims: Dims,
    tokens: float,
    step_rows: int,
    *,
    optimizer: str = "adamw",
    accumulation: int = 1,
    asked_share: float = _MASKED,
) -> Workload:
    return Workload(
        dims=dims,
        parameters=parameters(dims, vocabulary_head=True, pair_head=True),
        step_tokens=step_rows * tokens,
        steps=1,
        tokens=step_rows * tokens,
        row_tokens=tokens,
        row_squares=tokens**2,
        asked_share=asked_share,
        accumulation=accumulation,
        precision="fp16",
        optimizer=optimizer,  # type: ignore[arg-type]
        gradient_bytes=2,  # All of these runs communicate in half precision.
    )


def _rate(name: str) -> Rate:
    gpu = GPUS[name]
    return Rate(peak=gpu.half, mfu=_MFU, bandwidth=gpu.bandwidth)


def _one_machine(name: str) -> Fabric:
    return Fabric(node_gpus=8, inside=GPUS[name].link, between=1.0)
