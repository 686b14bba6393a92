"""Which documents say what an earlier one says: exactly, by a hash of the text, or nearly, by MinHash and banding.

A document's signature holds, for each of P random orders of all runs of words, the first of its own runs (MinHash;
Broder, 1997). Two signatures agree in a place with the probability of the documents' Jaccard similarity s. The
signature is cut into b bands of r values; documents that agree in a whole band are near duplicates, which happens with
probability 1 - (1 - s^r)^b (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4), a step around the
threshold. Only the bands' hashes are kept, and one band of all documents is in memory at a time.

Shapes: D documents of the whole corpus, P permutations, b bands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any
from zlib import crc32

import numpy as np
import regex

from bert_ray.training.corpus.cleaning import CHINESE, slices
from bert_ray.training.corpus.job import NearOptions

KEPT, EXACT, NEAR = 0, 1, 2

# A word has its marks: the vowels of Hindi and Thai are some.
_WORD = regex.compile(rf"[{CHINESE}]|[[\p{{L}}\p{{M}}\p{{N}}_]--[{CHINESE}]]+", regex.V1)
_SEED = 1
# Runs are hashed by so many at a time: their values under all permutations stay in a core's cache.
_RUNS = 2048
# A text's words are listed by so many characters at a time.
_SLICE_CHARACTERS = 2**18
# The golden ratio's odd multiplier (Knuth, The Art of Computer Programming, volume 3, section 6.4).
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def bands(options: NearOptions) -> tuple[int, int]:
    """How a signature is cut: b bands of r values, that the threshold be met best (datasketch weighs the errors)."""
    return _bands(options.threshold, options.permutations)


def signer(options: NearOptions) -> Callable[[str], np.ndarray]:
    """A function from a cleaned text to the hashes of its bands, uint64 (b,)."""
    from datasketch import MinHash  # type: ignore[import-untyped]

    count, size = bands(options)
    start = MinHash(num_perm=options.permutations, seed=_SEED, scheme="affine32")
    orders = start.permutations

    def sign(text: str) -> np.ndarray:
        lower = text.lower()
        if (said := _short(lower, options.words)) is not None:
            # As exact as bands can be: the run's 32 bits would make some of many different texts look alike.
            parts = [number.to_bytes(4, "little") + said for number in range(count)]
            return np.frombuffer(b"".join(hashlib.blake2b(part, digest_size=8).digest() for part in parts), "<u8")
        signature = MinHash(
            num_perm=options.permutations, seed=_SEED, scheme="affine32", permutations=orders, hashfunc=_as_it_is
        )
        for runs in _runs(lower, options.words):
            for first in range(0, len(runs), _RUNS):
                signature.update_batch(runs[first : first + _RUNS].tolist())
        values = signature.hashvalues.astype("<u4")
        hashes = [
            hashlib.blake2b(values[band * size : (band + 1) * size].tobytes(), digest_size=8).digest()
            for band in range(count)
        ]
        return np.frombuffer(b"".join(hashes), "<u8")

    return sign


def decide(ids: np.ndarray, band: Callable[[int], np.ndarray] | None, count: int) -> np.ndarray:
    """Which documents stay: those that no earlier one equals or, by a band of its own, nearly equals.

    Args:
        ids: hashes of the texts as two numbers each, uint64 (D, 2).
        band: gives the hashes of all documents in one band, uint64 (D,); None: near duplicates stay.
        count: b.

    Returns:
        KEPT, EXACT or NEAR, uint8 (D,).
    """
    verdict = np.full(len(ids), KEPT, np.uint8)
    if not len(ids):
        return verdict
    # Stable: of equal documents the first comes first.
    order = np.lexsort((ids[:, 1], ids[:, 0]))
    again = (ids[order[1:]] == ids[order[:-1]]).all(1)
    exact = order[1:][again]
    del order, again
    if band is not None:
        for number in range(count):
            hashes = band(number)
            order = np.argsort(hashes, kind="stable")
            hashes = hashes[order]
            verdict[order[1:][hashes[1:] == hashes[:-1]]] = NEAR
    verdict[exact] = EXACT
    return verdict


@cache
def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    from datasketch import MinHashLSH  # type: ignore[import-untyped]

    found: Any = MinHashLSH(threshold=threshold, num_perm=permutations)
    return found.b, found.r


def _short(text: str, words: int) -> bytes | None:
    """All that a text of one run or less says: its words, or where it has none the text; None for a longer one."""
    found = [match.group() for match in islice(_WORD.finditer(text), words + 1)]
    return None if len(found) > words else (" ".join(found) or text).encode()


def _runs(text: str, words: int) -> Iterator[np.ndarray]:
    """The hashes of a text's runs of words, 32 bits each."""
    held = np.empty(0, np.uint64)
    for piece in slices(text, _SLICE_CHARACTERS):
        found = _WORD.findall(piece)
        fresh = np.fromiter(map(crc32, map(str.encode, found)), np.uint64, len(found))
        held = np.concatenate([held, fresh])
        if len(held) >= words:
            yield _mix([held[place : len(held) - words + 1 + place] for place in range(words)])
            held = held[len(held) - words + 1 :]


def _mix(columns: list[np.ndarray]) -> np.ndarray:
    """One 32-bit number for each row of some columns of numbers."""
    mixed = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        mixed = (mixed ^ column) * _MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
    return mixed >> np.uint64(32)


def _as_it_is(value: int) -> int:
    return value
