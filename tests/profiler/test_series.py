"""A machine that others use slows down; nothing makes it faster."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.profiler.series import ENOUGH, Series


def noisy(true: float, count: int, seed: int, slow: float) -> list[float]:
    """Values within a percent or so of `true`, a share of them in slow spells."""
    chance = random.Random(seed)
    return [
        true * chance.gauss(1, 0.005) * (chance.uniform(1.3, 3) if chance.random() < slow else 1) for _ in range(count)
    ]


@given(st.floats(1e-6, 1e3), st.integers(0, 10_000))
def test_slow_spells_are_counted_and_not_averaged(true: float, seed: int) -> None:
    values = noisy(true, 40, seed, slow=0.3)
    series = Series(values)
    assert series.seconds == pytest.approx(true, rel=0.01)
    assert series.outliers == sum(value > 1.2 * true for value in values)
    assert series.settled


def test_too_few_values_are_never_settled() -> None:
    assert not Series([1.0] * (ENOUGH - 1)).settled
    assert Series([1.0] * ENOUGH).settled


def test_values_all_over_the_place_are_not_settled() -> None:
    assert not Series([1.0, 1.4, 2.0, 3.0, 5.0]).settled  # whichever is true, most are not near it
    assert not Series([1.0, 1.05, 1.1, 1.14]).settled  # near each other, but not near enough


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
def test_order_does_not_matter_and_the_answer_was_measured(values: list[float]) -> None:
    series, turned = Series(values), Series(values[::-1])
    assert series.seconds == turned.seconds
    assert series.outliers == turned.outliers
    assert min(values) <= series.seconds <= max(values)
    assert series.error >= 0
