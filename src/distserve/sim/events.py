"""The simulator's clock: what happens next. Knows no instance and no request."""

from __future__ import annotations


class Event:
    """Something that is planned. A kind of event says what happens."""

    __slots__ = ("order", "time")

    def __init__(self) -> None:
        self.time = 0.0
        self.order = 0  # among those of the same time

    def happen(self, now: float) -> None:
        raise NotImplementedError


class Heap:
    """Events, the first of them at hand. (`heapq` would need a tuple for each.)"""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: list[Event] = []

    def __len__(self) -> int:
        return len(self._events)

    def first(self) -> Event:
        return self._events[0]

    def push(self, event: Event) -> None:
        events, time, order = self._events, event.time, event.order
        events.append(event)
        at = len(events) - 1
        while at > 0:
            above = (at - 1) >> 1
            other = events[above]
            if other.time < time or (other.time == time and other.order < order):
                break
            events[at] = other
            at = above
        events[at] = event

    def pop(self) -> Event:
        events = self._events
        last = events.pop()
        if not events:
            return last
        first, size, time, order = events[0], len(events), last.time, last.order
        at, below = 0, 1
        while below < size:
            other = events[below]
            if below + 1 < size:
                sibling = events[below + 1]
                if sibling.time < other.time or (sibling.time == other.time and sibling.order < other.order):
                    other = sibling
                    below += 1
            if time < other.time or (time == other.time and order < other.order):
                break
            events[at] = other
            at, below = below, 2 * below + 1
        events[at] = last
        return first


class Events:
    """They happen in order of time; those of the same time in the order in which they were planned."""

    __slots__ = ("_heap", "_planned", "now", "stopped")

    def __init__(self) -> None:
        self.now = 0.0  # when the last of them happened
        self.stopped = False  # nothing happens any more
        self._heap = Heap()
        self._planned = 0

    def at(self, time: float, event: Event) -> None:
        self._planned += 1
        event.time = time
        event.order = self._planned
        self._heap.push(event)

    def run(self, until: float) -> None:
        """Lets everything happen that is planned for `until` or earlier, or until `stopped`."""
        heap = self._heap
        while len(heap) and heap.first().time <= until and not self.stopped:
            event = heap.pop()
            self.now = event.time
            event.happen(event.time)
