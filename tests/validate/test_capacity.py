"""The rate up to which a goal is attained."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.metrics import SLO
from distserve.validate.capacity import Capacity, crossing, falling


@pytest.mark.parametrize(
    ("curve", "rate"),
    [
        ([(1, 1.0), (2, 0.8)], 1.5),
        ([(1, 1.0), (2, 0.95), (3, 0.85), (4, 0.85)], 2.5),
        ([(1, 1.0), (2, 0.88), (3, 0.94), (4, 0.71)], 3.05),  # 0.91 at both in the middle
        ([(1, 0.88), (2, 0.96), (3, 0.8)], 2 + 0.02 / 0.12),  # 0.92 at both
        ([(1, 0.9), (2, 0.0)], 1.0),
        ([(1, 1.0), (2, 0.91)], None),
        ([(1, 0.5), (2, 0.4)], None),
    ],
)
def test_where_attainment_falls_below_the_goal(curve: list[tuple[float, float]], rate: float | None) -> None:
    found = crossing(curve, 0.9)
    assert found == (None if rate is None else pytest.approx(rate))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_a_curve_that_is_made_to_fall_falls_and_keeps_its_mean(shares: list[float]) -> None:
    made = [share for _, share in falling(list(enumerate(shares, 1)))]
    assert all(high >= low - 1e-12 for high, low in pairwise(made))
    assert sum(made) == pytest.approx(sum(shares))
    if all(high >= low for high, low in pairwise(shares)):
        assert made == shares


def test_beyond_the_rates_an_error_is_told_as_far_as_it_is_known() -> None:
    def of(measured: float | None, predicted: float | None, ends: tuple[float, float]) -> Capacity:
        return Capacity("1p1d", "chat", SLO(1.0, 0.1), measured, predicted, (1.0, 2.0, 3.0), ends)

    assert of(2.0, 2.5, (2.0, 2.5)).error == pytest.approx(0.25)
    assert of(2.0, None, (2.0, 3.0)).error == pytest.approx(0.5)
    assert not of(2.0, None, (2.0, 3.0)).exact
    assert of(None, None, (3.0, 1.0)).error is None
