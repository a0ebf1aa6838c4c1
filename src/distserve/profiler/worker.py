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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distserve.errors import UsageError
from distserve.profiler.answers import Parts, Progress, Worker
from distserve.profiler.messages import Failed, FromWorker, Loading, Ready, Start, decode_start, encode
from distserve.profiler.pool import Pool
from distserve.profiler.steps import Steps
from distserve.ranks import RankProcess, as_rank, die_with_parent, end_ranks, fork_ranks, spawn_ranks
from distserve.transfer.base import KVSource

if TYPE_CHECKING:
    from distserve.engine.base import EngineOptions
    from distserve.engine.loaded import LoadedModel
    from distserve.specs import ModelSpec
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


async def build(setting: Setting, progress: Progress) -> Parts:
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
    pool = Pool(
        [memory.buffer for memory in memories],
        [layout.of_rank(rank).block_bytes for rank in range(len(memories))],
        size,
        executor.import_blocks,
    )
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
        await Worker(reader, writer).live(partial(build, setting))
        await writer.drain()
    except ConnectionError:  # the command is gone
        return
    finally:
        writer.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        sys.exit(as_rank(sys.argv[2], sys.argv[3], partial(_rank, None)))
    sys.exit(main())
