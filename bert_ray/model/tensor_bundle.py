"""Reads the files that TensorFlow's savers write, `PREFIX.index` and `PREFIX.data-00000-of-00001`, without TensorFlow.

    TensorBundle("uncased_L-12_H-768_A-12/bert_model.ckpt")["bert/pooler/dense/bias"]

The index is a table in LevelDB's format (sorted blocks of names, each with what the name has in common with the one
before left out) from names to protocol buffers that say dtype, shape and place; the data files are the tensors laid end
to end. Sources: tensorflow/core/util/tensor_bundle/tensor_bundle.{h,cc}, core/protobuf/tensor_bundle.proto,
core/lib/io/format.cc, and LevelDB's doc/table_format.md.

Why not a package: the one there is, tensorflow-checkpoint-reader 0.1.0, can no longer be imported (its protocol buffers
are of before protobuf 4, and it asks numpy for names that numpy 2 has not), reads only the first block of the index,
checks no checksum, and stops in the debugger where a file is broken.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bert_ray.errors import BundleError
from bert_ray.model.checksum import crc32c

# The first eight bytes of the SHA-1 of LevelDB's address, at the end of every table (format.h, kTableMagicNumber).
_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
# Behind each block: a byte that says how it is compressed, and a checksum of the block and that byte.
_TRAILER_BYTES = 5

# DataType of types.proto -> numpy. bfloat16 (14) is read as the upper halves of float32.
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 9: "<i8", 10: "?", 14: "<u2", 19: "<f2"}
_BFLOAT16 = 14
_STRING = 7
# The names of data files have room for so many.
_MOST_SHARDS = 99_999

_COPY = "copy or download the checkpoint again, whole"


@dataclass(kw_only=True, frozen=True, slots=True)
class Entry:
    """Where a tensor lies: which data file, from which byte on, how many, and their checksum (masked CRC-32C)."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    sliced: bool


