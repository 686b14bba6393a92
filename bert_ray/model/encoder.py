"""The packed forward of BERT's encoder, over the modules of a transformers model.

The layers of BERT, RoBERTa and DistilBERT are the same under different names: `layers_of` finds them, `encode` walks
them. Weights stay where transformers put them, so a model trained here is saved by transformers and the other way.

Of the last layer only those tokens are computed that somebody reads (`PackedBatch.read`): the others' keys and values
are needed, their queries and all that comes after them are not. A classifier over the first token of each text saves
5/6 of the layer's products so, a masked language model nearly as much.

Shapes: T tokens of a packed batch, R of them that are read, D hidden size, F width of the feed-forward layer, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bert_ray.model.architectures import ENCODER_DECODER, dropout_rates, positions_follow_padding
from bert_ray.model.attention import packed_attention
from bert_ray.model.dropout import dropout
from bert_ray.model.lookup import lookup
from bert_ray.model.projection import filled, multiply, project
from bert_ray.model.ragged_attention import RaggedAttention
from bert_ray.model.residual import residual_norm

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from bert_ray.model.packing import PackedBatch


@dataclass(kw_only=True, slots=True)
class Attention:
    """The attention part of a layer: the modules of a transformers layer under common names."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    mix: nn.Linear
    mix_norm: nn.LayerNorm


@dataclass(kw_only=True, slots=True)
class Layer(Attention):
    """One layer: attention over the row itself, and the feed-forward part."""

    up: nn.Linear
    down: nn.Linear
    down_norm: nn.LayerNorm


@dataclass(kw_only=True, slots=True)
class Encoder:
    """The encoder inside a transformers model, under common names."""

    words: nn.Embedding
    positions: nn.Embedding
    types: nn.Embedding | None
    norm: nn.LayerNorm
    layers: list[Layer]
    heads: int
    first_position: int
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_gelu: bool
    dropout: float
    attention_dropout: float


def encoder_of(model: PreTrainedModel) -> Encoder:
    """Find the encoder in a model with or without a task's head, or with a decoder."""
    from transformers.activations import ACT2FN

    if model.config.model_type == ENCODER_DECODER:
        model = model.encoder
    config = model.config
    base = getattr(model, model.base_model_prefix, model)
    embeddings = base.embeddings
    distil = config.model_type == "distilbert"
    activation = config.activation if distil else config.hidden_act
    hidden_rate, attention_rate = dropout_rates(config)
    return Encoder(
        words=embeddings.word_embeddings,
        positions=embeddings.position_embeddings,
        types=None if distil else embeddings.token_type_embeddings,
        norm=embeddings.LayerNorm,
        layers=[_distil_layer(layer) for layer in base.transformer.layer]
        if distil
        else [bert_layer(layer) for layer in base.encoder.layer],
        heads=config.num_attention_heads,
        first_position=config.pad_token_id + 1 if positions_follow_padding(config) else 0,
        activation=ACT2FN[activation],
        is_gelu=activation == "gelu",
        dropout=hidden_rate,
        attention_dropout=attention_rate,
    )


def bert_layer(layer: nn.Module) -> Layer:
    """A layer of BERT or RoBERTa, also of a decoder (its attention to a source left out)."""
    return Layer(
        **bert_attention(layer.attention),
        up=layer.intermediate.dense,
        down=layer.output.dense,
        down_norm=layer.output.LayerNorm,
    )


def bert_attention(attention: nn.Module) -> dict[str, nn.Module]:
    """The modules of BERT's attention, over a row itself or over a source, by the names of Attention."""
    return {
        "query": attention.self.query,
        "key": attention.self.key,
        "value": attention.self.value,
        "mix": attention.output.dense,
        "mix_norm": attention.output.LayerNorm,
    }


