from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest

from bert_ray.training.corpus import duplicates
from bert_ray.training.corpus.duplicates import EXACT, KEPT, NEAR, bands, decide, signer
from bert_ray.training.corpus.job import NearOptions
from tests.unit.training.corpus.conftest import sentence

OPTIONS = NearOptions()


def verdicts(texts: list[str], near: bool = True) -> list[int]:
    """What is decided on some texts."""
    import hashlib

    ids = np.frombuffer(b"".join(hashlib.md5(text.encode()).digest() for text in texts), np.uint64).reshape(-1, 2)
    sign = signer(OPTIONS)
    signed = np.stack([sign(text) for text in texts])
    return decide(ids, (lambda band: signed[:, band].copy()) if near else None, signed.shape[1]).tolist()


def test_the_first_of_equal_or_like_documents_stays() -> None:
    long = sentence(1, 400)
    words = long.split()
    like = " ".join([*words[:200], "other", *words[201:]])
    texts = ["short one", long, sentence(2, 400), like, long, "short one", "Short, one!", like]
    assert verdicts(texts) == [KEPT, KEPT, KEPT, NEAR, EXACT, EXACT, NEAR, EXACT]
    assert verdicts(texts, near=False) == [KEPT, KEPT, KEPT, KEPT, EXACT, EXACT, KEPT, EXACT]


def test_marks_alone_are_the_same_only_if_they_are_equal() -> None:
    assert verdicts(["!!!", "???", "!!!", "…"]) == [KEPT, KEPT, EXACT, KEPT]


def test_chinese_is_compared_by_character() -> None:
    text = "这家店的味道很好，送餐也快，下次还会再来的，推荐给大家尝试一下吧" * 3
    assert verdicts([text, text.replace("大家", "你们", 1), text[::-1]]) == [KEPT, NEAR, KEPT]


@pytest.mark.parametrize(("similarity", "least", "most"), [(0.5, 0.0, 0.02), (0.95, 0.9, 1.0)])
def test_banding_is_a_step_around_the_threshold(similarity: float, least: float, most: float) -> None:
    count, size = bands(OPTIONS)
    chance = 1 - (1 - similarity**size) ** count
    assert least <= chance <= most


def test_found_as_often_as_the_formula_says() -> None:
    """Pairs of documents with a Jaccard similarity of 0.9 between their runs of words."""
    draw = np.random.default_rng(0)
    count, size = bands(OPTIONS)
    sign, found, pairs = signer(NearOptions(words=1)), 0, 200
    for _ in range(pairs):
        words = [f"w{number}" for number in draw.choice(10**6, 210, replace=False)]
        one, other = " ".join(words[:200]), " ".join(words[10:])  # 190 of 210 in common
        found += bool((sign(one) == sign(other)).any())
    expected = 1 - (1 - (190 / 210) ** size) ** count
    # Three standard deviations of a share of 200.
    assert abs(found / pairs - expected) < 3 * (expected * (1 - expected) / pairs) ** 0.5


def test_a_long_text_is_signed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    text = sentence(3, 300)
    whole = signer(OPTIONS)(text)
    monkeypatch.setattr(duplicates, "_SLICE_CHARACTERS", 50)
    monkeypatch.setattr(duplicates, "_RUNS", 7)
    assert (signer(OPTIONS)(text) == whole).all()


def test_a_document_is_like_an_earlier_one_or_stays() -> None:
    """What a later one has in common with two does not make these two alike."""
    bands_of = np.array([[1, 2], [3, 4], [1, 4], [5, 4]], np.uint64)
    ids = np.arange(8, dtype=np.uint64).reshape(4, 2)
    assert decide(ids, lambda band: bands_of[:, band].copy(), 2).tolist() == [KEPT, KEPT, NEAR, NEAR]


def test_short_texts_are_told_apart_by_all_they_say() -> None:
    """Two of them with the same 32 bits: words whose checksums are equal."""
    assert crc32(b"plumless") == crc32(b"buckeroo")
    assert verdicts(["plumless", "buckeroo", "Plumless!"]) == [KEPT, KEPT, NEAR]


def test_a_word_has_its_marks() -> None:
    """Vowels of Hindi and tones of Thai are marks: without them these would be the same words."""
    assert verdicts(["बहुत अच्छा", "बहुत अच्छी", "बहुत अच्छा!"]) == [KEPT, KEPT, NEAR]
    assert verdicts(["ไม่ ใหม่", "ไม้ ไหม้", "ไม่, ใหม่"]) == [KEPT, KEPT, NEAR]


def test_nothing_to_decide() -> None:
    assert decide(np.empty((0, 2), np.uint64), None, 0).tolist() == []
