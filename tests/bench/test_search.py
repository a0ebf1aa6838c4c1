"""The search for the goodput, against systems whose true attainment at each rate is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.bench.search import FLOOR, Search, Step, Trial


def measured(true: Callable[[float], float], requests: int = 400, seed: int = 0) -> Callable[[Step], Trial]:
    """A run of independent requests that each meet their targets with probability `true(rate)`."""

    def run(step: Step) -> Trial:
        draw = random.Random(f"{seed} {step}")
        met = tuple(draw.random() < true(step.rate) for _ in range(round(requests * step.length)))
        return Trial(step.rate, met, length=step.length)

    return run


def go(search: Search, run: Callable[[Step], Trial]) -> Search:
    while (step := search.next()) is not None:
        search.tell(run(step))
    return search


def falling(knee: float) -> Callable[[float], float]:
    """90 % at the knee, falling steeply."""
    return lambda rate: min(1.0, max(0.0, 0.9 + (knee - rate) / knee))


@settings(max_examples=40)
@given(st.floats(0.2, 200), st.floats(0.1, 10), st.integers(0, 1000))
def test_the_knee_is_found_from_anywhere(knee: float, start: float, seed: int) -> None:
    if start / knee > FLOOR / 2:
        start = knee * FLOOR / 2
    search = go(Search(start, 0.9), measured(falling(knee), 2000, seed))
    found = search.found
    assert len(search.trials) <= 20
    assert found.rate == pytest.approx(knee, rel=0.08)
    assert found.low <= found.rate
    assert found.high is None or found.rate <= found.high


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(60):
        found = go(Search(1.0, 0.9), measured(falling(5.0), 300, seed)).found
        held += found.low <= 5.0 and (found.high is None or found.high >= 5.0)
    assert held >= 54


def test_doubtful_rates_are_measured_again_with_other_arrivals() -> None:
    search = go(Search(4.0, 0.9), measured(falling(5.0), 100))
    repeats = [trial.rate for trial in search.trials]
    assert len(set(repeats)) < len(repeats)
    steps: list[Step] = []
    other = Search(4.0, 0.9)
    run = measured(falling(5.0), 100)
    while (step := other.next()) is not None:
        steps.append(step)
        other.tell(run(step))
    assert len(set(steps)) == len(steps)


def test_nothing_attains() -> None:
    search = go(Search(8.0, 0.9), measured(lambda rate: 0.0))
    found = search.found
    assert (found.rate, found.low) == (0.0, 0.0)
    assert found.high is not None
    assert found.why.startswith("not even 0.25 requests/s")
    assert len(search.trials) < 10


def test_queues_that_grow_are_watched_for_longer_and_do_not_attain() -> None:
    def run(step: Step) -> Trial:
        return Trial(step.rate, (True,) * 200, growing=step.rate > 3, length=step.length)

    search = go(Search(1.0, 0.9), run)
    assert 2.8 < search.found.rate <= 3
    assert any(trial.length == 2.0 for trial in search.trials)


def test_a_long_run_that_settles_counts() -> None:
    def run(step: Step) -> Trial:
        return Trial(step.rate, (step.rate < 5,) * 200, growing=step.length == 1.0, length=step.length)

    assert 4.7 < go(Search(1.0, 0.9), run).found.rate < 5


def test_a_client_that_is_too_slow_ends_it() -> None:
    def run(step: Step) -> Trial:
        return Trial(step.rate, (True,) * 200, kept_up=step.rate < 100)

    found = go(Search(10.0, 0.9), run).found
    assert (found.rate, found.high) == (80.0, None)
    assert found.why == "the client could not offer 160 requests/s"


def test_stopped_in_the_middle_it_tells_what_it_knows() -> None:
    search = Search(1.0, 0.9)
    for _ in range(4):
        step = search.next()
        assert step is not None
        search.tell(measured(falling(5.0))(step))
    found = search.found
    assert (found.rate, found.low, found.high, found.why) == (4.0, 4.0, 8.0, "stopped early")
    assert Search(1.0, 0.9).found.rate == 0.0
