"""What it is worth that an instance's cores stay awake between its steps (`distserve serve --awake`).

    python -m benchmarks.awake [--gap 0.5] [--rounds 4] [--json FILE|-]

Two servers of the demo model, one prefill and one decode instance each, on the same cores: one lets its cores sleep,
the other does not. They take turns; in each turn prompts come one by one, with pauses, and are answered with one token.
On a machine of one's own expect no difference; in a virtual machine, whose host lends idle cores to others, there is
one. Such machines have slow spells, too (`benchmarks.weather`): the lower quartile is beside them.
"""

from __future__ import annotations

import argparse
import asyncio
from statistics import fmean, median

import msgspec

from benchmarks.harness import describe, machine, report, table
from distserve.bench.client import Client, clock
from distserve.profiler.live import Server
from distserve.traces import Arrival

LINGER = 2.0  # seconds that the second server stays awake
PROMPT = 200  # tokens
TURN = 12  # prompts
SIZES = ("--kv-memory", "1GiB", "--max-batch-tokens", "256", "--log-level", "warning")
NAMES = ("cores sleep", "cores stay awake")


async def turn(client: Client, gap: float) -> list[float]:
    """Seconds to the first token of each prompt."""
    found = []
    for number in range(TURN):
        ids = [(i * 7919 + number) % 61 + 3 for i in range(PROMPT)]
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "ignore_eos": True, "stream": True}
        result = await client.send("/v1/completions", msgspec.json.encode(body), Arrival(0.0, PROMPT, 1), clock())
        assert result.record.ttft is not None, result.message
        found.append(result.record.ttft)
        await asyncio.sleep(gap)
    return found


async def measure(gap: float, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    async with (
        Server([*SIZES, "--awake", "0"]) as sleeps,
        Server([*SIZES, "--awake", str(LINGER)]) as stays,
        Client(sleeps.url, api_key=None, timeout=60.0) as first,
        Client(stays.url, api_key=None, timeout=60.0) as second,
    ):
        clients = (first, second)
        for server in (sleeps, stays):
            await server.ready()
        for client in clients:
            await turn(client, 0.0)  # warms all parts up
        for _ in range(rounds):
            for name, client in zip(NAMES, clients, strict=True):
                await asyncio.sleep(LINGER + 0.5)  # the other's cores sleep again
                found[name] += await turn(client, gap)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gap", type=float, default=0.5, metavar="SECONDS", help="from an answer to the next prompt")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    kind = machine()
    found = asyncio.run(measure(arguments.gap, arguments.rounds))
    rows = []
    for name, taken in found.items():
        ordered = sorted(taken)
        parts = (ordered[len(ordered) // 4], median(taken), ordered[9 * len(ordered) // 10], fmean(taken))
        rows.append([name, *(f"{1e3 * part:.1f} ms" for part in parts)])
    quick = [sorted(found[name])[len(found[name]) // 4] for name in NAMES]
    ratio = quick[1] / quick[0]
    shown = table([f"TTFT of {PROMPT} tokens", "p25", "p50", "p90", "mean"], rows)
    text = f"{describe(kind)}\n\n{shown}\n\nlower quartile, awake over asleep: {ratio:.2f}"
    report({"machine": kind, "seconds": found, "ratio": ratio}, text, arguments.json)


if __name__ == "__main__":
    main()
