"""Which tokens a masked language model has to guess, and what stands in their places.

Devlin et al., BERT, arXiv 1810.04805, section 3.1: a share of each row's tokens is chosen; of these 80 % become [MASK],
10 % another token, 10 % stay. Chosen anew each time a row is seen: what happens to a row is a function of the seed and
of the sample's number alone, whatever batch or worker it is in.

Shapes: R rows, T tokens of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bert_ray.errors import JobError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The target of a token that need not be guessed; torch's cross_entropy ignores it.
NOT_ASKED = -100

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# What a number is drawn for: different draws of one token must not depend on each other.
_CHOICE, _FATE, _WORD = np.uint64(1), np.uint64(2), np.uint64(3)


@dataclass(kw_only=True, frozen=True, slots=True)
class Vocabulary:
    """What masking has to know of a vocabulary.

    Attributes:
        mask: id of the mask token.
        ordinary: ids of all tokens but the special ones, int64: what a token may be replaced by.
    """

    mask: int
    ordinary: np.ndarray


def special_ids(tokenizer: PreTrainedTokenizerFast, name: str) -> tuple[int, int, int]:
    """Ids of the tokens that mask, that begin a row, and that end one or a part of it.

    Raises:
        JobError: it lacks one of them, or has no others; `name` is what the user calls it.
    """
    known = tokenizer.get_vocab()
    if len(known) <= len(tokenizer.all_special_ids):
        raise JobError(
            f"the tokenizer of {name} knows no token but special ones: train one with `bert-ray vocabulary`, or name "
            "the directory that has its files"
        )
    tokens = {
        "[MASK]": tokenizer.mask_token,
        "[CLS]": tokenizer.cls_token or tokenizer.bos_token,
        "[SEP]": tokenizer.sep_token or tokenizer.eos_token,
    }
    if lacking := [what for what, token in tokens.items() if token is None or token not in known]:
        raise JobError(
            f"the tokenizer of {name} has no {' and no '.join(lacking)} token, without which nothing can be masked: "
            "train one with `bert-ray vocabulary`, or name another"
        )
    mask, begin, end = (known[token] for token in tokens.values())
    return mask, begin, end


def mix(value: np.ndarray) -> np.ndarray:
    """Scatter uint64 numbers: SplitMix64's output function (Steele et al., OOPSLA 2014, figure 16)."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def keys(seed: int, samples: np.ndarray) -> np.ndarray:
    """A random number of each sample, uint64 (R,)."""
    return mix(mix(np.array([seed], np.uint64)) ^ samples.astype(np.uint64))


def uniform(noise: np.ndarray) -> np.ndarray:
    """Random uint64 as float64 in [0, 1)."""
    return (noise >> np.uint64(11)) * 2.0**-53


def budget(lengths: np.ndarray, rate: float) -> np.ndarray:
    """How many tokens of each row are to be guessed, int64: the rate's share, and at least one."""
    return np.maximum(1, np.rint(lengths * rate)).astype(np.int64)


def mask_rows(
    ids: np.ndarray,
    lengths: np.ndarray,
    row_keys: np.ndarray,
    rate: float,
    vocabulary: Vocabulary,
    word_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose tokens and put something else in their places.

    Args:
        ids: int64 (T,), rows end to end, without special tokens.
        lengths: int64 (R,), tokens of each row, none 0.
        row_keys: uint64 (R,), of `keys`.
        rate: share of the tokens.
        vocabulary: see Vocabulary.
        word_starts: bool (T,), whether a token begins a word; None: tokens are chosen one by one. With it, words are
            chosen whole (the whole-word masking of BERT's release of May 2019, for Chinese Cui et al., arXiv
            1906.08101): as many as come nearest to the budget on average, at least one.

    Returns:
        ids with masks, int64 (T,), and targets, int64 (T,): the original where it is to be guessed, else NOT_ASKED.
    """
    count = len(ids)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths) - lengths
    place = (np.arange(count) - np.repeat(first, lengths)).astype(np.uint64)
    noise = mix(np.repeat(row_keys, lengths) + place * _GOLDEN)
    wanted = np.repeat(budget(lengths, rate), lengths)
    if word_starts is None:
        # Row number plus a number below 1, sorted: each row's tokens in random order, row after row.
        order = np.argsort(rows + uniform(mix(noise ^ _CHOICE)), kind="stable")
        chosen = np.empty(count, bool)
        chosen[order] = np.arange(count) - np.repeat(first, lengths) < wanted
    else:
        chosen = _whole_words(word_starts, rows, first, uniform(mix(noise ^ _WORD)), wanted)
    fate = mix(noise ^ _FATE)
    share = uniform(fate)
    masked = ids.copy()
    masked[chosen & (share < 0.8)] = vocabulary.mask
    other = chosen & (share >= 0.8) & (share < 0.9)
    masked[other] = vocabulary.ordinary[(mix(fate[other]) % np.uint64(len(vocabulary.ordinary))).astype(np.int64)]
    return masked, np.where(chosen, ids, NOT_ASKED)


def _whole_words(
    word_starts: np.ndarray, rows: np.ndarray, first: np.ndarray, draws: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Which tokens are chosen, bool (T,), words whole."""
    begins = word_starts.copy()
    begins[first] = True  # A row may begin in the midst of a word.
    heads = np.flatnonzero(begins)
    sizes = np.diff(np.append(heads, len(rows)))
    order = np.argsort(rows[heads] + draws[heads], kind="stable")
    # Tokens of the row's words that come earlier in the random order.
    before = np.cumsum(sizes[order]) - sizes[order]
    row = rows[heads][order]
    leading = np.append(True, row[1:] != row[:-1])
    before -= np.maximum.accumulate(np.where(leading, before, 0))
    # Half of a word's further tokens in advance: words that go over the budget and words left out even out.
    taken = leading | (before + (sizes[order] - 1) / 2 < wanted[heads][order])
    chosen = np.empty(len(heads), bool)
    chosen[order] = taken
    return np.repeat(chosen, sizes)
