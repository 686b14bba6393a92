"""Parameters as real models have them, and operations as papers count them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PretrainedConfig,
    RobertaConfig,
    RobertaModel,
)

from bert_ray.model.flops import (
    Dims,
    computed_flops,
    dims_of,
    encoder_flops,
    head_flops,
    parameters,
    training_flops,
    utilisation,
)

BASE = Dims(layers=12, hidden=768, heads=12, feed_forward=3072, vocabulary=30_522)
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}


def count(model: type, config: PretrainedConfig) -> int:
    """Of a real model, without making its weights."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in model(config).parameters())


@pytest.mark.parametrize(
    ("model", "config", "kind"),
    [
        (BertModel, BertConfig(), {}),
        (BertModel, BertConfig(**TINY), {}),
        (BertForPreTraining, BertConfig(), {"vocabulary_head": True, "pair_head": True}),
        (BertForPreTraining, BertConfig(**TINY), {"vocabulary_head": True, "pair_head": True}),
        (BertForMaskedLM, BertConfig(**TINY), {"vocabulary_head": True, "pooler": False}),
        (RobertaModel, RobertaConfig(**TINY, max_position_embeddings=70, type_vocab_size=1), {}),
        (DistilBertModel, DistilBertConfig(), {"pooler": False}),
    ],
)
def test_parameters_are_those_of_the_model(model: type, config: PretrainedConfig, kind: dict[str, bool]) -> None:
    assert parameters(dims_of(config), **kind) == count(model, config)


def test_bert_base_has_the_known_number() -> None:
    assert dims_of(BertConfig()) == BASE
    assert parameters(BASE) == 109_482_240
    assert parameters(BASE, outputs=2) == 109_482_240 + 2 * 769


def test_operations_by_hand() -> None:
    small = Dims(layers=1, hidden=2, heads=1, feed_forward=8, vocabulary=10)
    # Four matrices of 2 x 2, two of 2 x 8: 48 entries; 3 tokens of one row; 4 D L² for attention.
    assert encoder_flops(small, 3, 9) == 2 * 48 * 3 + 4 * 2 * 9
    assert head_flops(small, 5) == 2 * (4 + 20) * 5
    assert training_flops(small, 3, 9, 5) == 3 * (encoder_flops(small, 3, 9) + head_flops(small, 5))


def test_frozen_layers_are_computed_forward_alone() -> None:
    whole, half = training_flops(BASE, 512, 512**2, 77), training_flops(BASE, 512, 512**2, 77, frozen=6)
    table = 2 * 768 * 30_522 * 77
    assert whole - half == pytest.approx(encoder_flops(BASE, 512, 512**2) + table)
    # All layers frozen, and no head's question: one pass.
    assert training_flops(BASE, 512, 512**2, frozen=12) == pytest.approx(encoder_flops(BASE, 512, 512**2))


def test_of_the_last_layer_only_keys_and_values_are_computed_of_what_nobody_reads() -> None:
    small = Dims(layers=1, hidden=2, heads=1, feed_forward=8, vocabulary=10)
    # Two matrices of 2 x 2 for 6 tokens, two of them and two of 2 x 8 for 3; half of attention.
    assert encoder_flops(small, 6, 18, read=3) == 2 * (8 * 6 + 40 * 3) + 4 * 2 * 9
    one = Dims(layers=11, hidden=768, heads=12, feed_forward=3072, vocabulary=30_522)
    assert encoder_flops(BASE, 512, 512**2, read=512) == pytest.approx(encoder_flops(BASE, 512, 512**2))
    least = encoder_flops(one, 512, 512**2) + 4 * 768**2 * 512
    assert encoder_flops(BASE, 512, 512**2, read=1e-9) == pytest.approx(least)
    assert computed_flops(BASE, 512, 512**2, 77, read=77, recompute=True) == pytest.approx(
        training_flops(BASE, 512, 512**2, 77, read=77) + encoder_flops(BASE, 512, 512**2, read=77)
    )
    frozen = training_flops(BASE, 512, 512**2, frozen=11, read=77)
    last = encoder_flops(BASE, 512, 512**2, read=77) - encoder_flops(one, 512, 512**2)
    assert frozen == pytest.approx(encoder_flops(one, 512, 512**2) + 3 * last)


def test_six_operations_for_each_parameter_and_token() -> None:
    """Kaplan et al.: 6 N a token; PaLM's appendix B: 12 L D of a row more."""
    matrices = BASE.layers * BASE.layer_matrices
    assert matrices == 12 * 12 * 768**2
    each = training_flops(BASE, 512, 512**2) / 512
    assert each == 6 * matrices + 12 * BASE.layers * BASE.hidden * 512


def test_recomputation_is_as_megatron_counts_it() -> None:
    """96 B l s h² (1 + s / 6h + V / 16lh), arXiv 2104.04473, equation 3; its head has no transform."""
    rows, tokens = 4, 512
    found = computed_flops(BASE, rows * tokens, rows * tokens**2, rows * tokens, recompute=True)
    found -= 3 * 2 * BASE.hidden**2 * rows * tokens
    h, layers, v = BASE.hidden, BASE.layers, BASE.vocabulary
    paper = 96 * rows * layers * tokens * h**2 * (1 + tokens / (6 * h) + v / (16 * layers * h))
    assert found == pytest.approx(paper, rel=1e-12)


def test_asking_for_fewer_tokens_and_shorter_rows_costs_less() -> None:
    assert training_flops(BASE, 1024, 2 * 512**2, 150) < training_flops(BASE, 1024, 2 * 512**2, 1024)
    assert training_flops(BASE, 1024, 8 * 128**2) < training_flops(BASE, 1024, 2 * 512**2)
    assert utilisation(5e12, 2.0, 10e12) == 0.25


def test_no_torch_is_needed() -> None:
    code = "import sys, bert_ray.model.flops; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
