"""Times many things in rounds until each is settled: every round visits those that are not, in another order, so that a
slow spell of the machine falls on points here and there and never looks like a slope. Knows no engine."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from statistics import median
from typing import Generic, TypeVar

from distserve.profiler.series import Series

ROUNDS = 12  # most visits of a thing: what has not settled by then is said

Key = TypeVar("Key", bound=Hashable)
Measure = Callable[[Key], Awaitable[Sequence[float]]]


class Survey(Generic[Key]):
    """What is known so far. `over` says when there is no time left; what was asked for first is visited once anyway.
    `tick` is called after each visit."""

    def __init__(
        self,
        measure: Measure[Key],
        *,
        over: Callable[[], bool],
        tick: Callable[[], None] = lambda: None,
        seed: int = 0,
    ) -> None:
        self.series: dict[Key, Series] = {}
        self.spent = 0.0  # seconds
        self._measure = measure
        self._over = over
        self._tick = tick
        self._random = random.Random(seed)

    async def settle(self, keys: Iterable[Key]) -> None:
        """Until all of them are settled, or there is no time left."""
        waiting = list(dict.fromkeys(keys))
        first = not self.series
        for turn in range(ROUNDS):
            self._random.shuffle(waiting)
            for key in waiting:
                if self._over() and not (first and turn == 0):
                    return
                await self._visit(key)
            waiting = [key for key in waiting if not self.series[key].settled]
            if not waiting:
                return

    async def again(self, keys: Iterable[Key], visits: int) -> None:
        """So many more visits of each, for somebody doubts them: perhaps all fell into one slow spell."""
        waiting = list(keys)
        for _ in range(visits):
            self._random.shuffle(waiting)
            for key in waiting:
                if self._over():
                    return
                await self._visit(key)

    async def _visit(self, key: Key) -> None:
        began = time.perf_counter()
        values = await self._measure(key)
        self.series.setdefault(key, Series()).values.append(median(values))
        self.spent += time.perf_counter() - began
        self._tick()

    @property
    def restless(self) -> list[Key]:
        """What has not settled."""
        return [key for key, series in self.series.items() if not series.settled]
