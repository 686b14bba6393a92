from __future__ import annotations

import numpy as np
import pytest

from bert_ray.model.examples import Examples, Targets
from bert_ray.model.tokenization import Pieces, Ragged
from bert_ray.training.sources import TableSource


@pytest.mark.parametrize(
    ("starts", "lengths", "squares"),
    [(None, [3, 2, 5, 1], [9, 4, 25, 1]), (np.array([0, 2, 3, 4]), [5, 5, 1], [13, 25, 1])],
)
def test_tokens_of_a_sample_and_what_attention_within_its_pieces_costs(
    starts: np.ndarray | None, lengths: list[int], squares: list[int]
) -> None:
    tokens = Ragged(ids=np.zeros(11, np.int32), types=None, offsets=np.array([0, 3, 5, 10, 11]))
    pieces = Pieces(tokens=tokens, rows=np.array([0, 0, 1, 2]))
    found = Examples(pieces=pieces, targets=Targets(values=np.zeros(len(lengths))), starts=starts)
    assert found.lengths.tolist() == lengths
    assert found.squares.tolist() == squares


def test_each_epoch_of_a_table_has_all_samples_in_an_order_of_its_own() -> None:
    tokens = Ragged(ids=np.zeros(50, np.int32), types=None, offsets=np.arange(51))
    pieces = Pieces(tokens=tokens, rows=np.arange(50))
    source = TableSource(Examples(pieces=pieces, targets=Targets(values=np.zeros(50))), batch_size=8, epochs=2)
    steps = source.round_steps
    epochs = [np.concatenate([source.select(epoch * steps + at) for at in range(steps)]) for epoch in range(2)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()
    assert source.tokens == 100
