"""Arrow strings -> token ids, ragged and without padding.

Shapes: B rows, T tokens of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.errors import ColumnError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A text is first cut to this many characters a token: tokens of natural text have 3 to 6. Where the head was not
# enough (long blanks, long words), it is widened, so that the result is that of the whole text.
_HEAD_CHARS_PER_TOKEN = 16


@dataclass(kw_only=True, slots=True)
class Ragged:
    """Token ids of many rows, end to end.

    Attributes:
        ids: int32 (T,).
        types: int32 (T,), 1 in the second of two texts; None for rows of one text.
        offsets: int64 (B + 1,); row b is `ids[offsets[b]:offsets[b + 1]]`.
    """

    ids: np.ndarray
    types: np.ndarray | None
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 (B,)."""
        return np.diff(self.offsets)


class Tokenizer:
    """The batch tokenizer of a bundle, cutting rows to `max_length` tokens, special tokens included.

    Two texts of a pair are cut longest first, as transformers does by default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self.max_length = max_length
        # A copy: truncation and padding are state of the backend, and the caller's tokenizer is not ours to change.
        self._backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.enable_truncation(max_length, strategy="longest_first")
        self._uncut = type(self._backend).from_str(self._backend.to_str())
        self._uncut.no_truncation()

    def __call__(self, inputs: Sequence[pa.Array]) -> Ragged:
        """Tokenise rows given as one array of strings per input (one, or two for pairs), none of them null."""
        columns = [[self._head(text) for text in to_python_strings(array)] for array in inputs]
        rows = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        encodings = self._backend.encode_batch_fast(rows)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(encoding) for encoding in encodings], out=offsets[1:])
        total = int(offsets[-1])
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, total)
        types = None
        if len(columns) > 1:
            types = np.fromiter(chain.from_iterable(encoding.type_ids for encoding in encodings), np.int32, total)
        return Ragged(ids=ids, types=types, offsets=offsets)

    def _head(self, text: str) -> str:
        """The part of a huge text that decides its first `max_length` tokens (10 MB would take seconds, for 512)."""
        size = _HEAD_CHARS_PER_TOKEN * self.max_length
        while len(text) > size:
            head = text[:size]
            # Pre-tokenizers split at blanks, so tokens before the last blank do not depend on what follows it.
            # Where the script has none, the margin of one max_length stands in.
            blank = max(head.rfind(" "), head.rfind("\n"))
            known = head[:blank] if blank > 0 else head
            if len(self._uncut.encode(known, add_special_tokens=False)) >= 2 * self.max_length:
                return known
            size *= 4
        return text


def as_strings(array: pa.Array | pa.ChunkedArray, column: str) -> pa.LargeStringArray:
    """Bring any of Arrow's string forms (also dictionary-encoded, chunked, all null) to one large_string array.

    Raises:
        ColumnError: the column does not hold text.
    """
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if not is_text(kind):
        raise ColumnError(
            f"column {column!r} is {array.type}, not text: cast it to string, or name another with --column"
        )
    array = array.cast(pa.large_string()) if array.type != pa.large_string() else array
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    return array


def is_text(kind: pa.DataType) -> bool:
    """Whether Arrow type `kind` can stand as an input: a string form, or the null type of an all-null column."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def is_blank(array: pa.Array) -> pa.BooleanArray:
    """Where a text is empty or white space alone."""
    try:
        return pc.equal(pc.binary_length(pc.utf8_trim_whitespace(array)), 0)
    except pa.ArrowInvalid:  # Bytes that are no UTF-8: Arrow's trim refuses the whole array.
        return pa.array([None if text is None else not text.strip() for text in to_python_strings(array)])


def to_python_strings(array: pa.Array) -> list[Any]:
    """Texts as str, nulls as None. The one place where text leaves Arrow: the tokenizer's door.

    Bytes that are no UTF-8 (a lone surrogate written by another system, say) become U+FFFD for the model; the
    column itself stays as it is.
    """
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        raw = array.cast(pa.large_binary()).to_pylist()
        return [None if item is None else item.decode("utf-8", errors="replace") for item in raw]
