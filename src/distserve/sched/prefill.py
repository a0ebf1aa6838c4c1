"""Decides which prompts are computed together, and how long their KV is kept for the puller. Knows no decode side.

QUEUED --next_batch--> RUNNING --complete--> HELD --release / lease over--> RELEASED
   |                      |         `------> FINISHED (the first token was the last)
   `------- abort --------+------------ abort ------> ABORTED  (RUNNING: blocks are freed by `complete`)
"""

from __future__ import annotations

from collections.abc import Collection

from distserve.sched.base import Batch, Item, Load, Outcome, Sequence, State
from distserve.sched.blocks import BlockPool
from distserve.sched.order import Queue
from distserve.sched.policy import PrefillPolicy


class _Lease:
    """Until when a sequence is held, if it is."""

    __slots__ = ("end", "following", "sequence")

    def __init__(self, sequence: Sequence, end: float) -> None:
        self.sequence = sequence
        self.end = end
        self.following: _Lease | None = None  # the next to end


class PrefillScheduler:
    """First come, first served; whole prompts, batched up to the knee (DistServe, OSDI'24, section 4.1).

    Where the first in the queue does not fit into the free blocks, all wait behind it. Letting shorter prompts pass
    would fill the memory with them again and again, and a long prompt might never start; the wait is short, because
    held blocks come free as the decode side pulls. A batch that ends at the knee is not filled up with later, shorter
    prompts either: first come, first served is what makes a predicted wait true.
    """

    def __init__(self, pool: BlockPool, policy: PrefillPolicy, *, max_in_flight: int = 1) -> None:
        assert max_in_flight >= 1, f"max_in_flight must be at least 1, not {max_in_flight}"
        self.pool = pool
        self.policy = policy
        self._max_batch_tokens, self._max_batch_size = policy.max_batch_tokens, policy.max_batch_size
        self._lease_seconds: float = policy.lease
        self._max_in_flight = max_in_flight
        self._sequences: dict[int, Sequence] = {}  # all that are here
        self._queue = Queue()  # aborted ones leave at the head
        self._num_queued = 0
        # By end of lease: all leases are equally long. One that was renewed is in it again, one that was released is
        # still in it; both leave at the head.
        self._first_lease: _Lease | None = None
        self._last_lease: _Lease | None = None
        self._num_held = 0
        self._num_pending_tokens = 0  # of QUEUED and RUNNING sequences
        self._num_added = 0
        self._num_batches = 0
        self._num_completed = 0  # of those; the rest is in flight
        self._num_running = 0  # sequences in flight

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._sequences

    def add(self, sequence: Sequence, now: float) -> None:
        self.pool.check_fits(sequence.num_tokens)
        assert sequence.id not in self._sequences, f"sequence {sequence.id} is here already"
        assert sequence.num_tokens > 0, f"sequence {sequence.id} has no tokens to compute"
        sequence.state = State.QUEUED
        sequence.arrival = now
        sequence.place = self._num_added
        self._num_added += 1
        self._num_pending_tokens += sequence.num_tokens
        self._sequences[sequence.id] = sequence
        self._queue.insert(sequence)
        self._num_queued += 1

    def next_batch(self, now: float) -> Batch | None:
        queue, pool = self._queue, self.pool
        if queue.first() is None or self._num_batches - self._num_completed >= self._max_in_flight:
            return None
        items: list[Item] = []
        budget = self._max_batch_tokens
        while len(items) < self._max_batch_size:
            sequence = queue.first()
            if sequence is None:
                break
            if sequence.state is State.ABORTED:
                queue.pop()
                continue
            n = sequence.num_tokens
            num_blocks = pool.blocks_for(n)
            if (items and n > budget) or num_blocks > pool.num_free:
                break
            queue.pop()
            self._num_queued -= 1
            pool.give(sequence, num_blocks)
            sequence.state = State.RUNNING
            sequence.scheduled = n
            items.append((sequence, n))
            budget -= n
        if not items:
            return None
        self._num_batches += 1
        self._num_running += len(items)
        return Batch(self._num_batches, items)

    def repeats(self, batch: Batch) -> int:
        return 1  # a prompt is computed once

    def complete(self, batch: Batch, ended: Collection[int], now: float, times: int = 1) -> Outcome:
        assert times == 1, f"a prefill batch is executed once, not {times} times"
        self._num_completed += 1
        due = self._num_completed
        assert batch.id == due, f"batch {batch.id} completes before batch {due}, which was made earlier"
        self._num_running -= len(batch.others)
        outcome = Outcome()
        for sequence, n in batch.others:
            self._num_pending_tokens -= n
            sequence.scheduled = 0
            if sequence.state is State.ABORTED:
                outcome.drop(self._forget(sequence))
                continue
            sequence.num_computed += n
            sequence.num_tokens += 1
            outcome.sample(sequence)
            if sequence.id in ended:
                sequence.state = State.FINISHED
                outcome.finish(self._forget(sequence))
            else:
                sequence.state = State.HELD
                self._num_held += 1
                self._lease(sequence, now)
                outcome.hold(sequence)
        return outcome

    def abort(self, sequence_id: int, now: float) -> Outcome:
        outcome = Outcome()
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return outcome
        if sequence.state is State.QUEUED:
            self._num_queued -= 1  # it leaves the queue when it is its turn
            self._num_pending_tokens -= sequence.num_tokens
        elif sequence.state is State.HELD:
            self._num_held -= 1
        else:  # in flight: the device writes to its blocks until `complete`
            sequence.state = State.ABORTED
            return outcome
        sequence.state = State.ABORTED
        outcome.drop(self._forget(sequence))
        return outcome

    def release(self, sequence_id: int, now: float) -> Outcome:
        outcome = Outcome()
        sequence = self._sequences.get(sequence_id)
        if sequence is not None and sequence.state is State.HELD:
            self._release(sequence, outcome)
            self._forget_leases()
        return outcome

    def renew(self, sequence_id: int, now: float) -> bool:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.state is not State.HELD:
            return False
        self._lease(sequence, now)
        return True

    def expire(self, now: float) -> Outcome:
        outcome, lease = Outcome(), self._first_lease
        while lease is not None and lease.end <= now:
            sequence = lease.sequence
            if sequence.state is State.HELD and sequence.lease == lease.end:
                self._release(sequence, outcome)
            lease = lease.following
        self._first_lease = lease
        return outcome

    def _lease(self, sequence: Sequence, now: float) -> None:
        sequence.lease = now + self._lease_seconds
        lease, last = _Lease(sequence, sequence.lease), self._last_lease
        if self._first_lease is None or last is None:
            self._first_lease = lease
        else:
            last.following = lease
        self._last_lease = lease

    def _release(self, sequence: Sequence, outcome: Outcome) -> None:
        self._num_held -= 1
        sequence.state = State.RELEASED
        outcome.drop(self._forget(sequence))

    def _forget_leases(self) -> None:
        """Those at the head of which nothing is left."""
        lease = self._first_lease
        while lease is not None and lease.sequence.state is not State.HELD:
            lease = lease.following
        self._first_lease = lease

    def load(self) -> Load:
        return Load(
            num_queued=self._num_queued,
            num_queued_tokens=self._num_pending_tokens,
            num_running=self._num_running,
            num_held=self._num_held,
            num_free_blocks=self.pool.num_free,
            num_blocks=self.pool.num_blocks,
            block_size=self.pool.block_size,
        )

    def _forget(self, sequence: Sequence) -> Sequence:
        del self._sequences[sequence.id]
        self.pool.take_back(sequence)
        return sequence
