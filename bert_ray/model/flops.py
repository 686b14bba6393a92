"""What a training step computes: parameters and floating-point operations, counted from a model's dimensions alone.

    forward  = 2 N T + 4 D Σ L²                       of each layer, N its matrices' entries
    last     = 2 (2 D² T + (N - 2 D²) R) + 4 D Σ L² R / T   where only R of its T tokens are read
    training = 3 × forward                            backward costs twice the forward

A product of a (T, K) with a (K, N) matrix is 2 T K N operations; in the backward pass there are two of the same size
for each: so 6 N T in all (Kaplan et al., arXiv 2001.08361, section 2.1; Chowdhery et al., PaLM, arXiv 2204.02311,
appendix B, which adds 12 layers D L a token for attention that sees the whole row). Rows are packed, so T counts real
tokens and attention costs L² of each row by itself. Of the last layer a token that nobody reads has keys and values
alone (`model/encoder.py`). The vocabulary's head runs over the tokens that are asked for alone. Everything that is no
matrix product is left out, as both papers do.

Imports neither torch nor transformers.

Shapes: T tokens of a step, L length of a row, D hidden size, F width of the feed-forward layer, V vocabulary,
M tokens asked for, R tokens read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bert_ray.model.architectures import encoder_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Forward and backward: one product forward, two backward (Kaplan et al., section 2.1).
_PASSES = 3
# Layer norms and the classifier of a pair have two vectors each: scale and shift, yes and no.
_TWO = 2


@dataclass(kw_only=True, frozen=True, slots=True)
class Dims:
    """The dimensions of a BERT.

    Attributes:
        layers: of the encoder.
        hidden: D.
        heads: of attention.
        feed_forward: F.
        vocabulary: V.
        positions: rows of the table of positions.
        types: rows of the table of token types; 0: there is none.
    """

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int = 512
    types: int = 2

    @property
    def layer_matrices(self) -> int:
        """Entries of one layer's matrices: queries, keys, values, their mixing, and the two feed-forward ones."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.feed_forward

    @property
    def head_matrices(self) -> int:
        """Entries of the matrices of the vocabulary's head: D² of its transform, D V shared with the embeddings."""
        return self.hidden**2 + self.hidden * self.vocabulary


def dims_of(config: PretrainedConfig) -> Dims:
    """The dimensions of a transformers configuration; of its encoder where there is a decoder too."""
    config = encoder_config(config)
    distil = config.model_type == "distilbert"
    return Dims(
        layers=config.n_layers if distil else config.num_hidden_layers,
        hidden=config.dim if distil else config.hidden_size,
        heads=config.n_heads if distil else config.num_attention_heads,
        feed_forward=config.hidden_dim if distil else config.intermediate_size,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        types=0 if distil else config.type_vocab_size,
    )


def parameters(
    dims: Dims, *, pooler: bool = True, vocabulary_head: bool = False, pair_head: bool = False, outputs: int = 0
) -> int:
    """Trainable numbers of a model.

    Args:
        dims: its dimensions.
        pooler: the dense layer over the first token (BERT; DistilBERT's classifier has one of the same size).
        vocabulary_head: transform, layer norm and bias; the matrix itself is the embeddings'.
        pair_head: the question that BERT's pretraining asks about two parts, of what the pooler gives.
        outputs: of a linear head over D.
    """
    width, wide = dims.hidden, dims.feed_forward
    embeddings = (dims.vocabulary + dims.positions + dims.types) * width + _TWO * width
    # Biases: four of D in attention, F and D in the feed-forward part; two layer norms.
    layer = dims.layer_matrices + 4 * width + wide + width + 2 * _TWO * width
    count = embeddings + dims.layers * layer
    if pooler:
        count += width**2 + width
    if vocabulary_head:
        count += width**2 + width + _TWO * width + dims.vocabulary
    if pair_head:
        count += _TWO * (width + 1)
    return count + outputs * (width + 1)


def encoder_flops(dims: Dims, tokens: float, squares: float, read: float | None = None) -> float:
    """Operations of the encoder's forward pass.

    Args:
        dims: of the model.
        tokens: T.
        squares: Σ L² over the rows; T * L where all rows have length L.
        read: R, tokens whose last hidden states are read, as large a share of long rows as of short ones; None: all.
    """
    # Q Kᵀ and the product with V: 2 L² D each.
    layer = 2.0 * dims.layer_matrices * tokens + 4.0 * dims.hidden * squares
    if read is None:
        return dims.layers * layer
    key_value = 2 * dims.hidden**2
    last = 2.0 * (key_value * tokens + (dims.layer_matrices - key_value) * read)
    return (dims.layers - 1) * layer + last + 4.0 * dims.hidden * squares * read / tokens


def head_flops(dims: Dims, asked: float) -> float:
    """Operations of the vocabulary head's forward pass over `asked` tokens, M."""
    return 2.0 * dims.head_matrices * asked


def training_flops(
    dims: Dims, tokens: float, squares: float, asked: float = 0.0, frozen: int = 0, read: float | None = None
) -> float:
    """Model FLOPs of training on some rows, forward and backward: what "model FLOPs utilisation" counts.

    Args:
        dims: of the model.
        tokens: T.
        squares: Σ L² over the rows.
        asked: M, tokens that go through the vocabulary's head.
        frozen: so many of the lowest layers, and the embeddings, are not trained: nothing is computed backward there.
        read: R, tokens whose last hidden states are read; None: all.
    """
    encoder = encoder_flops(dims, tokens, squares, read)
    whole = _PASSES * (encoder + head_flops(dims, asked))
    if not frozen:
        return whole
    if frozen < dims.layers:
        encoder = encoder_flops(replace(dims, layers=frozen), tokens, squares)
    # The head's product with the embeddings passes its gradient on, and makes none of theirs.
    return whole - (_PASSES - 1) * encoder - 2.0 * dims.hidden * dims.vocabulary * asked


def computed_flops(
    dims: Dims,
    tokens: float,
    squares: float,
    asked: float = 0.0,
    *,
    recompute: bool = False,
    read: float | None = None,
) -> float:
    """What is computed for it: with activation checkpointing the encoder's forward pass is made twice.

    Narayanan et al., arXiv 2104.04473, equation 3: 96 B l s h² (1 + s / 6h + V / 16lh) for a model of l layers that
    computes all layers again, its vocabulary head over all tokens.
    """
    again = encoder_flops(dims, tokens, squares, read) if recompute else 0.0
    return training_flops(dims, tokens, squares, asked, read=read) + again


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation (PaLM, appendix B): model FLOPs a second, as a share of the device's peak.

    Args:
        flops: `training_flops` of what one device did.
        seconds: it took.
        peak: the device's matrix-multiply rate, FLOP/s.
    """
    return flops / seconds / peak
