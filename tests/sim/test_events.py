"""The simulator's clock against Python's own heap."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.sim.events import Event, Events, Heap

TIMES = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.5]) | st.floats(0, 10)  # many of the same time, many not
STEPS = st.lists(st.none() | TIMES, max_size=120)  # None: the first leaves


class Happening(Event):
    """Does something once it is its turn."""

    def __init__(self, do: Callable[[float], None]) -> None:
        super().__init__()
        self.do = do

    def happen(self, now: float) -> None:
        self.do(now)


def planned(time: float, order: int) -> Event:
    event = Event()
    event.time, event.order = time, order
    return event


@given(STEPS)
def test_a_heap_gives_what_pythons_gives(steps: list[float | None]) -> None:
    heap, reference = Heap(), list[tuple[float, int]]()
    events: dict[int, Event] = {}
    for order, time in enumerate(steps):
        if time is not None:
            events[order] = planned(time, order)
            heap.push(events[order])
            heapq.heappush(reference, (time, order))
        elif reference:
            heap.pop()
            heapq.heappop(reference)
        assert heap.first() is (events[reference[0][1]] if reference else None)
    while reference:
        assert heap.first() is events[heapq.heappop(reference)[1]]
        heap.pop()
    assert heap.first() is None


@given(st.lists(TIMES, min_size=1, max_size=40), st.lists(TIMES, max_size=80))
def test_an_event_that_happened_can_be_planned_again(first: list[float], later: list[float]) -> None:
    """As an instance does with its own: no link of its last time in the heap is left."""
    heap, reference = Heap(), list[tuple[float, int]]()
    events = [planned(time, order) for order, time in enumerate(first)]
    for event in events:
        heap.push(event)
        heapq.heappush(reference, (event.time, event.order))
    for order, more in enumerate(later, len(first)):
        next_ = heap.first()
        assert next_ is not None
        assert (next_.time, next_.order) == reference[0]
        heap.pop()
        next_.time, next_.order = next_.time + more, order
        heap.push(next_)
        heapq.heapreplace(reference, (next_.time, next_.order))
    left = []
    while (rest := heap.first()) is not None:
        left.append((rest.time, rest.order))
        heap.pop()
    assert left == sorted(reference)


def test_nothing_leaves_an_empty_heap() -> None:
    with pytest.raises(AssertionError, match="nothing is planned"):
        Heap().pop()


@given(st.lists(TIMES, max_size=60))
def test_events_happen_by_time_and_those_of_one_time_as_they_were_planned(times: list[float]) -> None:
    events, seen = Events(), list[tuple[float, int]]()

    def plan(number: int, time: float) -> None:
        def do(now: float) -> None:
            assert now == events.now == time
            seen.append((time, number))

        events.at(time, Happening(do))

    for number, time in enumerate(times):
        plan(number, time)
    events.run(until=10.0)
    assert seen == sorted((time, number) for number, time in enumerate(times))


def test_what_is_planned_meanwhile_takes_its_turn() -> None:
    events, seen = Events(), list[str]()

    def plan(time: float, name: str, then: Callable[[], None] | None = None) -> None:
        def do(now: float) -> None:
            seen.append(f"{name} at {now:g}")
            if then is not None:
                then()

        events.at(time, Happening(do))

    def more() -> None:
        plan(1.5, "later")
        plan(1.0, "last of that time")

    plan(1.0, "first", more)
    plan(1.0, "second")
    plan(2.0, "after the end")
    events.run(until=1.5)
    assert seen == ["first at 1", "second at 1", "last of that time at 1", "later at 1.5"]
    assert events.now == 1.5
    events.run(until=2.0)
    assert seen[4:] == ["after the end at 2"]


def test_nothing_happens_after_it_was_stopped() -> None:
    events, seen = Events(), list[float]()

    def stop(now: float) -> None:
        events.stopped = True

    events.at(1.0, Happening(seen.append))
    events.at(1.0, Happening(stop))
    events.at(1.0, Happening(seen.append))
    events.run(until=5.0)
    assert seen == [1.0]
