"""Plain-text files as documents: .txt and .txt.gz, a document being a line, a paragraph or a file.

A large file is shared out in spans of bytes: a span has the documents that begin in it, so no document is cut.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bert_ray.errors import LakeError, why
from bert_ray.lake.files import printable
from bert_ray.lake.tables import is_data, once, walk
from bert_ray.lake.units import Unit
from bert_ray.training.corpus.job import ReadingOptions

_SUFFIXES = (".txt", ".txt.gz")
# Parquet and Arrow count the bytes of a value in 31 bits, and a document is in memory whole.
_MOST_DOCUMENT_BYTES = 2**30
# Documents are handed on in batches of so many, or about so much.
_BATCH_DOCUMENTS, _BATCH_BYTES = 8192, 8 * 2**20
# Where a line break is looked for, so much is read at a time.
_STEP_BYTES = 64 * 2**10


def text_files(place: Path) -> list[Path]:
    """The plain-text files of a directory at any depth, links followed, in path order; or one file, whatever its name.

    Raises:
        LakeError: a directory below it cannot be listed.
    """
    if place.is_file():
        return [place]
    found = (path for path in walk(place, is_data) if is_data(path.name) and path.name.lower().endswith(_SUFFIXES))
    return once(sorted(found), place)


def spans_of(path: Path, size: int, options: ReadingOptions, unit_bytes: int) -> list[tuple[int, int] | None]:
    """The spans of bytes that a file of `size` bytes is read in; [None]: whole."""
    # In a span's middle the next document is found by its line break, which has to be this one byte.
    splits = options.documents != "file" and not _packed(path) and _one_byte_lines(options.encoding)
    if not splits or size <= unit_bytes:
        return [None]
    return [(start, min(start + unit_bytes, size)) for start in range(0, size, unit_bytes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReader:
    """Reads units of plain-text files; small and picklable, it travels to the workers.

    Attributes:
        root: the directory that the units' paths start from.
        options: how a file is read.
    """

    root: str
    options: ReadingOptions

    def read(self, unit: Unit, span: tuple[int, int] | None) -> Iterator[tuple[list[str | None], int]]:
        """The documents of a unit in order, a batch at a time, and in how many of them bytes were replaced.

        Raises:
            LakeError: the file is damaged, is gone, has changed since it was planned, has a document of more than
                1 GiB, or bytes that are no text.
        """
        path = Path(self.root, unit.path)
        told = printable(path)
        try:
            status = path.stat()
            if (status.st_size, status.st_mtime_ns) != (unit.size_bytes, unit.modified_ns):
                raise LakeError(f"{told} changed after the run had begun: run again to take it as it is now")
            texts: list[str | None] = []
            replaced = size = 0
            with self._open(path) as file:
                for start, raw in _DOCUMENTS[self.options.documents](path, file, span):
                    text, bad = self._text(path, start, raw)
                    texts.append(text)
                    replaced += bad
                    size += len(raw)
                    if len(texts) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
                        yield texts, replaced
                        texts, replaced, size = [], 0, 0
            if texts:
                yield texts, replaced
        except FileNotFoundError:
            raise LakeError(f"{told} is gone, or this machine does not see it") from None
        except (OSError, EOFError, zlib.error) as error:
            raise LakeError(f"{told} cannot be read: {why(error)}. Replace the file and run again") from error

    def _open(self, path: Path) -> IO[bytes]:
        file: IO[bytes] = gzip.open(path) if _packed(path) else path.open("rb")  # type: ignore[assignment]  # noqa: SIM115
        if _one_byte_lines(self.options.encoding):
            return file
        # UTF-16 and the like: lines are found in the text, and such a file is in memory whole.
        with file:
            text, _ = _decode(path, 0, file.read(), self.options.encoding, self.options.bad_bytes)
        return io.BytesIO(text.encode("utf-8"))

    def _text(self, path: Path, start: int, raw: bytes) -> tuple[str, bool]:
        """A document's text, and whether bytes of it were replaced."""
        if _one_byte_lines(self.options.encoding):
            return _decode(path, start, raw, self.options.encoding, self.options.bad_bytes)
        text = raw.decode("utf-8")
        return text, "\ufffd" in text


