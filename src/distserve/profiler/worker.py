"""A worker's process: an engine as an instance has it, which does what the profiler asks. The one module of this room
that names implementations of engine and transfer.

`python -m distserve.profiler.worker` reads a `Start`, loads the weights and becomes as many workers as it has sockets:
on a CPU by forking, as the server does, so that workers share the weights' memory as instances do. A worker ends when
its socket is closed, and ignores the terminal's signals: the command decides.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

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
    Start,
    Took,
    ToWorker,
    Work,
    decode_start,
    decode_to_worker,
    encode,
)
from distserve.profiler.steps import Steps, Timed
from distserve.transfer.base import KVHandle, KVSource, Source, Transport

if TYPE_CHECKING:
    from distserve.engine.base import EngineOptions
    from distserve.engine.loaded import LoadedModel
    from distserve.specs import ModelSpec
    from distserve.transfer.memory import SharedMemory

WARM_KV = 64 << 20  # bytes of KV memory that an instance takes at its start, in large pages
_REAL = 16  # blocks whose KV is computed; the others are copies of them


@dataclass(slots=True)
class Parts:
    """What is built for a worker."""

    steps: Steps
    publisher: Source
    transport: Transport
    source: KVSource
    ready: Ready


class Pool:
    """The KV memory as bytes: makes blocks hold KV of the right kind without computing it."""

    def __init__(
        self, memory: SharedMemory, num_blocks: int, block_bytes: int, load: Callable[[list[int]], None]
    ) -> None:
        size = num_blocks * block_bytes
        self._blocks = np.frombuffer(memory.buffer, np.uint8, size).reshape(num_blocks, block_bytes)
        self._load = load
        self._pattern = self._blocks[:0]
        self._filled = 0

    def learn(self, num_blocks: int) -> None:
        """Takes the first blocks, which hold a prompt's KV, for the pattern."""
        self._pattern = self._blocks[:num_blocks].copy()
        self._filled = num_blocks

    def fill(self, count: int) -> None:
        if not len(self._pattern) or count <= self._filled:
            return
        for first in range(self._filled, count, len(self._pattern)):
            part = self._blocks[first : min(count, first + len(self._pattern))]
            part[:] = self._pattern[: len(part)]
        self._load(list(range(self._filled, count)))
        self._filled = count


async def build(
    options: EngineOptions, loaded: LoadedModel | None, name: str, progress: Callable[[float, str], None]
) -> Parts:
    from distserve.transfer.layout import InstanceLayout
    from distserve.transfer.memory import SharedMemory
    from distserve.transfer.shm import ShmSource, ShmTransport

    memories: list[SharedMemory] = []

    def allocate(size: int) -> memoryview:
        memories.append(SharedMemory(size))
        return memories[-1].buffer

    executor: Any = _executor(options, loaded, allocate)
    await executor.start(progress)
    memories[0].touch(WARM_KV)
    size, layout = executor.num_blocks, InstanceLayout.of(executor.layout)
    publisher = ShmSource(memories, size, layout, executor.export_blocks)
    transport = ShmTransport(memories, size, layout, executor.import_blocks)
    pool = Pool(memories[0], size, executor.layout.block_bytes, executor.import_blocks)
    steps = Steps(executor, pool.fill)
    real = min(_REAL, size, executor.max_model_len // executor.block_size)
    if real:
        await steps.prompts([real * executor.block_size])
        executor.export_blocks(list(range(real)))
        pool.learn(real)
    ready = Ready(size, executor.block_size, executor.max_model_len, executor.layout.block_bytes, executor.layout.dtype)
    source = KVSource(name, os.getpid(), layout, publisher.location, "")
    return Parts(steps, publisher, transport, source, ready)


def find(model: str) -> tuple[str, ModelSpec]:
    """(what an executor is told, the model's shape). Raises `ModelError`."""
    from distserve.engine import hub

    if is_fake(model):
        return model, hub.read_spec(hub.resolve(hub.DEMO))
    path = hub.resolve(model)
    return str(path), hub.read_spec(path)


def is_fake(model: str) -> bool:
    """See serve/launch.py: everything is real but the model."""
    return model == "fake" or model.startswith("fake:")


def _executor(options: EngineOptions, loaded: LoadedModel | None, allocate: Callable[[int], memoryview]) -> Any:
    if is_fake(options.model):
        from distserve.engine.fake import FakeExecutor, parse_fake

        return FakeExecutor(options, replace(parse_fake(options.model), writes_kv=False), kv_buffer_factory=allocate)
    from distserve.engine.executor import LocalExecutor

    return LocalExecutor(options, allocate, loaded)


# -- a worker ---------------------------------------------------------------------------------------------------------


class Worker:
    """Answers one message after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, answer: FromWorker) -> None:
        self._writer.write(encode(answer) + b"\n")

    async def live(self, options: EngineOptions, loaded: LoadedModel | None, name: str) -> None:
        """Until the socket is closed."""
        try:
            parts = await build(options, loaded, name, lambda fraction, what: self.say(Loading(fraction, what)))
        except UsageError as error:
            self.say(Failed(str(error), usage=True))
            return
        self.say(parts.ready)
        while line := await self._reader.readline():
            try:
                self.say(await self._do(parts, decode_to_worker(line)))
            except DistserveError as error:
                self.say(Failed(str(error), usage=False))
        await self._writer.drain()

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


# -- its process ------------------------------------------------------------------------------------------------------


def main() -> int:
    for unwanted in (signal.SIGINT, signal.SIGTERM):
        signal.signal(unwanted, signal.SIG_IGN)
    start = decode_start(sys.stdin.buffer.readline())
    loaded = None
    if len(start.sockets) > 1 and not is_fake(start.engine.model):
        from distserve.engine.loaded import load

        try:
            loaded = load(start.engine, lambda fraction, what: _say_all(start, Loading(fraction, what)))
        except UsageError as error:
            _say_all(start, Failed(str(error), usage=True))
            return 2
    children = []
    for number in range(1, len(start.sockets)):
        child = os.fork()
        if not child:
            return _become(start, loaded, number)
        children.append(child)
    status = _become(start, loaded, 0)
    for child in children:
        os.waitpid(child, 0)
    return status


def _say_all(start: Start, message: FromWorker) -> None:
    for descriptor in start.sockets:
        os.write(descriptor, encode(message) + b"\n")


def _become(start: Start, loaded: LoadedModel | None, number: int) -> int:
    for other, descriptor in enumerate(start.sockets):
        if other != number:
            os.close(descriptor)
    cores = tuple(start.cores[number])
    if cores:
        os.sched_setaffinity(0, cores)
    options = replace(start.engine, cores=cores)
    asyncio.run(_live(options, loaded, start.sockets[number], f"worker-{number}"))
    return 0


async def _live(options: EngineOptions, loaded: LoadedModel | None, descriptor: int, name: str) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor), limit=1 << 24)
    try:
        await Worker(reader, writer).live(options, loaded, name)
    except ConnectionError:  # the command is gone
        return
    finally:
        writer.close()


if __name__ == "__main__":
    sys.exit(main())
