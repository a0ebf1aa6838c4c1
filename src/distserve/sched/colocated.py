"""Both phases on one instance: the baseline, and a candidate of the placement search. Two policies, two classes."""

from __future__ import annotations

from distserve.sched.base import Batch, Item, Sequence
from distserve.sched.blocks import BlockPool
from distserve.sched.continuous import ContinuousScheduler
from distserve.sched.policy import ColocatedPolicy


class ColocatedScheduler(ContinuousScheduler):
    """What the two policies share. They differ in `next_batch`."""

    def __init__(self, pool: BlockPool, policy: ColocatedPolicy, *, max_in_flight: int = 1) -> None:
        super().__init__(
            pool,
            max_batch_size=policy.max_batch_size,
            watermark_blocks=policy.watermark_blocks,
            max_in_flight=max_in_flight,
        )
        self.policy = policy

    def add(self, sequence: Sequence, now: float) -> None:
        assert sequence.num_kv_tokens == 0, f"sequence {sequence.id} comes with KV, but nothing is pulled here"
        super().add(sequence, now)


class ChunkedScheduler(ColocatedScheduler):
    """Every step decodes what runs and computes pieces of prompts with the rest of its token budget."""

    def next_batch(self, now: float) -> Batch | None:
        if self._num_batches - self._num_completed >= self._max_in_flight:
            return None
        items: list[Item] = []
        behind = self._schedule_decodes()
        decoding = len(self._formed.members) if self._formed is not None else 0
        budget = self._schedule_behind(items, behind, self.policy.chunk_tokens - decoding)
        self._schedule_queued(items, budget)
        return self._launch(items)


class PrefillFirstScheduler(ColocatedScheduler):
    """Whole prompts as soon as there is memory for them; what runs decodes when no prompt can start."""

    def next_batch(self, now: float) -> Batch | None:
        if self._num_batches - self._num_completed >= self._max_in_flight:
            return None
        items: list[Item] = []
        self._schedule_prompts(items)
        if not items:
            self._schedule_decodes()
        return self._launch(items)

    def _schedule_prompts(self, items: list[Item]) -> None:
        budget = self.policy.max_batch_tokens
        while True:
            sequence = self._head()
            if sequence is None or not self._has_room(sequence):
                break
            n = sequence.num_tokens
            if items and n > budget:
                break
            self._admit(sequence)
            sequence.scheduled = n
            items.append((sequence, n))
            budget -= n


COLOCATED: dict[str, type[ColocatedScheduler]] = {
    "chunked": ChunkedScheduler,
    "prefill-first": PrefillFirstScheduler,
}


def colocated_scheduler(pool: BlockPool, policy: ColocatedPolicy, *, max_in_flight: int = 1) -> ColocatedScheduler:
    """The scheduler that `policy` names."""
    return COLOCATED[policy.policy](pool, policy, max_in_flight=max_in_flight)
