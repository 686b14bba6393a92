"""Which architectures run here, and what their configurations call what is needed of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The architectures whose layers `encoder.py` walks: post-norm encoders with learned absolute positions.
ARCHITECTURES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")
# One of these as the encoder, and a decoder of BERT's layers that `decoder.py` walks.
ENCODER_DECODER = "encoder-decoder"


def encoder_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the encoder, also of one that has a decoder beside it."""
    return config.encoder if config.model_type == ENCODER_DECODER else config


def dropout_names(config: PretrainedConfig) -> tuple[str, str]:
    """What an encoder's configuration calls its rates of dropout: for hidden states, and for attention weights."""
    if config.model_type == "distilbert":
        return "dropout", "attention_dropout"
    return "hidden_dropout_prob", "attention_probs_dropout_prob"


def dropout_rates(config: PretrainedConfig) -> tuple[float, float]:
    """An encoder's rates of dropout: for hidden states, and for attention weights."""
    hidden, attention = (float(getattr(config, name)) for name in dropout_names(config))
    return hidden, attention


def max_positions(config: PretrainedConfig) -> int:
    """Longest row in tokens. RoBERTa's positions start behind the padding id, so its table holds two rows more."""
    config = encoder_config(config)
    limit = int(config.max_position_embeddings)
    return limit - config.pad_token_id - 1 if positions_follow_padding(config) else limit


def positions_follow_padding(config: PretrainedConfig) -> bool:
    """Whether position 0 is `pad_token_id + 1`, as in RoBERTa (transformers, `create_position_ids_from_input_ids`)."""
    return config.model_type in ("roberta", "xlm-roberta", "camembert")
