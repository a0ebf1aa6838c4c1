"""A worker's process: an engine as an instance has it, which does what the profiler asks. The one module of this room
that names implementations of engine and transfer.

`python -m distserve.profiler.worker` reads a `Start`, loads the weights and becomes as many workers as it has sockets:
on a CPU by forking, as the server does, so that workers share the weights' memory as instances do. A worker of several
ranks computes nothing itself: its ranks are processes of their own, which load their slices. A worker ends when its
socket is closed, its ranks end with it, and all ignore the terminal's signals: the command decides.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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
from distserve.ranks import RankProcess, as_rank, die_with_parent, end_ranks, fork_ranks, spawn_ranks
from distserve.transfer.base import KVHandle, KVSource, Source, Transport

if TYPE_CHECKING:
    from distserve.engine.base import EngineOptions
    from distserve.engine.loaded import LoadedModel
    from distserve.specs import ModelSpec
    from distserve.transfer.layout import InstanceLayout
    from distserve.transfer.memory import SharedMemory

RANK = (sys.executable, "-m", "distserve.profiler.worker", "rank")  # a rank in an interpreter of its own
WARM_KV = 64 << 20  # bytes of KV memory that an instance takes at its start, in large pages
_REAL = 16  # blocks whose KV is computed; the others are copies of them


@dataclass(frozen=True, slots=True)
class Setting:
    """What a worker is made of."""

    name: str
    options: EngineOptions
    loaded: LoadedModel | None  # by the process that it was forked from
    ranks: list[RankProcess]  # of its own; none: it computes itself
    meeting: str  # a folder in which they meet


@dataclass(slots=True)
class Parts:
    """What is built for a worker."""

    executor: Any
    steps: Steps
    publisher: Source
    transport: Transport
    source: KVSource
    ready: Ready


class Pool:
    """The KV memory of every rank as bytes: makes blocks hold KV of the right kind without computing it."""

    def __init__(
        self,
        memories: Sequence[SharedMemory],
        num_blocks: int,
        layout: InstanceLayout,
        load: Callable[[list[int]], None],
    ) -> None:
        sizes = [layout.of_rank(rank).block_bytes for rank in range(len(memories))]
        self._blocks = [
            np.frombuffer(memory.buffer, np.uint8, num_blocks * size).reshape(num_blocks, size)
            for memory, size in zip(memories, sizes, strict=True)
        ]
        self._load = load
        self._patterns = self._blocks
        self._length = 0  # blocks of a pattern
        self._filled = 0

    def learn(self, num_blocks: int) -> None:
        """Takes the first blocks, which hold a prompt's KV, for the pattern."""
        self._patterns = [blocks[:num_blocks].copy() for blocks in self._blocks]
        self._length = self._filled = num_blocks

    def fill(self, count: int) -> None:
        if not self._length or count <= self._filled:
            return
        for blocks, pattern in zip(self._blocks, self._patterns, strict=True):
            for first in range(self._filled, count, self._length):
                part = blocks[first : min(count, first + self._length)]
                part[:] = pattern[: len(part)]
        self._load(list(range(self._filled, count)))
        self._filled = count


