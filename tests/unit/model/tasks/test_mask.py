"""Masking personal data: patterns with their checks, entities, what overlaps, long and odd texts, no network."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bert_ray.errors import BertRayError, BundleError, JobError
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.card import Card
from bert_ray.model.patterns import PATTERNS, Match, Patterns
from bert_ray.model.tasks import get_task
from bert_ray.model.tasks.mask import merged
from tests.conftest import TINY_SEED, needs, tiny_config, tiny_tokenizer

needs("presidio_analyzer", "pii")

TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]
REGIONS = ("US", "GB", "CN")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny entities bundle with random weights."""
    import torch
    from transformers import BertForTokenClassification

    tokenizer = tiny_tokenizer()
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: index for index, tag in enumerate(TAGS)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        model = BertForTokenClassification(tiny_config(len(tokenizer), **names)).eval()
    directory = tmp_path_factory.mktemp("mask") / "bundle"
    card = Card(task="entities", labels=["person", "place"], max_length=64, options={"overflow": "truncate"})
    save_bundle(directory, model, tokenizer, card)
    return directory


def run(model: Path, column: list[Any], kind: pa.DataType | None = None, **options: Any) -> list[Any]:
    annotator = AnnotatorSpec(model=str(model), task="mask", options=options).build()
    return annotator(pa.table({"text": pa.array(column, kind or pa.string())}))["mask"].to_pylist()


def masked(model: Path, text: str, **options: Any) -> str:
    return run(model, [text], kinds=[], **options)[0]["text"]


# Patterns.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe+x@example.co.uk, please", "write to [EMAIL], please"),
        ("jane@example is no address, nor is @jane", "jane@example is no address, nor is @jane"),
        ("jane@example.invalidsuffix", "jane@example.invalidsuffix"),
        ("邮箱zhang@example.com请查收", "邮箱[EMAIL]请查收"),
        ("card 4111 1111 1111 1111.", "card [CARD]."),
        ("card 4111 1111 1111 1112.", "card 4111 1111 1111 1112."),
        ("卡号4111111111111111，谢谢", "卡号[CARD]，谢谢"),
        ("IBAN DE89 3704 0044 0532 0130 00 here", "IBAN [IBAN] here"),
        ("IBAN DE89 3704 0044 0532 0130 01 here", "IBAN DE89 3704 0044 0532 0130 01 here"),
        ("from 192.168.10.77 and 2001:db8::8a2e:370:7334", "from [IP] and [IP]"),
        ("at dead:beef:cafe:babe:dead:beef:cafe:babe", "at [IP]"),
        ("at fe80::ab:cd, link", "at [IP], link"),
        ("at fe::ab:cd, link", "at [IP], link"),
        ("version 1.2.3 or 999.1.1.1", "version 1.2.3 or 999.1.1.1"),
        ("call +49 30 901820 or (212) 555-0134 now", "call [PHONE] or [PHONE] now"),
        ("call (415) 555-2671 now", "call [PHONE] now"),
        ("电话13812345678。", "电话[PHONE]。"),
        ("in 1984 we sold 2,500 at 9.99", "in 1984 we sold 2,500 at 9.99"),
        ("std::vector and a :: b", "std::vector and a :: b"),
        # What stands behind hides none.
        ("write to anna@example.org.Thanks", "write to [EMAIL].Thanks"),
        ("anna@example.org-Anna and bob@mail.example.co.uk_old", "[EMAIL]-Anna and [EMAIL]_old"),
        ("邮箱zhang@example.com.谢谢", "邮箱[EMAIL].谢谢"),
        ("Mastercard 2223 0031 2200 3222", "Mastercard [CARD]"),
        ("UnionPay 6212345678900000003, yes", "UnionPay [CARD], yes"),
        ("Room 1204 4111 1111 1111 1111 now", "Room 1204 [CARD] now"),
        ("4111-1111-1111-1111 123", "[CARD] 123"),
        ("rows 2000 3000 4000 5000 and 2223 0031 2200 3223", "rows 2000 3000 4000 5000 and 2223 0031 2200 3223"),
        ("BE68 5390 0754 7034 2024", "[IBAN] 2024"),
        ("BE68539007547034 PAID", "[IBAN] PAID"),
        ("to ES91 2100 0418 4502 0005 1332 2024", "to [IBAN] 2024"),
        ("to de89 3704 0044 0532 0130 00 please", "to [IBAN] please"),
        ("client 2001:db8::1: denied", "client [IP]: denied"),
        ("from 192.168.001.010 on", "from [IP] on"),
        ("from 192.168.001.999 on", "from 192.168.001.999 on"),
    ],
)
def test_patterns(bundle: Path, text: str, expected: str) -> None:
    assert masked(bundle, text) == expected


