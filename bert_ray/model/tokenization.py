"""Arrow strings -> token ids, ragged and without padding.

Shapes: B rows, P pieces, T tokens of all pieces together.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.errors import BundleError, ColumnError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A text is first cut to this many characters a token: tokens of natural text have 3 to 6. Where the head was not
# enough (long blanks, long words), it is widened, so that the result is that of the whole text.
_HEAD_CHARS_PER_TOKEN = 16

# Where more than this share of a table's tokens is unknown, the vocabulary is another language's.
MOST_UNKNOWN = 1 / 3
# A table is judged by so many of its texts, from all over it, and by so many characters of each.
_JUDGED_TEXTS, _JUDGED_CHARACTERS = 1_000, 1_000


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


@dataclass(kw_only=True, slots=True)
class Pieces:
    """What rows became for the model: one token list a row, or several (windows of a long text, texts told apart).

    Attributes:
        tokens: token ids of P pieces.
        rows: int64 (P,), the row that each piece belongs to, ascending; no row is without a piece.
        spans: int32 (T, 2), for each token the code points [start, end) of the text it stems from, combining marks
            behind them included; (0, 0) for special tokens. None unless the task asks for them.
        sources: int8 (T,), which input a token stems from (0, 1, …), -1 for special tokens; None like `spans`.
    """

    tokens: Ragged
    rows: np.ndarray
    spans: np.ndarray | None = None
    sources: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def starts(self) -> np.ndarray:
        """Pieces of row b are `starts[b]:starts[b + 1]`; int64 (B + 1,)."""
        count = int(self.rows[-1]) + 1 if len(self.rows) else 0
        return np.searchsorted(self.rows, np.arange(count + 1))


@lru_cache
def _check_that_nothing_is_lost() -> None:
    """Releases 0.23.0 to 0.23.2 of tokenizers stop reading where the first window is full, and say nothing of it.

    https://github.com/huggingface/tokenizers/issues/2091
    """
    import tokenizers

    probe = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    probe.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    probe.enable_truncation(2)
    windows = 1 + len(probe.encode("a " * 8).overflowing)
    if windows != 4:
        raise BundleError(
            f"tokenizers {tokenizers.__version__} loses what stands behind a text's first window (of 4 it gave "
            f"{windows}): pip install 'tokenizers>=0.23.3'"
        )


Overflow = Literal["truncate", "head_tail", "windows"]
Cut = Literal["longest_first", "only_first", "only_second"]


class Tokenizer:
    """The batch tokenizer of a bundle: rows of at most `max_length` tokens, special tokens included.

    What does not fit is, by `overflow`: cut off ("truncate"; two texts of a pair the longest first, as transformers
    does by default); left out of the middle ("head_tail": the first quarter of the room and the last three, after Sun
    et al., How to Fine-Tune BERT for Text Classification?, arXiv 1905.05583, section 5.3.1); or put into further pieces
    ("windows"), each of which begins with the `overlap` last tokens of the one before.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        *,
        overflow: Overflow = "truncate",
        overlap: int = 0,
        cut: Cut = "longest_first",
        spans: bool = False,
    ) -> None:
        """Set up.

        Args:
            tokenizer: a fast tokenizer of transformers; it is copied.
            max_length: most tokens of a piece.
            overflow: what becomes of more than that.
            overlap: tokens that neighbouring windows share.
            cut: which text of a pair gives way.
            spans: also tell which code points each token stems from.

        Raises:
            BundleError: the overlap leaves no room for a window to move on; or the tokenizers library that is installed
                loses what stands behind a text's first window.
        """
        self.max_length = max_length
        self.overflow = overflow
        self.spans = spans
        self._unknown: int | None = tokenizer.unk_token_id
        # A copy: truncation and padding are state of the backend, and the caller's tokenizer is not ours to change.
        self._backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._uncut = type(self._backend).from_str(self._backend.to_str())
        self._uncut.no_truncation()
        if overflow == "head_tail":
            self._backend.no_truncation()
        else:
            stride = overlap if overflow == "windows" else 0
            if stride >= max_length - self._backend.num_special_tokens_to_add(False):
                raise BundleError(
                    f"an overlap of {stride} tokens fills a window of {max_length}: give a smaller overlap"
                )
            if overflow == "windows":
                _check_that_nothing_is_lost()
            self._backend.enable_truncation(max_length, stride=stride, strategy=cut)

    def __call__(self, inputs: Sequence[pa.Array]) -> Pieces:
        """Tokenise rows given as one array of strings per input (one, or two for pairs), none of them null."""
        if len(inputs) > 1 and self.max_length <= (special := self._backend.num_special_tokens_to_add(True)):
            raise BundleError(f"max_length is {self.max_length}, and two texts have {special} special tokens alone")
        columns = [to_python_strings(array) for array in inputs]
        if self.overflow == "truncate":
            columns = [[self._head(text) for text in column] for column in columns]
        rows = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        encode = self._backend.encode_batch if self.spans else self._backend.encode_batch_fast
        encodings = encode(rows)
        owners = np.arange(len(encodings))
        if self.overflow == "windows":
            owners = np.repeat(owners, [1 + len(encoding.overflowing) for encoding in encodings])
            encodings = [piece for encoding in encodings for piece in (encoding, *encoding.overflowing)]
        pieces = self._pieces(encodings, owners, pair=len(columns) > 1)
        _take_marks_along(pieces, columns)
        return _without_middle(pieces, self.max_length) if self.overflow == "head_tail" else pieces

    def cut(self, texts: pa.Array, tokens: int) -> pa.Array:
        """Texts cut at the end of their `tokens`th token, large_string; shorter ones as they are."""
        result = []
        for text, encoding in zip(
            found := to_python_strings(texts), self._uncut.encode_batch(found, add_special_tokens=False), strict=True
        ):
            result.append(text[: encoding.offsets[tokens - 1][1]] if len(encoding) > tokens else text)
        return pa.array(result, pa.large_string())

    def unknown_share(self, texts: pa.Array) -> float:
        """Share of tokens that the vocabulary has no piece for, in a sample of texts; nulls are passed over."""
        texts = texts.drop_null()
        places = np.linspace(0, len(texts) - 1, min(len(texts), _JUDGED_TEXTS)).astype(np.int64)
        heads = [text[:_JUDGED_CHARACTERS] for text in to_python_strings(texts.take(pa.array(places)))]
        encodings = self._uncut.encode_batch_fast(heads, add_special_tokens=False)
        ids = [token for encoding in encodings for token in encoding.ids]
        return ids.count(self._unknown) / max(1, len(ids))

    def unknown_note(self, texts: pa.Array) -> str | None:
        """What to tell where the vocabulary cannot spell the language of these texts; None where it can."""
        if (share := self.unknown_share(texts)) <= MOST_UNKNOWN:
            return None
        return (
            f"{share:.0%} of the tokens are unknown to the model's vocabulary, as of a language that it cannot spell: "
            "take a model that was pretrained on this language"
        )

    def _pieces(self, encodings: list[Any], owners: np.ndarray, pair: bool) -> Pieces:
        offsets = np.zeros(len(encodings) + 1, np.int64)
        np.cumsum([len(encoding) for encoding in encodings], out=offsets[1:])
        total = int(offsets[-1])
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, total)
        types = spans = sources = None
        if pair:
            types = np.fromiter(chain.from_iterable(encoding.type_ids for encoding in encodings), np.int32, total)
        if self.spans:
            flat = chain.from_iterable(chain.from_iterable(encoding.offsets) for encoding in encodings)
            spans = np.fromiter(flat, np.int32, 2 * total).reshape(total, 2)
            known = chain.from_iterable(encoding.sequence_ids for encoding in encodings)
            sources = np.fromiter((-1 if item is None else item for item in known), np.int8, total)
        tokens = Ragged(ids=ids, types=types, offsets=offsets)
        return Pieces(tokens=tokens, rows=owners, spans=spans, sources=sources)

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


