"""Single steps of an executor, timed: prompts of given lengths, batches that decode at given contexts, both at once.
Knows the contract of executors (`engine/base.py`) and nothing behind it: one rank or a group, real or fake.

A sequence that decodes needs KV that nobody computed: `fill` makes the first blocks of the pool hold some, so that a
step reads as much memory as it would in service. Sampling is greedy, as load generators ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distserve.engine.base import Executor
from distserve.errors import DistserveError
from distserve.request import Request, SamplingParams
from distserve.sched.base import Batch
from distserve.sched.base import Sequence as Scheduled

_PRIME, _IDS = 7919, 61  # prompts are spread over so many token ids, which the smallest vocabulary has
_SPARE = 64  # tokens that a decoding sequence has left before it ends


class StepFailed(DistserveError):
    """The model's output was no number, or a step gave no token: nothing that it took can be trusted."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One step. What its caller waits beyond it is the host's part, which the live server tells (`live.py`)."""

    seconds: float  # as the executor measured it
    context: int = 0  # tokens of the sequences that decoded, the new ones too


class Steps:
    """Drives an executor that has started and is idle. `fill(n)`: the first n blocks hold plausible KV from now on."""

    def __init__(self, executor: Executor, fill: Callable[[int], None] = lambda count: None) -> None:
        self._executor = executor
        self._fill = fill
        self._next_id = -1  # no request has such

    async def prompts(self, lengths: Sequence[int]) -> Timed:
        """One step of whole prompts, each followed by its first token."""
        return await self.chunks([(0, length) for length in lengths])

    async def chunks(self, pieces: Sequence[tuple[int, int]], batch: int = 0, context: int = 0) -> Timed:
        """One step of pieces of prompts, (tokens that are computed already, tokens to compute), and beside them `batch`
        sequences that decode with `context` tokens each."""
        with_batch = [(context - 1, 1)] * batch
        taken: list[tuple[Scheduled, int]] = []
        first = 0
        for computed, count in [*with_batch, *pieces]:
            taken.append((self._sequence(computed + count, computed, first), count))
            first += len(taken[-1][0].blocks)
        self._fill(first)
        try:
            return await self._step(taken, batch * context)
        finally:
            self._forget(taken)

    async def decodes(self, batch: int, context: int, steps: int) -> list[Timed]:
        """So many steps in a row of `batch` sequences, whose contexts grow through `context` tokens each (the new one
        counted) in the middle of them. The first step, which meets cold caches, is not among them."""
        start = max(2, min(context - steps // 2, self._executor.max_model_len - steps - 1)) - 1
        items: list[tuple[Scheduled, int]] = []
        first = 0
        for _ in range(batch):
            items.append((self._sequence(start, start - 1, first, start + steps + 1), 1))
            first += len(items[-1][0].blocks)
        self._fill(first)
        found = []
        try:
            for _ in range(steps + 1):
                found.append(await self._step(items, sum(sequence.num_tokens for sequence, _ in items)))
                for sequence, _ in items:
                    sequence.num_computed += 1
                    sequence.num_tokens += 1
        finally:
            self._forget(items)
        return found[1:]

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._executor.block_size)

    def _sequence(self, num_tokens: int, num_computed: int, first_block: int, room: int = 0) -> Scheduled:
        """A sequence that the executor knows, with blocks of its own from `first_block` on."""
        key, self._next_id = self._next_id, self._next_id - 1
        sampling = SamplingParams(max_tokens=_SPARE, temperature=0, ignore_eos=True)
        prompt = [(i * _PRIME - key) % _IDS + 3 for i in range(num_tokens)]
        self._executor.add(Request(key, prompt, sampling))
        blocks = range(first_block, first_block + self.blocks_for(max(num_tokens, room)))
        assert blocks.stop <= self._executor.num_blocks, "the grid asks for more KV than there is"
        return Scheduled(key, num_tokens, num_computed=num_computed, blocks=list(blocks))

    async def _step(self, items: list[tuple[Scheduled, int]], context: int) -> Timed:
        result = await self._executor.execute(Batch(0, items))
        if result.failures or len(result.tokens) < len(items):
            reason = next(iter(result.failures.values()), "a sequence got no token")
            raise StepFailed(f"a step of {len(items)} sequences failed: {reason}")
        return Timed(result.seconds, context)

    def _forget(self, items: list[tuple[Scheduled, int]]) -> None:
        for sequence, _ in items:
            self._executor.forget(sequence.id)