def test_offsets_are_code_points() -> None:
    text = "🎬 né: a@b.org, 🎬 10.0.0.1"
    found = Patterns(PATTERNS, REGIONS).find(text)
    assert [(text[match.start : match.end], match.label) for match in found] == [
        ("a@b.org", "EMAIL"),
        ("10.0.0.1", "IP"),
    ]
    assert [match.score for match in found] == [1.0, pytest.approx(0.6)]  # Checked for its suffix; a pattern alone.


def test_regions_decide_about_local_numbers(bundle: Path) -> None:
    text = "ring 020 7946 0958 or +44 20 7946 0958"
    assert masked(bundle, text, regions=["US"]) == "ring 020 7946 0958 or [PHONE]"
    assert masked(bundle, text, regions=["GB"]) == "ring [PHONE] or [PHONE]"
    assert masked(bundle, text, regions=[]) == "ring 020 7946 0958 or [PHONE]"
    # Nor are those of the country whose numbers begin with +1.
    assert masked(bundle, "ring 212-736-5000", regions=[]) == "ring 212-736-5000"
    assert masked(bundle, "ring 212-736-5000", regions=["US"]) == "ring [PHONE]"


def test_one_pattern_alone(bundle: Path) -> None:
    text = "a@b.org 10.0.0.1"
    assert masked(bundle, text, patterns=["ip"]) == "a@b.org [IP]"
    assert masked(bundle, text, mark="***") == "*** ***"


