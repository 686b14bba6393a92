"""WordPiece vocabularies: which characters stand alone, and how tokens are added to a tokenizer's own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_ray.errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast


def is_wordpiece(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer's vocabulary is one of WordPiece, which `add_tokens` adds to."""
    return _state(tokenizer.backend_tokenizer)["model"]["type"] == "WordPiece"


def whole_texts(tokenizer: PreTrainedTokenizerFast) -> Backend:
    """A copy of a tokenizer's backend that neither cuts nor pads: some are saved with a fixed length of either."""
    backend: Backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def stands_alone(backend: Backend, character: str) -> bool:
    """Whether a character is always a word by itself, as marks and Chinese characters are in BERT."""
    text = f"a{character}a"
    if backend.normalizer:
        text = backend.normalizer.normalize_str(text)
    return [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == ["a", character, "a"]


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose WordPiece vocabulary has more tokens, behind those that it had.

    Args:
        tokenizer: stays as it is.
        tokens: that it lacks; those that go on a word begin with ##.

    Raises:
        BundleError: transformers does not take it back as it was written.
    """
    from transformers import AutoTokenizer

    state = _state(tokenizer.backend_tokenizer)
    first = max(tokenizer.get_vocab().values()) + 1
    state["model"]["vocab"] |= {token: first + place for place, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory(prefix="bert_ray-") as scratch:
        tokenizer.save_pretrained(scratch)
        (Path(scratch) / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), "utf-8")
        (Path(scratch) / "vocab.txt").unlink(missing_ok=True)
        wider = AutoTokenizer.from_pretrained(scratch)
    if (largest := max(wider.get_vocab().values())) != first + len(tokens) - 1:
        raise BundleError(f"the tokenizer could not be added to: its largest id is {largest}")
    return wider


def _state(backend: Backend) -> dict[str, Any]:
    return json.loads(backend.to_str())
