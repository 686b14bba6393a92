"""The packed forward of a BERT decoder: it looks at what it has said so far, and at what an encoder has read.

The layers are those of transformers' `EncoderDecoderModel` with a BERT decoder (Rothe et al., Leveraging Pre-trained
Checkpoints for Sequence Generation Tasks, arXiv 1907.12461): `decoder_of` finds them, `decode_targets` walks them over
whole targets, for training; `generation.py` has the walk of one token at a time.

Shapes: B rows, T tokens of the packed source, S tokens of the packed targets, D hidden size, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bert_ray.model.dropout import dropout
from bert_ray.model.encoder import Attention, Layer, bert_attention, bert_layer
from bert_ray.model.lookup import lookup
from bert_ray.model.projection import project
from bert_ray.model.ragged_attention import RaggedAttention
from bert_ray.model.residual import residual_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel


@dataclass(kw_only=True, slots=True)
class Decoder:
    """The decoder inside a transformers encoder-decoder model, under common names.

    Attributes:
        layers: each one's own attention and feed-forward part, and its attention to the source.
        head: hidden states (…, D) -> logits (…, V).
    """

    words: nn.Embedding
    positions: nn.Embedding
    types: nn.Embedding
    norm: nn.LayerNorm
    layers: list[tuple[Layer, Attention]]
    head: nn.Module
    heads: int
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_gelu: bool
    dropout: float
    attention_dropout: float


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Find the decoder in a transformers `EncoderDecoderModel` whose decoder is a `BertLMHeadModel`."""
    from transformers.activations import ACT2FN

    decoder: Any = model.decoder
    config = decoder.config
    embeddings = decoder.bert.embeddings
    return Decoder(
        words=embeddings.word_embeddings,
        positions=embeddings.position_embeddings,
        types=embeddings.token_type_embeddings,
        norm=embeddings.LayerNorm,
        layers=[
            (bert_layer(layer), Attention(**bert_attention(layer.crossattention)))
            for layer in decoder.bert.encoder.layer
        ],
        head=decoder.cls,
        heads=config.num_attention_heads,
        activation=ACT2FN[config.hidden_act],
        is_gelu=config.hidden_act == "gelu",
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
    )


def decode_targets(
    decoder: Decoder,
    memory: torch.Tensor,
    source_lengths: Sequence[int],
    target_ids: torch.Tensor,
    target_lengths: Sequence[int],
    training: bool,
) -> torch.Tensor:
    """Hidden states of whole targets, each token having seen those before it and its row of the source.

    Args:
        decoder: see `decoder_of`.
        memory: the encoder's hidden states (T, D).
        source_lengths: tokens of each row of it, B numbers.
        target_ids: int64 (S,), the targets' tokens end to end, in the order of the source's rows.
        target_lengths: tokens of each target, B numbers.
        training: whether dropout is active.

    Returns:
        (S, D).
    """
    device = memory.device
    drop = decoder.dropout if training else 0.0
    drop_attention = decoder.attention_dropout if training else 0.0
    own = RaggedAttention(target_lengths, target_lengths, causal=True, device=device)
    cross = RaggedAttention(target_lengths, source_lengths, device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in target_lengths])
    hidden = lookup(decoder.words.weight, target_ids) + decoder.positions(positions) + decoder.types.weight[0]
    hidden = dropout(decoder.norm(hidden), drop)
    for layer, over in decoder.layers:
        mixed = own(*_qkv(layer, hidden, hidden), decoder.heads, drop_attention)
        hidden = residual_norm(hidden, project(mixed, layer.mix), layer.mix_norm, drop)
        mixed = cross(*_qkv(over, hidden, memory), decoder.heads, drop_attention)
        hidden = residual_norm(hidden, project(mixed, over.mix), over.mix_norm, drop)
        wide = decoder.activation(project(hidden, layer.up))
        hidden = residual_norm(hidden, project(wide, layer.down), layer.down_norm, drop)
    return hidden


def _qkv(
    attention: Attention, hidden: torch.Tensor, source: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of (S, D) for keys and values of (T, D)."""
    return project(hidden, attention.query), project(source, attention.key), project(source, attention.value)
