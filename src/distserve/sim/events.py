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

    def run(self, until: float, stopped: Callable[[], bool] | None = None) -> float | None:
        """Lets everything happen that is planned for `until` or earlier, or until `stopped`. Returns when the last of
        it happened; None: nothing did."""
        heap = self._heap
        time = None
        while heap and heap[0][0] <= until:
            time, _, happening, argument = heappop(heap)
            happening(time, argument)
            if stopped is not None and stopped():
                break
        return time
