"""A worker's conversation: it builds its parts, says that it is ready, and does what it is asked, one message after the
other. Knows contracts of engine and transfer (their `base.py`), no implementation and no process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from distserve.errors import DistserveError, UsageError
from distserve.profiler.messages import (
    Busy,
    Chunks,
    Decodes,
    Failed,
    FromWorker,
    Loading,
    Prompts,
    Publish,
    Published,
    Pull,
    Ready,
    Took,
    ToWorker,
    Work,
    decode_to_worker,
    encode,
)
from distserve.profiler.steps import Steps, Timed
from distserve.transfer.base import KVHandle, KVSource, Source, Transport

Progress = Callable[[float, str], None]  # a share of loading, and what is loaded


@dataclass(slots=True)
class Parts:
    """What is built for a worker."""

    executor: Any
    steps: Steps
    publisher: Source
    transport: Transport
    source: KVSource
    ready: Ready


class Worker:
    """Answers one message after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, answer: FromWorker) -> None:
        self._writer.write(encode(answer) + b"\n")

    async def live(self, build: Callable[[Progress], Coroutine[Any, Any, Parts]]) -> None:
        """Until the socket is closed."""
        asked = asyncio.ensure_future(self._reader.readline())
        built = asyncio.ensure_future(build(lambda fraction, what: self.say(Loading(fraction, what))))
        await asyncio.wait((asked, built), return_when=asyncio.FIRST_COMPLETED)
        if not built.done():  # nobody asks before it is ready: the command is gone, or has been told to stop
            built.cancel()
            await asyncio.wait((built,))
            return
        try:
            parts = built.result()
        except DistserveError as error:
            self.say(Failed(str(error), usage=isinstance(error, UsageError)))
            asked.cancel()
            return
        self.say(parts.ready)
        while line := await asked:
            try:
                self.say(await self._do(parts, decode_to_worker(line)))
            except DistserveError as error:
                self.say(Failed(str(error), usage=False))
            asked = asyncio.ensure_future(self._reader.readline())
        await parts.executor.stop()

    async def _do(self, parts: Parts, asked: ToWorker) -> FromWorker:
        match asked:
            case Busy(work=work):
                return await self._busy(parts.steps, work)
            case Publish(blocks=count):
                return _publish(parts, count)
            case Pull(handle=handle):
                began = time.perf_counter()
                await parts.transport.pull(handle, list(range(len(handle.blocks))))
                return Took([time.perf_counter() - began])
            case Prompts() | Chunks() | Decodes():
                return _took(await _work(parts.steps, asked))
            case _:
                return Took([])

    async def _busy(self, steps: Steps, work: Work) -> FromWorker:
        """Until there is another message, which is then gone: it said stop."""
        stop = asyncio.ensure_future(self._reader.readline())
        found: list[Timed] = []
        while not stop.done():
            found += await _work(steps, work)
            await asyncio.sleep(0)
        return _took(found)


async def _work(steps: Steps, work: Work) -> list[Timed]:
    match work:
        case Prompts(lengths=lengths):
            return [await steps.prompts(lengths)]
        case Chunks(pieces=pieces, batch=batch, context=context):
            return [await steps.chunks(pieces, batch, context)]
        case Decodes(batch=batch, context=context, steps=count):
            return await steps.decodes(batch, context, count)


def _took(found: list[Timed]) -> Took:
    return Took([timed.seconds for timed in found], sum(timed.context for timed in found) / max(1, len(found)))


def _publish(parts: Parts, count: int) -> Published:
    blocks = list(range(count))
    began = time.perf_counter()
    generations, digest = parts.publisher.publish(blocks)
    seconds = time.perf_counter() - began
    tokens = count * parts.ready.block_size
    return Published(seconds, KVHandle(parts.source, 1, 1, tokens, tuple(blocks), generations, digest))
