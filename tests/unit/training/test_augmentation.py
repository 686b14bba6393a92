"""Distorted rows: what may change, what stays, and that the draw depends on nothing but seed, epoch and row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from bert_ray.errors import JobError
from bert_ray.model.bundle import load_bundle
from bert_ray.model.tokenization import Pieces, Ragged, Tokenizer
from bert_ray.model.vocabulary import add_tokens
from bert_ray.training import augmentation as augmentation_module
from bert_ray.training.augmentation import Augmentation
from bert_ray.training.job import AugmentationOptions, CheckpointOptions, TrainJob
from bert_ray.training.launch import train
from tests.conftest import tiny_tokenizer
from tests.tiny_tasks import save

CPU = torch.device("cpu")
TEXTS = ["the film was great and the staff was nice", "food", "excellent product, terrible battery", ""]


def encoded(*inputs: list[str]) -> Pieces:
    return Tokenizer(tiny_tokenizer(), 64)([pa.array(texts, pa.large_string()) for texts in inputs])


def distorted(pieces: Pieces, epoch: int = 0, seed: int = 0, **shares: Any) -> list[list[int]]:
    augmentation = Augmentation(AugmentationOptions(**shares), tiny_tokenizer(), 64, seed, CPU)
    ragged = augmentation(pieces.tokens, np.arange(len(pieces)), epoch)
    assert ragged.lengths.max() <= 64
    return [ragged.ids[start:end].tolist() for start, end in itertools.pairwise(ragged.offsets)]


def plain(pieces: Pieces) -> list[list[int]]:
    ids, ends = pieces.tokens.ids, pieces.tokens.offsets
    return [ids[start:end].tolist() for start, end in itertools.pairwise(ends)]


def special(rows: list[list[int]]) -> list[list[int]]:
    known = set(tiny_tokenizer().all_special_ids)
    return [[token for token in row if token in known] for row in rows]


@pytest.mark.parametrize("what", ["deletion", "swap", "characters"])
def test_words_change_and_special_tokens_stay(what: str) -> None:
    pieces = encoded(TEXTS, ["a great place"] * 4)
    found = distorted(pieces, **{what: 0.5})
    assert found != plain(pieces)
    assert special(found) == special(plain(pieces))
    assert found[:1] != distorted(pieces, epoch=1, **{what: 0.5})[:1], "another epoch, other noise"
    assert found == distorted(pieces, **{what: 0.5}), "the same epoch, the same noise"
    assert found != distorted(pieces, seed=1, **{what: 0.5})


def test_deletion_leaves_words_out_and_at_least_one() -> None:
    pieces = encoded(["food"] * 50)
    assert distorted(pieces, deletion=0.5) == plain(pieces)
    many = encoded(["the film was great and the staff was nice"] * 50)
    lengths = [len(row) for row in distorted(many, deletion=0.2)]
    assert np.mean(lengths) == pytest.approx(2 + 9 * 0.8, abs=0.5)
    assert min(lengths) >= 3


def test_each_text_of_a_pair_keeps_a_word_where_both_are_of_one_type() -> None:
    """As RoBERTa has them: the special tokens between them tell them apart."""
    pieces = encoded(["the film was great and nice"] * 200, ["food"] * 200)
    assert pieces.tokens.types is not None
    pieces.tokens.types[:] = 0
    found = distorted(pieces, deletion=0.5)
    food, end = tiny_tokenizer().convert_tokens_to_ids(["food", "[SEP]"])
    assert all(row[-3:] == [end, food, end] for row in found)
    assert len(set(map(len, found))) > 2


def test_swapping_keeps_the_words() -> None:
    pieces = encoded(TEXTS)
    found = distorted(pieces, swap=0.5)
    assert [sorted(row) for row in found] == [sorted(row) for row in plain(pieces)]


def test_swapping_stays_within_a_text_of_a_pair() -> None:
    pieces = encoded(["film food"] * 40, ["phone place"] * 40)
    tokenizer = tiny_tokenizer()
    for row in distorted(pieces, swap=0.5):
        first, _, second = tokenizer.decode(row).removeprefix("[CLS] ").partition(" [SEP] ")
        assert (set(first.split()), set(second.removesuffix(" [SEP]").split())) == (
            {"film", "food"},
            {"phone", "place"},
        )


def test_misspelled_words_differ_by_a_letter() -> None:
    pieces = encoded(["excellent"] * 30)
    texts = {tiny_tokenizer().decode(row[1:-1]).replace(" ", "") for row in distorted(pieces, characters=0.5)}
    assert len(texts) > 5
    assert all(abs(len(text) - len("excellent")) <= 1 for text in texts)


def test_a_row_depends_on_no_other() -> None:
    pieces = encoded(TEXTS)
    augmentation = Augmentation(AugmentationOptions(deletion=0.3, swap=0.3), tiny_tokenizer(), 64, 0, CPU)
    together = augmentation(pieces.tokens, np.array([2, 0]), 3)
    alone = augmentation(pieces.tokens, np.array([0]), 3)
    assert together.ids[together.offsets[1] :].tolist() == alone.ids.tolist()


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("filler"), "BertForMaskedLM", {"task": "fill-mask"})


def test_a_masked_language_model_fills_words_in(filler: str) -> None:
    pieces = encoded([*TEXTS, "a [MASK] of one's own"])
    found = distorted(pieces, substitution=0.4, model=filler)
    assert found != plain(pieces)
    mask = tiny_tokenizer().mask_token_id
    assert [row.count(mask) for row in found] == [0, 0, 0, 0, 1], "only the mask that stood there"
    assert found == distorted(pieces, substitution=0.4, model=filler)


def test_the_filler_has_the_same_vocabulary(tmp_path: Path, filler: str, job_for: Callable[..., TrainJob]) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["unheard"])
    with pytest.raises(JobError, match="another vocabulary"):
        Augmentation(AugmentationOptions(substitution=0.1, model=filler), other, 64, 0, CPU)
    with pytest.raises(JobError, match=r"reads rows of 512 tokens, .* up to 513: .* max_length=512"):
        Augmentation(AugmentationOptions(substitution=0.1, model=filler), tiny_tokenizer(), 513, 0, CPU)


def test_a_distorted_run_cut_off_goes_on_to_the_same_bits(
    tmp_path: Path, job_for: Callable[..., TrainJob], filler: str
) -> None:
    from tests.unit.training.test_loop import Cut, cut_at

    options = AugmentationOptions(deletion=0.1, swap=0.1, characters=0.1, substitution=0.1, model=filler)
    job = job_for(augmentation=options, checkpoint=CheckpointOptions(every_steps=2))
    whole = train(replace(job, output=str(tmp_path / "whole")), tell=lambda _: None)
    with pytest.raises(Cut):
        train(job, tell=lambda _: None, callbacks=[cut_at(6)])
    told: list[dict[str, Any]] = []
    resumed = train(job, tell=told.append)
    assert (told[0]["what"], told[0]["step"]) == ("resumed", 4)
    one, other = (dict(load_bundle(result.bundle).model().state_dict()) for result in (whole, resumed))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_validation_rows_are_never_distorted(job_for: Callable[..., TrainJob], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training row once an epoch, and no other rows."""
    seen: list[tuple[int, int, int]] = []
    distort = Augmentation.__call__

    def counting(self: Augmentation, tokens: Ragged, pieces: np.ndarray, epoch: int) -> Ragged:
        seen.extend((len(tokens), epoch, piece) for piece in pieces.tolist())
        return distort(self, tokens, pieces, epoch)

    monkeypatch.setattr(Augmentation, "__call__", counting)
    job = job_for(augmentation=AugmentationOptions(deletion=0.3), epochs=2)
    result = train(job, tell=lambda _: None)
    rows = result.train_rows
    assert result.validation_rows > 0
    assert result.validation_rows != rows
    assert sorted(seen) == [(rows, epoch, piece) for epoch in range(2) for piece in range(rows)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deletion": 0.6}, "augmentation.deletion"),
        ({"swap": -0.1}, "augmentation.swap"),
        ({"substitution": 0.1}, "augmentation.model"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        AugmentationOptions(**options)


def test_tasks_over_words_are_not_distorted(job_for: Callable[..., TrainJob]) -> None:
    with pytest.raises(JobError, match="belongs to single words"):
        train(job_for(task="entities", augmentation=AugmentationOptions(swap=0.1)), tell=lambda _: None)


def test_a_letter_that_other_vocabularies_have_as_a_blank_begins_no_word_less() -> None:
    """Maltese has words with a capital Ġ; of byte-level BPE it is the mark of a blank."""
    plain, wider = tiny_tokenizer(), add_tokens(tiny_tokenizer(), ["Ġust"])
    assert "Ġust" in wider.get_vocab()
    begins = augmentation_module._begins(wider)
    assert (begins[: len(plain)] == augmentation_module._begins(plain)).all()
    assert begins[wider.get_vocab()["Ġust"]]
