"""A text as it goes into a corpus: Unicode NFC, no control characters, one space between words.

Texts of any length: what takes memory in proportion to a text is done slice by slice.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator

# The characters that BERT's tokenizer sets apart as words: the CJK ideographs (google-research/bert, tokenization.py,
# `_is_chinese_char`), as the inside of a character class.
CHINESE = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002f800-\U0002fa1f"
)

# Control characters that are no white space, soft hyphens, and byte order marks.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\ufeff]+")
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,2000}>")
_TAG_OR_COMMENT = re.compile(rf"<!--.*?-->|{_TAG.pattern}", re.DOTALL)
# Numbers that Python refuses to read for their digits (`sys.set_int_max_str_digits`); no character has such a one.
_ENDLESS_REFERENCE = re.compile("&#[0-9]{640,};?")
_APART = re.compile(f"[^\\w]|[{CHINESE}]")
# A longer text is cleaned in slices of so many characters: the list of its words would take many times its size.
_SLICE_CHARACTERS = 2**20
# So far back a place to cut is looked for.
_LOOK_BACK_CHARACTERS = 1000


def clean(text: str, markup: str = "none") -> str:
    """The text as it goes into a corpus; "" where nothing is left.

    Args:
        text: any text.
        markup: "html": tags become spaces and character references their characters; "none": it stays.
    """
    if markup == "html":
        text = _without_markup(text) if "<" in text or "&" in text else text
    # Before anything else: a control character may stand between a letter and its mark.
    text = _CONTROL.sub("", text)
    if len(text) <= _SLICE_CHARACTERS:
        return _clean(text)
    parts: list[str] = []
    apart = False
    for piece in slices(text, _SLICE_CHARACTERS):
        if body := _clean(piece):
            if parts and (apart or piece[0].isspace()):
                parts.append(" ")
            parts.append(body)
            apart = piece[-1].isspace()
        else:
            apart = apart or any(map(str.isspace, piece))
    return "".join(parts)


def _without_markup(text: str) -> str:
    """Without tags and comments; where no comment ends any more none is looked for: each would be, up to the end."""
    ends = text.rfind("-->")
    last = 0 if ends < 0 else ends + 3
    untagged = _TAG_OR_COMMENT.sub(" ", text[:last]) + _TAG.sub(" ", text[last:])
    # As `html.unescape` has other numbers of no character.
    return html.unescape(_ENDLESS_REFERENCE.sub("\ufffd", untagged))


def slices(text: str, size: int) -> Iterator[str]:
    """A text in slices of at most `size` characters, cut behind white space where there is any.

    Where there is none, they are cut behind a mark or a Chinese character, where no word goes on either.
    """
    start = 0
    while len(text) - start > size:
        stop = start + _cut(text[start : start + size + 1])
        yield text[start:stop]
        start = stop
    yield text[start:]


def _clean(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _cut(text: str) -> int:
    """Where to cut a text, before its last character at the latest."""
    last = len(text) - 1
    first = max(1, last - _LOOK_BACK_CHARACTERS)
    for place in range(last, first - 1, -1):
        if text[place - 1].isspace() and not unicodedata.combining(text[place]):
            return place
    for place in range(last, first - 1, -1):
        if _APART.match(text[place - 1]) and not unicodedata.combining(text[place]):
            return place
    return last
