"""Our contender of `benchmarks.engine`: scheduler and executor in this process, stepped as the instance steps them.

Every step is the three calls of the driver's loop (next_batch, execute, complete), sampling included; whole prompts in
one step, as a prefill instance computes them.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from benchmarks.harness import serve_commands
from distserve.engine.base import EngineOptions
from distserve.engine.executor import LocalExecutor
from distserve.request import Request, SamplingParams
from distserve.sched.base import Outcome, Sequence
from distserve.sched.blocks import BlockPool
from distserve.sched.colocated import colocated_scheduler
from distserve.sched.policy import ColocatedPolicy


class Distserve:
    def __init__(self, model: str, core: int) -> None:
        options = EngineOptions(model=model, dtype="bfloat16", kv_bytes=2 << 30, max_model_len=4096, cores=(core,))
        self.executor = LocalExecutor(options)
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.executor.start(lambda fraction, what: None))
        pool = BlockPool(self.executor.num_blocks, self.executor.block_size)
        self.scheduler = colocated_scheduler(pool, ColocatedPolicy(policy="prefill-first", max_batch_tokens=4096))
        self.count = 0
        self.open_ids: list[int] = []

    def _add(self, prompt: list[int], tokens: int) -> int:
        self.count += 1
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        self.executor.add(Request(self.count, prompt, sampling))
        self.scheduler.add(Sequence(self.count, len(prompt)), time.monotonic())
        return self.count

    async def _step(self) -> Outcome:
        batch = self.scheduler.next_batch(time.monotonic())
        assert batch is not None, "nothing to compute"
        result = await self.executor.execute(batch)
        outcome = self.scheduler.complete(batch, result.ended, time.monotonic())
        for sequence in outcome.finished:
            self.executor.forget(sequence.id)
        return outcome

    async def _steps(self, count: int) -> None:
        for _ in range(count):
            outcome = await self._step()
            assert len(outcome.sampled) == len(self.open_ids), "a step that is not the whole batch's"

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from the prompt's token ids to its first new token."""
        self._close()
        begin = time.perf_counter()
        self._add(prompt, 1)
        outcome = self.loop.run_until_complete(self._step())
        seconds = time.perf_counter() - begin
        assert outcome.finished, "a prompt takes one step"
        return seconds

    def open(self, prompts: list[list[int]]) -> None:
        """Makes a batch ready to decode: steps until every sequence has its first token."""
        self._close()
        self.open_ids = [self._add(prompt, 1000) for prompt in prompts]
        waiting = set(self.open_ids)
        while waiting:
            waiting -= {sequence.id for sequence in self.loop.run_until_complete(self._step()).sampled}

    def steps(self, count: int) -> float:
        """Seconds for `count` decode steps of the open batch."""
        begin = time.perf_counter()
        self.loop.run_until_complete(self._steps(count))
        return time.perf_counter() - begin

    def _close(self) -> None:
        for request_id in self.open_ids:
            self.scheduler.abort(request_id, time.monotonic())
            self.executor.forget(request_id)
        self.open_ids = []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--core", type=int, required=True)
    arguments = parser.parse_args()
    contender = Distserve(str(arguments.model), arguments.core)
    serve_commands({"prefill": contender.prefill, "open": contender.open, "steps": contender.steps})
