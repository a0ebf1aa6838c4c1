"""Sequences that decode together, one token each in every step. Knows their blocks, no queue and no policy.

What a step changes is the same for each of them, so it is written down once: `ticks` counts steps, and a sequence in
lockstep knows its tokens from it (`Sequence.num_tokens`). A step then costs what joins, leaves or needs a block, not
the size of the batch; many steps in a row cost hardly more than one.

A sequence needs a block every `block_size` steps, always at the same residue of `ticks`: `_due` has one list a residue.
"""

from __future__ import annotations

from bisect import bisect_left

from distserve.sched.base import Sequence
from distserve.sched.blocks import BlockPool

Item = tuple[Sequence, int]


class Lockstep:
    """`items` are its batch: every member with one token, oldest first."""

    __slots__ = ("_due", "_longest", "_pool", "_sum", "in_flight", "items", "joined", "leaving", "members", "ticks")

    def __init__(self, pool: BlockPool) -> None:
        self.ticks = 0  # steps completed
        self.items: list[Item] = []
        self.members: list[Sequence] = []  # of `items`, in the same order
        self.joined: list[Sequence] = []  # since the last step
        self.in_flight = False
        self.leaving: list[Sequence] = []  # aborted in flight: the device writes to their blocks until the step is over
        self._pool = pool
        self._sum = 0  # of each member's tokens less `ticks`
        self._longest = 0  # at least the most tokens less `ticks` of any member
        self._due: list[list[Sequence]] = [[] for _ in range(pool.block_size)]

    @property
    def context(self) -> int:
        """Tokens of all members together."""
        return self._sum + self.ticks * len(self.items)

    def join(self, sequence: Sequence) -> None:
        """A sequence that has one token to compute. Not while a step is in flight."""
        offset = sequence.num_tokens - self.ticks
        if not self.items:
            self._longest = offset
        sequence.enter(self)
        at = bisect_left(self.members, sequence.place, key=_place)
        self.items.insert(at, (sequence, 1))
        self.members.insert(at, sequence)
        self.joined.append(sequence)
        self._sum += offset
        self._longest = max(self._longest, offset)
        self._due[(1 - offset) % len(self._due)].append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It knows its own tokens again."""
        offset = sequence.num_tokens - self.ticks
        self._sum -= offset
        self._due[(1 - offset) % len(self._due)].remove(sequence)
        at = bisect_left(self.members, sequence.place, key=_place)
        del self.items[at], self.members[at]
        if self.in_flight:
            self.leaving.append(sequence)
        sequence.exit()

    def needy(self) -> list[Sequence]:
        """Those that lack a block for the next step, oldest first."""
        due = self._due[self.ticks % len(self._due)]
        if not due:
            return due
        block_size = self._pool.block_size
        needy = [sequence for sequence in due if sequence.num_tokens > len(sequence.blocks) * block_size]
        if len(needy) > 1:
            needy.sort(key=_place)
        return needy

    def advance(self, times: int) -> list[Sequence]:
        """`times` steps in a row are over (`steps_with_room` at most). Returns those that can grow no further: all
        blocks there are hold them, and not one token more."""
        pool, dues = self._pool, self._due
        block_size, size = pool.block_size, len(dues)
        for _ in range(times - 1):
            self.ticks += 1
            for sequence in dues[self.ticks % size]:
                if sequence.num_tokens > len(sequence.blocks) * block_size:
                    sequence.blocks += pool.allocate(1)
        self.ticks += 1
        self.in_flight = False
        self.joined.clear()
        capacity = pool.capacity
        if self._longest + self.ticks <= capacity:
            return []
        return [sequence for sequence in dues[self.ticks % size] if sequence.num_tokens > capacity]

    def steps_with_room(self) -> int:
        """How many steps in a row all members can take with the blocks that are free; the next one has its own."""
        free, size = self._pool.num_free, len(self._due)
        steps = free // len(self.items) * size + 1
        if steps == 1:
            due = len(self._due[(self.ticks + 1) % size])
            while due <= free:
                steps += 1
                due += len(self._due[(self.ticks + steps) % size])
        return max(1, min(steps, self._pool.capacity - self._longest - self.ticks + 1))


def _place(sequence: Sequence) -> int:
    return sequence.place
