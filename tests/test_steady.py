"""Steady states, and queues on their way up, made by a queue whose load is known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve import steady
from distserve.metrics import SLO, Record


def queue(load: float, number: int, seed: int = 0) -> list[Record]:
    """Waiting times of one server that takes 0.1 s on average for each request, `load` of which it is offered."""
    draw = random.Random(seed)
    found, now, free = [], 0.0, 0.0
    for _ in range(number):
        now += draw.expovariate(load / 0.1)
        free = max(free, now) + draw.expovariate(1 / 0.1)
        found.append(Record(now, 10, 3, free - now, 0.01))
    return found


def test_too_much_load_grows_and_little_does_not() -> None:
    slo = SLO(ttft=0.5)
    said = [steady.growing(queue(1.5, 600, seed), slo) for seed in range(20)]
    assert all("TTFT grows from" in one for one in said)
    false_alarms = sum(bool(steady.growing(queue(0.3, 600, seed), slo)) for seed in range(50))
    assert false_alarms <= 4  # chance decides now and then; a search runs longer then


@pytest.mark.parametrize(
    ("number", "load", "least", "most"),
    [
        # can be borne (the last third beside the first alone gives 0.10, 0.23 and 0.31 of false alarms at 1000)
        (1000, 0.7, 0.0, 0.06),
        (1000, 0.9, 0.0, 0.12),
        (1000, 0.95, 0.0, 0.25),
        (3000, 0.7, 0.0, 0.04),
        (3000, 0.9, 0.0, 0.06),
        (3000, 0.95, 0.0, 0.12),
        # too much: 5 % of it shows in long runs only
        (1000, 1.05, 0.6, 1.0),
        (1000, 1.2, 0.98, 1.0),
        (3000, 1.05, 0.85, 1.0),
        (3000, 1.2, 1.0, 1.0),
    ],
)
def test_near_saturation_chance_is_told_from_growth(number: int, load: float, least: float, most: float) -> None:
    warm = number // 10
    times = [[record.ttft or 0.0 for record in queue(load, number + warm, seed)[warm:]] for seed in range(60)]
    said = [steady.grows(values) for values in times]
    assert least <= sum(said) / len(said) <= most


def test_tpot_grows_too() -> None:
    records = [Record(float(i), 1, 3, 0.1, 0.01 * (1 + i / 50)) for i in range(300)]
    assert "TPOT grows from 0.0199 s in the first third of the run to 0.0599 s in the last" in steady.growing(
        records, SLO()
    )


def test_attainment_falls_where_the_failed_have_no_times() -> None:
    records = [Record(float(i), 1, 3, 0.1, 0.01, "ok" if i < 100 else "refused") for i in range(200)]
    assert steady.growing(records, SLO()) == (
        "attainment falls from 100% in the first half of the run to 0% in the second"
    )
    assert steady.growing(records[::-1], SLO()) == ""  # getting better is no sign of a queue


def test_few_requests_say_nothing() -> None:
    assert steady.growing([Record(float(i), 1, 2, i + 1.0) for i in range(89)], SLO(ttft=5)) == ""
    assert steady.growing([], SLO()) == ""
    assert steady.residence([]) is None
    assert steady.short([]) == ""


@given(st.lists(st.floats(0.001, 100), max_size=200))
def test_any_values_may_be_asked(values: list[float]) -> None:
    grows = steady.grows(values)
    assert not (grows and steady.grows(values[::-1]))


def test_a_run_is_short_beside_what_a_request_stays() -> None:
    records = [Record(float(i), 10, 11, 1.0, 0.4) for i in range(11)]  # 5 s each
    assert steady.residence(records) == pytest.approx(5.0)
    assert steady.short(records) == "the requests that count arrived within 10 s, and one stays 5 s"
    assert steady.short([Record(2.0 * i, 10, 11, 1.0, 0.4) for i in range(11)]) == ""
    assert steady.short([Record(float(i), 10, 11, status="refused") for i in range(11)]) == ""
