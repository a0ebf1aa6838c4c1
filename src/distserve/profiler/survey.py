"""Times many things of several kinds in rounds until each is settled: every round visits what is not, all kinds mixed
and in another order, so that a slow spell of the machine falls on points here and there and never looks like a slope.
What settled early is visited again to fill short rounds: of visits in a row all may lie in one spell. Knows no engine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from statistics import median
from typing import Any, Generic, NamedTuple, TypeVar

from distserve.profiler.series import Series

ROUNDS = 16  # most visits of a thing: what has not settled by then is said
LONG = 4.0  # seconds of a round at least: most spells are over then

Key = TypeVar("Key", bound=Hashable)
Measure = Callable[[Key], Awaitable[Sequence[float]]]


class Visit(NamedTuple, Generic[Key]):
    """When it ended (seconds, on a clock of its own), of what, and the seconds that it told."""

    at: float
    key: Key
    seconds: float


class Survey(Generic[Key]):
    """What is known so far of one kind of thing."""

    def __init__(self, measure: Measure[Key]) -> None:
        self.series: dict[Key, Series] = {}
        self.visits: list[Visit[Key]] = []
        self._measure = measure
        self._asked: dict[Key, None] = {}
        self._took: dict[Key, float] = {}  # seconds of the latest visit, preparations and all

    def ask(self, keys: Iterable[Key]) -> None:
        """From now on these are to be settled, too."""
        self._asked |= dict.fromkeys(keys)

    def doubt(self, keys: Iterable[Key], visits: int) -> None:
        """They are not settled until so many more visits: perhaps all fell into one slow spell."""
        for key in keys:
            self.series[key].wanted = len(self.series[key].values) + visits

    @property
    def waiting(self) -> list[Key]:
        series = self.series
        return [
            key
            for key in self._asked
            if key not in series or (not series[key].settled and len(series[key].values) < ROUNDS)
        ]

    @property
    def restless(self) -> list[Key]:
        """What has not settled."""
        return [key for key, series in self.series.items() if not series.settled]

    async def visit(self, key: Key) -> None:
        began = time.perf_counter()
        values = await self._measure(key)
        ended = time.perf_counter()
        self._took[key] = ended - began
        seconds = median(values)
        self.series.setdefault(key, Series()).values.append(seconds)
        self.visits.append(Visit(ended, key, seconds))

    def seconds(self, key: Key) -> float:
        """That a visit takes, as far as is known."""
        return self._took.get(key, 0.0)


async def settle(
    surveys: Sequence[Survey[Any]],
    *,
    over: Callable[[], bool],
    tick: Callable[[], None] = lambda: None,
    chance: random.Random,
) -> None:
    """Until everything that was asked for is settled, or there is no time left, which `over` says; what nobody has
    visited yet in a survey that has just begun is visited all the same. `tick` is called after each visit."""
    first = [survey for survey in surveys if not survey.series]
    while waiting := [(survey, key) for survey in surveys for key in survey.waiting]:
        visits = waiting + _others(surveys, waiting)
        chance.shuffle(visits)
        for survey, key in visits:
            if not over() or survey in first:
                await survey.visit(key)
                tick()
        if over():
            return
        first = []


def _others(
    surveys: Sequence[Survey[Any]], waiting: Sequence[tuple[Survey[Any], Any]]
) -> list[tuple[Survey[Any], Any]]:
    """Settled ones that make a round long enough, the least certain first."""
    left = LONG - sum(survey.seconds(key) for survey, key in waiting)
    here = set(waiting)
    settled = [(survey, key) for survey in surveys for key in survey.series if (survey, key) not in here]
    settled.sort(key=lambda each: (len(each[0].series[each[1]].values), -each[0].series[each[1]].error))
    found = []
    for survey, key in settled:
        if left <= 0:
            break
        found.append((survey, key))
        left -= survey.seconds(key)
    return found
