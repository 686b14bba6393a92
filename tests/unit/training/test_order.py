"""Sample order, shares of a step, seeds, the held-out rows and the learning rate: pure functions of their arguments."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bert_ray.training.order import epoch_order, held_out, noise_seed, shares
from bert_ray.training.schedule import learning_rate


def test_an_epochs_order_is_a_permutation_given_by_seed_and_epoch() -> None:
    order = epoch_order(1000, seed=3, epoch=1)
    assert sorted(order) == list(range(1000))
    assert (order == epoch_order(1000, seed=3, epoch=1)).all()
    assert (order != epoch_order(1000, seed=3, epoch=2)).any()
    assert (order != epoch_order(1000, seed=4, epoch=1)).any()


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_shares_hold_every_row_once_and_about_equally_many_tokens(parts: int) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 60, 500)
    rows = draw.permutation(500)[:64]
    found = shares(rows, lengths[rows], parts)
    assert len(found) == parts
    assert sorted(np.concatenate(found)) == sorted(rows)
    tokens = [lengths[part].sum() for part in found]
    assert max(tokens) - min(tokens) <= lengths.max()
    for part in found:
        assert (np.diff(lengths[part]) <= 0).all()


def test_more_parts_than_rows_leaves_some_empty() -> None:
    found = shares(np.array([4, 2]), np.array([1, 1]), 4)
    assert sorted(len(part) for part in found) == [0, 0, 1, 1]


def test_noise_seeds_differ_in_each_argument() -> None:
    seeds = {noise_seed(*arguments) for arguments in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_held_out_rows_are_a_function_of_the_text() -> None:
    texts = [f"text {number}" for number in range(5000)] + ["text 7", "lone \ud800 surrogate"]
    out = held_out(texts, 0.1)
    assert 400 < out.sum() < 600
    assert out[7] == out[5000]
    assert (held_out(texts[::-1], 0.1)[::-1] == out).all()
    assert (held_out(texts, 0.2) >= out).all()


def test_the_learning_rate_rises_and_falls() -> None:
    def rates(schedule: str, warmup: float = 0.1) -> list[float]:
        return [learning_rate(step, 100, 2.0, warmup, schedule) for step in range(100)]

    for schedule in ("linear", "cosine", "constant"):
        found = rates(schedule)
        assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
        assert found[10] == pytest.approx(2.0)
        assert all(later <= earlier for earlier, later in itertools.pairwise(found[10:]))
    assert rates("linear")[55] == pytest.approx(1.0)
    assert rates("cosine")[32] == pytest.approx(1.0 + math.cos(math.pi * 22 / 90))
    assert rates("linear")[-1] == pytest.approx(2.0 / 90)
    assert set(rates("constant", warmup=0.0)) == {2.0}
    # Warm-up in a tenth, stable, decay in the last fifth.
    found = rates("trapezoidal")
    assert found[:10] == rates("constant")[:10]
    assert set(found[10:81]) == {2.0}
    assert found[81:] == pytest.approx([2.0 * (100 - step) / 20 for step in range(81, 100)])
