"""Rounds of visits, in changing order, until all is settled or the time is over."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest

from distserve.profiler.survey import ROUNDS, Survey, settle


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


async def settled(machine: Machine, keys: Iterable[int], survey: Survey[int] | None = None) -> Survey[int]:
    survey = survey or Survey(machine)
    survey.ask(keys)
    await settle([survey], over=machine.over, chance=random.Random(0))
    return survey


async def test_a_quiet_machine_is_asked_no_more_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distserve.profiler.survey.LONG", 0.0)
    machine = Machine()
    survey = await settled(machine, range(1, 20))
    assert not survey.restless
    assert len(machine.seen) < 19 * 5


async def test_slow_spells_look_like_no_slope() -> None:
    machine = Machine(slow=0.3)
    survey = await settled(machine, range(1, 20))
    wrong = [key for key, series in survey.series.items() if series.seconds != pytest.approx(key, rel=0.02)]
    assert len(wrong) <= 1  # all of its visits may have met slow spells
    assert sum(series.outliers for series in survey.series.values()) > 5
    survey.doubt(wrong, 6)
    await settled(machine, [], survey)
    for key, series in survey.series.items():
        assert series.seconds == pytest.approx(key, rel=0.02)


async def test_every_round_has_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distserve.profiler.survey.LONG", 0.0)
    machine = Machine()
    await settled(machine, range(1, 20))
    first, second = machine.seen[:19], machine.seen[19:38]
    assert sorted(first) == sorted(second) == list(range(1, 20))
    assert first != second != sorted(second)


async def test_kinds_take_turns() -> None:
    seen: list[str] = []

    def kind(name: str) -> Survey[int]:
        async def measure(key: int) -> Sequence[float]:
            seen.append(name)
            return [1.0]

        survey = Survey(measure)
        survey.ask(range(20))
        return survey

    await settle([kind("a"), kind("b")], over=lambda: len(seen) >= 200, chance=random.Random(0))
    first = seen[:40]
    assert first.count("a") == first.count("b") == 20
    assert "ab" in "".join(first[:10])


async def test_a_short_round_is_filled_with_what_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all visits of the one that is restless would lie in one slow spell."""
    clock = 0.0

    def now() -> float:
        return clock

    async def measure(key: str) -> Sequence[float]:
        nonlocal clock
        clock += 1.0
        return [1.0 if key != "wild" else 1.5**clock]

    monkeypatch.setattr("distserve.profiler.survey.time.perf_counter", now)
    survey = Survey(measure)
    survey.ask(["wild", *"abcdefgh"])
    await settle([survey], over=lambda: False, chance=random.Random(0))
    at = [visit.at for visit in survey.visits if visit.key == "wild"]
    assert len(at) == ROUNDS
    assert min(b - a for a, b in pairwise(at)) >= 1.0
    assert (at[-1] - at[0]) / (ROUNDS - 1) > 3.0
    assert {len(series.values) for key, series in survey.series.items() if key != "wild"} <= {8, 9, 10}


async def test_what_was_asked_for_first_is_visited_once_though_the_time_is_over() -> None:
    machine = Machine(visits=3)
    survey = await settled(machine, range(1, 8))
    assert sorted(machine.seen) == list(range(1, 8))
    await settled(machine, [9], survey)
    assert 9 not in survey.series
    assert len(survey.restless) == 7


async def test_what_never_settles_ends() -> None:
    count = 0

    async def wild(key: str) -> Sequence[float]:
        nonlocal count
        count += 1
        return [1.5**count]

    survey = Survey(wild)
    survey.ask(["a"])
    await settle([survey], over=lambda: False, chance=random.Random(0))
    assert count == ROUNDS
    assert survey.restless == ["a"]
