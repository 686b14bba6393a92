"""Memory of one worker, in bytes, as this implementation holds it: weights, gradients, optimiser, activations.

What is shared out among n workers by ZeRO's stages, of a model of N parameters (Rajbhandari et al., arXiv 1910.02054,
section 5; there with weights in half precision, here all in fp32 under autocast):

    stage  weights        gradients  optimiser's state
    0      4 N            4 N        8 N
    1      4 N            4 N        8 N / n, and 4 N / n for the weights it works on
    2      4 N            4 N / n    the same
    3      4 N / n        4 N / n    the same

At stage 3 all weights are gathered while the model computes (`training/deepspeed.py`), 4 N more then: here it spares
gradients and state, not weights. DeepSpeed's buffers come on top. benchmarks/zero.py measures each stage.

Activations are counted layer by layer from what autograd keeps of `model/encoder.py` and `model/attention.py`, as
Korthikanti et al. (arXiv 2205.05198, section 4.1) do for Megatron's layers; theirs is s b h (34 + 5 a s / h), with
masks of one byte and inputs of layer norms in half precision. With activation checkpointing a layer keeps its input
alone (section 5 there; Chen et al., arXiv 1604.06174).

Shapes: T tokens of one pass, L length of a row, D hidden size, F width of the feed-forward layer, H heads,
V vocabulary, M tokens asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from bert_ray.model.attention import GROUP_SCORES
from bert_ray.planning.workload import Pass, Workload

_FP32, _HALF, _INT64 = 4, 2, 8
# Adam's and LAMB's moments: two fp32 numbers for each parameter.
_MOMENTS = 2
# Elements of a ZeRO communication bucket at most, as `training/deepspeed.py` sets it.
_BUCKET_ELEMENTS = 64 * 2**20
# Elements that DeepSpeed 0.19 copies into one flat tensor for stage 0's all-reduce (runtime/engine.py,
# MEMORY_OPT_ALLREDUCE_SIZE).
_FLAT_ELEMENTS = 500_000_000


@dataclass(kw_only=True, frozen=True, slots=True)
class Memory:
    """Bytes of one worker.

    Attributes:
        weights: that it holds, gathered ones included.
        gradients: all that exist at once.
        optimizer: moments, and the copy of the weights that ZeRO's optimiser works on.
        copies: of weights for the time of a step: cast by autocast, and queries, keys and values side by side.
        buffers: of communication.
        activations: kept for the backward pass, by the encoder and by the head.
        working: what the head's, or the last layer's, backward pass needs besides.
        peak: the most at any moment of a step. Less than the sum: activations have gone when the last gradients come.
        host: in the machine's memory, by offload.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    buffers: float
    activations: float
    working: float
    peak: float
    host: float = 0.0


def memory(work: Workload, workers: int) -> Memory:
    """What one of so many workers needs, at the moments of a step when it needs most."""
    passed = work.passes(workers)
    numbers = _FP32 * work.parameters
    share = numbers / workers if work.zero_stage else numbers
    held, copied = _weights(work, numbers, share)
    state, host = copied + _MOMENTS * share, 0.0
    if work.offload != "none":  # What is updated lies where its gradients are.
        host, state = state + share, 0.0
    if work.offload == "parameters":
        host += share
    partial = share if work.zero_stage >= 2 and work.offload == "none" else 0.0
    bucket = _FP32 * min(_BUCKET_ELEMENTS, work.parameters)
    buffers = _buffers(work, workers, bucket)
    copies = _copies(work)
    kept, working = activations(work, passed), _working(work, passed)
    # On a CPU a stage's gradients wait whole for their bucket; on a GPU they are copied into it as they come.
    waiting = bucket if work.device == "cpu" else 0.0
    whole = numbers if work.zero_stage < 2 else waiting
    table = float(_FP32 * work.dims.vocabulary * work.dims.hidden)
    # On a CPU, without other workers, the gradient of the word embeddings has a storage that stays (lookup.py); with a
    # vocabulary's head, which has the same weights, the sum of the two gradients is a third of them.
    resident = table if work.device == "cpu" and workers == 1 else 0.0
    summed = table + (resident or table) if work.asked_share else 0.0
    # At stage 3 the shares' place is there from the beginning; at stage 2 those of the last bucket come after it.
    earlier = partial * (1 - waiting / numbers) if work.zero_stage == 2 else partial
    # The three moments: the backward pass begins; it ends; the optimiser steps.
    begins = copies + kept + working + partial + (whole if passed.times > 1 else resident)
    if work.zero_stage >= 2 and work.device == "cuda":
        begins += buffers
    ends = whole + earlier + max(buffers, summed)
    gradients = whole + partial
    steps = (whole if work.zero_stage < 2 else partial) + (resident if work.asked_share else 0.0)
    steps += share if work.zero_stage in (1, 2) and work.offload == "none" else 0.0
    steps += numbers if work.optimizer == "lamb" else 0.0  # All steps at once, before any norm is taken.
    return Memory(
        weights=held,
        gradients=gradients,
        optimizer=state,
        copies=copies,
        buffers=buffers,
        activations=kept,
        working=working,
        peak=held + state + max(begins, ends, steps),
        host=host,
    )


