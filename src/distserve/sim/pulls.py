"""Pulls on their way over links that they share. Knows bytes and links, no instance and no scheduler.

When a pull begins or ends, those that share a link with it go on at another speed: each has so many bytes left, and its
end is planned anew.
"""

from __future__ import annotations

from distserve.costs.network import Link, Links, Route
from distserve.sim.events import Event, Events


class _Wire:
    """A link and the pulls on it."""

    __slots__ = ("capacity", "pulls")

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity  # bytes/s
        self.pulls: list[Pull] = []


class Way:
    """A route, and the links it loads."""

    __slots__ = ("latency", "route", "shares", "wires")

    def __init__(self, route: Route, wires: list[_Wire]) -> None:
        self.route = route
        self.latency: float = route.latency
        self.wires = wires
        self.shares: list[float] = [share for _, share in route.loads]  # bytes on each for a byte of KV

    def rate(self) -> float:
        """KV bytes/s of each pull on it, as `Links.rate` says; infinite where it loads nothing."""
        rate = float("inf")
        for wire, share in zip(self.wires, self.shares, strict=True):
            rate = min(rate, wire.capacity / (len(wire.pulls) * share))
        return rate


class Pull:
    """A pull of `left` bytes of KV; a world's kind of pull says what is done when they have arrived."""

    __slots__ = ("left", "plans", "rate", "since", "touched", "way")

    def __init__(self, way: Way, left: float) -> None:
        self.way = way
        self.left = left
        self.since = 0.0  # when `left` was true
        self.rate = 0.0  # bytes/s
        self.plans = 0  # an end that was planned before the last change is void
        self.touched = 0  # by which change last

    def done(self, now: float) -> None:
        raise NotImplementedError


class _End(Event):
    __slots__ = ("plans", "pull", "pulls")

    def __init__(self, pulls: Pulls, pull: Pull) -> None:
        super().__init__()
        self.pulls = pulls
        self.pull = pull
        self.plans = pull.plans

    def happen(self, now: float) -> None:
        if self.plans == self.pull.plans:
            self.pulls.end(self.pull, now)


class Pulls:
    """All pulls of a world."""

    def __init__(self, links: Links, events: Events) -> None:
        self._links = links
        self._events = events
        self._wires: dict[Link, _Wire] = {}
        self._changes = 0

    def way(self, route: Route) -> Way:
        """What pulls on this route need."""
        wires: list[_Wire] = []
        for link, _ in route.loads:
            if link not in self._wires:
                self._wires[link] = _Wire(self._links.capacity(link))
            wires.append(self._wires[link])
        return Way(route, wires)

    def start(self, pull: Pull, now: float) -> None:
        """From `now` on. It is told when its bytes have arrived."""
        pull.since = now + pull.way.latency
        for wire in pull.way.wires:
            wire.pulls.append(pull)
        self._share(pull.way, now)
        if not pull.way.wires:
            self._plan(pull, now)

    def end(self, pull: Pull, now: float) -> None:
        for wire in pull.way.wires:
            wire.pulls.remove(pull)
        self._share(pull.way, now)
        pull.done(now)

    def _share(self, way: Way, now: float) -> None:
        self._changes += 1
        for wire in way.wires:
            for pull in wire.pulls:
                if pull.touched == self._changes:
                    continue
                pull.touched = self._changes
                pull.left -= pull.rate * max(0.0, now - pull.since)
                pull.since = max(now, pull.since)
                pull.rate = pull.way.rate()
                self._plan(pull, now)

    def _plan(self, pull: Pull, now: float) -> None:
        pull.plans += 1
        end = pull.since + (pull.left / pull.rate if pull.rate else 0.0)
        self._events.at(max(now, end), _End(self, pull))
