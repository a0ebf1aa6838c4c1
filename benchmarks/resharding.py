"""What re-sharding KV on its way costs beside copying whole blocks: the arithmetic, and the shorter copies.

    python -m benchmarks.resharding [--rounds 20] [--json FILE|-]

For the usual pairs of layouts, and a model's real shape: how long the list of byte ranges takes to compute (once for a
pair) and to look up (each pull), how many ranges a block is read in, how short they are, and how fast numpy copies a
request of 1,000 tokens by them, all ranks one after another on one core. The yardstick is the same bytes copied as one
piece. Both sides are memory of this process; the copies are C loops over blocks, started once for a range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import describe, machine, report, say, table
from distserve.catalogue import model_spec
from distserve.transfer.layout import InstanceLayout, reads

TOKENS, BLOCK_SIZE = 1000, 32
MODELS = ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.1-8B")
Degrees = tuple[int, int]  # tp, pp
PAIRS: dict[str, tuple[tuple[Degrees, Degrees], ...]] = {
    MODELS[0]: (
        ((1, 1), (1, 1)),
        ((3, 1), (3, 1)),
        ((3, 1), (1, 1)),
        ((1, 1), (3, 1)),
        ((1, 2), (1, 3)),
        ((3, 1), (1, 2)),
        ((1, 3), (3, 2)),
    ),
    MODELS[1]: (
        ((1, 1), (1, 1)),
        ((2, 1), (2, 1)),
        ((2, 1), (1, 1)),
        ((4, 1), (2, 1)),
        ((4, 1), (1, 4)),
        ((2, 1), (4, 2)),
        ((8, 1), (1, 1)),
    ),
}
Blocks = NDArray[np.uint8]  # [num_blocks, block_bytes]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one pair."""

    model: str
    source: Degrees
    target: Degrees
    compute: float  # seconds for the ranges of all target ranks, once
    look_up: float  # seconds, each time
    ranges: float  # of a block on one target rank, the mean
    range_bytes: float  # mean
    copied: int  # bytes
    bandwidth: float  # bytes/s
    share: float  # of the bandwidth of copying the same bytes as one piece


def measure(model: str, source: Degrees, target: Degrees, rounds: int) -> Cost:
    kv = model_spec(model).kv_layout(BLOCK_SIZE, "bfloat16")
    there, here = InstanceLayout.of(kv, *source), InstanceLayout.of(kv, *target)
    blocks = -(-TOKENS // BLOCK_SIZE)
    memory, own = allocate(there, blocks), allocate(here, blocks)
    found = reads(there, here)
    moves = [
        (memory[read.source][:, at : at + size], own[rank][:, to : to + size])
        for rank, of_rank in enumerate(found)
        for read in of_rank
        for at, to, size in read.ranges
    ]
    copied = sum(to.size for _, to in moves)
    one, other = np.ones(copied, np.uint8), np.empty(copied, np.uint8)

    def by_ranges() -> None:
        for at, to in moves:
            np.copyto(to, at)

    resharded, whole = in_turns([by_ranges, lambda: np.copyto(other, one)], rounds)
    num_ranges = len(moves) / len(found)
    return Cost(
        model=model,
        source=source,
        target=target,
        compute=statistics.median(timed(lambda: reads.__wrapped__(there, here)) for _ in range(rounds)),
        look_up=statistics.median(timed(lambda: reads(there, here)) for _ in range(100)),
        ranges=num_ranges,
        range_bytes=copied / len(moves) / blocks,
        copied=copied,
        bandwidth=copied / resharded,
        share=whole / resharded,
    )


def allocate(layout: InstanceLayout, blocks: int) -> list[Blocks]:
    """Each rank's blocks, written once so that the system has given the pages."""
    sizes = [layout.of_rank(rank).block_bytes for rank in range(layout.sharding.num_ranks)]
    return [np.ones((blocks, size), np.uint8) for size in sizes]


def in_turns(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, under the same weather."""
    times = [[timed(function) for function in functions] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def words(degrees: Degrees) -> str:
    return f"tp{degrees[0]} pp{degrees[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    kind, costs, text = machine(), [], []
    for model, pairs in PAIRS.items():
        say(f"{model}: {len(pairs)} pairs")
        found = [measure(model, *pair, arguments.rounds) for pair in pairs]
        costs += found
        rows = [
            [
                f"{words(cost.source)} -> {words(cost.target)}",
                f"{1e6 * cost.compute:,.0f} us",
                f"{1e6 * cost.look_up:.1f} us",
                f"{cost.ranges:,.1f}",
                f"{cost.range_bytes:,.0f} B",
                f"{cost.bandwidth / 1e9:.1f} GB/s",
                f"{cost.share:.0%}",
            ]
            for cost in found
        ]
        columns = ["pair", "compute", "look-up", "ranges a block and rank", "mean range", "copy", "of one piece"]
        text += ["", f"{model}, {TOKENS} tokens, {found[0].copied / 1e6:.1f} MB of KV", "", table(columns, rows)]
    report(
        {"machine": kind, "costs": [asdict(cost) for cost in costs]}, "\n".join([describe(kind), *text]), arguments.json
    )


if __name__ == "__main__":
    main()