def _by_line(path: Path, file: IO[bytes], span: tuple[int, int] | None) -> Iterator[tuple[int, bytes]]:
    """Where each line that begins in the span begins, and its bytes."""
    start, stop = span or (0, None)
    place = _next_line(file, start)
    while (stop is None or place < stop) and (line := file.readline(_MOST_DOCUMENT_BYTES + 1)):
        if len(line) > _MOST_DOCUMENT_BYTES:
            raise _too_long(path, place)
        yield place, line
        place += len(line)


def _by_paragraph(path: Path, file: IO[bytes], span: tuple[int, int] | None) -> Iterator[tuple[int, bytes]]:
    """The same for paragraphs; the last one goes on beyond the span."""
    start, stop = span or (0, None)
    place = _next_line(file, start)
    # One that begins before the span is not its.
    foreign = place > 0 and not _behind_blank(file, place)
    held: list[bytes] = []
    first = size = 0
    for begins, line in _by_line(path, file, (place, sys.maxsize)):
        if not line.strip():
            if held:
                yield first, b"".join(held)
            held, foreign = [], False
            continue
        if not held:
            if stop is not None and begins >= stop:  # None begins in the span any more.
                return
            if foreign:
                continue
            first, size = begins, 0
        held.append(line)
        size += len(line)
        if size > _MOST_DOCUMENT_BYTES:
            raise _too_long(path, first)
    if held:
        yield first, b"".join(held)


def _by_file(path: Path, file: IO[bytes], span: tuple[int, int] | None) -> Iterator[tuple[int, bytes]]:
    """The same for a whole file."""
    raw = file.read(_MOST_DOCUMENT_BYTES + 1)
    if len(raw) > _MOST_DOCUMENT_BYTES:
        raise _too_long(path, 0)
    yield 0, raw


_DOCUMENTS = {"line": _by_line, "paragraph": _by_paragraph, "file": _by_file}


def _next_line(file: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or behind it."""
    if start > 0:
        file.seek(start - 1)
        while (part := file.readline(_STEP_BYTES)) and not part.endswith(b"\n"):
            pass
        return file.tell()
    file.seek(0)
    return 0


def _behind_blank(file: IO[bytes], place: int) -> bool:
    """Whether the line before the one that begins at `place` is blank; stays where it is."""
    stop = place - 1  # Without its own line break.
    while stop > 0:
        begin = max(0, stop - _STEP_BYTES)
        file.seek(begin)
        before = file.read(stop - begin).rpartition(b"\n")
        if before[2].strip() or before[1]:
            file.seek(place)
            return not before[2].strip()
        stop = begin
    file.seek(place)
    return True


def _decode(path: Path, start: int, raw: bytes, encoding: str, bad_bytes: str) -> tuple[str, bool]:
    """The text of bytes that begin at `start` of a file, and whether some were replaced."""
    try:
        return raw.decode(encoding), False
    except UnicodeDecodeError as error:
        if bad_bytes == "replace":
            return raw.decode(encoding, errors="replace"), True
        unpacked = " of what it unpacks to" if _packed(path) else ""
        raise LakeError(
            f"{printable(path)}: byte {start + error.start:,}{unpacked} (0x{raw[error.start]:02x}) is no {encoding}: "
            "give reading.encoding, or reading.bad_bytes=replace to have U+FFFD in its place"
        ) from None


def _too_long(path: Path, start: int) -> LakeError:
    return LakeError(
        f"{printable(path)}: the document at byte {start:,} has more than {_MOST_DOCUMENT_BYTES // 2**30} GiB: give "
        "another reading.documents (line, paragraph), or break it up"
    )


def _packed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _one_byte_lines(encoding: str) -> bool:
    """Whether a line break is the one byte that it is in ASCII, so that lines are found before they are decoded."""
    return "a\n".encode(encoding)[-2:] == b"a\n"
