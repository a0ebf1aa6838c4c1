"""Pulls between instances of one host: the target maps the source's KV memory and copies the blocks it needs.

Every rank's KV lies in a memory of its own; the pulling instance copies, for each of its ranks, what that rank needs
out of the source's. The generations of the source's blocks lie in shared memory too, and its scheduler moves them as it
frees blocks. A pull copies, then compares: whatever was freed while it was being read shows another generation,
whatever was damaged another digest (`copying.py`). It knows no scheduler and no message: who may free what, and when,
is `sched/` and `serve/`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from distserve.errors import PullError
from distserve.transfer.base import KVHandle, KVSource, Stage, check, refuse
from distserve.transfer.blocks import RankBlocks
from distserve.transfer.layout import InstanceLayout
from distserve.transfer.memory import SharedMemory, attach

NAME = "shm"
AT_ONCE = 32 << 20  # bytes; a pull this small is over before a thread would be worth its two changes

T = TypeVar("T")


class ShmSource:
    """The publishing side. `memories`: one a rank. `generations` is the shared array that the scheduler's block pool
    counts in. Both are closed with the source."""

    def __init__(
        self, memories: Sequence[SharedMemory], num_blocks: int, layout: InstanceLayout, stage: Stage | None = None
    ) -> None:
        self._memories = list(memories)
        self._stage = stage
        self._counts = SharedMemory(8 * num_blocks)
        self.generations = self._counts.buffer.cast("Q")
        self._blocks = RankBlocks([memory.buffer for memory in memories], num_blocks, layout)
        paths = [memory.path for memory in (self._counts, *memories)]
        self.location = f"{NAME}:{num_blocks};" + ";".join(paths)

    def publish(self, blocks: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self._stage is not None:
            self._stage(blocks)
        return tuple(self.generations[b] for b in blocks), self._blocks.digests(blocks)

    def close(self) -> None:
        for memory in (self._counts, *self._memories):
            memory.close()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Attached:
    """One source's memory as this process sees it. Raises `PullError`."""

    def __init__(self, source: KVSource) -> None:
        layout = source.layout
        match source.location.removeprefix(f"{NAME}:").split(";"):
            case [number, counts, *paths] if number.isdecimal() and len(paths) == layout.sharding.num_ranks:
                num_blocks = int(number)
            case _:
                raise PullError(f"{source.instance} offers its KV at {source.location}, which is no place", "transport")
        sizes = [num_blocks * layout.of_rank(rank).block_bytes for rank in range(len(paths))]
        self.generations = attach(counts, 8 * num_blocks).cast("Q")
        self.blocks = RankBlocks([attach(*found) for found in zip(paths, sizes, strict=True)], num_blocks, layout)


class ShmTransport:
    """The pulling side. A large pull is made by one thread a core, so that it leaves the event loop free and takes what
    memory gives; a small one is made in the loop, which it holds for about 3 ms: the changes of thread would cost a
    sixth of it.

    `layout` and `memories`, one a rank, are this instance's own; `stage` (CUDA) moves pulled blocks from host memory to
    the device.
    """

    def __init__(
        self, memories: Sequence[SharedMemory], num_blocks: int, layout: InstanceLayout, stage: Stage | None = None
    ) -> None:
        self._own = RankBlocks([memory.buffer for memory in memories], num_blocks, layout)
        self._stage = stage
        self._attached: dict[tuple[str, int], _Attached] = {}
        self._over: set[tuple[str, int]] = set()
        self._num_threads = cores()
        self._threads = ThreadPoolExecutor(self._num_threads, "pull")

    async def connect(self, source: KVSource) -> None:
        key = (source.instance, source.epoch)
        if key in self._attached:
            return
        self._refuse_over(source)
        refuse(source, NAME, self._own.layout)
        attached = await self._in_thread(_Attached, source)
        self._refuse_over(source)
        self._attached[key] = attached

    def _refuse_over(self, source: KVSource) -> None:
        if (source.instance, source.epoch) in self._over:
            raise PullError(f"epoch {source.epoch} of {source.instance} is over", "gone")

    async def pull(self, handle: KVHandle, into: list[int]) -> int:
        key = (handle.source.instance, handle.source.epoch)
        await self.connect(handle.source)
        if len(into) < len(handle.blocks):
            raise PullError(f"{len(handle.blocks)} blocks to read, room for {len(into)}", "transport")
        attached = self._attached[key]
        if not all(0 <= block < attached.blocks.num_blocks for block in handle.blocks):
            raise PullError(f"{handle.source.instance} promised blocks {handle.blocks} that it does not have", "stale")
        targets = into[: len(handle.blocks)]
        size = len(targets) * self._own.block_bytes
        if size <= AT_ONCE:
            self._finish(attached, handle, targets, self._own.copy_from(attached.blocks, handle.blocks, targets))
        else:
            digests = await self._copy(attached.blocks, handle.blocks, targets)
            await self._in_thread(self._finish, attached, handle, targets, digests)
        self._refuse_over(handle.source)  # it died during the pull
        return size

    async def _copy(self, source: RankBlocks, blocks: Sequence[int], into: Sequence[int]) -> list[tuple[int, ...]]:
        """`RankBlocks.copy_from` by all threads: each takes some of the blocks, on all ranks."""
        share = -(-len(blocks) // self._num_threads)
        copies = [
            self._in_thread(self._own.copy_from, source, blocks[at : at + share], into[at : at + share])
            for at in range(0, len(blocks), share)
        ]
        await asyncio.wait(copies)  # none writes any more when one has failed
        parts = [copy.result() for copy in copies]
        return [tuple(chain.from_iterable(of_copy)) for of_copy in zip(*parts, strict=True)]

    def _finish(self, attached: _Attached, handle: KVHandle, into: list[int], digests: list[tuple[int, ...]]) -> None:
        """Looks whether what was copied is what was promised, and moves it to the device."""
        check(handle, [attached.generations[b] for b in handle.blocks], digests)
        if self._stage is not None:
            self._stage(into)

    def _in_thread(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def disconnect(self, instance: str, epoch: int) -> None:
        self._over.add((instance, epoch))
        self._attached.pop((instance, epoch), None)

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self._attached.clear()
