"""What is to be trained, as the plan sees it: dimensions, tokens and settings. Imports nothing heavy.

Shapes: T tokens, L length of a row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bert_ray.model.flops import Dims, training_flops

Offload = Literal["none", "optimizer", "parameters"]


class Pass(NamedTuple):
    """One forward and backward pass of one worker.

    Attributes:
        times: passes of a step, on the worker that has most to do.
        tokens: T of each.
        squares: Σ L² over its rows.
        asked: tokens that go through the vocabulary's head.
        read: tokens whose last hidden states are read.
    """

    times: int
    tokens: float
    squares: float
    asked: float
    read: float


@dataclass(kw_only=True, frozen=True, slots=True)
class Workload:
    """A training run.

    Attributes:
        dims: of the model.
        parameters: trainable numbers.
        step_tokens: of one optimiser step, over all workers.
        steps: optimiser steps.
        tokens: of the whole run; less than `steps * step_tokens` where the batch grows at first.
        row_tokens: mean L.
        row_squares: mean L²; `row_tokens²` where all rows have one length.
        asked_share: share of the tokens that goes through the vocabulary's head; 0: the task has none.
        read_share: share whose last hidden states are read, for which alone the last layer is computed whole.
        accumulation: passes into which each worker divides its part of a step.
        micro_batches: passes of all workers together, instead.
        precision: of matrix products.
        zero_stage: see TrainJob.
        offload: see TrainJob.
        recompute: activation checkpointing.
        dropout: rate for hidden states.
        attention_dropout: rate for attention weights; above 0 attention keeps its scores.
        optimizer: see TrainJob; both keep two fp32 moments.
        gradient_bytes: of a gradient's number as it is communicated: 4 here, 2 in published runs.
        device: what it runs on.
    """

    dims: Dims
    parameters: int
    step_tokens: float
    steps: int
    tokens: float
    row_tokens: float
    row_squares: float
    asked_share: float = 0.0
    read_share: float = 1.0
    accumulation: int = 1
    micro_batches: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero_stage: int = 0
    offload: Offload = "none"
    recompute: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    optimizer: Literal["adamw", "lamb"] = "adamw"
    gradient_bytes: int = 4
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def fused_attention(self) -> bool:
        """Whether attention runs as a kernel that keeps no scores (`attention.packed_attention` decides so)."""
        return self.attention_dropout == 0.0 and self.half != (self.device == "cpu")

    @property
    def half(self) -> bool:
        """Whether products are in half precision, and with them the residual stream (`residual.residual_norm`)."""
        return self.precision != "fp32"

    @property
    def fused_norms(self) -> bool:
        """Whether dropout, residual sum and norm are one kernel (`residual.residual_norm` decides so)."""
        return self.device == "cuda" and self.half

    def model_flops(self, tokens: float) -> float:
        """`flops.training_flops` of so many of its tokens."""
        squares = tokens / self.row_tokens * self.row_squares
        return training_flops(self.dims, tokens, squares, tokens * self.asked_share, read=tokens * self.read_share)

    def rows(self) -> float:
        """Rows of one step."""
        return self.step_tokens / self.row_tokens

    def passes(self, workers: int) -> Pass:
        """What the busiest of so many workers computes in a step.

        Workers share whole rows out: with more workers than rows some have nothing to do.
        """
        if self.micro_batches is None:
            count, parts = self.accumulation, workers * self.accumulation
        else:
            count, parts = math.ceil(self.micro_batches / workers), self.micro_batches
        tokens = max(self.row_tokens, self.step_tokens / parts)
        # A step of fewer rows than parts is shared out among fewer passes, too.
        count = min(count, math.ceil(self.step_tokens / tokens))
        return Pass(
            times=count,
            tokens=tokens,
            squares=tokens / self.row_tokens * self.row_squares,
            asked=tokens * self.asked_share,
            read=tokens * self.read_share,
        )
