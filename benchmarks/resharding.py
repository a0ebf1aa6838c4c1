"""What a pull between instances of any tp and pp costs on one host, beside memcpy.

    python -m benchmarks.resharding [--rounds 20] [--cores 1] [--json FILE|-]

For the usual pairs of layouts, and a model's real shape: one request of 1,000 tokens is pulled through shared memory by
the code that serves, checks included (generations, and the digest of every block), and published (the digest, as
prefill takes it). The yardstick is the same number of bytes copied between two such memories by memcpy, under the same
weather: all take turns. Source and target lie in large pages that exist, as a pool's first blocks do
(`SharedMemory.touch`), and each round takes other blocks than the last one, so that they come from memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.harness import describe, machine, report, say, table
from distserve.catalogue import model_spec
from distserve.transfer.base import KVHandle, KVSource
from distserve.transfer.layout import InstanceLayout, reads
from distserve.transfer.memory import SharedMemory
from distserve.transfer.shm import ShmSource, ShmTransport

TOKENS, BLOCK_SIZE = 1000, 32
BLOCKS = -(-TOKENS // BLOCK_SIZE)
SMALL, LARGE = "HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.1-8B"
SETS = {SMALL: 6, LARGE: 2}  # of blocks, which take turns: together more than a cache holds
Degrees = tuple[int, int]  # tp, pp
PAIRS: dict[str, tuple[tuple[Degrees, Degrees], ...]] = {
    SMALL: (
        ((1, 1), (1, 1)),
        ((3, 1), (3, 1)),
        ((3, 1), (1, 1)),
        ((1, 1), (3, 1)),
        ((1, 2), (1, 3)),
        ((1, 3), (3, 2)),
    ),
    LARGE: (
        ((1, 1), (1, 1)),
        ((2, 1), (2, 1)),
        ((2, 1), (1, 1)),
        ((1, 1), (2, 1)),
        ((4, 1), (2, 1)),
        ((1, 2), (1, 1)),
        ((1, 2), (2, 1)),
        ((8, 1), (1, 1)),
    ),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one pair. Seconds are medians."""

    model: str
    source: Degrees
    target: Degrees
    lay_out: float  # seconds for the ranges of all target ranks, once for a pair
    ranges: float  # of a block on one target rank, the mean
    range_bytes: float  # mean
    copied: int  # bytes
    publish: float  # seconds
    pull: float
    memcpy: float

    @property
    def share(self) -> float:
        """Of the bandwidth of memcpy."""
        return self.memcpy / self.pull


class Pair:
    """A source and a target that have met, with KV in place and handles of every set of blocks."""

    def __init__(self, model: str, source: Degrees, target: Degrees) -> None:
        kv = model_spec(model).kv_layout(BLOCK_SIZE, "bfloat16")
        self.there, self.here = InstanceLayout.of(kv, *source), InstanceLayout.of(kv, *target)
        self.copied = BLOCKS * kv.block_bytes
        num_blocks = BLOCKS * SETS[model]
        self.sets = [list(range(first, first + BLOCKS)) for first in range(0, num_blocks, BLOCKS)]
        self._source = ShmSource(allocate(self.there, num_blocks), num_blocks, self.there)
        self._own = allocate(self.here, num_blocks)
        self._transport = ShmTransport(self._own, num_blocks, self.here)
        self._where = KVSource("prefill-0", 1, self.there, self._source.location, notices="")

    async def connect(self) -> None:
        await self._transport.connect(self._where)
        self._handles = [
            KVHandle(self._where, 1, 1, TOKENS, tuple(blocks), *self._source.publish(blocks)) for blocks in self.sets
        ]

    async def publish(self, number: int) -> float:
        start = time.perf_counter()
        self._source.publish(self.sets[number % len(self.sets)])
        return time.perf_counter() - start

    async def pull(self, number: int) -> float:
        start = time.perf_counter()
        await self._transport.pull(self._handles[number % len(self.sets)], self.sets[number % len(self.sets)])
        return time.perf_counter() - start

    def close(self) -> None:
        self._transport.close()
        self._source.close()
        for memory in self._own:
            memory.close()