async def build(setting: Setting, progress: Callable[[float, str], None]) -> Parts:
    from distserve.transfer.layout import InstanceLayout
    from distserve.transfer.memory import SharedMemory
    from distserve.transfer.shm import ShmSource, ShmTransport

    memories: list[SharedMemory] = []

    def allocate(size: int) -> SharedMemory:
        memories.append(SharedMemory(size))
        return memories[-1]

    executor: Any = _executor(setting, allocate)
    await executor.start(progress)
    for memory in memories:
        memory.touch(WARM_KV // len(memories))
    size, whole = executor.num_blocks, executor.layout
    layout = InstanceLayout(executor.sharding, whole.head_dim, whole.block_size, whole.dtype)
    publisher = ShmSource(memories, size, layout, executor.export_blocks)
    transport = ShmTransport(memories, size, layout, executor.import_blocks)
    pool = Pool(memories, size, layout, executor.import_blocks)
    steps = Steps(executor, pool.fill)
    real = min(_REAL, size, executor.max_model_len // executor.block_size)
    if real:
        await steps.prompts([real * executor.block_size])
        executor.export_blocks(list(range(real)))
        pool.learn(real)
    ready = Ready(size, executor.block_size, executor.max_model_len, whole.block_bytes, whole.dtype)
    source = KVSource(setting.name, os.getpid(), layout, publisher.location, "")
    return Parts(executor, steps, publisher, transport, source, ready)


def find(model: str, tp: int = 1, pp: int = 1) -> tuple[str, ModelSpec]:
    """(what an executor is told, the model's shape). Raises `ModelError`, and `PlanError` where the model cannot be
    shared by so many ranks."""
    from distserve.engine import hub
    from distserve.engine.fake import parse_fake
    from distserve.engine.parallel import check_degrees

    if is_fake(model):
        parse_fake(model).sharding(tp, pp)
        return model, hub.read_spec(hub.resolve(hub.DEMO))
    path = hub.resolve(model)
    spec = hub.read_spec(path)
    check_degrees(spec, tp, pp)
    return str(path), spec


def is_fake(model: str) -> bool:
    """See serve/launch.py: everything is real but the model."""
    return model == "fake" or model.startswith("fake:")


def has_ranks(options: EngineOptions) -> bool:
    """It computes in processes of their own."""
    return options.num_ranks > 1 and not is_fake(options.model)


def _executor(setting: Setting, allocate: Callable[[int], SharedMemory]) -> Any:
    options, buffer = setting.options, lambda size: allocate(size).buffer
    if is_fake(options.model):
        from distserve.engine.fake import FakeExecutor, parse_fake

        return FakeExecutor(options, replace(parse_fake(options.model), writes_kv=False), kv_buffer_factory=buffer)
    if setting.ranks:
        from distserve.engine.group import GroupExecutor

        rendezvous = Path(setting.meeting) / f"{setting.name}-{os.getpid()}"
        return GroupExecutor(
            options,
            setting.ranks,
            lambda size: allocate(size).path,
            rendezvous,
            name=setting.name,
            log_level="warning",
        )
    from distserve.engine.executor import LocalExecutor

    return LocalExecutor(options, buffer, setting.loaded)


# -- a worker ---------------------------------------------------------------------------------------------------------


class Worker:
    """Answers one message after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, answer: FromWorker) -> None:
        self._writer.write(encode(answer) + b"\n")

    async def live(self, setting: Setting) -> None:
        """Until the socket is closed."""
        asked = asyncio.ensure_future(self._reader.readline())
        built = asyncio.ensure_future(build(setting, lambda fraction, what: self.say(Loading(fraction, what))))
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


# -- its process ------------------------------------------------------------------------------------------------------


def main() -> int:
    for unwanted in (signal.SIGINT, signal.SIGTERM):
        signal.signal(unwanted, signal.SIG_IGN)
    die_with_parent()
    start = decode_start(sys.stdin.buffer.readline())
    try:
        loaded = _load(start)
    except UsageError as error:
        _say_all(start, Failed(str(error), usage=True))
        return 2
    if len(start.sockets) == 1:
        return _become(start, loaded, 0)
    children = []
    for number in range(len(start.sockets)):
        child = os.fork()
        if not child:
            die_with_parent()
            return _become(start, loaded, number)
        children.append(child)
    for descriptor in start.sockets:
        os.close(descriptor)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _load(start: Start) -> LoadedModel | None:
    """What every worker needs, before they are forked: the weights, or for their ranks PyTorch."""
    first = start.engines[0]
    if has_ranks(first):
        import distserve.engine.worker  # noqa: F401

        return None
    if len(start.sockets) == 1 or is_fake(first.model):
        return None
    from distserve.engine.loaded import load

    return load(first, lambda fraction, what: _say_all(start, Loading(fraction, what)))


def _say_all(start: Start, message: FromWorker) -> None:
    for descriptor in start.sockets:
        os.write(descriptor, encode(message) + b"\n")


def _become(start: Start, loaded: LoadedModel | None, number: int) -> int:
    mine, options = start.sockets[number], start.engines[number]
    for descriptor in start.sockets:
        if descriptor != mine:
            os.close(descriptor)
    ranks: list[RankProcess] | int = []
    if has_ranks(options):
        forks = options.device == "cpu"  # what CUDA has begun cannot be forked
        ranks = fork_ranks(options.num_ranks, partial(_rank, mine)) if forks else spawn_ranks(options.num_ranks, RANK)
    if isinstance(ranks, int):
        return ranks  # this is a rank, whose life is over
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    try:
        asyncio.run(_live(Setting(f"worker-{number}", options, loaded, ranks, start.meeting), mine))
    finally:
        end_ranks(ranks)
    return 0


def _rank(inherited: int | None, end: socket.socket, side: socket.socket) -> int:
    """A rank's life. `inherited`: the socket of the worker that forked it, which is not its business."""
    from distserve.engine import worker
    from distserve.transfer.memory import attach

    if inherited is not None:
        os.close(inherited)
    return worker.main(end, side, partial(attach, writable=True))


async def _live(setting: Setting, descriptor: int) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor), limit=1 << 24)
    try:
        await Worker(reader, writer).live(setting)
        await writer.drain()
    except ConnectionError:  # the command is gone
        return
    finally:
        writer.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        sys.exit(as_rank(sys.argv[2], sys.argv[3], partial(_rank, None)))
    sys.exit(main())
