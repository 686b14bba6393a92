"""Text that does not fit into a window: read, or an error, never lost."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers

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


def test_the_library_that_is_here_is_not() -> None:
    tokenization.Tokenizer(tiny_tokenizer(), 16, overflow="windows")
