"""CRC-32C (Castagnoli, RFC 3720 appendix B.4), the checksum of TensorFlow's files, with numpy alone.

A checksum goes byte by byte, and numpy is fast only over many values at once. So the data is cut into equal lanes whose
checksums advance together, two bytes a step; neighbours are then joined pairwise, for which CRC is made: of two
stretches that follow one another it is the first one's, moved on by as many zero bytes as the second one has, XOR the
second one's (zlib's crc32_combine).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# The polynomial, its lowest bit last.
_POLYNOMIAL = 0x82F63B78
_LANES = 4096
# A block of lanes, 1 MiB, stays in the processor's cache.
_MOST_LANE_BYTES = 256


def crc32c(data: np.ndarray) -> int:
    """The checksum of bytes.

    Args:
        data: uint8, one dimension.
    """
    state, start = 0xFFFFFFFF, 0
    left = len(data)
    if left:
        # Blocks of full size, but the first takes what does not fill one: zeros may stand in front of it.
        block = _LANES * _MOST_LANE_BYTES
        size = left % block or block
        while start < len(data):
            state = _moved(state, size) ^ _plain(data[start : start + size])
            start, size = start + size, block
    return state ^ 0xFFFFFFFF


def _plain(data: np.ndarray) -> int:
    """The checksum that begins with 0 instead of all ones, of at most a block; zeros in front do not change it."""
    power = 1
    while _LANES << power < len(data):
        power += 1
    padded = np.zeros(_LANES << power, np.uint8)
    padded[len(padded) - len(data) :] = data
    # Step by step, so that each step reads one stretch of memory: (bytes of a lane / 2, lanes).
    steps = np.ascontiguousarray(padded.view("<u2").reshape(_LANES, -1).T)
    table, states = _two_bytes(), np.zeros(_LANES, np.uint32)
    for step in steps:
        states = table[(states & 0xFFFF) ^ step] ^ (states >> 16)
    while len(states) > 1:
        states = _apply(_moving(power), states[0::2]) ^ states[1::2]
        power += 1
    return int(states[0])


def _moved(state: int, count: int) -> int:
    """A state after so many zero bytes."""
    states, power = np.array([state], np.uint32), 0
    while count >> power:
        if count >> power & 1:
            states = _apply(_moving(power), states)
        power += 1
    return int(states[0])


def _apply(tables: np.ndarray, states: np.ndarray) -> np.ndarray:
    """A linear map, given as (4, 256) uint32, what each byte of a state becomes."""
    return (
        tables[0][states & 0xFF]
        ^ tables[1][states >> 8 & 0xFF]
        ^ tables[2][states >> 16 & 0xFF]
        ^ tables[3][states >> 24]
    )


@lru_cache(maxsize=64)
def _moving(power: int) -> np.ndarray:
    """What 2 ** power zero bytes make of a state, as `_apply` takes it."""
    each = np.arange(256, dtype=np.uint32)
    bytes_alone = np.stack([each << np.uint32(8 * place) for place in range(4)])
    if power == 0:
        return _one_byte()[bytes_alone & 0xFF] ^ (bytes_alone >> np.uint32(8))
    half = _moving(power - 1)
    return _apply(half, half.reshape(-1)).reshape(4, 256)


@lru_cache(maxsize=1)
def _one_byte() -> np.ndarray:
    """What a byte makes of a state of 0, uint32 (256,)."""
    states = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        states = np.where(states & 1, states >> np.uint32(1) ^ np.uint32(_POLYNOMIAL), states >> np.uint32(1))
    return states


@lru_cache(maxsize=1)
def _two_bytes() -> np.ndarray:
    """The same of two bytes, uint32 (65536,)."""
    states = np.arange(65536, dtype=np.uint32)
    for _ in range(2):
        states = _one_byte()[states & 0xFF] ^ (states >> np.uint32(8))
    return states