class Yardstick:
    """As many bytes in memory of the same kind, as one piece a set."""

    def __init__(self, model: str) -> None:
        kv = model_spec(model).kv_layout(BLOCK_SIZE, "bfloat16")
        self._memories = [*(allocate(InstanceLayout.of(kv), BLOCKS * SETS[model])[0] for _ in range(2))]
        self._from, self._to = (
            np.frombuffer(memory.buffer, np.uint8).reshape(SETS[model], BLOCKS * kv.block_bytes)
            for memory in self._memories
        )

    async def copy(self, number: int) -> float:
        at = number % len(self._to)
        start = time.perf_counter()
        np.copyto(self._to[at], self._from[at])
        return time.perf_counter() - start


def allocate(layout: InstanceLayout, num_blocks: int) -> list[SharedMemory]:
    """Each rank's memory, of random bytes."""
    found, some = [], np.random.default_rng(0)
    for rank in range(layout.sharding.num_ranks):
        memory = SharedMemory(num_blocks * layout.of_rank(rank).block_bytes)
        memory.touch(memory.size)
        np.frombuffer(memory.buffer, np.uint64)[:] = some.integers(0, 2**64, memory.size // 8, np.uint64)
        found.append(memory)
    return found


async def measure(model: str, source: Degrees, target: Degrees, yardstick: Yardstick, rounds: int) -> Cost:
    pair = Pair(model, source, target)
    try:
        await pair.connect()
        actions: list[Callable[[int], Coroutine[None, None, float]]] = [pair.publish, pair.pull, yardstick.copy]
        times = [[await action(number) for action in actions] for number in range(rounds + 2)][2:]
    finally:
        pair.close()
    publish, pull, memcpy = (statistics.median(column) for column in zip(*times, strict=True))
    found = reads(pair.there, pair.here)
    sizes = [part.size for of_rank in found for read in of_rank for part in read.ranges]
    start = time.perf_counter()
    reads.__wrapped__(pair.there, pair.here)
    return Cost(
        model=model,
        source=source,
        target=target,
        lay_out=time.perf_counter() - start,
        ranges=len(sizes) / len(found),
        range_bytes=statistics.mean(sizes),
        copied=pair.copied,
        publish=publish,
        pull=pull,
        memcpy=memcpy,
    )


def words(degrees: Degrees) -> str:
    return f"tp{degrees[0]} pp{degrees[1]}"


def rows_of(costs: list[Cost]) -> list[list[str]]:
    return [
        [
            f"{words(cost.source)} -> {words(cost.target)}",
            f"{cost.ranges:,.1f}",
            f"{cost.range_bytes:,.0f} B",
            f"{1e6 * cost.lay_out:,.0f} us",
            f"{1e3 * cost.publish:.2f} ms",
            f"{1e3 * cost.pull:.2f} ms",
            f"{cost.copied / cost.pull / 1e9:.1f} GB/s",
            f"{cost.share:.0%}",
        ]
        for cost in costs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cores", type=int, default=1, help="that the pulling instance may use")
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    kind, costs, text = machine(), [], []
    columns = ["pair", "ranges a block and rank", "mean range", "layout", "publish", "pull", "bandwidth", "of memcpy"]
    for model, pairs in PAIRS.items():
        say(f"{model}: {len(pairs)} pairs")
        yardstick = Yardstick(model)
        found = [asyncio.run(measure(model, *pair, yardstick, arguments.rounds)) for pair in pairs]
        costs += found
        title = f"{model}, {TOKENS} tokens, {found[0].copied / 1e6:.1f} MB of KV, {arguments.cores} core(s)"
        text += ["", title, "", table(columns, rows_of(found))]
    report(
        {"machine": kind, "cores": arguments.cores, "costs": [asdict(cost) for cost in costs]},
        "\n".join([describe(kind), *text]),
        arguments.json,
    )


if __name__ == "__main__":
    main()
