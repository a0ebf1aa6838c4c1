"""The simulator's clock: what happens next. Knows no instance and no request."""

from __future__ import annotations


class Event:
    """Something that is planned. A kind of event says what happens."""

    __slots__ = ("child", "order", "sibling", "time")

    def __init__(self) -> None:
        self.time = 0.0
        self.order = 0  # among those of the same time
        self.child: Event | None = None  # in a heap: the first of those that come after it
        self.sibling: Event | None = None  # and the next of those that come after the same one

    def happen(self, now: float) -> None:
        raise NotImplementedError


def _meld(one: Event, other: Event) -> Event:
    """Two heaps become one, under the earlier of both."""
    if other.time < one.time or (other.time == one.time and other.order < one.order):
        one, other = other, one
    other.sibling = one.child
    one.child = other
    return one


class Heap:
    """Events, the first of them at hand: a pairing heap (Fredman et al., 1986), whose links lie in the events."""

    __slots__ = ("_first",)

    def __init__(self) -> None:
        self._first: Event | None = None

    def first(self) -> Event | None:
        return self._first

    def push(self, event: Event) -> None:
        first = self._first
        self._first = event if first is None else _meld(first, event)

    def pop(self) -> None:
        """The first leaves."""
        first = self._first
        assert first is not None, "nothing is planned"
        child, first.child = first.child, None
        pairs: Event | None = None
        rest: Event | None
        while child is not None:  # in pairs, left to right
            pair, sibling, rest = child, child.sibling, None
            if sibling is not None:
                rest = sibling.sibling
                pair = _meld(child, sibling)
            pair.sibling, pairs, child = pairs, pair, rest
        whole: Event | None = None
        while pairs is not None:  # and the pairs right to left
            rest, pairs.sibling = pairs.sibling, None
            whole, pairs = pairs if whole is None else _meld(pairs, whole), rest
        self._first = whole


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
        while not self.stopped:
            event = heap.first()
            if event is None or event.time > until:
                return
            heap.pop()
            self.now = event.time
            event.happen(event.time)
