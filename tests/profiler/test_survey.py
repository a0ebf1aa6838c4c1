"""Rounds of visits, in changing order, until all is settled or the time is over."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from distserve.profiler.survey import ROUNDS, Survey


class Machine:
    """Takes key seconds for a key, and 2.5 times as long in slow spells that last for several visits."""

    def __init__(self, slow: float = 0.0, spell: int = 15, visits: int = 10**9) -> None:
        self.seen: list[int] = []
        self._chance = random.Random(0)
        self._slow = slow
        self._spell = spell
        self._visits = visits
        self._until = 0

    async def __call__(self, key: int) -> Sequence[float]:
        self.seen.append(key)
        if len(self.seen) >= self._until and self._chance.random() < self._slow / self._spell:
            self._until = len(self.seen) + self._spell
        factor = 2.5 if len(self.seen) < self._until else 1.0
        return [key * factor * self._chance.gauss(1, 0.002) for _ in range(3)]

    def over(self) -> bool:
        return len(self.seen) >= self._visits


async def test_a_quiet_machine_is_asked_no_more_than_needed() -> None:
    machine = Machine()
    survey = Survey(machine, over=machine.over)
    await survey.settle(range(1, 20))
    assert not survey.restless
    assert len(machine.seen) < 19 * 5


async def test_slow_spells_look_like_no_slope() -> None:
    machine = Machine(slow=0.3)
    survey = Survey(machine, over=machine.over)
    await survey.settle(range(1, 20))
    wrong = [key for key, series in survey.series.items() if series.seconds != pytest.approx(key, rel=0.02)]
    assert len(wrong) <= 1  # all of its visits may have met slow spells
    assert sum(series.outliers for series in survey.series.values()) > 5
    await survey.again(wrong, 6)  # whoever doubts it
    for key, series in survey.series.items():
        assert series.seconds == pytest.approx(key, rel=0.02)


async def test_every_round_has_another_order() -> None:
    machine = Machine()
    await Survey(machine, over=machine.over).settle(range(1, 20))
    first, second = machine.seen[:19], machine.seen[19:38]
    assert sorted(first) == sorted(second) == list(range(1, 20))
    assert first != second != sorted(second)


async def test_what_was_asked_for_first_is_visited_once_though_the_time_is_over() -> None:
    machine = Machine(visits=3)
    survey = Survey(machine, over=machine.over)
    await survey.settle(range(1, 8))
    assert sorted(machine.seen) == list(range(1, 8))
    await survey.settle([9])
    assert 9 not in survey.series
    assert len(survey.restless) == 7


async def test_what_never_settles_ends() -> None:
    count = 0

    async def wild(key: str) -> Sequence[float]:
        nonlocal count
        count += 1
        return [1.5**count]

    survey = Survey(wild, over=lambda: False)
    await survey.settle(["a"])
    assert count == ROUNDS
    assert survey.restless == ["a"]
