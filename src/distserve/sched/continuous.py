"""Continuous batching: what decode and colocated schedulers share. Knows neither pulls nor where prompts come from.

    QUEUED ----admitted when blocks are free----> RUNNING --complete--> FINISHED
    PREEMPTED --admitted, computed again--------> RUNNING
    RUNNING --an older sequence needs its blocks--> PREEMPTED
    any --abort--> ABORTED  (in a batch in flight: blocks are freed by `complete`)

Three rules keep it free of starvation and livelock:

1. First come, first served, by `Sequence.place`: nothing is admitted while something older waits for blocks, and a
   preempted sequence keeps its place.
2. Only an older sequence takes blocks from a younger one. So the oldest always moves on, and each in its turn is the
   oldest.
3. A sequence that lacks a block and finds nobody younger waits with its blocks instead of giving them up: the next
   block to come free is its own, and its KV need not be computed again. While it waits nobody is admitted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

from distserve.sched import order
from distserve.sched.base import NOBODY, Batch, Item, Load, Outcome, Sequence, State
from distserve.sched.blocks import BlockPool
from distserve.sched.lockstep import Lockstep


class ContinuousScheduler(ABC):
    """All of `Scheduler` but `next_batch`, and the parts that one is made of.

    `max_in_flight` batches may be in flight, one per pipeline stage. Those that decode do so in as many locksteps,
    which take turns and are kept equally large.
    """

    def __init__(self, pool: BlockPool, *, max_batch_size: int, watermark_blocks: int, max_in_flight: int) -> None:
        assert max_in_flight >= 1, f"max_in_flight must be at least 1, not {max_in_flight}"
        self.pool = pool
        self._max_batch_size = max_batch_size
        self._watermark_blocks = watermark_blocks
        self._max_in_flight = max_in_flight
        self._sequences: dict[int, Sequence] = {}  # all that are here
        self._queue = order.Queue()  # wait for blocks, by place; aborted ones leave at the head
        self._running: list[Sequence] = []  # RUNNING, by place
        self._locksteps = [Lockstep(pool) for _ in range(max_in_flight)]
        self._turn = 0  # whose it is
        self._formed: Lockstep | None = None  # of the batch that is being made
        self._loose: list[Sequence] = []  # those of the running that are not in lockstep, by place
        self._starved: Sequence | None = None  # the oldest of them that lacked a block in the last batch
        self._num_pulling = 0  # own blocks without running; only decode has such
        self._num_queued = 0
        self._num_queued_tokens = 0
        self._num_preemptions = 0
        self._num_added = 0
        self._num_batches = 0
        self._num_completed = 0  # of those; the rest is in flight

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._sequences

    def add(self, sequence: Sequence, now: float) -> None:
        self.pool.check_fits(sequence.num_tokens)
        assert sequence.id not in self._sequences, f"sequence {sequence.id} is here already"
        assert sequence.num_kv_tokens < sequence.num_tokens, f"sequence {sequence.id} has no tokens to compute"
        sequence.arrival = now
        sequence.place = self._num_added
        self._num_added += 1
        self._sequences[sequence.id] = sequence
        self._enqueue(sequence, State.WAITING if sequence.num_kv_tokens else State.QUEUED)

    @abstractmethod
    def next_batch(self, now: float) -> Batch | None: ...

    def repeats(self, batch: Batch) -> int:
        if self._max_in_flight > 1 or self._loose or batch.others or not batch.members:
            return 1
        head = self._head()
        if head is not None and self._has_room(head):
            return 1  # the step after may admit it: what kept it out of this one (a starved sequence) is over
        return self._locksteps[0].steps_with_room()

    def complete(self, batch: Batch, ended: Collection[int], now: float, times: int = 1) -> Outcome:
        self._num_completed += 1
        due = self._num_completed
        assert batch.id == due, f"batch {batch.id} completes before batch {due}, which was made earlier"
        outcome = Outcome()
        if batch.members:
            self._complete_lockstep(batch, ended, times, outcome)
        if batch.others:
            self._complete_others(batch.others, ended, outcome)
        return outcome

    def _complete_lockstep(self, batch: Batch, ended: Collection[int], times: int, outcome: Outcome) -> None:
        lockstep, members = batch.lockstep, batch.members
        assert isinstance(lockstep, Lockstep)
        longest = lockstep.advance(times)
        if lockstep.leaving:  # aborted in flight
            gone = {sequence.id for sequence in lockstep.leaving}
            outcome.sampled = [sequence for sequence in members if sequence.id not in gone]
            for sequence in lockstep.leaving:
                sequence.scheduled = 0
                outcome.drop(self._forget(sequence))
            lockstep.leaving.clear()
        else:
            outcome.sampled = members.copy() if batch.others else members  # nobody changes those of a batch
        if ended or longest:
            last: list[Sequence] = []
            for i in ended:
                found = self._sequences.get(i)
                if found is not None and found.clock is lockstep:
                    order.insert(last, found)
            for sequence in longest:
                if sequence.id not in ended:
                    order.insert(last, sequence)
            for sequence in last:
                self._finish(sequence, outcome)

    def _complete_others(self, others: list[Item], ended: Collection[int], outcome: Outcome) -> None:
        capacity = self.pool.capacity
        for sequence, n in others:
            sequence.scheduled = 0
            if sequence.state is State.ABORTED:
                outcome.drop(self._forget(sequence))
                continue
            sequence.num_computed += n
            if sequence.num_computed < sequence.num_tokens:
                continue
            sequence.num_tokens += 1
            outcome.sample(sequence)
            if sequence.id in ended or sequence.num_tokens > capacity:
                self._finish(sequence, outcome)

    def _finish(self, sequence: Sequence, outcome: Outcome) -> None:
        self._stop_running(sequence)
        sequence.state = State.FINISHED
        outcome.finish(self._forget(sequence))

    def abort(self, sequence_id: int, now: float) -> Outcome:
        outcome = Outcome()
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.state is State.ABORTED:
            return outcome
        state, sequence.state = sequence.state, State.ABORTED
        if state is State.RUNNING:
            self._stop_running(sequence)
        elif state is not State.PULLING:
            self._leave_queue(sequence)
        if state is not State.PULLING and not sequence.scheduled:
            outcome.drop(self._forget(sequence))
        return outcome

    def expire(self, now: float) -> Outcome:
        return Outcome()  # nothing here has a lease: what waits, waits for blocks, and its turn comes

    def load(self) -> Load:
        behind = 0
        for sequence in self._loose:
            n = sequence.num_tokens - sequence.num_computed
            if n > 1:
                behind += n
        return Load(
            num_queued=self._num_queued,
            num_queued_tokens=self._num_queued_tokens + behind,
            num_running=len(self._running) + self._num_pulling,
            num_free_blocks=self.pool.num_free,
            num_blocks=self.pool.num_blocks,
            block_size=self.pool.block_size,
            num_preemptions=self._num_preemptions,
        )

    # The parts of a next_batch

    def _schedule_decodes(self) -> list[Sequence]:
        """Forms the lockstep whose turn it is. Returns those that run and have more than one token to compute, oldest
        first."""
        self._starved = None
        share = -(-len(self._running) // self._max_in_flight)
        for _ in range(self._max_in_flight):
            lockstep = self._locksteps[self._turn]
            self._turn = (self._turn + 1) % self._max_in_flight
            if not lockstep.in_flight and self._form(lockstep, share):
                break
        return self._behind()

    def _form(self, lockstep: Lockstep, share: int) -> bool:
        """Makes `lockstep` as large as its share, for the batch that is being made; False: it is empty."""
        if self._loose:
            rest: list[Sequence] = []
            for sequence in self._loose:
                ready = not sequence.scheduled and sequence.num_tokens - sequence.num_computed == 1
                if ready and len(lockstep.members) < share:
                    lockstep.join(sequence)
                else:
                    rest.append(sequence)
            self._loose = rest
        while len(lockstep.members) > share:
            self._loosen(lockstep.members[-1])
        if not lockstep.feed():
            self._feed_some(lockstep)
        if not lockstep.members:
            return False
        lockstep.in_flight = True  # from here on nobody takes their blocks
        self._formed = lockstep
        return True

    def _feed_some(self, lockstep: Lockstep) -> None:
        """The oldest first, from what is free and from the youngest; who gets no block leaves the lockstep."""
        for sequence in lockstep.needy():  # `_grow` preempts some, but only behind the one we are at
            if sequence.clock is lockstep and not self._grow(sequence, sequence.num_tokens):
                self._loosen(sequence)

    def _behind(self) -> list[Sequence]:
        if not self._loose:
            return NOBODY
        return [s for s in self._loose if not s.scheduled and s.num_tokens - s.num_computed > 1]

    def _loosen(self, sequence: Sequence) -> None:
        """Takes it out of its lockstep; it goes on running."""
        assert isinstance(sequence.clock, Lockstep)
        sequence.clock.leave(sequence)
        order.insert(self._loose, sequence)

    def _schedule_behind(self, items: list[Item], behind: list[Sequence], budget: int) -> int:
        """Puts chunks of `behind` into `items`, oldest first; returns what is left of `budget` (tokens)."""
        for sequence in behind:
            if budget <= 0:
                break
            n = min(budget, sequence.num_tokens - sequence.num_computed)
            # It may have been preempted for an older one since, and pulled KV comes without blocks for what follows.
            if sequence.state is State.RUNNING and self._grow(sequence, sequence.num_computed + n):
                sequence.scheduled = n
                items.append((sequence, n))
                budget -= n
        return budget

    def _schedule_queued(self, items: list[Item], budget: int) -> None:
        """Admits from the head of the queue what is computed here, and puts its first chunk into `items`."""
        while budget > 0:
            sequence = self._head()
            if sequence is None or sequence.num_kv_tokens or not self._has_room(sequence):
                break
            self._admit(sequence)
            n = min(budget, sequence.num_tokens)
            sequence.scheduled = n
            items.append((sequence, n))
            budget -= n

    def _launch(self, items: list[Item]) -> Batch | None:
        """The lockstep that was formed, if one was, and `items` beside it."""
        formed = self._formed
        if formed is None and not items:
            return None
        self._num_batches += 1
        if formed is None:
            batch = Batch(self._num_batches, items)
        else:
            batch = Batch(self._num_batches, items, formed, formed.lend())
            self._formed = None
        return batch

    # Queue and blocks

    def _enqueue(self, sequence: Sequence, state: State) -> None:
        sequence.state = state
        self._num_queued += 1
        self._num_queued_tokens += sequence.num_kv_tokens or sequence.num_tokens
        self._queue.insert(sequence)  # where it was preempted, what came later waits behind it

    def _leave_queue(self, sequence: Sequence) -> None:
        self._num_queued -= 1
        self._num_queued_tokens -= sequence.num_kv_tokens or sequence.num_tokens

    def _head(self) -> Sequence | None:
        """The oldest sequence that waits for blocks."""
        queue = self._queue
        while True:
            sequence = queue.first()
            if sequence is None or sequence.state is not State.ABORTED:
                return sequence
            queue.pop()

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether the head of the queue may have its blocks now, those for its next token included. The watermark is no
        obstacle for a sequence that has all memory to itself."""
        if self._starved is not None and self._starved.state is State.RUNNING:
            return False
        if len(self._running) + self._num_pulling >= self._max_batch_size:
            return False
        pool = self.pool
        num_blocks, num_free = pool.blocks_for(sequence.num_tokens), pool.num_free
        return num_blocks + self._watermark_blocks <= num_free or num_blocks <= num_free == pool.num_blocks

    def _admit(self, sequence: Sequence) -> None:
        """Takes the head of the queue out of it, to be computed here from its first token on."""
        self._queue.pop()
        self._leave_queue(sequence)
        self.pool.give(sequence, self.pool.blocks_for(sequence.num_tokens))
        self._run(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        order.insert(self._running, sequence)
        order.insert(self._loose, sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        order.remove(self._running, sequence)
        clock = sequence.clock
        if isinstance(clock, Lockstep):
            clock.leave(sequence)
        else:
            order.remove(self._loose, sequence)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the KV of `num_tokens` tokens, taken from the youngest where none are free. False: it must wait
        for what nobody can take: blocks in flight, being pulled, or those of older sequences."""
        pool = self.pool
        missing = pool.blocks_for(num_tokens) - sequence.num_blocks
        if missing <= 0:
            return True
        while pool.num_free < missing:
            for victim in reversed(self._running):
                if victim is sequence:
                    self._starved = self._starved or sequence
                    return False
                if not victim.scheduled:
                    break
            self._preempt(victim)
        pool.give(sequence, missing)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._stop_running(victim)
        self.pool.take_back(victim)
        victim.num_computed = victim.num_kv_tokens = 0
        self._num_preemptions += 1
        self._enqueue(victim, State.PREEMPTED)

    def _forget(self, sequence: Sequence) -> Sequence:
        del self._sequences[sequence.id]
        self.pool.take_back(sequence)
        return sequence
