"""One plan under load: what a run says, when it may stop, and the highest rate."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.planner.small import costs, demand

from distserve.plan import InstanceSpec, Plan, Role
from distserve.planner.bounds import Bounds
from distserve.planner.goodput import QUICK, USUAL, Length, Situation, highest_rate, judge

PLAN = Plan((InstanceSpec(Role.COLOCATED),))


def situation(slo: str = "ttft=0.25,tpot=0.1", goal: float = 0.9) -> Situation:
    asked = demand(slo, goal=goal)
    return Situation(costs(), None, asked, Bounds(costs(), asked).stay(PLAN.instances[0]))


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(1.0, 1000))
def test_bisection_finds_the_highest_rate(goodput: float, start: float, room: float) -> None:
    asked: list[float] = []

    def attains(rate: float) -> bool:
        asked.append(rate)
        return rate <= goodput

    most = max(goodput, start) * room
    found = highest_rate(attains, start, most=most, tolerance=0.02)
    if goodput < start / 100:
        assert found == 0 or found <= goodput
    else:
        assert goodput / 1.03 <= found <= goodput
    assert max(asked) <= most
    assert len(asked) < 60


def test_a_light_load_attains_and_stops_early() -> None:
    verdict = judge(situation(), PLAN, 1.0)
    assert verdict.attains
    assert not verdict.whole
    assert verdict.requests < 1000
    assert verdict.interval[0] > 0.9


def test_a_heavy_load_does_not_and_stops_early() -> None:
    verdict = judge(situation(), PLAN, 60.0)
    assert not verdict.attains
    assert verdict.requests < 1000


def test_more_than_can_be_computed_is_not_attained_however_late_a_token_may_be() -> None:
    lenient = situation("ttft=20,tpot=2")
    most = Bounds(costs(), lenient.demand).most(PLAN.instances[0]) * 0.9  # with the goal's share taken out
    assert not judge(lenient, PLAN, most * 1.1, USUAL).attains


def test_the_whole_run_says_the_same() -> None:
    here = situation()
    for rate in (2.0, 30.0):
        quick = judge(here, PLAN, rate, QUICK)
        whole = judge(here, PLAN, rate, QUICK, early=False)
        assert whole.whole
        assert quick.attains == whole.attains


def test_attainment_falls_with_the_rate_on_the_same_luck() -> None:
    here = situation()
    joint = [judge(here, PLAN, rate, QUICK, early=False).attainment.joint for rate in (4.0, 10.0, 14.0, 20.0)]
    assert joint == sorted(joint, reverse=True)


def test_a_run_is_as_long_as_its_residence_asks_for() -> None:
    length = Length(2.0, 5.0, 100)
    assert length.numbers(1.0, 1.0) == (10, 100, 20)
    warm, counted, cool = length.numbers(10.0, 30.0)
    assert (warm, counted, cool) == (600, 1500, 300)


@pytest.mark.parametrize("goal", [0.5, 0.99])
def test_the_goal_decides(goal: float) -> None:
    here = situation(goal=goal)
    verdict = judge(here, PLAN, 12.0, early=False)
    assert verdict.attains == (verdict.attainment.joint >= goal or math.isclose(verdict.attainment.joint, goal))
