"""What a new BERT's embeddings start from: which tokens stand near which in its corpus.

From random weights a small model spends its first millions of tokens on finding out that words have anything to do with
each other: until then every word it could guess looks alike. Counts of neighbours say that in a minute. Each token's
vector comes from the positive pointwise mutual information of its neighbours, brought to D numbers by a truncated SVD
(Levy and Goldberg, NIPS 2014, "Neural Word Embedding as Implicit Matrix Factorization"; context distribution smoothing
and the square root of the singular values as in Levy, Goldberg and Dagan, TACL 2015, sections 3.1 and 3.3). It has the
length that random weights have, so the rest of BERT's start stays as it is.

Shapes: D hidden size, V vocabulary, N tokens that are counted, P positions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from bert_ray.training.order import epoch_order

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from transformers import PreTrainedModel

    from bert_ray.training.shards import Documents

# Tokens up to so far apart are neighbours.
WINDOW = 8
# More tokens than these hardly change the vectors, and the counts would outgrow the memory.
MOST_TOKENS = 10_000_000
# Contexts are weighed by their frequency to this power, so that rare ones do not outshine all others.
_SMOOTHING = 0.75
_POWER_ITERATIONS = 3
# The longest wavelength of the positions, as a share of the shortest, which is two tokens.
_WAVELENGTHS = 1000.0


def start_from_cooccurrences(model: PreTrainedModel, documents: Documents, seed: int) -> int:
    """Give a BERT of random weights embeddings that know their neighbours, in place.

    Tokens that do not occur (special ones among them) keep their random vectors. Positions begin as sinusoids (Vaswani
    et al., arXiv 1706.03762, section 3.5) of the same length, so that near ones look alike.

    Args:
        model: with BERT's embeddings.
        documents: of the corpus's training part.
        seed: of what is drawn.

    Returns:
        N.
    """
    embeddings, spread = model.bert.embeddings, model.config.initializer_range
    words, positions = embeddings.word_embeddings.weight, embeddings.position_embeddings.weight
    counts, tokens = count_neighbours(documents, len(words), seed)
    vectors = torch.from_numpy(factorize(counts, words.shape[1], seed))
    seen = vectors.any(dim=1)
    with torch.no_grad():
        words[seen] = spread * math.sqrt(words.shape[1]) * vectors[seen]
        positions.copy_(math.sqrt(2.0) * spread * sinusoids(*positions.shape))
    return tokens


def count_neighbours(documents: Documents, vocabulary: int, seed: int) -> tuple[csr_matrix, int]:
    """How often each token stands within WINDOW of each other one, in the same document.

    Args:
        documents: whole ones are read, in an order drawn by the seed, until they have MOST_TOKENS.
        vocabulary: V.
        seed: of that order.

    Returns:
        the counts, fp32 (V, V), symmetric; and N.
    """
    from scipy.sparse import csr_matrix

    order = epoch_order(len(documents.sizes), seed, 0)
    sizes = documents.sizes[order]
    before = np.cumsum(sizes) - sizes
    chosen = np.sort(order[(before < MOST_TOKENS) & (sizes > 0)])
    stop = np.minimum(documents.sizes[chosen], MOST_TOKENS)
    ids, _ = documents.take(chosen, np.zeros_like(chosen), stop)
    document = np.repeat(np.arange(len(chosen)), stop)
    counts = csr_matrix((vocabulary, vocabulary), dtype=np.float32)
    for distance in range(1, min(WINDOW, len(ids) - 1) + 1):
        same = document[distance:] == document[:-distance]
        first, second = ids[:-distance][same], ids[distance:][same]
        counts += csr_matrix((np.ones(len(first), np.float32), (first, second)), shape=counts.shape)
    return (counts + counts.T).tocsr(), len(ids)


def factorize(counts: csr_matrix, dimension: int, seed: int) -> np.ndarray:
    """A vector of length 1 for each token, of positive pointwise mutual information with its neighbours.

    Args:
        counts: fp32 (V, V).
        dimension: D.
        seed: of the SVD's start and of the axes, which are turned at random so that each carries as much.

    Returns:
        fp32 (V, D); zeros for tokens without neighbours, or with none that they stand with more often than by chance.
    """
    from scipy.sparse import csr_matrix
    from sklearn.utils.extmath import randomized_svd

    pairs = counts.tocoo()
    totals = np.asarray(counts.sum(axis=1)).ravel()
    smoothed = totals**_SMOOTHING
    vectors = np.zeros((counts.shape[0], dimension), np.float32)
    if not pairs.nnz:
        return vectors
    information = np.log(pairs.data * smoothed.sum() / (totals[pairs.row] * smoothed[pairs.col]))
    positive = information > 0
    matrix = csr_matrix(
        (information[positive].astype(np.float32), (pairs.row[positive], pairs.col[positive])), shape=counts.shape
    )
    rank = min(dimension, counts.shape[0] - 1)
    left, values, _ = randomized_svd(matrix, rank, n_iter=_POWER_ITERATIONS, random_state=seed)
    found = np.flatnonzero(np.diff(matrix.indptr))
    kept = (left * np.sqrt(values))[found]
    # What all have in common says nothing of one.
    kept -= kept.mean(axis=0)
    kept /= np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dimension, dimension)))
    vectors[found] = kept @ turn[:rank]
    return vectors


def sinusoids(positions: int, dimension: int) -> torch.Tensor:
    """Sines and cosines of each position at wavelengths from 2 to 2,000 tokens, fp32 (P, D), D even or odd."""
    half = (dimension + 1) // 2
    frequencies = math.pi * _WAVELENGTHS ** -(torch.arange(half) / half)
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :dimension]