def _weights(work: Workload, numbers: float, share: float) -> tuple[float, float]:
    """Bytes of weights while the model computes; and of the copy that ZeRO's optimiser has of its share."""
    if work.zero_stage == 0:
        return numbers, 0.0
    if work.zero_stage < 3:
        return numbers, share
    # DeepSpeed's optimiser works on a clone of the share (stage3.py, fp32_partitioned_groups_flat).
    return numbers + (0.0 if work.offload == "parameters" else share), share


def _buffers(work: Workload, workers: int, bucket: float) -> float:
    """What communication needs: DeepSpeed's flat copies of gradients."""
    if workers == 1 and work.zero_stage == 0:
        return 0.0
    if work.zero_stage == 0:
        return float(_FP32 * min(_FLAT_ELEMENTS, work.parameters))
    if work.zero_stage == 3 and work.device == "cpu":
        # Reduce-scatter of flat copies, which gloo copies once more, and the shares that come out.
        return bucket * (2.0 + 1.0 / workers)
    # Two buckets where communication overlaps with the backward pass (stage_1_and_2.py, setup_buckets).
    return 2.0 * bucket if work.device == "cuda" else bucket


def _copies(work: Workload) -> float:
    """Weights in another form, kept from the forward pass for the backward pass."""
    dims = work.dims
    together = 3 * dims.hidden**2  # Queries', keys' and values' matrices as one.
    if work.precision == "fp32":
        return float(_FP32 * together * (1 if work.recompute else dims.layers))
    cast = dims.layers * dims.layer_matrices + (dims.head_matrices if work.asked_share else 0)
    return float(_HALF * cast)


def activations(work: Workload, passed: Pass) -> float:
    """What autograd keeps of one pass over the whole model, bytes."""
    dims = work.dims
    ids = 3 * _INT64  # Tokens, positions, targets.
    embeddings = ids + _FP32 * dims.hidden + 2 * _FP32 + (_FP32 * dims.hidden if work.dropout else 0)
    if work.recompute:
        layers = dims.layers * _size(work) * dims.hidden * passed.tokens
    else:
        layers = (dims.layers - 1) * layer_activations(work, passed) + last_layer_activations(work, passed)
    return passed.tokens * (embeddings + _FP32 * dims.hidden) + layers + _head(work, passed)


def layer_activations(work: Workload, passed: Pass) -> float:
    """What autograd keeps of one layer, bytes; see `encoder._through`, line by line."""
    dims, size = work.dims, _size(work)
    # Input of the product of queries, keys and values; these; what attention gives, the input of the next product.
    each = size * (dims.hidden + 3 * dims.hidden + dims.hidden) + _behind_attention(work)
    if work.fused_attention:
        return passed.tokens * (each + _FP32 * dims.heads)  # The kernel keeps one number for each row of scores.
    scores = size * dims.heads * passed.squares * (2 if work.attention_dropout else 1)
    return passed.tokens * each + scores


