"""Writes TensorFlow's checkpoint files, as broken as a test wants them; TensorFlow itself reads the whole ones.

write_checkpoint(tmp_path / "bert_model.ckpt", {"bert/pooler/dense/bias": zeros})
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bert_ray.model.checksum import crc32c

DTYPES = {"float32": 1, "float64": 2, "int64": 9, "uint16": 14, "float16": 19}  # uint16: the bits of a bfloat16


def write_checkpoint(
    prefix: Path,
    tensors: dict[str, np.ndarray],
    shards: int = 1,
    block_names: int = 1000,
    sliced: Iterable[str] = (),
    big_endian: bool = False,
) -> None:
    """An index and data files; the tensors go to the data files in turn, the index has a block for so many names."""
    data = [b""] * shards
    header = number(1, shards) + (number(2, 1) if big_endian else b"") + message(3, number(1, 1))
    entries = [(b"", header)]
    for place, (name, value) in enumerate(sorted(tensors.items(), key=lambda item: item[0].encode())):
        shard, raw = place % shards, value.tobytes()
        shape = b"".join(message(2, number(1, size)) for size in value.shape)
        entry = number(1, DTYPES[value.dtype.name]) + message(2, shape) + number(3, shard)
        entry += number(4, len(data[shard])) + number(5, len(raw))
        entry += bytes([6 << 3 | 5]) + struct.pack("<I", masked(raw)) + (message(7, b"") if name in sliced else b"")
        entries.append((name.encode(), entry))
        data[shard] += raw
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)
    index, handles = b"", []
    for start in range(0, len(entries), block_names):
        part = entries[start : start + block_names]
        index, handle = append(index, part)
        handles.append((part[-1][0], handle))
    index, meta = append(index, [])
    index, of_blocks = append(index, handles)
    footer = (meta + of_blocks).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    prefix.with_name(f"{prefix.name}.index").write_bytes(index + footer)


def append(table: bytes, entries: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """A table with one block more, and the block's handle. Every 16th name stands in full."""
    block, restarts, before = b"", [0], b""
    for place, (name, value) in enumerate(entries):
        if place and place % 16 == 0:
            restarts.append(len(block))
            before = b""
        shared = 0
        while shared < min(len(before), len(name)) and before[shared] == name[shared]:
            shared += 1
        block += varint(shared) + varint(len(name) - shared) + varint(len(value)) + name[shared:] + value
        before = name
    block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    handle = varint(len(table)) + varint(len(block))
    return table + block + b"\0" + struct.pack("<I", masked(block + b"\0")), handle


def masked(data: bytes) -> int:
    checksum = crc32c(np.frombuffer(data, np.uint8))
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    found = b""
    while value >= 0x80:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value
