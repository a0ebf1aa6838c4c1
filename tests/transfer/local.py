"""The contract of transports between instances in one process: the slow, obvious reference. Copies range by range with
numpy, and takes digests of what arrived, as the real ones need not.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from tests.transfer.contract import Medium, SourceEnd, TargetEnd

from distserve.errors import PlanError, PullError
from distserve.transfer.base import KVHandle, KVSource, check
from distserve.transfer.blocks import RankBlocks
from distserve.transfer.layout import InstanceLayout, reads


def plain_memory(num_blocks: int, layout: InstanceLayout) -> RankBlocks:
    sizes = [num_blocks * layout.of_rank(rank).block_bytes for rank in range(layout.sharding.num_ranks)]
    return RankBlocks([memoryview(bytearray(size)) for size in sizes], num_blocks, layout)


class LocalSource:
    """Found by its location while it is open."""

    open: ClassVar[dict[str, LocalSource]] = {}

    def __init__(self, blocks: RankBlocks) -> None:
        self.blocks = blocks
        self.generations = [0] * blocks.num_blocks
        self.location = f"local:{id(self)}"
        self.open[self.location] = self

    def publish(self, blocks: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.generations[b] for b in blocks), self.blocks.digests(blocks)

    def close(self) -> None:
        self.open.pop(self.location, None)


class LocalTransport:
    def __init__(self, blocks: RankBlocks) -> None:
        self._own = blocks
        self._over: set[tuple[str, int]] = set()

    async def connect(self, source: KVSource) -> None:
        self._reach(source)

    def _reach(self, source: KVSource) -> LocalSource:
        if (source.instance, source.epoch) in self._over:
            raise PullError(f"epoch {source.epoch} of {source.instance} is over", "gone")
        if not source.location.startswith("local:"):
            raise PullError("it is not of this process: give both the same --transport", "transport")
        try:
            reads(source.layout, self._own.layout)
        except PlanError as error:
            raise PullError(str(error), "transport") from None
        if source.location not in LocalSource.open:
            raise PullError(f"{source.instance} is closed", "gone")
        return LocalSource.open[source.location]

    async def pull(self, handle: KVHandle, into: list[int]) -> int:
        source = self._reach(handle.source)
        if len(into) < len(handle.blocks):
            raise PullError(f"{len(handle.blocks)} blocks to read, room for {len(into)}", "transport")
        if not all(0 <= block < source.blocks.num_blocks for block in handle.blocks):
            raise PullError(f"{handle.source.instance} does not have blocks {handle.blocks}", "stale")
        targets = into[: len(handle.blocks)]
        for memory, found in zip(self._own.ranks, reads(handle.source.layout, self._own.layout), strict=True):
            for read in found:
                for at, to, size in read.ranges:
                    memory[targets, to : to + size] = source.blocks.ranks[read.source][
                        list(handle.blocks), at : at + size
                    ]
                await asyncio.sleep(0)
        check(handle, [source.generations[b] for b in handle.blocks], self._own.every_digest(targets))
        self._reach(handle.source)
        return len(targets) * self._own.block_bytes

    def disconnect(self, instance: str, epoch: int) -> None:
        self._over.add((instance, epoch))

    def close(self) -> None: ...


class LocalMedium(Medium):
    lives_in_processes = False

    def __init__(self) -> None:
        self._sources: list[LocalSource] = []

    def source(self, layout: InstanceLayout, num_blocks: int, instance: str = "prefill-0", epoch: int = 1) -> SourceEnd:
        source = LocalSource(plain_memory(num_blocks, layout))
        self._sources.append(source)
        where = KVSource(instance, epoch, layout, source.location, notices="")
        return SourceEnd(source, where, source.blocks.ranks)

    def target(self, layout: InstanceLayout, num_blocks: int) -> TargetEnd:
        own = plain_memory(num_blocks, layout)
        return TargetEnd(LocalTransport(own), layout, own.ranks)

    def close(self) -> None:
        for source in self._sources:
            source.close()
