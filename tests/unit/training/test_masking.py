"""Masks: the shares of the paper, a function of seed and sample alone, words whole where asked."""

from __future__ import annotations

import numpy as np
import pytest

from bert_ray.training.masking import NOT_ASKED, Vocabulary, budget, keys, mask_rows

VOCABULARY = Vocabulary(mask=4, ordinary=np.arange(5, 1000))


def rows(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids end to end, and lengths from 1 to 200."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 200, count)
    return draw.integers(5, 1000, int(lengths.sum())), lengths


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_the_shares_are_those_of_the_paper(rate: float) -> None:
    ids, lengths = rows(2000)
    masked, targets = mask_rows(ids, lengths, keys(0, np.arange(2000)), rate, VOCABULARY)
    asked = targets != NOT_ASKED
    assert (targets[asked] == ids[asked]).all()
    assert (masked[~asked] == ids[~asked]).all()
    # Exactly the budget in each row.
    assert (np.add.reduceat(asked, np.cumsum(lengths) - lengths) == budget(lengths, rate)).all()
    changed = masked[asked]
    assert (changed == VOCABULARY.mask).mean() == pytest.approx(0.8, abs=0.01)
    # A tenth stays; another token is by chance the same one in a thousand.
    assert (changed == ids[asked]).mean() == pytest.approx(0.1, abs=0.01)
    other = changed[(changed != VOCABULARY.mask) & (changed != ids[asked])]
    assert set(other) <= set(VOCABULARY.ordinary)
    assert len(set(other)) > 900


def test_every_place_is_as_likely_as_another() -> None:
    lengths = np.full(20_000, 20)
    _, targets = mask_rows(np.full(400_000, 7), lengths, keys(1, np.arange(20_000)), 0.15, VOCABULARY)
    shares = (targets.reshape(-1, 20) != NOT_ASKED).mean(axis=0)
    assert shares == pytest.approx(np.full(20, 0.15), abs=0.012)


def test_a_rows_masks_do_not_depend_on_its_batch() -> None:
    ids, lengths = rows(50)
    ends = np.cumsum(lengths)
    whole = mask_rows(ids, lengths, keys(3, np.arange(50)), 0.15, VOCABULARY)
    for row in (0, 17, 49):
        here = slice(ends[row] - lengths[row], ends[row])
        alone = mask_rows(ids[here], lengths[row : row + 1], keys(3, np.array([row])), 0.15, VOCABULARY)
        assert (alone[0] == whole[0][here]).all()
        assert (alone[1] == whole[1][here]).all()


def test_another_seed_or_another_pass_masks_otherwise() -> None:
    ids, lengths = rows(50)
    first, seed, later = (
        mask_rows(ids, lengths, keys(seed, np.arange(50) + shift), 0.15, VOCABULARY)[1] != NOT_ASKED
        for seed, shift in ((0, 0), (1, 0), (0, 50))
    )
    for other in (seed, later):
        assert (first & other).sum() < 0.35 * first.sum()


def test_whole_words_are_masked_whole_and_about_as_many_tokens() -> None:
    draw = np.random.default_rng(0)
    ids, lengths = rows(2000)
    starts = draw.random(len(ids)) < 0.6
    _, targets = mask_rows(ids, lengths, keys(0, np.arange(2000)), 0.15, VOCABULARY, starts)
    asked = targets != NOT_ASKED
    first = np.cumsum(lengths) - lengths
    starts[first] = True
    word = np.cumsum(starts) - 1
    share = np.bincount(word, asked) / np.bincount(word)
    assert set(share) == {0.0, 1.0}
    assert asked.sum() == pytest.approx(budget(lengths, 0.15).sum(), rel=0.03)
    assert (np.add.reduceat(asked, first) >= 1).all()


def test_a_row_of_one_token_is_asked_for_it() -> None:
    _, targets = mask_rows(np.array([9]), np.array([1]), keys(0, np.array([0])), 0.15, VOCABULARY)
    assert targets.tolist() == [9]
