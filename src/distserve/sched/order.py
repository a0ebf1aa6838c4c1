"""Sequences in order of arrival (`Sequence.place`): lists, and a queue. Knows nothing else of them."""

from __future__ import annotations

from distserve.sched.base import Sequence


def find(sequences: list[Sequence], place: int) -> int:
    """Where the sequence of this place is, or belongs."""
    low, high = 0, len(sequences)
    while low < high:
        middle = (low + high) >> 1
        if sequences[middle].place < place:
            low = middle + 1
        else:
            high = middle
    return low


def insert(sequences: list[Sequence], sequence: Sequence) -> None:
    place = sequence.place
    if not sequences or sequences[-1].place < place:  # nearly always: it came last
        sequences.append(sequence)
    else:
        sequences.insert(find(sequences, place), sequence)


def remove(sequences: list[Sequence], sequence: Sequence) -> None:
    at = find(sequences, sequence.place)
    assert sequences[at] is sequence, f"{sequence} is not among them"
    sequences.pop(at)


class Queue:
    """Those that wait, each in one queue at most: its links lie in the sequences (`following`)."""

    __slots__ = ("_first", "_last")

    def __init__(self) -> None:
        self._first: Sequence | None = None
        self._last: Sequence | None = None

    def first(self) -> Sequence | None:
        return self._first

    def insert(self, sequence: Sequence) -> None:
        """Behind what came before it."""
        before, after = self._last, None
        if before is not None and before.place > sequence.place:
            before, after = None, self._first
            while after is not None and after.place < sequence.place:
                before, after = after, after.following
        sequence.following = after
        if before is None:
            self._first = sequence
        else:
            before.following = sequence
        if after is None:
            self._last = sequence

    def pop(self) -> None:
        """The first leaves."""
        first = self._first
        assert first is not None, "nobody waits"
        self._first, first.following = first.following, None
        if self._first is None:
            self._last = None
