"""A medium whose ranks' memory is shared memory. Knows no transport: which one publishes and pulls, a subclass says."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack

from tests.transfer.contract import Medium, SourceEnd, TargetEnd

from distserve.transfer.base import KVSource, Source, Transport
from distserve.transfer.blocks import RankBlocks
from distserve.transfer.copying import Bytes
from distserve.transfer.layout import InstanceLayout
from distserve.transfer.memory import SharedMemory


class SharedMedium(Medium):
    def __init__(self) -> None:
        self.pulling, self._memories = ExitStack(), ExitStack()  # transports with their own; what they read and write

    @abstractmethod
    def make_source(self, memories: list[SharedMemory], num_blocks: int, layout: InstanceLayout) -> Source:
        """It owns the memories."""

    @abstractmethod
    def make_transport(self, memories: list[SharedMemory], num_blocks: int, layout: InstanceLayout) -> Transport: ...

    def source(self, layout: InstanceLayout, num_blocks: int, instance: str = "prefill-0", epoch: int = 1) -> SourceEnd:
        memories, ranks = _allocate(layout, num_blocks)
        source = self.make_source(memories, num_blocks, layout)
        self._memories.callback(source.close)
        return SourceEnd(source, KVSource(instance, epoch, layout, source.location, notices=""), ranks)

    def target(self, layout: InstanceLayout, num_blocks: int) -> TargetEnd:
        memories, ranks = _allocate(layout, num_blocks)
        for memory in memories:
            self._memories.callback(memory.close)
        transport = self.make_transport(memories, num_blocks, layout)
        self.pulling.callback(transport.close)
        return TargetEnd(transport, layout, ranks)

    def close(self) -> None:
        self.pulling.close()
        self._memories.close()


def _allocate(layout: InstanceLayout, num_blocks: int) -> tuple[list[SharedMemory], list[Bytes]]:
    sizes = [layout.of_rank(rank).block_bytes for rank in range(layout.sharding.num_ranks)]
    memories = [SharedMemory(num_blocks * size) for size in sizes]
    return memories, RankBlocks([memory.buffer for memory in memories], num_blocks, layout).ranks
