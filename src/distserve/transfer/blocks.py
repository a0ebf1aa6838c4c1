"""The KV of all ranks of one instance, as arrays of blocks: its digests, and copies of what another instance has.

Knows where each unit of a block lies (`layout.py`) and how units are copied (`copying.py`); of whose memory it is, and
of whether its owner kept his promise, it knows nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from distserve.transfer import copying
from distserve.transfer.copying import Bytes, Sums, Units
from distserve.transfer.layout import InstanceLayout, reads


class RankBlocks:
    """`num_blocks` blocks on each rank of an instance of `layout`. `buffers`: each rank's memory.

    Where ranks outnumber the heads, several hold the same one: `copies` of everything, each spread over as many ranks.
    """

    def __init__(self, buffers: Sequence[memoryview], num_blocks: int, layout: InstanceLayout) -> None:
        count = layout.sharding.num_ranks
        assert len(buffers) == count, f"{len(buffers)} memories of {count} ranks"
        self.layout = layout
        self.num_blocks = num_blocks
        sizes = [layout.of_rank(rank).block_bytes for rank in range(count)]
        self.ranks: list[Bytes] = [  # each [num_blocks, block_bytes of the rank]
            np.frombuffer(buffer, np.uint8, count=num_blocks * size).reshape(num_blocks, size)
            for buffer, size in zip(buffers, sizes, strict=True)
        ]
        self.block_bytes = sum(sizes)  # of a block on all ranks
        self._copying = copying.load()

    def digests(self, blocks: Sequence[int], copy: int = 0) -> tuple[int, ...]:
        """Of each block, as one complete copy has it."""
        found = np.zeros(len(blocks), np.uint64)
        for rank, units in enumerate(_held(self.layout)):
            if _copy_of(self.layout, rank) == copy:
                found += self._copying.digests(self.ranks[rank], blocks, units)
        return tuple(found.tolist())

    def every_digest(self, blocks: Sequence[int]) -> list[tuple[int, ...]]:
        """`digests` of each complete copy."""
        return [self.digests(blocks, copy) for copy in range(self.layout.sharding.copies)]

    def copy_from(self, source: RankBlocks, blocks: Sequence[int], into: Sequence[int]) -> list[tuple[int, ...]]:
        """Fills `into`, on all ranks, with what `blocks` of `source` hold. Returns `every_digest` of what was written.
        Raises `PlanError` where the two are not of the same model. Threads may do so at once, for other blocks."""
        found: list[Sums] = [np.zeros(len(blocks), np.uint64) for _ in range(self.layout.sharding.copies)]
        for rank, moves in enumerate(_moves(source.layout, self.layout)):
            for source_rank, units in moves:
                parts = (source.ranks[source_rank], blocks, self.ranks[rank], into)
                found[_copy_of(self.layout, rank)] += self._copying.copy(*parts, units)
        return [tuple(sums.tolist()) for sums in found]


def _copy_of(layout: InstanceLayout, rank: int) -> int:
    """Which of the complete copies a rank belongs to."""
    return rank % layout.sharding.tp % layout.sharding.copies


@functools.cache
def _held(layout: InstanceLayout) -> tuple[Units, ...]:
    """All units of each rank's block."""
    size = layout.unit_bytes
    return tuple(
        Units.of(size, [(i * size, i * size, place) for i, place in enumerate(layout.places(rank))])
        for rank in range(layout.sharding.num_ranks)
    )


@functools.cache
def _moves(source: InstanceLayout, target: InstanceLayout) -> tuple[tuple[tuple[int, Units], ...], ...]:
    """What each rank of `target` copies, from which rank of `source`: the ranges of `reads` unit by unit."""
    size = target.unit_bytes
    found = []
    for rank, of_rank in enumerate(reads(source, target)):
        places = target.places(rank)
        found.append(
            tuple(
                (
                    read.source,
                    Units.of(
                        size,
                        [
                            (at + offset, to + offset, places[(to + offset) // size])
                            for at, to, length in read.ranges
                            for offset in range(0, length, size)
                        ],
                    ),
                )
                for read in of_rank
            )
        )
    return tuple(found)
