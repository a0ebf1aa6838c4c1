"""Sequences by their place: a list, and the queue whose links lie in the sequences, against Python's `sorted`."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.sched import order
from distserve.sched.base import Sequence


def sequence(place: int) -> Sequence:
    made = Sequence(place, 10)
    made.place = place
    return made


def chain(queue: order.Queue) -> list[int]:
    """The places of those that wait, first to last."""
    found = []
    at = queue.first()
    while at is not None:
        found.append(at.place)
        at = at.following
    return found


PLACES = st.lists(st.integers(0, 1000), unique=True, max_size=40)


@given(PLACES, st.lists(st.booleans(), max_size=80), st.randoms(use_true_random=False))
def test_a_queue_is_in_order_whoever_comes_and_goes(places: list[int], steps: list[bool], random: Random) -> None:
    queue, waiting = order.Queue(), list[int]()
    outside = [sequence(place) for place in places]  # those that left come back, as a preempted one does
    for comes in steps:
        if comes and outside:
            entering = outside.pop(random.randrange(len(outside)))
            queue.insert(entering)
            waiting = sorted([*waiting, entering.place])
        elif waiting:
            leaving = queue.first()
            assert leaving is not None
            queue.pop()
            assert leaving.place == waiting.pop(0)
            assert leaving.following is None
            outside.append(leaving)
        assert chain(queue) == waiting


@pytest.mark.parametrize("places", [[1, 2, 3], [3, 2, 1], [2, 3, 1], [2, 1, 3], [1, 3, 2], [3, 1, 2]])
def test_a_queue_takes_any_order(places: list[int]) -> None:
    queue = order.Queue()
    for place in places:
        queue.insert(sequence(place))
    queue.insert(sequence(4))  # behind the last, wherever that came in
    assert chain(queue) == [1, 2, 3, 4]


def test_an_empty_queue() -> None:
    queue = order.Queue()
    assert queue.first() is None
    with pytest.raises(AssertionError, match="nobody waits"):
        queue.pop()
    queue.insert(sequence(7))
    queue.pop()
    assert queue.first() is None
    queue.insert(sequence(3))  # nothing is left of who was last
    assert chain(queue) == [3]


@given(PLACES, st.data())
def test_a_list_is_in_order_whoever_comes_and_goes(places: list[int], data: st.DataObject) -> None:
    found: list[Sequence] = []
    for place in places:
        order.insert(found, sequence(place))
    assert [each.place for each in found] == sorted(places)
    for at, each in enumerate(found):
        assert order.find(found, each.place) == at
    assert order.find(found, 1001) == len(found)
    leaving = data.draw(st.permutations(list(found)))[: len(found) // 2]
    for each in leaving:
        order.remove(found, each)
    assert [each.place for each in found] == sorted(set(places) - {each.place for each in leaving})


def test_who_is_not_in_the_list_is_not_removed_from_it() -> None:
    found = [sequence(1), sequence(3)]
    with pytest.raises(AssertionError, match="not among them"):
        order.remove(found, sequence(1))  # another one of that place
    assert [each.place for each in found] == [1, 3]
