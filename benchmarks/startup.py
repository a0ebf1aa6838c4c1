"""How long a server takes from its command to ready (the first 200 of /health), everything installed: ours and vLLM's.

    python -m benchmarks.startup [--vllm-python PATH] [--rounds 3] [--json FILE|-]

Weights and programs have been read before (one untimed start goes first), vLLM's compiler cache is warm. vLLM starts
`--rounds` times compiled, its default, and once with --enforce-eager, which trades speed for the start.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

from benchmarks import servers
from benchmarks.engine import demo_folder
from benchmarks.harness import describe, machine, report, say, table


def starts(make: Callable[[], servers.Server], rounds: int) -> list[float]:
    """Seconds of each timed start."""
    seconds = []
    for turn in range(rounds + 1):
        with make() as server:
            say(f"{server.name}: ready after {server.ready:.1f} s{'' if turn else ' (not counted)'}")
            if turn:
                seconds.append(server.ready)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    python = arguments.vllm_python
    kind = machine()
    found = {"distserve": starts(servers.distserve, arguments.rounds)}
    if python:
        folder = demo_folder()
        found["vLLM, compiled"] = starts(lambda: servers.vllm(python, folder, kv_gib=1, cores="1"), arguments.rounds)
        eager = ["--enforce-eager"]
        found["vLLM, eager"] = starts(lambda: servers.vllm(python, folder, kv_gib=1, cores="1", arguments=eager), 1)
    ours = median(found["distserve"])
    rows = [[name, f"{median(times):.1f} s", f"{median(times) / ours:.1f}x"] for name, times in found.items()]
    if not python:
        rows.append(["vLLM", "not installed", "-"])
    text = f"{describe(kind)}\n\n{table(['from command to ready', 'median', 'over ours'], rows)}"
    report({"machine": kind, "seconds": found}, text, arguments.json)


if __name__ == "__main__":
    main()