def test_nothing_asks_the_network(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the network was asked")

    from bert_ray.model import patterns

    patterns._recogniser.cache_clear()
    monkeypatch.setenv("TLDEXTRACT_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    found = Patterns(PATTERNS, REGIONS).find("a@b.org +49 30 901820 10.0.0.1 4111111111111111")
    assert {match.label for match in found} >= {"EMAIL", "PHONE", "IP", "CARD"}
    assert not list(tmp_path.iterdir())


def test_long_texts_take_time_by_their_length() -> None:
    finder = Patterns(PATTERNS, REGIONS)
    finder.find("a@b.org 1")
    started = time.perf_counter()
    assert finder.find("a/" * 200_000 + "@ 1") == []
    text = "word " * 8_000 + "a@b.org " + "word " * 8_000 + "card 4111 1111 1111 1111 "
    assert [text[match.start : match.end] for match in finder.find(text)] == ["a@b.org", "4111 1111 1111 1111"]
    assert time.perf_counter() - started < 20


def test_what_stands_across_two_parts_is_found_once() -> None:
    finder = Patterns(PATTERNS, REGIONS)
    for lead in range(1_970, 2_010, 3):
        text = "x" * lead + " 4111 1111 1111 1111 and a@b.org"
        found = [(text[match.start : match.end], match.label) for match in finder.find(text)]
        assert found == [("4111 1111 1111 1111", "CARD"), ("a@b.org", "EMAIL")]


# What overlaps.


def match(start: int, end: int, label: str, score: float = 0.5) -> Match:
    return Match(start=start, end=end, label=label, score=score)


def test_overlapping_finds_are_one_of_the_longest_label() -> None:
    assert merged([match(0, 10, "person")], [match(5, 20, "EMAIL", 1.0)]) == [match(0, 20, "EMAIL", 1.0)]
    assert merged([match(0, 30, "person")], [match(5, 20, "EMAIL")]) == [match(0, 30, "person")]
    assert merged([match(3, 9, "person")], [match(3, 9, "IP")]) == [match(3, 9, "IP")]
    assert merged([], [match(0, 4, "PHONE"), match(0, 4, "CARD")]) == [match(0, 4, "CARD")]
    assert merged([match(0, 4, "a"), match(4, 6, "b")], []) == [match(0, 4, "a"), match(4, 6, "b")]
    chain = [match(0, 5, "a"), match(4, 10, "b"), match(9, 13, "c"), match(20, 21, "d")]
    assert merged(chain, []) == merged(chain[::-1], []) == [match(0, 13, "b"), match(20, 21, "d")]


# With entities.


def test_entities_and_patterns(bundle: Path, uci_sample: pa.Table) -> None:
    texts = [f"{text} a@b.org" for text in uci_sample["text"].to_pylist()[:50]] + ["word " * 300 + "a@b.org"]
    entities = AnnotatorSpec(model=str(bundle), options={"overflow": "windows"}).build()
    found = entities(pa.table({"text": texts}))["entities"].to_pylist()
    results = run(bundle, texts)
    assert sum(map(len, found)) > 100
    for text, known, result in zip(texts, found, results, strict=True):
        rest, place = [], 0
        for span in result["spans"]:
            rest += [text[place : span["start"]], f"[{span['label'].upper()}]"]
            place = span["end"]
        assert result["text"] == "".join([*rest, text[place:]])
        for entity in known:
            assert any(span["start"] <= entity["start"] and entity["end"] <= span["end"] for span in result["spans"])
        assert "a@b.org" not in result["text"]


def test_chosen_kinds(bundle: Path, uci_sample: pa.Table) -> None:
    texts = uci_sample["text"].to_pylist()[:30]
    found = run(bundle, texts, kinds=["place"], patterns=[])
    assert {span["label"] for result in found for span in result["spans"]} == {"place"}
    assert run(bundle, texts, patterns=[], least_score=1.0) == [{"text": text, "spans": []} for text in texts]


def test_given_words(bundle: Path) -> None:
    (found,) = run(bundle, [["mail", "a@b.org", "now"]], pa.list_(pa.string()), kinds=[])
    assert found["text"] == "mail [EMAIL] now"
    assert [(span["start"], span["end"]) for span in found["spans"]] == [(5, 12)]


def test_odd_rows(bundle: Path) -> None:
    found = run(bundle, [None, "", " \t ", "a\x00b@c.org"], patterns=["email"], kinds=[])
    assert found[:3] == [None, {"text": "", "spans": []}, {"text": " \t ", "spans": []}]
    assert found[3]["text"] == "a\x00[EMAIL]"


def test_patterns_on_any_bundle(tiny_encoder: Path, tiny_bundle: Path) -> None:
    for model in (tiny_encoder, tiny_bundle):
        assert masked(model, "a@b.org") == "[EMAIL]"
        with pytest.raises(BundleError, match="kinds"):
            run(model, ["a@b.org"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kinds": ["animal"]}, "animal"),
        ({"patterns": ["fax"]}, "fax"),
        ({"patterns": "email"}, "give a list"),
        ({"regions": ["UK"]}, "UK"),
        ({"kinds": [], "patterns": []}, "nothing to mask"),
        ({"least_score": 2}, "least_score"),
        ({"mark": None}, "mark is None; give a text"),
    ],
)
def test_options_are_checked(bundle: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(JobError, match=says):
        run(bundle, ["x"], **options)


def test_it_is_not_trained(bundle: Path) -> None:
    task = get_task(Card(task="mask", labels=["person"]), load_bundle(bundle).config)
    with pytest.raises(BertRayError, match="train and evaluate an entities bundle"):
        task.read_truth([], [pa.array(["x"])])
