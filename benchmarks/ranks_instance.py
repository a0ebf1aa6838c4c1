"""A contender of `benchmarks.ranks`: an instance of tp * pp ranks on given cores, driven as the instance's loop does,
without scheduler and gateway: batches are launched, as many at once as it has stages, and their results awaited.

One rank is `LocalExecutor` in this process; several are processes of their own behind `GroupExecutor`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import serve_commands
from distserve.engine.base import EngineOptions, EngineResult, Executor
from distserve.engine.executor import LocalExecutor
from distserve.engine.group import GroupExecutor
from distserve.ranks import spawn_ranks
from distserve.request import Request, SamplingParams
from distserve.sched.base import Batch, Sequence
from distserve.serve.launch import RANK
from distserve.transfer.memory import SharedMemory

KV = 2 << 30  # bytes of each rank
BLOCK = 32  # tokens
ROOM = 256  # tokens that an open batch may grow by


class Instance:
    def __init__(self, model: str, tp: int, pp: int, cores: list[int]) -> None:
        self.loop = asyncio.new_event_loop()
        self.memories: list[SharedMemory] = []
        self.executor = self._executor(model, tp, pp, cores)
        self.loop.run_until_complete(self.executor.start(lambda fraction, what: None))
        self.random = random.Random(0)
        self.count = 0
        self.open_ids: list[int] = []

    def _executor(self, model: str, tp: int, pp: int, cores: list[int]) -> Executor:
        if tp * pp == 1:
            return LocalExecutor(EngineOptions(model, dtype="bfloat16", kv_bytes=KV, cores=tuple(cores)))
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # this process drives from whichever core is free
        ranks = tuple((core,) for core in cores)
        options = EngineOptions(model, dtype="bfloat16", kv_bytes=KV, tp=tp, pp=pp, ranks=ranks)
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        return GroupExecutor(options, spawn_ranks(tp * pp, RANK), self._allocate, meeting)

    def _allocate(self, size: int) -> str:
        self.memories.append(SharedMemory(size))
        return self.memories[-1].path

    def _add(self, tokens: int, blocks: list[int]) -> Sequence:
        self.count += 1
        prompt = [self.random.randrange(1000) for _ in range(tokens)]
        self.executor.add(Request(self.count, prompt, SamplingParams(10_000, temperature=0, ignore_eos=True)))
        self.open_ids.append(self.count)
        return Sequence(self.count, tokens, blocks=blocks)

    def _close(self) -> None:
        for request_id in self.open_ids:
            self.executor.forget(request_id)
        self.open_ids = []

    def prefill(self, tokens: int, count: int) -> float:
        """Seconds a prompt, of `count` prompts one behind the other."""
        self._close()
        blocks = list(range(-(-tokens // BLOCK)))
        prompts = [Batch(i, [(self._add(tokens, blocks), tokens)]) for i in range(count)]
        ends = self.loop.run_until_complete(self._stream([iter([prompt]) for prompt in prompts]))
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def latency(self, tokens: int) -> float:
        """Seconds of one prompt alone."""
        self._close()
        batch = Batch(0, [(self._add(tokens, list(range(-(-tokens // BLOCK)))), tokens)])
        began = time.perf_counter()
        (end,) = self.loop.run_until_complete(self._stream([iter([batch])]))
        return end - began

    def open(self, batch: int, groups: int, context: int) -> None:
        """Makes `groups` batches of `batch` sequences ready to decode: their prompts are computed."""
        self._close()
        each = -(-(context + ROOM) // BLOCK)
        assert groups * batch * each <= self.executor.num_blocks, "more blocks than there are"
        self.groups: list[list[Sequence]] = []
        for group in range(groups):
            first = group * batch * each
            tables = [list(range(first + i * each, first + (i + 1) * each)) for i in range(batch)]
            self.groups.append([self._add(context, table) for table in tables])
            prompts = [Batch(0, [(sequence, context)]) for sequence in self.groups[-1]]
            self.loop.run_until_complete(self._stream([iter([prompt]) for prompt in prompts]))
        self.context = context

    def decode(self, steps: int) -> float:
        """Seconds a step of one batch, `steps` of each; the batches take turns."""
        streams = [self._steps(sequences, self.context, steps) for sequences in self.groups]
        self.context += steps
        ends = self.loop.run_until_complete(self._stream(streams))
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def _steps(self, sequences: list[Sequence], context: int, steps: int) -> Iterator[Batch]:
        for n in range(context, context + steps):
            yield Batch(0, [(Sequence(s.id, n + 1, num_computed=n, blocks=s.blocks), 1) for s in sequences])

    async def _stream(self, streams: list[Iterator[Batch]]) -> list[float]:
        """Computes the batches of all streams, each stream's in order and one at a time; returns when each ended."""
        waiting, ends = deque(streams), []
        flights: deque[tuple[Iterator[Batch], asyncio.Future[EngineResult]]] = deque()
        while waiting or flights:
            while waiting and len(flights) < self.executor.max_in_flight:
                stream = waiting.popleft()
                batch = next(stream, None)
                if batch is not None:
                    flights.append((stream, self.executor.launch(batch)))
            if not flights:
                break
            stream, flight = flights.popleft()
            await flight
            ends.append(time.perf_counter())
            waiting.append(stream)
        return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--cores", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    instance = Instance(arguments.model, arguments.tp, arguments.pp, arguments.cores)
    commands: dict[str, Callable[..., object]] = {"prefill": instance.prefill, "latency": instance.latency}
    serve_commands({**commands, "open": instance.open, "decode": instance.decode})