class TensorBundle:
    """A checkpoint: names, shapes, and tensors that are read when asked for.

    Attributes:
        prefix: path without `.index`.
        entries: by name, in the order of the names.
    """

    def __init__(self, prefix: Path) -> None:
        """Read the index, and see that the data files are all there and long enough.

        Raises:
            BundleError: a file is missing, cut short or altered.
        """
        self.prefix = prefix
        index = prefix.with_name(prefix.name + ".index")
        try:
            table = _Table(index.read_bytes(), index)
        except FileNotFoundError:
            raise BundleError(f"{index} is missing: the checkpoint is only half there; {_COPY}") from None
        except OSError as error:
            raise BundleError(f"{index} cannot be read: {error}") from error
        found = iter(table)
        try:
            name, header = next(found, (b"", b""))
            if name:
                raise ValueError
            fields = _fields(header)
            # BundleHeaderProto: the number of data files, and the order of bytes (1: the highest first).
            self._shards, big_endian = _last(fields, 1), _last(fields, 2)
            if self._shards > _MOST_SHARDS:
                raise ValueError
            self.entries = {name.decode("utf-8"): _entry(value) for name, value in found}
        except (ValueError, IndexError, struct.error, UnicodeDecodeError):
            raise BundleError(f"{index} is no index of a TensorFlow checkpoint, or is damaged; {_COPY}") from None
        if big_endian:
            raise BundleError(f"{index}: the checkpoint was written on a big-endian machine, which is not supported")
        self._check_sizes()

    def _file(self, shard: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self._shards:05d}")

    def _check_sizes(self) -> None:
        wanted: dict[int, int] = dict.fromkeys(range(self._shards), 0)
        for entry in self.entries.values():
            wanted[entry.shard] = max(wanted.get(entry.shard, 0), entry.offset + entry.size)
        for shard, size in wanted.items():
            path = self._file(shard)
            if not path.is_file():
                raise BundleError(f"{path} is missing: the checkpoint is only half there; {_COPY}")
            if (there := path.stat().st_size) < size:
                raise BundleError(f"{path} is cut short: it has {there:,} bytes, its index tells of {size:,}; {_COPY}")

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor, in its own dtype (bfloat16 as float32).

        Raises:
            BundleError: it is text or kept in slices, or its bytes are not those that were written.
        """
        entry, path = self.entries[name], self._file(self.entries[name].shard)
        if entry.sliced:
            raise BundleError(
                f"{self.prefix}: {name} is kept in slices (a partitioned variable), which is not supported; save it "
                "whole with TensorFlow first"
            )
        if entry.dtype not in _DTYPES:
            kind = "text" if entry.dtype == _STRING else f"of TensorFlow's type {entry.dtype}"
            raise BundleError(f"{self.prefix}: {name} is {kind}, not numbers")
        values = np.fromfile(path, np.uint8, entry.size, offset=entry.offset)
        dtype = np.dtype(_DTYPES[entry.dtype])
        if entry.size != dtype.itemsize * math.prod(entry.shape) or _masked(crc32c(values)) != entry.checksum:
            raise BundleError(f"{path}: the bytes of {name} are not those that were written (checksum); {_COPY}")
        values = values.view(dtype)
        if entry.dtype == _BFLOAT16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(entry.shape)


class _Table:
    """Names and values of a table in LevelDB's format."""

    def __init__(self, data: bytes, path: Path) -> None:
        self._data, self._path = data, path

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        footer = self._data[-_FOOTER_BYTES:]
        if len(footer) < _FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
            raise BundleError(f"{self._path} is no index of a TensorFlow checkpoint, or is cut short; {_COPY}")
        # Two handles, (offset, size) each: of a block that nobody needs, and of the index of blocks.
        _, at = _handle(footer, 0)
        handle, _ = _handle(footer, at)
        for _, value in self._block(*handle):
            yield from self._block(*_handle(value, 0)[0])

    def _block(self, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        end = offset + size
        whole = self._data[offset : end + _TRAILER_BYTES]
        if len(whole) < size + _TRAILER_BYTES or _masked(_crc(whole[: size + 1])) != _fixed32(whole, size + 1):
            raise BundleError(f"{self._path} is damaged (checksum); {_COPY}")
        if whole[size]:
            raise BundleError(f"{self._path} is compressed, as TensorFlow's savers never do; save it anew with them")
        # At the end the places where names stand in full, 4 bytes each, and their number.
        end = size - 4 * (1 + _fixed32(whole, size - 4))
        at, name = 0, b""
        while at < end:
            (shared, own, length), at = _varints(whole, at, 3)
            name = name[:shared] + whole[at : at + own]
            at += own
            yield name, whole[at : at + length]
            at += length


def _entry(value: bytes) -> Entry:
    """A BundleEntryProto."""
    fields = _fields(value)
    dimensions = [found for item in fields.get(2, []) for found in _fields(_bytes(item)).get(2, [])]
    return Entry(
        dtype=_last(fields, 1),
        shape=tuple(_last(_fields(_bytes(item)), 1) for item in dimensions),
        shard=_last(fields, 3),
        offset=_last(fields, 4),
        size=_last(fields, 5),
        checksum=_last(fields, 6),
        sliced=7 in fields,
    )


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """A protocol buffer's fields by number (protobuf.dev, Encoding): a varint, 4 or 8 bytes, or a stretch of bytes."""
    found: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(message):
        (tag,), at = _varints(message, at, 1)
        value: int | bytes
        if tag & 7 == 0:
            (value,), at = _varints(message, at, 1)
        elif tag & 7 == 2:
            (length,), at = _varints(message, at, 1)
            value, at = message[at : at + length], at + length
        elif tag & 7 in (1, 5):
            width = 8 if tag & 7 == 1 else 4
            value, at = int.from_bytes(message[at : at + width], "little"), at + width
        else:
            raise ValueError("not a protocol buffer")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _last(fields: dict[int, list[int | bytes]], number: int) -> int:
    """A field that is a number; 0 where it is left out, as proto3 has it."""
    value = fields.get(number, [0])[-1]
    if isinstance(value, bytes):
        raise ValueError("not a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("not a message")
    return value


def _varints(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    """So many numbers of 7 bits a byte, the lowest first, the high bit set on all bytes but the last."""
    found = []
    for _ in range(count):
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        found.append(value)
    return found, at


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    (offset, size), at = _varints(data, at, 2)
    return (offset, size), at


def _fixed32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _crc(data: bytes) -> int:
    return crc32c(np.frombuffer(data, np.uint8))


def _masked(checksum: int) -> int:
    """As checksums stand in files (tsl/lib/hash/crc32c.h, Mask): rotated by 15 bits, plus a constant."""
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def checkpoints_in(directory: Path) -> list[Path]:
    """Prefixes of the checkpoints in a directory, by name; also of one of which only half is there."""
    try:
        paths = list(directory.iterdir())
    except OSError:  # A folder that may not be read: one looks into folders to tell what a reference is.
        return []
    names = {
        found[1]
        for path in paths
        if (found := re.fullmatch(r"(.+)\.(?:index|data-\d{5}-of-\d{5})", path.name)) and path.is_file()
    }
    return [directory / name for name in sorted(names)]
