"""Pulls between instances of one host: the target maps the source's KV memory and copies the blocks it needs.

Every rank's KV lies in a memory of its own; the pulling instance copies, for each of its ranks, what that rank needs
out of the source's. The generations of the source's blocks lie in shared memory too, and its scheduler moves them as it
frees blocks. A pull copies, then compares: whatever was freed while it was being read shows another generation,
whatever was damaged another digest (`copying.py`). It knows no scheduler and no message: who may free what, and when,
is `sched/` and `serve/`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from distserve.errors import PlanError, PullError
from distserve.transfer.base import KVHandle, KVSource, check
from distserve.transfer.blocks import RankBlocks
from distserve.transfer.layout import InstanceLayout, reads
from distserve.transfer.memory import SharedMemory, attach

NAME = "shm"
AT_ONCE = 32 << 20  # bytes; a pull this small is over before a thread would be worth its two changes

Stage = Callable[[list[int]], None]  # moves blocks between the device and its host copy; nothing to do on a CPU


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


class _Attached:
    """One source's memory as this process sees it."""

    def __init__(self, source: KVSource) -> None:
        number, counts, *paths = source.location.removeprefix(f"{NAME}:").split(";")
        num_blocks, layout = int(number), source.layout
        sizes = [num_blocks * layout.of_rank(rank).block_bytes for rank in range(len(paths))]
        self.generations = attach(counts, 8 * num_blocks).cast("Q")
        self.blocks = RankBlocks([attach(*found) for found in zip(paths, sizes, strict=True)], num_blocks, layout)


class ShmTransport:
    """The pulling side. One thread copies, so that a large pull leaves the event loop free; a small one is made in the
    loop, which it holds for about 3 ms: the changes of thread would cost a sixth of it.

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
        self._thread = ThreadPoolExecutor(1, "pull")

    async def connect(self, source: KVSource) -> None:
        key = (source.instance, source.epoch)
        if key in self._over:
            raise PullError(f"epoch {source.epoch} of {source.instance} is over", "gone")
        if key in self._attached:
            return
        if not source.location.startswith(f"{NAME}:"):
            raise PullError(
                f"{source.instance} offers its KV by {source.location.partition(':')[0]}, this instance pulls by "
                f"{NAME}: give both the same --transport",
                "transport",
            )
        try:
            reads(source.layout, self._own.layout)
        except PlanError as error:
            raise PullError(f"{source.instance}: {error}", "transport") from None
        self._attached[key] = await asyncio.get_running_loop().run_in_executor(self._thread, _Attached, source)

    async def pull(self, handle: KVHandle, into: list[int]) -> int:
        key = (handle.source.instance, handle.source.epoch)
        await self.connect(handle.source)
        if len(into) < len(handle.blocks):
            raise PullError(f"{len(handle.blocks)} blocks to read, room for {len(into)}", "transport")
        attached = self._attached[key]
        targets = into[: len(handle.blocks)]
        size = len(targets) * self._own.block_bytes
        if size <= AT_ONCE:
            self._read(attached, handle, targets)
        else:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._read, attached, handle, targets)
        if key in self._over:
            raise PullError(f"{handle.source.instance} died during the pull", "gone")
        return size

    def _read(self, attached: _Attached, handle: KVHandle, into: list[int]) -> None:
        """Copies, with digests of what was copied; then looks whether that is what was promised."""
        if not all(0 <= block < attached.blocks.num_blocks for block in handle.blocks):
            raise PullError(f"{handle.source.instance} promised blocks {handle.blocks} that it does not have", "stale")
        found = self._own.copy_from(attached.blocks, handle.blocks, into)
        check(handle, [attached.generations[b] for b in handle.blocks], found)
        if self._stage is not None:
            self._stage(into)

    def disconnect(self, instance: str, epoch: int) -> None:
        self._over.add((instance, epoch))
        self._attached.pop((instance, epoch), None)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._attached.clear()
