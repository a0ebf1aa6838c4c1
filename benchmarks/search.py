"""How long a placement search takes: 32 and 256 devices, OPT-66B, ShareGPT, both algorithms (DistServe's paper, figure
12, plots theirs).

    python -m benchmarks.search [--quick] [--json FILE|-]

Wall seconds of the whole choice, its explanation included, with one process for each core.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.harness import report, say, table
from distserve.planner.answer import Answer
from distserve.planner.api import plan

MODEL, WORKLOAD, SLO = "facebook/opt-66b", "sharegpt", "ttft=2.5,tpot=0.15"
CASES = (("a100-4x8", 6.0), ("a100-4x8", 18.0), ("a100-32x8", 60.0))  # (cluster, requests/s)


@dataclass(frozen=True)
class Row:
    """One search."""

    cluster: str
    rate: float
    algorithm: str
    seconds: float
    simulated: int  # requests
    devices: int
    plan: str


def search(cluster: str, rate: float, algorithm: str) -> Row:
    began = time.perf_counter()
    answer = plan(MODEL, cluster, WORKLOAD, rate=rate, slo=SLO, algorithm=algorithm, jobs=len(os.sched_getaffinity(0)))
    assert isinstance(answer, Answer)
    instances = " + ".join(f"{s.count} {s.role} tp{s.tp} pp{s.pp}" for s in answer.plan.instances)
    seconds = time.perf_counter() - began
    return Row(cluster, rate, algorithm, seconds, answer.simulated, answer.num_devices, instances)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 devices only")
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args(argv)
    rows = []
    for cluster, rate in CASES[:1] if options.quick else CASES:
        for algorithm in ("low", "high"):
            rows.append(search(cluster, rate, algorithm))
            say(f"{cluster}, {rate:g} requests/s, {algorithm}: {rows[-1].seconds:.1f} s")
    text = table(
        ("cluster", "requests/s", "algorithm", "seconds", "simulated", "devices", "plan"),
        [
            (r.cluster, f"{r.rate:g}", r.algorithm, f"{r.seconds:.1f}", f"{r.simulated:,}", r.devices, r.plan)
            for r in rows
        ],
    )
    report({"searches": [asdict(row) for row in rows]}, text, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
