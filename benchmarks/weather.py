"""How steady one core is while nothing of ours runs on it but this: what other tenants of the machine's host do to it.

    python -m benchmarks.weather [--core 0] [--seconds 40] [--json FILE|-]

Kinds of work take turns, some milliseconds each: products of bf16 matrices (which oneDNN computes in the matrix tiles
where a core has them), the same in the vector units (our own kernels, as with DISTSERVE_KERNELS=vectors, where the core
has such), products of fp32 matrices (vector units, too), an interpreter's loop, a copy of memory.
Each is divided by what its quick tenth takes. The last column is the mean while the bf16 products take more than 1.6
times as long: what is slow together is slow for the same reason. Virtual processors that do not know of each other may
be the two threads of one core, and share its units.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from statistics import fmean

import torch

from benchmarks.harness import describe, machine, report, table
from distserve.engine import kernels
from distserve.engine.kernels.build import build

SLOW = 1.6
SIZE, ROWS, FLOAT_SIZE, COPIED = 1024, 256, 512, 64 << 20


def works() -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    tiles = [torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(2)]
    floats = [torch.randn(FLOAT_SIZE, FLOAT_SIZE) for _ in range(2)]
    source, target = torch.zeros(2, COPIED, dtype=torch.uint8)
    found: dict[str, Callable[[], object]] = {"bf16 products": lambda: [tiles[0] @ tiles[1] for _ in range(6)]}
    library = kernels.load()
    if library is not None and kernels.Kernels(ctypes.CDLL(str(build())), "vectors").packs:
        weight = kernels.PackedWeight(library, tiles[0][:ROWS].contiguous())
        found["in vectors"] = lambda: weight.multiply(tiles[1])
    return found | {
        "fp32 products": lambda: [floats[0] @ floats[1] for _ in range(4)],
        "interpreter": lambda: sum(i * i for i in range(60_000)),
        "copy": lambda: target.copy_(source),
    }


def times(seconds: float) -> dict[str, list[float]]:
    """Of every turn, as multiples of the quick tenth."""
    mine = works()
    found: dict[str, list[float]] = {name: [] for name in mine}
    for _ in range(3):
        for work in mine.values():
            work()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, work in mine.items():
            began = time.perf_counter()
            work()
            found[name].append(time.perf_counter() - began)
    return {name: [each / quantile(taken, 0.1) for each in taken] for name, taken in found.items()}


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    torch.set_num_threads(1)
    kind = machine()
    found = times(arguments.seconds)
    spell = [turn for turn, each in enumerate(found["bf16 products"]) if each > SLOW]
    rows = []
    for name, taken in found.items():
        parts = [quantile(taken, share) for share in (0.5, 0.9, 0.99)]
        together = f"{fmean(taken[turn] for turn in spell):.2f}" if spell else "-"
        rows.append([name, *(f"{part:.2f}" for part in (*parts, fmean(taken))), together])
    share = len(spell) / len(found["bf16 products"])
    shown = table(["times the quick tenth", "p50", "p90", "p99", "mean", "in slow spells"], rows)
    said = f"bf16 products took more than {SLOW:g} times as long in {share:.1%} of the turns"
    text = f"{describe(kind)}\n\n{shown}\n\n{said}"
    report({"machine": kind, "share_slow": share, "times": found}, text, arguments.json)


if __name__ == "__main__":
    main()
