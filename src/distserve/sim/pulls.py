"""Pulls on their way over links that they share. Knows bytes and links, no instance and no scheduler.

When a pull begins or ends, those that share a link with it go on at another speed: each has so many bytes left, and its
end is planned anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from distserve.costs.network import Link, Links, Route
from distserve.sim.events import Events


@dataclass(slots=True, eq=False)
class _Pull:
    route: Route
    left: float  # bytes
    done: Callable[[float], None]
    since: float  # when `left` was true
    rate: float = 0.0  # bytes/s
    plans: int = 0  # an end that was planned before the last change is void


class Pulls:
    """All pulls of a world."""

    def __init__(self, links: Links, events: Events) -> None:
        self._links = links
        self._events = events
        self._active: dict[Link, list[_Pull]] = {}  # by link
        self._count: Counter[Link] = Counter()

    def start(self, route: Route, size: float, now: float, done: Callable[[float], None]) -> None:
        """`size` bytes of KV from `now` on; `done(when)` is called as they have arrived."""
        pull = _Pull(route, size, done, now + route.latency)
        for link, _ in route.loads:
            self._active.setdefault(link, []).append(pull)
            self._count[link] += 1
        self._share(route, now)
        if not route.loads:
            self._plan(pull, now)

    def _share(self, route: Route, now: float) -> None:
        touched = {id(pull): pull for link, _ in route.loads for pull in self._active[link]}
        for pull in touched.values():
            pull.left -= pull.rate * max(0.0, now - pull.since)
            pull.since = max(now, pull.since)
            pull.rate = self._links.rate(pull.route, self._count)
            self._plan(pull, now)

    def _plan(self, pull: _Pull, now: float) -> None:
        pull.plans += 1
        end = pull.since + (pull.left / pull.rate if pull.rate else 0.0)
        self._events.at(max(now, end), self._ended, (pull, pull.plans))

    def _ended(self, now: float, planned: tuple[_Pull, int]) -> None:
        pull, plans = planned
        if plans != pull.plans:
            return
        for link, _ in pull.route.loads:
            self._active[link].remove(pull)
            self._count[link] -= 1
        self._share(pull.route, now)
        pull.done(now)
