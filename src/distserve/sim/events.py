"""The simulator's clock: what happens next. Knows no instance and no request."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Happening = Callable[[float, Any], None]  # (now, argument)


class Events:
    """Happenings in order of time; those of the same time in the order in which they were planned."""

    __slots__ = ("_heap", "_planned")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Happening, Any]] = []
        self._planned = 0

    def at(self, time: float, happening: Happening, argument: Any = None) -> None:
        self._planned += 1
        heappush(self._heap, (time, self._planned, happening, argument))

    @property
    def next_time(self) -> float:
        """Infinity where nothing is planned."""
        return self._heap[0][0] if self._heap else float("inf")

    def step(self) -> float:
        """Lets the next thing happen; returns when."""
        time, _, happening, argument = heappop(self._heap)
        happening(time, argument)
        return time
