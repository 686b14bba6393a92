"""Tokens to words to entities, as arrays over all rows of a batch at once.

A word is what stands between white space and punctuation; in scripts that are written without blanks (Chinese,
Japanese, Thai, …) each token is a word. Where the table has its words already (a list of strings a row), these are the
words: they travel as one text in which each word is followed by `WORD_END`, in the place of a blank.

Shapes: B rows, P pieces (windows), T tokens, W words, E entities, N code points of all rows together, C tags.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.model.tokenization import FIRST_MARK, Pieces, combining, head_tokens

# Ends each word of a row whose words are given. Medium mathematical space: one code point, white space, and in no text.
WORD_END = "\u205f"

# Scripts that are written without blanks between words, as ranges of code points (Unicode, Blocks.txt): Thai to
# Myanmar, Khmer, CJK radicals, kana, Bopomofo to CJK, compatibility ideographs, halfwidth kana, further ideographs.
WITHOUT_BLANKS = (
    (0x0E00, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x2FDF),
    (0x3040, 0x30FF),
    (0x3100, 0x312F),
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x1B000, 0x1B16F),
    (0x20000, 0x323AF),
)

# Prefixes of tags: those that begin an entity, and those that end one. BIO, BIOES and BILOU share B and I.
_BEGIN, _CLOSE = frozenset("BSU"), frozenset("ESLU")
_PREFIXES = frozenset("BIESLUM")


@lru_cache(maxsize=1)
def _classes() -> tuple[np.ndarray, np.ndarray]:
    """For each code point whether it is white space, and whether words end at it: two bool arrays."""
    blank, ends = np.zeros(0x110000, bool), np.zeros(0x110000, bool)
    for code in range(0x110000):
        # Punctuation as BERT's own tokenizer has it: category P, and all ASCII marks.
        if unicodedata.category(chr(code))[0] == "P":
            ends[code] = True
        elif chr(code).isspace():
            blank[code] = True
    for first, last in ((33, 47), (58, 64), (91, 96), (123, 126), *WITHOUT_BLANKS):
        ends[first : last + 1] = True
    return blank, ends | blank


@dataclass(kw_only=True, slots=True)
class Texts:
    """The code points of B rows, end to end.

    Attributes:
        offsets: int64 (B + 1,); row b is code points `offsets[b]:offsets[b + 1]`.
        blank: bool (N + 1,), where there is white space; one more at the end.
        breaks: int64 (N + 2,), how many code points before each one end a word.
    """

    offsets: np.ndarray
    blank: np.ndarray
    breaks: np.ndarray


def read_texts(texts: Sequence[str]) -> Texts:
    """Texts, each with words to be found or with given ones, as arrays."""
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    # A blank at the end, so that one past the last code point can be asked for as well.
    codes = np.frombuffer("".join([*texts, " "]).encode("utf-32-le", "surrogatepass"), np.uint32)
    blank, ends = (table[codes] for table in _classes())
    if codes.max() >= FIRST_MARK:
        # A mark is of the character that it combines with: a word ends at it or does not, as at that one.
        marks = combining()[codes]
        marks[offsets[:-1]] = False  # At a row's beginning there is none.
        ends = ends[np.maximum.accumulate(np.where(marks, 0, np.arange(len(codes))))]
    given = np.flatnonzero([text.endswith(WORD_END) for text in texts])
    for row in given.tolist():
        part = slice(offsets[row], offsets[row + 1])
        ends[part] = codes[part] == ord(WORD_END)
    breaks = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(ends, out=breaks[1:])
    return Texts(offsets=offsets, blank=blank, breaks=breaks)


def plain(text: str) -> str:
    """A text as people know it: given words joined by one blank each."""
    return text[:-1].replace(WORD_END, " ") if text.endswith(WORD_END) else text


def plain_texts(texts: pa.Array) -> pa.Array:
    """`plain` for an array."""
    given = pc.fill_null(pc.ends_with(texts, WORD_END), False)
    if not pc.any(given).as_py():
        return texts
    # As bytes: a slice at the end, and rows that are no UTF-8, are no matter then.
    raw, mark = texts.cast(pa.large_binary()), WORD_END.encode()
    trimmed = pc.binary_replace_slice(raw, -len(mark), np.iinfo(np.int32).max, b"")
    joined = pc.replace_substring(trimmed, mark, b" ")
    return pc.if_else(given, joined, raw).cast(pa.large_string(), safe=False)


def marked_texts(words: pa.Array) -> pa.Array:
    """Lists of words, one list a row, as texts in which each word is followed by `WORD_END`: large_string.

    A null list is a null text; a null word an empty one.
    """
    words = words.cast(pa.large_list(pa.large_string()))
    flat = pc.fill_null(words.flatten(), "")
    nothing, mark = pa.scalar("", pa.large_string()), pa.scalar(WORD_END, pa.large_string())
    flat = pc.binary_join_element_wise(pc.replace_substring(flat, WORD_END, " "), nothing, mark)
    # The rows are stretches of one long text: cut where the words' own offsets say.
    ends = np.frombuffer(flat.buffers()[1], np.int64)[flat.offset : flat.offset + len(flat) + 1]
    counts = pc.fill_null(pc.list_value_length(words), 0).to_numpy(zero_copy_only=False)
    cuts = ends[np.concatenate([[0], np.cumsum(counts)])] if len(flat) else np.zeros(len(words) + 1, np.int64)
    known = words.is_valid()
    buffers = [None, pa.py_buffer(cuts.astype(np.int64).tobytes()), flat.buffers()[2] or pa.py_buffer(b"")]
    texts = pa.LargeStringArray.from_buffers(len(words), buffers[1], buffers[2])
    return texts if not words.null_count else pc.if_else(known, texts, pa.scalar(None, pa.large_string()))


@dataclass(kw_only=True, slots=True)
class Tokens:
    """The tokens that stand for something in the text, special tokens and lone blanks left out.

    Attributes:
        number: int64, each one's number among all T.
        piece: int64, its piece.
        row: int64, its row.
        start, end: int64, its code points among all N.
    """

    number: np.ndarray
    piece: np.ndarray
    row: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def take(self, which: np.ndarray) -> Tokens:
        """Some of them."""
        return Tokens(
            number=self.number[which],
            piece=self.piece[which],
            row=self.row[which],
            start=self.start[which],
            end=self.end[which],
        )


def text_tokens(pieces: Pieces, texts: Texts, overlap: int | None = None) -> Tokens:
    """The tokens of all pieces.

    Args:
        pieces: with `spans` and `sources`.
        texts: the rows' texts.
        overlap: where given, each token of the text once: of the windows that share one, that in which it stands
            farther from the edge, with more to see on both sides. None: every token of every window.
    """
    assert pieces.spans is not None and pieces.sources is not None
    number = np.flatnonzero(pieces.sources >= 0)
    piece = np.repeat(np.arange(len(pieces)), pieces.tokens.lengths)[number]
    row = pieces.rows[piece] if len(number) else piece
    if overlap is not None:
        once = _once(pieces, piece, overlap)
        number, piece, row = number[once], piece[once], row[once]
    start = pieces.spans[number, 0] + texts.offsets[row]
    end = pieces.spans[number, 1] + texts.offsets[row]
    # Tokens of some tokenizers (SentencePiece) begin with the blank before the word, or are that blank alone.
    while (lead := (start < end) & texts.blank[start]).any():
        start += lead
    return Tokens(number=number, piece=piece, row=row, start=start, end=end).take(np.flatnonzero(start < end))


def _once(pieces: Pieces, piece: np.ndarray, overlap: int) -> np.ndarray:
    """Which tokens to take so that each of the text stands once, in the order of the text."""
    starts = pieces.starts
    several = np.diff(starts) > 1
    if not several.any():
        return np.arange(len(piece))
    counts = np.bincount(piece, minlength=len(pieces))
    place = np.arange(len(piece)) - (np.cumsum(counts) - counts)[piece]
    window = np.arange(len(pieces)) - starts[:-1][pieces.rows]
    is_last = np.zeros(len(pieces), bool)
    is_last[starts[1:] - 1] = True
    # A window that is not the last is full, and the next one begins where its `overlap` last tokens do.
    room = int(counts[starts[:-1][several][0]])
    number = window[piece] * (room - window_overlap(overlap, room)) + place
    far = np.iinfo(np.int64).max
    left = np.where(window[piece] == 0, far, place)
    right = np.where(is_last[piece], far, counts[piece] - 1 - place)
    row = pieces.rows[piece]
    order = np.lexsort((-np.minimum(left, right), number, row))
    fresh = np.ones(len(order), bool)
    fresh[1:] = (row[order][1:] != row[order][:-1]) | (number[order][1:] != number[order][:-1])
    return order[fresh]


def window_overlap(overlap: int, room: int) -> int:
    """Tokens that windows with room for `room` tokens share: as asked, but each moves on by half its room at least."""
    return min(overlap, room // 2)


def word_begins(tokens: Tokens, texts: Texts, group: np.ndarray) -> np.ndarray:
    """Where a word begins, bool, one a token.

    Args:
        tokens: in order of the text within each group.
        texts: the rows' texts.
        group: what is read together: the row, or the piece where each window stands for itself.
    """
    first, first_of_row = np.ones(len(group), bool), np.ones(len(group), bool)
    first[1:] = group[1:] != group[:-1]
    first_of_row[1:] = tokens.row[1:] != tokens.row[:-1]
    before = np.maximum(tokens.start - 1, 0)
    before[1:] = np.where(first[1:], before[1:], tokens.end[:-1] - 1)
    begins = texts.breaks[tokens.start + 1] > texts.breaks[np.minimum(before, tokens.start)]
    # Tokens that share a code point (bytes of it, in a byte-level vocabulary) are one word.
    begins[1:] &= first[1:] | (tokens.start[1:] >= tokens.end[:-1])
    return begins | first_of_row


def stretches(tokens: Tokens, pieces: Pieces, texts: Texts, max_length: int) -> np.ndarray:
    """The stretch of text that each token stands in, int64, where the middle of long texts was left out (`head_tail`).

    A piece of so many tokens may have lost its middle behind its head; it has where there is text that has no token.
    """
    place = tokens.number - pieces.tokens.offsets[tokens.piece]
    tail = (pieces.tokens.lengths[tokens.piece] == max_length) & (place >= head_tokens(max_length))
    seen = np.concatenate([[0], np.cumsum(~texts.blank)])
    cut = tail[1:] & ~tail[:-1] & (seen[tokens.start[1:]] > seen[tokens.end[:-1]])
    return np.cumsum(np.concatenate([[0], cut | (tokens.row[1:] != tokens.row[:-1])]))[: len(tokens.row)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tags:
    """What a model's outputs stand for.

    Attributes:
        names: the C tags, as the model's configuration has them.
        types: the entity types, in order of appearance.
        kind: int64 (C,), each tag's type; -1 for "O".
        begins: bool (C,), whether it always begins an entity.
        closes: bool (C,), whether it always ends one.
    """

    names: tuple[str, ...]
    types: tuple[str, ...]
    kind: np.ndarray
    begins: np.ndarray
    closes: np.ndarray

    def ids(self, begin: bool) -> np.ndarray:
        """The tag of each type's first word (or of its further ones), int64 (types,): B (or I), else what there is."""
        wanted = "B" if begin else "I"
        found = np.full(len(self.types), -1, np.int64)
        for tag, (name, kind) in enumerate(zip(self.names, self.kind.tolist(), strict=True)):
            if kind >= 0 and (found[kind] < 0 or name == f"{wanted}-{self.types[kind]}"):
                found[kind] = tag
        return found


