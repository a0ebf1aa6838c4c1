"""Decode micro-batches that keep their members and take turns, as in DistServe's own engine. Knows no pipeline: a world
with `max_in_flight` stages asks for the next batch, and whose turn it is answers.

    a sequence joins the micro-batch whose turn it is when it comes, and stays there until it ends
    an empty micro-batch passes its turn; it is asked again when a batch has come back

What it costs (why `even` is the default): while the large micro-batch runs, more sequences come than while the small
one does, and they join the one that runs. So the large one grows and the small one dies out, and the stages of the
pipeline wait for each other (LLMServe/DistServe, decoding_stage_scheduler.py, `get_next_batch`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from distserve.sched.base import Batch, Item, Outcome
from distserve.sched.blocks import BlockPool
from distserve.sched.decode import DecodeScheduler
from distserve.sched.policy import DecodePolicy


class TurnsScheduler(DecodeScheduler):
    """`DecodeScheduler` with another answer to who decodes together. Of several batches: one is always together."""

    def __init__(self, pool: BlockPool, policy: DecodePolicy, *, max_in_flight: int = 1) -> None:
        assert max_in_flight > 1, "one micro-batch has no turns to take"
        super().__init__(pool, policy, max_in_flight=max_in_flight)
        self._turns: deque[int | None] = deque()  # of the batches in flight, by id; None: a turn that was passed

    def next_batch(self, now: float) -> Batch | None:
        turns = self._turns
        for _ in range(self._max_in_flight):
            while turns and turns[0] is None:
                turns.popleft()
            if len(turns) >= self._max_in_flight:
                return None
            batch = self._batch_of(self._turn)
            self._turn = (self._turn + 1) % self._max_in_flight
            turns.append(batch.id if batch else None)
            if batch:
                return batch
        turns.clear()  # nobody had anything
        return None

    def complete(self, batch: Batch, ended: Collection[int], now: float, times: int = 1) -> Outcome:
        outcome = super().complete(batch, ended, now, times)
        while self._turns and self._turns[0] != batch.id:
            self._turns.popleft()
        self._turns.popleft()
        return outcome

    def _batch_of(self, turn: int) -> Batch | None:
        items: list[Item] = []
        self._starved = None
        lockstep = self._locksteps[turn]
        assert not lockstep.in_flight, "a turn came again before its batch had come back"
        self._form(lockstep, len(self._running))
        budget = self._schedule_behind(items, self._behind(), self.policy.chunk_tokens)
        self._schedule_queued(items, budget)
        return self._launch(items)
