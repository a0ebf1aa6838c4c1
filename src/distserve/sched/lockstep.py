"""Sequences that decode together, one token each in every step. Knows their blocks, no queue and no policy.

What a step changes is the same for each of them, so it is written down once: `ticks` counts steps, and a sequence in
lockstep knows its tokens from it (`Sequence.num_tokens`). A step then costs what joins, leaves or needs a block, not
the size of the batch; many steps in a row cost hardly more than one.

A sequence needs a block every `block_size` steps, always at the same residue of `ticks`: `_due` has one list a residue.
"""

from __future__ import annotations

from distserve.sched import order
from distserve.sched.base import NOBODY, Clock, Sequence
from distserve.sched.blocks import BlockPool


class Lockstep(Clock):
    """`members` are its batch: each with one token, oldest first."""

    __slots__ = ("_due", "_lent", "_longest", "_pool", "_sum", "leaving", "members")

    def __init__(self, pool: BlockPool) -> None:
        super().__init__()
        self.members: list[Sequence] = []
        self.leaving: list[Sequence] = []  # aborted in flight: the device writes to their blocks until the step is over
        self._lent = False  # a batch holds `members`: who changes it takes a copy
        self._pool = pool
        self._sum = 0  # of each member's tokens less `ticks`
        self._longest = 0  # at least the most tokens less `ticks` of any member
        self._due: list[list[Sequence]] = [[] for _ in range(pool.block_size)]

    @property
    def context(self) -> int:
        return self._sum + self.ticks * len(self.members)

    def lend(self) -> list[Sequence]:
        """The members as they are now, to be kept."""
        self._lent = True
        return self.members

    def _own(self) -> list[Sequence]:
        if self._lent:
            self._lent = False
            self.members = self.members.copy()
        return self.members

    def join(self, sequence: Sequence) -> None:
        """A sequence that has one token to compute. Not while a step is in flight."""
        offset = sequence.num_tokens - self.ticks
        members = self._own()
        self._longest = max(self._longest, offset) if members else offset
        sequence.enter(self)
        order.insert(members, sequence)
        self.joined.append(sequence)
        self._sum += offset
        self._due[(1 - offset) % len(self._due)].append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It knows its own tokens again."""
        offset = sequence.num_tokens - self.ticks
        self._sum -= offset
        due = self._due[(1 - offset) % len(self._due)]
        last = due.pop()
        if last is not sequence:
            for at, other in enumerate(due):
                if other is sequence:
                    due[at] = last
                    break
        order.remove(self._own(), sequence)
        if self.in_flight:
            self.leaving.append(sequence)
        sequence.exit()

    def feed(self) -> bool:
        """Gives a block to each that lacks one for the next step. False: there may be too few, and nobody got any."""
        due = self._due[self.ticks % len(self._due)]
        if len(due) > self._pool.num_free:
            return False
        self._feed(due)
        return True

    def _feed(self, due: list[Sequence]) -> None:
        pool = self._pool
        block_size = pool.block_size
        for sequence in due:
            if sequence.num_tokens > sequence.num_blocks * block_size:
                pool.give(sequence, 1)

    def needy(self) -> list[Sequence]:
        """Those that lack a block for the next step, oldest first."""
        due = self._due[self.ticks % len(self._due)]
        block_size = self._pool.block_size
        needy = NOBODY
        for sequence in due:
            if sequence.num_tokens > sequence.num_blocks * block_size:
                needy = needy or []
                order.insert(needy, sequence)
        return needy

    def advance(self, times: int) -> list[Sequence]:
        """`times` steps in a row are over (`steps_with_room` at most). Returns those that can grow no further: all
        blocks there are hold them, and not one token more."""
        dues = self._due
        size = len(dues)
        for _ in range(times - 1):
            self.ticks += 1
            due = dues[self.ticks % size]
            if due:
                self._feed(due)
        self.ticks += 1
        self.in_flight = False
        if self.joined:
            self.joined = []
        capacity = self._pool.capacity
        if self._longest + self.ticks <= capacity:
            return NOBODY
        return [sequence for sequence in dues[self.ticks % size] if sequence.num_tokens > capacity]

    def steps_with_room(self) -> int:
        """How many steps in a row all members can take with the blocks that are free; the next one has its own."""
        free, dues, ticks = self._pool.num_free, self._due, self.ticks
        size = len(dues)
        steps = free // len(self.members) * size + 1
        if steps == 1:
            due = len(dues[(ticks + 1) % size])
            while due <= free:
                steps += 1
                due += len(dues[(ticks + steps) % size])
        return max(1, min(steps, self._pool.capacity - self._longest - ticks + 1))