def read_tags(names: Sequence[str], known: Collection[str] = ()) -> Tags:
    """Understand tags: BIO, BIOES, BILOU, or an entity's bare type (IO).

    E, S, L, U and M before a hyphen count as prefixes only before a type that is known or also stands with a B or an I
    before it, so that a type "E-MAIL" is one; or where the letter is a prefix of another type by that.

    Args:
        names: the tags.
        known: entity types that are known to be some.
    """
    spanned = {name[2:] for name in names if name[:2] in ("B-", "I-")} | set(known)
    letters = {name[0] for name in names if name[1:2] == "-" and name[2:] in spanned}
    types: dict[str, int] = {}
    kind, begins, closes = [], [], []
    for name in names:
        prefix, kind_name = "", name
        whole = name in known and name[0] not in "BI"
        if name[1:2] == "-" and name[0] in _PREFIXES and (name[2:] in spanned or name[0] in letters) and not whole:
            prefix, kind_name = name[0], name[2:]
        kind.append(-1 if name == "O" else types.setdefault(kind_name, len(types)))
        begins.append(prefix in _BEGIN)
        closes.append(prefix in _CLOSE)
    return Tags(
        names=tuple(names),
        types=tuple(types),
        kind=np.array(kind, np.int64),
        begins=np.array(begins, bool),
        closes=np.array(closes, bool),
    )


def is_tag(name: str | None) -> bool:
    """Whether a truth column may hold it: "O", a prefix with a type, or a type; not empty, not a prefix alone."""
    return bool(name) and name not in _PREFIXES and not (name[1:] == "-" and name[0] in _PREFIXES)  # type: ignore[index]


def entity_runs(tags: Tags, said: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last word of each entity, two int64 (E,).

    As seqeval's default mode (the CoNLL evaluation script) has it: an entity also begins at an I that follows an O or
    another type.

    Args:
        tags: the tags.
        said: int64 (W,), each word's tag.
        row: int64 (W,), each word's row, ascending.
    """
    kind, begins, closes = tags.kind[said], tags.begins[said], tags.closes[said]
    inside = kind >= 0
    follows = np.zeros(len(said) + 1, bool)
    follows[1:-1] = inside[1:] & (row[1:] == row[:-1]) & (kind[1:] == kind[:-1]) & ~begins[1:] & ~closes[:-1]
    return np.flatnonzero(inside & ~follows[:-1]), np.flatnonzero(inside & ~follows[1:])
