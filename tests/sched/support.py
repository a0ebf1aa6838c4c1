"""What the scheduler tests share: a world that ends sequences, and an auditor that trusts no scheduler."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from distserve.sched.base import Batch, Outcome, Scheduler, Sequence, State
from distserve.sched.blocks import BlockPool


class CountedPool(BlockPool):
    """Counts how often each block was freed, to compare with its generation."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.frees = [0] * num_blocks

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            self.frees[block] += 1
        super().free(blocks)


def run_step(scheduler: Scheduler, ended: Collection[int] = (), now: float = 0.0) -> tuple[Batch, Outcome]:
    """One batch, executed at once."""
    batch = scheduler.next_batch(now)
    assert batch is not None, "nothing to run"
    return batch, scheduler.complete(batch, ended, now)


def shape(batch: Batch | None) -> list[tuple[int, int]]:
    """(sequence id, number of tokens) of each item."""
    return [] if batch is None else [(sequence.id, n) for sequence, n in batch.items]


def ids(sequences: Iterable[Sequence]) -> list[int]:
    return [sequence.id for sequence in sequences]


@dataclass
class Auditor:
    """Follows every sequence from `add` to its end and checks what protocol.md promises about blocks after each event.

    It holds sequences until the scheduler has said that they are over, so a block that nobody speaks of is a leak.
    """

    pool: CountedPool
    live: dict[int, Sequence] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)  # "finished" or "dropped"
    in_flight: list[Batch] = field(default_factory=list)
    _aborted: set[int] = field(default_factory=set)  # in the batch that completes
    _writing: dict[int, list[tuple[Sequence, list[int]]]] = field(default_factory=dict)  # batch id: blocks at launch

    def added(self, sequence: Sequence) -> None:
        self.live[sequence.id] = sequence

    def launched(self, batch: Batch) -> None:
        assert batch.items, "an empty batch"
        busy = {s.id for other in self.in_flight for s, _ in other.items}
        for sequence, n in batch.items:
            assert sequence.id in self.live
            assert sequence.id not in busy, f"sequence {sequence.id} is in two batches in flight"
            assert sequence.state is State.RUNNING
            assert sequence.scheduled == n > 0
            assert sequence.num_computed + n <= sequence.num_tokens
            assert len(sequence.blocks) * self.pool.block_size >= sequence.num_computed + n, "no block for its KV"
        self.in_flight.append(batch)
        self._writing[batch.id] = [(sequence, list(sequence.blocks)) for sequence, _ in batch.items]

    def completing(self, batch: Batch) -> dict[int, tuple[int, int]]:
        """Before `complete`: the blocks that the device wrote to still belong to the sequences it wrote for. Returns
        (num_tokens, num_computed) of each."""
        for sequence, blocks in self._writing.pop(batch.id):
            assert sequence.blocks[: len(blocks)] == blocks, (
                f"sequence {sequence.id} lost blocks to the device's writes"
            )
        self.in_flight.remove(batch)
        self._aborted = {sequence.id for sequence, _ in batch.items if sequence.state is State.ABORTED}
        return {s.id: (s.num_tokens, s.num_computed) for s, _ in batch.items}

    def completed(self, batch: Batch, before: dict[int, tuple[int, int]], outcome: Outcome) -> None:
        dropped = set(ids(outcome.dropped))
        assert dropped == self._aborted, "what was aborted meanwhile is dropped now, and nothing else"
        due = [s.id for s, n in batch.items if s.id not in dropped and before[s.id][1] + n == before[s.id][0]]
        assert ids(outcome.sampled) == due, "a token is sampled exactly where the last known token was computed"
        for sequence, n in batch.items:
            assert sequence.scheduled == 0
            num_tokens, num_computed = before[sequence.id]
            if sequence.id not in dropped:
                assert sequence.num_computed == num_computed + n
                assert sequence.num_tokens == num_tokens + (sequence.id in due)
        assert set(ids(outcome.held)) | set(ids(outcome.finished)) <= set(due)
        self.ended(outcome)

    def ended(self, outcome: Outcome) -> None:
        for end, sequences in (("finished", outcome.finished), ("dropped", outcome.dropped)):
            for sequence in sequences:
                assert self.live.pop(sequence.id) is sequence, "the scheduler speaks of another sequence"
                assert sequence.id not in self.ends, f"sequence {sequence.id} ended twice"
                assert not sequence.blocks, "it is over but owns blocks"
                expected = {State.FINISHED} if end == "finished" else {State.ABORTED, State.RELEASED}
                assert sequence.state in expected
                self.ends[sequence.id] = end

    def check(self) -> None:
        """Invariants 1, 2 and 3."""
        owners: dict[int, int] = {}
        for sequence in self.live.values():
            for block in sequence.blocks:
                assert block not in owners, f"block {block} belongs to sequences {owners[block]} and {sequence.id}"
                owners[block] = sequence.id
            if sequence.state in (State.QUEUED, State.WAITING, State.PREEMPTED):
                assert not sequence.blocks, "it waits for blocks but owns some"
        assert self.pool.num_free + len(owners) == self.pool.num_blocks, "a block is lost, or free and owned at once"

        generations = [self.pool.generations[block] for block in range(self.pool.num_blocks)]
        assert generations == self.pool.frees, "a generation moves exactly when its block is freed"
