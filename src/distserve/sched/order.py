"""Lists of sequences in order of arrival (`Sequence.place`). Knows nothing else of them."""

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
