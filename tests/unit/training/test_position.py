"""The curve of a run: thinned out when it is long, and silent of what is not known."""

from __future__ import annotations

from bert_ray.training import position
from bert_ray.training.position import Position


def test_a_long_curve_is_thinned_out() -> None:
    found = Position()
    for step in range(1, position._CURVE_POINTS + 1):
        found.draw(step, [step, step + 1], [2.0])
    assert len(found.curve) == position._CURVE_POINTS // 2
    assert found.curve[0] == [2, 2.0, 2.0]
    assert found.curve[-1][0] == position._CURVE_POINTS


def test_a_norm_that_overflowed_is_none_and_counts_in_no_mean() -> None:
    found = Position()
    found.draw(1, [1.0, 2.0], [None, 4.0])
    found.draw(2, [1.0], [None])
    assert found.curve == [[1, 1.5, 4.0], [2, 1.0, None]]
    for step in range(3, position._CURVE_POINTS + 1):
        found.draw(step, [1.0], [None])
    assert found.curve[0] == [2, 1.25, 4.0]
    assert found.curve[1] == [4, 1.0, None]