def key_value_of(layer: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (2D, D) and bias (2D,) of keys and values together."""
    return torch.cat((layer.key.weight, layer.value.weight)), torch.cat((layer.key.bias, layer.value.bias))


def _distil_layer(layer: nn.Module) -> Layer:
    return Layer(
        query=layer.attention.q_lin,
        key=layer.attention.k_lin,
        value=layer.attention.v_lin,
        mix=layer.attention.out_lin,
        mix_norm=layer.sa_layer_norm,
        up=layer.ffn.lin1,
        down=layer.ffn.lin2,
        down_norm=layer.output_layer_norm,
    )


def encode(model: PreTrainedModel, batch: PackedBatch, recompute: bool = False) -> torch.Tensor:
    """Hidden states of a packed batch, (T, D), or of its tokens that are read, (R, D).

    Dropout is active when the model is in training mode.

    Args:
        model: with or without a task's head.
        batch: T tokens.
        recompute: in training mode keep only each layer's input, and compute the layer again in the backward pass
            (Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174).
    """
    return encode_with(encoder_of(model), batch, training=model.training, recompute=recompute and model.training)


def encode_with(encoder: Encoder, batch: PackedBatch, training: bool, recompute: bool = False) -> torch.Tensor:
    """As `encode`, with the encoder already found: a loop over many batches finds it once."""
    drop = encoder.dropout if training else 0.0
    words = lookup(encoder.words.weight, batch.input_ids)
    hidden = words + encoder.positions(batch.position_ids + encoder.first_position)
    if encoder.types is not None:
        # Without a second text every token is of type 0: one row, added to all. So it is where the model has but one.
        types = batch.token_type_ids if encoder.types.num_embeddings > 1 else None
        hidden = hidden + (encoder.types.weight[0] if types is None else encoder.types(types))
    tokens = len(hidden) if batch.read is None else len(batch.read)
    hidden = filled(dropout(encoder.norm(hidden), drop))
    for layer in encoder.layers:
        through = _through if batch.read is None or layer is not encoder.layers[-1] else _through_read
        if recompute:
            hidden = checkpoint(through, layer, hidden, encoder, batch, training, use_reentrant=False)
        else:
            hidden = through(layer, hidden, encoder, batch, training)
    # Autocast may have left them in half precision; what pools many of them needs their own.
    return hidden[:tokens].to(encoder.words.weight.dtype)


def _through(layer: Layer, hidden: torch.Tensor, encoder: Encoder, batch: PackedBatch, training: bool) -> torch.Tensor:
    """One layer: hidden states (T, D) -> (T, D)."""
    drop_attention = encoder.attention_dropout if training else 0.0
    # One matrix product for queries, keys and values: (T, D) x (D, 3D).
    weight = torch.cat((layer.query.weight, layer.key.weight, layer.value.weight))
    bias = torch.cat((layer.query.bias, layer.key.bias, layer.value.bias))
    qkv = multiply(hidden, weight, bias)
    mixed = packed_attention(qkv, batch.lengths, batch.cu_seqlens, encoder.heads, drop_attention)
    return _behind_attention(layer, hidden, mixed, encoder, training)


def _through_read(
    layer: Layer, hidden: torch.Tensor, encoder: Encoder, batch: PackedBatch, training: bool
) -> torch.Tensor:
    """The last layer, of the tokens that are read: hidden states (T, D) -> (R, D)."""
    assert batch.read is not None and batch.read_lengths is not None
    # One matrix product for keys and values: (T, D) x (D, 2D).
    key, value = multiply(hidden, *key_value_of(layer)).chunk(2, dim=1)
    hidden = filled(hidden.index_select(0, batch.read))
    queries = project(hidden, layer.query)[: len(batch.read)]
    attention = RaggedAttention(batch.read_lengths, batch.lengths, device=hidden.device)
    mixed = attention(queries, key, value, encoder.heads, encoder.attention_dropout if training else 0.0)
    return _behind_attention(layer, hidden, filled(mixed), encoder, training)


def _behind_attention(
    layer: Layer, hidden: torch.Tensor, mixed: torch.Tensor, encoder: Encoder, training: bool
) -> torch.Tensor:
    """The rest of a layer, of each token by itself: its input and what attention gave -> hidden states."""
    drop = encoder.dropout if training else 0.0
    hidden = residual_norm(hidden, project(mixed, layer.mix), layer.mix_norm, drop)
    wide = encoder.activation(project(hidden, layer.up))
    return residual_norm(hidden, project(wide, layer.down), layer.down_norm, drop)
