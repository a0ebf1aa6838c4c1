"""What handing a prompt's KV from prefill to decode costs: publish, pull and verify of a 1,000-token prompt.

    python -m benchmarks.handoff [--requests 30] [--json FILE|-]

A live server of the demo model, one prefill and one decode instance on a core each, gets `--requests` prompts of 1,000
random tokens one after another, 200 output tokens each, after 3 that do not count. Publish (take the digest, after the
first token has left) and pull (copy the blocks, check generations and digest) are read from /metrics. Their sum is held
against the TTFT and the total latency that the client measured. Means, for /metrics has sums.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics

from benchmarks import servers
from benchmarks.harness import describe, machine, report, say, table
from benchmarks.load import body, closed_loop, prompts

PROMPT, OUTPUT = 1000, 200
TARGETS = {"TTFT": 0.02, "total": 0.001}  # the highest share of it that a hand-off may take
PARTS = {"publish": "distserve:publish_seconds", "pull": "distserve:pull_seconds"}


def measure(server: servers.Server, requests: int) -> dict[str, float]:
    """Mean seconds of each part of the hand-off, of TTFT and of the whole answer."""
    bodies = [body(prompt, OUTPUT) for prompt in prompts(requests + 3, PROMPT)]
    asyncio.run(closed_loop(server.url, bodies[:3], 1))
    before = server.metrics()
    results = asyncio.run(closed_loop(server.url, bodies[3:], 1))
    after = server.metrics()
    found = {}
    for part, metric in PARTS.items():
        count = after[f"{metric}_count"] - before[f"{metric}_count"]
        assert count == requests, f"{count} of {requests} requests were handed off"
        found[part] = (after[f"{metric}_sum"] - before[f"{metric}_sum"]) / count
    records = [result.record for result in results]
    found["TTFT"] = statistics.mean(r.ttft for r in records if r.ttft is not None)
    found["total"] = found["TTFT"] + (OUTPUT - 1) * statistics.mean(r.tpot for r in records if r.tpot is not None)
    found["bytes"] = (after["distserve:pull_bytes_total"] - before["distserve:pull_bytes_total"]) / requests
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    kind = machine()
    with servers.distserve() as server:
        say("ready, measuring")
        found = measure(server, arguments.requests)
    cost = found["publish"] + found["pull"]
    rows = [[part, f"{1e3 * found[part]:.2f} ms", ""] for part in ("publish", "pull")]
    for whole, target in TARGETS.items():
        share = cost / found[whole]
        verdict = "met" if share <= target else "missed"
        rows.append([f"hand-off of {whole} ({1e3 * found[whole]:,.0f} ms)", f"{share:.2%}", f"{target:.1%}: {verdict}"])
    text = "\n".join(
        [
            describe(kind),
            f"{arguments.requests} prompts of {PROMPT} tokens, {OUTPUT} output; {found['bytes'] / 1e6:.1f} MB of KV",
            "",
            table(["hand-off", "mean", "target"], rows),
        ]
    )
    report({"machine": kind, "seconds": found, "cost": cost}, text, arguments.json)


if __name__ == "__main__":
    main()
