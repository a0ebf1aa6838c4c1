"""A worker without a process: the same questions, answered by an executor in the test's own event loop."""

from __future__ import annotations

from typing import Any

from distserve.engine.base import EngineOptions
from distserve.engine.fake import FakeExecutor, FakeModel
from distserve.profiler.messages import Chunks, Decodes, Prompts, Ready, Took, Work
from distserve.profiler.steps import Steps, Timed
from distserve.sched.base import Batch


class Direct:
    """See `workers.Remote`."""

    def __init__(self, executor: FakeExecutor) -> None:
        self.steps = Steps(executor)
        self.asked: list[Work] = []
        layout = executor.layout
        self.ready = Ready(
            executor.num_blocks, executor.block_size, executor.max_model_len, layout.block_bytes, layout.dtype
        )

    async def ask(self, work: Work, kind: Any) -> Took:
        self.asked.append(work)
        found = await self._do(work)
        return Took([timed.seconds for timed in found], sum(timed.context for timed in found) / len(found))

    async def _do(self, work: Work) -> list[Timed]:
        match work:
            case Prompts(lengths=lengths):
                return [await self.steps.prompts(lengths)]
            case Chunks(pieces=pieces, batch=batch, context=context):
                return [await self.steps.chunks(pieces, batch, context)]
            case Decodes(batch=batch, context=context, steps=count):
                return await self.steps.decodes(batch, context, count)


async def direct(seconds: Any, *, tokens: int = 8192, longest: int = 2048) -> Direct:
    """Of a device whose batches take `seconds(batch)`, with KV for so many tokens."""
    options = EngineOptions(model="fake", block_size=16, kv_bytes=tokens * 64, max_model_len=longest)
    executor = FakeExecutor(options, FakeModel(seconds=seconds, writes_kv=False))
    await executor.start(lambda fraction, what: None)
    return Direct(executor)


def composition(batch: Batch) -> tuple[int, int, int, int]:
    """(prompt tokens, their squares, decoding sequences, their context)."""
    tokens = squares = decoding = context = 0
    for sequence, count in batch.items:
        if count == 1 and sequence.num_computed:
            decoding += 1
            context += sequence.num_computed + 1
        else:
            tokens += count
            squares += count * (2 * sequence.num_computed + count)
    return tokens, squares, decoding, context
