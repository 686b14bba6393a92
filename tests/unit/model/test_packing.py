from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bert_ray.model.packing import pack_rows, plan
from bert_ray.model.tokenization import Ragged


@given(st.lists(st.integers(1, 90), min_size=1, max_size=200), st.integers(1, 100))
def test_plan_places_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    sizes = np.array(lengths)
    batches = plan(sizes, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(sizes)))
    for rows in batches:
        assert sizes[rows].sum() <= budget or len(rows) == 1
        assert (np.diff(sizes[rows]) <= 0).all()


def test_plan_fills_its_batches() -> None:
    sizes = np.random.default_rng(0).integers(1, 257, 3000)
    assert sizes.sum() / (512 * len(plan(sizes, 512))) > 0.96


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 2]])
def test_pack_rows_lays_rows_end_to_end(rows: list[int]) -> None:
    texts = [[5, 6, 7], [8], [9, 10]]
    ragged = Ragged(
        ids=np.concatenate(texts).astype(np.int32), types=np.zeros(6, np.int32), offsets=np.array([0, 3, 4, 6])
    )
    batch = pack_rows(ragged, np.array(rows))
    assert batch.input_ids.tolist() == [token for row in rows for token in texts[row]]
    assert batch.position_ids.tolist() == [place for row in rows for place in range(len(texts[row]))]
    assert batch.lengths == tuple(len(texts[row]) for row in rows)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum([len(texts[row]) for row in rows])]


def test_which_tokens_are_read_is_counted_by_row() -> None:
    ragged = Ragged(ids=np.arange(6, dtype=np.int32), types=None, offsets=np.array([0, 3, 4, 6]))
    batch = pack_rows(ragged, np.arange(3))
    assert batch.first_tokens.tolist() == [0, 3, 4]
    assert batch.read is None
    read = batch.reading(torch.tensor([1, 2, 3, 5])).to("cpu")
    assert read.read is not None
    assert (read.read.tolist(), read.read_lengths) == ([1, 2, 3, 5], (2, 1, 1))
    with pytest.raises(ValueError, match="row 1 is read"):
        batch.reading(torch.tensor([0, 4]))