# Below this code point nothing combines.
FIRST_MARK = 0x300


@lru_cache(maxsize=1)
def combining() -> np.ndarray:
    """For each code point whether it combines with the one before it (Unicode's category M), bool."""
    return np.array([unicodedata.category(chr(code))[0] == "M" for code in range(0x110000)])


def _take_marks_along(pieces: Pieces, columns: Sequence[Sequence[str]]) -> None:
    """Move the ends of spans on over combining marks that belong to no token.

    Normalisers that strip accents drop marks, and the tokenizer's spans end before them: what is cut out of a text by
    its spans would lose its last accent, or the vowel of a Hindi syllable.
    """
    spans, sources = pieces.spans, pieces.sources
    if spans is None or sources is None:
        return
    piece = np.repeat(np.arange(len(pieces)), pieces.tokens.lengths)
    for source, texts in enumerate(columns):
        # A blank behind each text, so that none runs on into the next.
        codes = np.frombuffer(" ".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
        if codes.max(initial=0) < FIRST_MARK or not (marks := combining()[codes]).any():
            continue
        begins = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) + 1 for text in texts], out=begins[1:])
        # The first place from each one on where there is no mark.
        places = np.where(marks, len(codes), np.arange(len(codes)))
        plain = np.minimum.accumulate(places[::-1])[::-1]
        token = np.flatnonzero((sources == source) & (spans[:, 0] < spans[:, 1]))
        begin = begins[pieces.rows[piece[token]]]
        end = plain[begin + spans[token, 1]] - begin
        # Not past the next token: of a tokenizer that keeps marks, they are its own.
        follows = np.flatnonzero(piece[token[1:]] == piece[token[:-1]])
        end[follows] = np.minimum(end[follows], np.maximum(spans[token[follows + 1], 0], spans[token[follows], 1]))
        spans[token, 1] = end


def head_tokens(max_length: int) -> int:
    """Tokens of a piece that stand before the middle that is left out of it (`head_tail`)."""
    return max(1, max_length // 4)


def _without_middle(pieces: Pieces, max_length: int) -> Pieces:
    """Pieces of one text each, cut to their head and tail; the special tokens at both ends stay."""
    lengths = pieces.tokens.lengths
    if (lengths <= max_length).all():
        return pieces
    head = head_tokens(max_length)
    keep = np.ones(len(pieces.tokens.ids), bool)
    for start, length in zip(
        pieces.tokens.offsets[:-1][lengths > max_length], lengths[lengths > max_length], strict=True
    ):
        keep[start + head : start + length - (max_length - head)] = False
    offsets = np.zeros_like(pieces.tokens.offsets)
    np.cumsum(np.minimum(lengths, max_length), out=offsets[1:])
    return Pieces(
        tokens=Ragged(ids=pieces.tokens.ids[keep], types=None, offsets=offsets),
        rows=pieces.rows,
        spans=None if pieces.spans is None else pieces.spans[keep],
        sources=None if pieces.sources is None else pieces.sources[keep],
    )


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
    if isinstance(kind, pa.BaseExtensionType):  # Parquet's JSON is text by another name.
        kind = kind.storage_type
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether Arrow type `kind` is of lists; list views, which few of Arrow's functions know, are none."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


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
