"""What `serve --record` takes of a request: the time to note it, its share of writing to the file included.

    python -m benchmarks.recording [--requests 200000] [--json FILE|-]

Beside it, in turns, what a gateway without a recording does at the same place: a call that does nothing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.harness import describe, machine, report, table
from distserve.request import FinishReason, Request, SamplingParams
from distserve.serve.record import Deaf, Recorder

ROUNDS = 5
PROMPT, OUTPUT = 200, 128  # tokens


@dataclass
class Ended:
    """A request that got its whole answer."""

    request: Request
    first: float = 10.25
    last: float = 15.5
    finish: FinishReason | None = FinishReason.LENGTH
    error: Exception | None = None


def seconds(record: Recorder | Deaf, requests: int) -> float:
    """A request's."""
    ended = Ended(Request(1, [7] * PROMPT, SamplingParams(max_tokens=OUTPUT), 10.0, output=[8] * OUTPUT))
    begin = time.perf_counter()
    for _ in range(requests):
        record.note(ended)
    record.close()
    return (time.perf_counter() - begin) / requests


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--json", metavar="FILE|-")
    asked = parser.parse_args()
    kind = machine()
    found: dict[str, list[float]] = {"none": [], "traffic.csv": [], "traffic.jsonl": []}
    for _ in range(ROUNDS):
        for name, times in found.items():
            with TemporaryDirectory() as folder:
                record: Recorder | Deaf = Deaf()
                if name != "none":
                    record = Recorder(Path(folder) / name, later=lambda *_: None, clock=time.monotonic)
                times.append(seconds(record, asked.requests))
    rows = [[name, f"{median(times) * 1e6:.2f}"] for name, times in found.items()]
    text = f"{describe(kind)}\n\n{table(['recording', 'microseconds a request'], rows)}"
    report({"machine": kind, "seconds": found}, text, asked.json)


if __name__ == "__main__":
    main()
