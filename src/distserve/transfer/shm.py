"""Pulls between instances of one host: the target maps the source's KV memory and copies the blocks it needs.

The generations of the source's blocks lie in shared memory too, and its scheduler moves them as it frees blocks. A pull
copies, then compares: whatever was freed while it was being read shows another generation, whatever was damaged another
digest (`copying.py`). It knows no scheduler and no message: who may free what, and when, is `sched/` and `serve/`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from distserve.errors import PullError
from distserve.specs import KVLayout
from distserve.transfer import copying
from distserve.transfer.base import KVHandle, KVSource, check
from distserve.transfer.layout import InstanceLayout
from distserve.transfer.memory import SharedMemory, attach

AT_ONCE = 32 << 20  # bytes; a pull this small is over before a thread would be worth its two changes

Stage = Callable[[list[int]], None]  # moves blocks between the device and its host copy; nothing to do on a CPU


class ShmSource:
    """The publishing side. `generations` is the shared array that the scheduler's block pool counts in."""

    def __init__(
        self, memories: Sequence[SharedMemory], num_blocks: int, layout: InstanceLayout, stage: Stage | None = None
    ) -> None:
        (memory,) = memories
        self._memory = memory
        self._stage = stage
        self._copying = copying.load()
        self._counts = SharedMemory(8 * num_blocks)
        self.generations = self._counts.buffer.cast("Q")
        self._blocks = _as_blocks(memory.buffer, num_blocks, layout.of_rank(0))
        self.location = "shm:" + ";".join((memory.path, str(num_blocks), self._counts.path))

    def publish(self, blocks: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self._stage is not None:
            self._stage(blocks)
        return tuple(self.generations[b] for b in blocks), self._copying.digests(self._blocks, blocks)

    def close(self) -> None:
        self._counts.close()
        self._memory.close()


class _Attached:
    """One source's memory as this process sees it."""

    def __init__(self, source: KVSource) -> None:
        path, num_blocks, counts = source.location.removeprefix("shm:").split(";")
        layout = source.layout.of_rank(0)
        self.blocks = _as_blocks(attach(path, int(num_blocks) * layout.block_bytes), int(num_blocks), layout)
        self.generations = attach(counts, 8 * int(num_blocks)).cast("Q")


class ShmTransport:
    """The pulling side. One thread copies, so that a large pull leaves the event loop free; a small one is made in the
    loop, which it holds for about 3 ms: the changes of thread would cost a sixth of it.

    `layout` and `memory` are this instance's own; `stage` (CUDA) moves pulled blocks from host memory to the device.
    """

    def __init__(
        self, memories: Sequence[SharedMemory], num_blocks: int, layout: InstanceLayout, stage: Stage | None = None
    ) -> None:
        (memory,) = memories
        self._own = _as_blocks(memory.buffer, num_blocks, layout.of_rank(0))
        self._layout = layout
        self._block_bytes = layout.of_rank(0).block_bytes
        self._stage = stage
        self._copying = copying.load()
        self._attached: dict[tuple[str, int], _Attached] = {}
        self._over: set[tuple[str, int]] = set()
        self._thread = ThreadPoolExecutor(1, "pull")

    async def connect(self, source: KVSource) -> None:
        key = (source.instance, source.epoch)
        if key in self._over:
            raise PullError(f"epoch {source.epoch} of {source.instance} is over", "gone")
        if key in self._attached:
            return
        if source.layout != self._layout:
            raise PullError(
                f"{source.instance} lays out KV as {source.layout}, this instance as {self._layout}", "transport"
            )
        self._attached[key] = await asyncio.get_running_loop().run_in_executor(self._thread, _Attached, source)

    async def pull(self, handle: KVHandle, into: list[int]) -> int:
        key = (handle.source.instance, handle.source.epoch)
        await self.connect(handle.source)
        if len(into) < len(handle.blocks):
            raise PullError(f"{len(handle.blocks)} blocks to read, room for {len(into)}", "transport")
        attached = self._attached[key]
        targets = into[: len(handle.blocks)]
        if len(targets) * self._block_bytes <= AT_ONCE:
            self._read(attached, handle, targets)
        else:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._read, attached, handle, targets)
        if key in self._over:
            raise PullError(f"{handle.source.instance} died during the pull", "gone")
        return len(targets) * self._block_bytes

    def _read(self, attached: _Attached, handle: KVHandle, into: list[int]) -> None:
        """Copies, with digests of what was copied; then looks whether that is what was promised."""
        if not all(0 <= block < len(attached.blocks) for block in handle.blocks):
            raise PullError(f"{handle.source.instance} promised blocks {handle.blocks} that it does not have", "stale")
        found = self._copying.copy(attached.blocks, handle.blocks, self._own, into)
        check(handle, [attached.generations[b] for b in handle.blocks], [found])
        if self._stage is not None:
            self._stage(into)

    def disconnect(self, instance: str, epoch: int) -> None:
        self._over.add((instance, epoch))
        self._attached.pop((instance, epoch), None)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._attached.clear()


def _as_blocks(buffer: memoryview, num_blocks: int, layout: KVLayout) -> copying.Bytes:
    """[num_blocks, block_bytes] over `buffer`."""
    size = num_blocks * layout.block_bytes
    return np.frombuffer(buffer, np.uint8, count=size).reshape(num_blocks, layout.block_bytes)