def last_layer_activations(work: Workload, passed: Pass) -> float:
    """The same of the last layer, where only some tokens are read; see `encoder._through_read`."""
    if work.read_share == 1.0:
        return layer_activations(work, passed)
    dims, size = work.dims, _size(work)
    # Keys and values: their product's input, and both as attention takes them; where it took them from.
    keys = size * (dims.hidden + 2 * dims.hidden) + _INT64
    # The input of the queries' product; queries and what attention gives, as attention has them and as products do.
    queries = size * (dims.hidden + 3 * dims.hidden) + _INT64 * 2
    scores = size * dims.heads * passed.squares * work.read_share * (3 if work.attention_dropout else 1)
    if not work.attention_dropout:
        scores, queries = 0.0, queries + _FP32 * dims.heads
    return passed.tokens * keys + passed.read * (queries + _behind_attention(work)) + scores


def _behind_attention(work: Workload) -> float:
    """What autograd keeps of a token behind attention, bytes; see `encoder._behind_attention`."""
    width, wide, size = work.dims.hidden, work.dims.feed_forward, _size(work)
    # Layer norms keep mean, standard deviation and their input, the residual sum; where sum and norm are one kernel,
    # only what is added (the stream itself is an earlier product's input), with dropout's mask of a byte.
    norms = 2 * (size * width + 2 * _FP32)
    masks = 2 * (1 if work.fused_norms else size) * width if work.dropout else 0
    # Input of the wide product, of the activation, of the narrow product.
    feed_forward = size * (width + wide + wide)
    return norms + masks + feed_forward


def _head(work: Workload, passed: Pass) -> float:
    """What the vocabulary's head keeps: inputs of its transform, activation, layer norm and product; and the logits.

    These become their own gradient where they lie (`model/vocabulary_head.py`).
    """
    size = _size(work)
    return passed.asked * (work.dims.hidden * (3 * size + _FP32) + size * work.dims.vocabulary)


def _working(work: Workload, passed: Pass) -> float:
    """What the beginning of the backward pass needs while nearly all activations are still there, bytes.

    First comes the head's, then the last layer's: its feed-forward part, then its attention, when what the
    feed-forward part kept has gone. With activation checkpointing the layer's activations are made for it.
    """
    dims, size = work.dims, _size(work)
    width, wide = dims.hidden, dims.feed_forward
    # The gradient of its matrix; in half precision as the product gives it, and in the weights' own.
    table = dims.vocabulary * width if work.asked_share else 0
    head = float((_FP32 + (_HALF if work.half else 0)) * table)
    # Gradients of the activation's output and of the residual sum.
    last = passed.tokens * size * (wide + width)
    # Gradients of queries, keys and values, of attention's output and of the residual sums.
    attention = passed.tokens * size * 6 * width + _FP32 * dims.layer_matrices
    # Of the rows that are taken together (those of one length; on a CPU so many as GROUP_SCORES allows) the gradients
    # once more, without a fused kernel also copies of all, and the gradients of weights and of scores.
    squares = passed.squares if work.row_squares <= work.row_tokens**2 else work.row_squares
    if work.device == "cpu":
        squares = min(squares, max(float(GROUP_SCORES), work.row_squares))
    attention += size * squares / work.row_tokens * width * (3 if work.fused_attention else 7)
    if not work.fused_attention:
        attention += 2.0 * size * dims.heads * squares
    gone = size * (width + 2 * wide)
    gone += 2 * size * width
    if work.dropout:
        gone += (1 if work.fused_norms else 2 * size) * width
    last = max(last, attention - passed.tokens * gone)
    if work.recompute:  # Its input is there already.
        last += layer_activations(work, passed) - passed.tokens * size * width
    if work.read_share < 1.0:
        # Of the last layer itself gradients of keys and values, as attention takes them and as their product has them.
        own = passed.tokens * size * 4 * width
        own -= 0.0 if work.recompute else passed.read * _behind_attention(work)
        # It is small: more may be needed for the one before it, when what the last one kept has gone.
        last -= size * width * passed.tokens if work.recompute else last_layer_activations(work, passed)
        last = own if dims.layers == 1 else max(last, own)
    if work.asked_share:
        last += _FP32 * table  # That gradient has come by then.
    # What the head kept has gone by then, and its weights as autocast made them.
    return max(head, last - _head(work, passed) - (_HALF * dims.head_matrices if work.half else 0))


def _size(work: Workload) -> int:
    """Bytes of a number in matrix products and in the residual stream."""
    return _HALF if work.half else _FP32
