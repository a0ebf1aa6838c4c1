"""Decides which hand-offs are pulled and which sequences decode together. Knows no transport and no prefill side.

WAITING --next_pulls--> PULLING --pulled--> RUNNING --complete--> FINISHED
                           |                   `--> PREEMPTED --> RUNNING (its KV computed again, here)
                           `--pull_failed--> ABORTED
QUEUED (came without KV) --next_batch--> RUNNING
any --abort--> ABORTED  (PULLING, or in a batch in flight: blocks are freed by `pulled`, `pull_failed`, `complete`)
"""

from __future__ import annotations

from distserve.sched.base import NO_ITEMS, NOBODY, NOTHING, Batch, Outcome, Sequence, State
from distserve.sched.blocks import BlockPool
from distserve.sched.continuous import ContinuousScheduler
from distserve.sched.policy import DecodePolicy


class DecodeScheduler(ContinuousScheduler):
    """A burst waits where it was prefilled: a hand-off is pulled when its KV and its next token have blocks here
    (DistServe, OSDI'24, section 4.3). One queue for hand-offs and for what is computed here keeps them first come,
    first served."""

    def __init__(self, pool: BlockPool, policy: DecodePolicy, *, max_in_flight: int = 1) -> None:
        super().__init__(
            pool,
            max_batch_size=policy.max_batch_size,
            watermark_blocks=policy.watermark_blocks,
            max_in_flight=max_in_flight,
        )
        self.policy = policy
        self._chunk_tokens = policy.chunk_tokens

    def next_batch(self, now: float) -> Batch | None:
        if self._num_batches - self._num_completed >= self._max_in_flight:
            return None
        behind, items = self._schedule_decodes(), NO_ITEMS
        if behind or self._queue.first() is not None:
            items = []
            budget = self._schedule_behind(items, behind, self._chunk_tokens)
            self._schedule_queued(items, budget)
        return self._launch(items)

    def next_pulls(self, now: float) -> list[Sequence]:
        if self._queue.first() is None:
            return NOBODY
        pulls: list[Sequence] = []
        while True:
            sequence = self._head()
            if sequence is None or not self._has_room(sequence):
                return pulls
            if not sequence.num_kv_tokens:
                self._admit(sequence)  # next in turn, and what came after it need not wait for a step
                continue
            self._queue.pop()
            self._leave_queue(sequence)
            self.pool.give(sequence, self.pool.blocks_for(sequence.num_kv_tokens))
            sequence.state = State.PULLING
            self._num_pulling += 1
            pulls.append(sequence)

    def pulled(self, sequence_id: int, now: float) -> Outcome:
        sequence = self._end_pull(sequence_id)
        if sequence is None:
            return NOTHING
        if sequence.state is State.ABORTED:
            outcome = Outcome()
            outcome.drop(self._forget(sequence))
            return outcome
        sequence.num_computed = sequence.num_kv_tokens
        self._run(sequence)
        return NOTHING

    def pull_failed(self, sequence_id: int, now: float) -> Outcome:
        outcome = Outcome()
        sequence = self._end_pull(sequence_id)
        if sequence is not None:
            sequence.state = State.ABORTED
            outcome.drop(self._forget(sequence))
        return outcome

    def _end_pull(self, sequence_id: int) -> Sequence | None:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or not _arrives(sequence):
            return None
        self._num_pulling -= 1
        return sequence


def _arrives(sequence: Sequence) -> bool:
    """Its bytes are on their way, wanted or not: of the aborted that are still here, those that no batch has."""
    state = sequence.state
    return state is State.PULLING or (state is State.ABORTED and not sequence.scheduled)
