"""Text that does not fit into a window: read, or an error, never lost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from bert_ray.errors import BundleError
from bert_ray.model import tokenization
from tests.conftest import tiny_tokenizer


class Losing:
    """A tokenizer like that of tokenizers 0.23.1: what stands behind the first window is not there."""

    def __init__(self, *arguments: Any) -> None:
        self._whole = _WHOLE(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def encode(self, text: str) -> Any:
        """The first window alone."""
        found = self._whole.encode(" ".join(text.split()[:2]))
        assert found.overflowing == []
        return found


_WHOLE = tokenizers.Tokenizer


@pytest.fixture(autouse=True)
def anew() -> Any:
    """What was found out before counts no more."""
    tokenization._check_that_nothing_is_lost.cache_clear()
    yield
    tokenization._check_that_nothing_is_lost.cache_clear()


def test_a_library_that_loses_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizers, "Tokenizer", Losing)
    tokenization.Tokenizer(tokenizer, 16)  # Nobody asks for the rest.
    with pytest.raises(BundleError, match=r"loses what stands behind.*of 4 it gave 1.*pip install"):
        tokenization.Tokenizer(tokenizer, 16, overflow="windows")


def test_lengths_that_leave_no_room() -> None:
    tokenizer = tiny_tokenizer()
    pair = [pa.array(["good film"])] * 2
    with pytest.raises(BundleError, match="max_length is 3, and two texts have 3 special tokens alone"):
        tokenization.Tokenizer(tokenizer, 3)(pair)
    assert tokenization.Tokenizer(tokenizer, 5)(pair).tokens.lengths.tolist() == [5]
    (ids,) = [tokenization.Tokenizer(tokenizer, 3, overflow="head_tail")([pa.array(["good film good"])]).tokens.ids]
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id


def test_the_library_that_is_here_is_not() -> None:
    tokenization.Tokenizer(tiny_tokenizer(), 16, overflow="windows")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Jose\u0301 went", ["Jose\u0301", "went"]),
        ("so e\u0301\u0302\u0301", ["so", "e\u0301\u0302\u0301"]),
        ("i \u2764\ufe0f it", ["i", "\u2764\ufe0f", "it"]),
        ("plain", ["plain"]),
        ("\u0301", []),
    ],
)
def test_marks_that_the_normaliser_drops_belong_to_the_token_before(text: str, parts: list[str]) -> None:
    tokenize = tokenization.Tokenizer(tiny_tokenizer(), 32, spans=True)
    for inputs in ([["x", text]], [["why e\u0301", "\u0301"], ["x", text]]):
        pieces = tokenize([pa.array(column, pa.large_string()) for column in inputs])
        last = slice(pieces.tokens.offsets[1], None)
        spans = pieces.spans[last][pieces.sources[last] == len(inputs) - 1]
        # Pieces of one word follow each other.
        words = [text[start:end] for start, end in spans]
        assert "".join(words) == "".join(parts)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_a_tokenizer_that_keeps_marks_has_them_as_they_are() -> None:
    """Each mark is a token of its own."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "\u0301": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    pieces = tokenization.Tokenizer(tokenizer, 32, spans=True)([pa.array(["a\u0301a"], pa.large_string())])
    assert pieces.spans.tolist() == [[0, 1], [1, 2], [2, 3]]
