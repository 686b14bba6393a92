from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from bert_ray.training.corpus import cleaning
from bert_ray.training.corpus.cleaning import clean, slices


def test_what_cleaning_does() -> None:
    assert clean("  a\tb\r\n\n c  ") == "a b c"
    assert clean("cafe\u0301") == clean("cafe\xad\u0301") == "café"
    assert clean("\ufeffco\xadop\x00 \x1b[1m") == "coop [1m"
    assert clean("\u2028\x1f \x85") == ""
    assert clean("1 < 2 &amp; <br />so") == "1 < 2 &amp; <br />so"
    assert clean("1 < 2 &amp; <br />so<!-- no --><p class='x'>it", "html") == "1 < 2 & so it"


def test_a_number_of_thousands_of_digits_is_no_character_and_no_error() -> None:
    assert clean(f"a &#{'1' * 5000}; b &#{'0' * 5000}65 c &#65;&#x41;", "html") == "a \ufffd b \ufffd c AA"


def test_comments_that_never_end_stay_and_cost_no_more_than_others() -> None:
    assert clean("a <!-- b --> c <!-- <b>d</b>", "html") == "a c <!-- d"
    # Looked for from each of them to the end, theirs would take half an hour.
    never = "<!--" * 2**18
    assert clean(never, "html") == never


# Seams in all kinds of places: blanks, marks, Chinese, letters, combining marks, control characters.
TEXTS = st.text(st.sampled_from("ab \n\t.。好的é\u0301\xad\x00\x85"), max_size=80)


@given(TEXTS)
def test_a_long_text_is_cleaned_as_a_short_one(text: str) -> None:
    whole = clean(text)
    before = cleaning._SLICE_CHARACTERS
    cleaning._SLICE_CHARACTERS = 16
    try:
        sliced = clean(text)
    finally:
        cleaning._SLICE_CHARACTERS = before
    assert sliced == whole


@given(TEXTS, st.integers(5, 40))
def test_slices_join_to_the_text_and_keep_marks_on_their_letters(text: str, size: int) -> None:
    found = list(slices(text, size))
    assert "".join(found) == text
    assert max(map(len, found)) <= size
    for piece in found[1:]:
        # Unless there is nothing but combining marks to cut at.
        assert not unicodedata.combining(piece[0]) or len(set(piece)) < 3 or size < 10


def test_slices_end_at_a_blank_where_there_is_one() -> None:
    assert list(slices("aa bb cc", 4)) == ["aa ", "bb ", "cc"]
    assert list(slices("好好好好好", 2)) == ["好好", "好好", "好"]
    assert list(slices("aaaaa", 2)) == ["aa", "aa", "a"]
