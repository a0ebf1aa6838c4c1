"""The contract of every scheduler, and the nouns it speaks: lists and integers, no token ids, no tensors, no clock.

A scheduler is told what happened and says what to do next; two drivers connect it to a world (`serve/instance.py` to
asyncio and a device, `sim/` to a heap). It never sees a request's true output length: the world says who ended.

A sequence's life (which states a scheduler uses depends on its role):

    prefill:    QUEUED -> RUNNING -> HELD (lease) -> RELEASED
    decode:     WAITING -> PULLING -> RUNNING -> FINISHED          RUNNING -> PREEMPTED -> RUNNING (recomputed here)
    colocated:  QUEUED -> RUNNING -> FINISHED                      RUNNING -> PREEMPTED -> RUNNING
    any of them -> ABORTED
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol


class State(Enum):
    QUEUED = "queued"  # waits for its first batch
    WAITING = "waiting"  # its KV waits elsewhere until there is room here
    PULLING = "pulling"  # blocks allocated here, bytes on their way
    RUNNING = "running"
    PREEMPTED = "preempted"  # lost its blocks; will be computed again from its tokens
    HELD = "held"  # prefilled; blocks wait to be pulled, until the lease ends
    RELEASED = "released"
    FINISHED = "finished"
    ABORTED = "aborted"


class Clock(ABC):
    """What a sequence in lockstep with others knows its tokens from (`lockstep.py`)."""

    __slots__ = ("in_flight", "joined", "ticks")

    def __init__(self) -> None:
        self.ticks = 0  # steps completed
        self.in_flight = False
        self.joined: list[Sequence] = []  # those that are for the first time in the batch in flight

    @property
    @abstractmethod
    def context(self) -> int:
        """Tokens of all of them together."""


class Sequence:
    """A request as a scheduler sees it. `add` takes ownership; only its scheduler writes to it afterwards.

    id               of the request, or of its attempt
    num_tokens       tokens known so far: prompt and generated
    attempt
    num_kv_tokens    decode: how many of them have their KV waiting to be pulled (0: compute it here)
    num_computed     tokens whose KV is in `blocks`
    blocks           (a world without memory keeps to their number)
    num_blocks
    state
    scheduled        tokens of it in a batch that has not completed (0: it may be scheduled)
    arrival          when it was added here
    following        the next in the queue it waits in
    place            its place in the order of arrival here, given by `add`; a preempted sequence keeps it
    lease            HELD: until when its blocks are kept without word from the puller
    """

    __slots__ = (
        "_clock",
        "_computed",
        "_entered",
        "_scheduled",
        "_tokens",
        "arrival",
        "attempt",
        "blocks",
        "following",
        "id",
        "lease",
        "num_blocks",
        "num_kv_tokens",
        "place",
        "state",
    )

    def __init__(
        self,
        id: int,
        num_tokens: int,
        attempt: int = 1,
        num_kv_tokens: int = 0,
        num_computed: int = 0,
        blocks: list[int] | None = None,
    ) -> None:
        self.id = id
        self.attempt = attempt
        self.num_kv_tokens = num_kv_tokens
        self.blocks: list[int] = [] if blocks is None else blocks
        self.num_blocks = len(self.blocks)
        self.following: Sequence | None = None
        self.state = State.QUEUED
        self.arrival = 0.0
        self.place = 0
        self.lease = 0.0
        self._tokens = num_tokens
        self._computed = num_computed
        self._scheduled = 0
        self._clock: Clock | None = None
        self._entered = 0

    @property
    def num_tokens(self) -> int:
        clock = self._clock
        return self._tokens if clock is None else self._tokens + clock.ticks - self._entered

    @num_tokens.setter
    def num_tokens(self, value: int) -> None:
        assert self._clock is None, "a sequence in lockstep does not count for itself"
        self._tokens = value

    @property
    def num_computed(self) -> int:
        clock = self._clock
        return self._computed if clock is None else self._computed + clock.ticks - self._entered

    @num_computed.setter
    def num_computed(self, value: int) -> None:
        assert self._clock is None, "a sequence in lockstep does not count for itself"
        self._computed = value

    @property
    def scheduled(self) -> int:
        clock = self._clock
        return self._scheduled if clock is None else int(clock.in_flight)

    @scheduled.setter
    def scheduled(self, value: int) -> None:
        assert self._clock is None, "a sequence in lockstep does not count for itself"
        self._scheduled = value

    @property
    def clock(self) -> Clock | None:
        """What it is in lockstep with."""
        return self._clock

    @property
    def in_lockstep(self) -> bool:
        return self._clock is not None

    def enter(self, clock: Clock) -> None:
        """From now on its tokens grow by one with each tick."""
        self._clock, self._entered = clock, clock.ticks

    def exit(self) -> None:
        """It counts for itself again."""
        tokens, computed, scheduled = self.num_tokens, self.num_computed, self.scheduled
        self._clock = None
        self._tokens, self._computed, self._scheduled = tokens, computed, scheduled

    def __repr__(self) -> str:
        return f"Sequence({self.id}, {self.num_computed} of {self.num_tokens} tokens, {self.state.value})"


Item = tuple[Sequence, int]  # and how many tokens of it
NOBODY: Final[list[Sequence]] = []  # most answers name nobody; this list is never changed
NO_ITEMS: Final[list[Item]] = []  # nor is this one


class Batch:
    """What to compute in one step: for each sequence the next `n` tokens after its `num_computed`.

    A sequence whose tokens are all computed by the step (`num_computed + n == num_tokens`) gets a new token sampled.

    members    those of `lockstep`, one token each; they come first. Nobody changes this list any more
    others     everybody else
    """

    __slots__ = ("_items", "id", "lockstep", "members", "others")

    def __init__(
        self, id: int, others: list[Item], lockstep: Clock | None = None, members: list[Sequence] | None = None
    ) -> None:
        self.id = id
        self.others = others
        self.lockstep = lockstep
        self.members: list[Sequence] = NOBODY if members is None else members
        self._items: list[Item] | None = None

    @property
    def items(self) -> list[Item]:
        """All of them."""
        if self._items is None:  # a world that knows a lockstep never asks
            self._items = [(sequence, 1) for sequence in self.members] + self.others if self.members else self.others
        return self._items

    @property
    def num_tokens(self) -> int:
        return len(self.members) + sum([n for _, n in self.others])


def composition(items: list[Item], padded: bool = False) -> tuple[int, int, int, int]:
    """(prompt tokens, their squares, decoding sequences, their context) of a batch."""
    tokens = squares = prompts = longest = batch = context = 0
    for sequence, n in items:
        computed = sequence.num_computed
        if n == 1 and computed:
            batch += 1
            context += computed + 1
        else:  # a single token that is a sequence's first is a prompt
            tokens += n
            squares += n * (2 * computed + n)
            prompts += 1
            longest = max(longest, n)
    if padded and prompts > 1:
        tokens, squares = prompts * longest, prompts * longest * longest
    return tokens, squares, batch, context


class Outcome:
    """What a scheduler's answer to an event means for the world, which only reads it. Blocks are freed when it comes.

    Every sequence that was added is, once, in `finished` or in `dropped`; from then on its id may be added again. Where
    an abort has to wait for the device or the transport, it is `dropped` by the call that ends the wait.

    sampled    got a token in this step (in batch order)
    held       of those: prefilled, KV now held for a puller
    finished   of the sampled: that token was their last. The world said so, or the KV memory of the whole instance
               cannot hold one token more (the world then ends it as "length")
    dropped    aborted, released or lease over: forget them
    """

    __slots__ = ("dropped", "finished", "held", "sampled")

    def __init__(self) -> None:
        self.sampled = self.held = self.finished = self.dropped = NOBODY

    def sample(self, sequence: Sequence) -> None:
        self.sampled = _with(self.sampled, sequence)

    def hold(self, sequence: Sequence) -> None:
        self.held = _with(self.held, sequence)

    def finish(self, sequence: Sequence) -> None:
        self.finished = _with(self.finished, sequence)

    def drop(self, sequence: Sequence) -> None:
        self.dropped = _with(self.dropped, sequence)


NOTHING: Final = Outcome()  # most calls that may end a sequence end none


def _with(sequences: list[Sequence], sequence: Sequence) -> list[Sequence]:
    if sequences is NOBODY:
        return [sequence]
    sequences.append(sequence)
    return sequences


@dataclass(init=False, slots=True)
class Load:
    """What a router needs to know about an instance. Counts at one moment; nobody changes them."""

    num_queued: int  # sequences waiting for a first batch, a pull or a recomputation
    num_queued_tokens: int  # tokens still to be computed or pulled, except the one token of a decode step
    num_running: int  # in a batch, between two, or being pulled
    num_held: int
    num_free_blocks: int
    num_blocks: int
    block_size: int  # tokens
    num_preemptions: int  # since the epoch began

    def __init__(
        self,
        num_queued: int = 0,
        num_queued_tokens: int = 0,
        num_running: int = 0,
        num_held: int = 0,
        num_free_blocks: int = 0,
        num_blocks: int = 0,
        block_size: int = 1,
        num_preemptions: int = 0,
    ) -> None:
        self.num_queued = num_queued
        self.num_queued_tokens = num_queued_tokens
        self.num_running = num_running
        self.num_held = num_held
        self.num_free_blocks = num_free_blocks
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_preemptions = num_preemptions


class Scheduler(Protocol):
    """Decides, never waits. Every method returns at once; `now` is in seconds and never goes back."""

    def __contains__(self, sequence_id: int) -> bool:
        """Whether a sequence of this id is still here: from `add` until it was in `finished` or `dropped`."""
        ...

    def add(self, sequence: Sequence, now: float) -> None:
        """Takes ownership; the id must not be here (see `__contains__`). Raises `RequestError` where the sequence could
        never fit the KV memory."""
        ...

    def next_batch(self, now: float) -> Batch | None:
        """The next step's work, or None: nothing can run until something happens. May preempt. Several batches may be
        in flight (as many as the instance has pipeline stages); a sequence is in at most one of them."""
        ...

    def repeats(self, batch: Batch) -> int:
        """How many times in a row `batch`, just made, would be made again if nothing but its own steps happened: no
        arrival, no pull, no abort, no end of a sequence. At least 1. For worlds that need not live through each step
        (a simulator); the blocks that its sequences grow into are counted."""
        ...

    def complete(self, batch: Batch, ended: Collection[int], now: float, times: int = 1) -> Outcome:
        """The world has executed `batch`, `times` times in a row (at most `repeats`); `ended`: ids of those whose token
        of the last step was their last one. Batches complete in the order in which they were made. Sequences that were
        aborted meanwhile are skipped and their blocks, kept until now because the device was writing to them, freed."""
        ...

    def abort(self, sequence_id: int, now: float) -> Outcome:
        """Drops it from whichever queue holds it; an unknown id changes nothing (the answer is then empty)."""
        ...

    def expire(self, now: float) -> Outcome:
        """Lets go of what waited longer than its lease. Cheap; called often."""
        ...

    def load(self) -> Load: ...


class HoldingScheduler(Scheduler, Protocol):
    """Prefill's additions: blocks are held until every puller is done."""

    def release(self, sequence_id: int, now: float) -> Outcome:
        """The pull is over (or the gateway no longer wants it): frees the held blocks. Idempotent; changes nothing
        where they are not held (yet): `abort` is for that."""
        ...

    def renew(self, sequence_id: int, now: float) -> bool:
        """Extends the lease; False where nothing is held any more."""
        ...


class PullingScheduler(Scheduler, Protocol):
    """Decode's additions: KV arrives from elsewhere."""

    def next_pulls(self, now: float) -> list[Sequence]:
        """Admits waiting hand-offs for which there are blocks, first come first served; they become PULLING and own
        the target blocks (`blocks`, just enough for `num_kv_tokens` tokens). Ask after every event, before
        `next_batch`."""
        ...

    def pulled(self, sequence_id: int, now: float) -> Outcome:
        """All bytes are here and verified: it runs from the next batch on. Where the sequence was aborted meanwhile the
        blocks are freed now."""
        ...

    def pull_failed(self, sequence_id: int, now: float) -> Outcome:
        """Frees the target blocks and forgets the sequence (it is in `dropped`); the driver reports it."""
        ...
