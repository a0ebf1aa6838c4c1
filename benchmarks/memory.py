"""How much memory a whole server takes, ours (gateway, prefill, decode) and vLLM's: same model, KV size and load.

    python -m benchmarks.memory [--vllm-python PATH] [--json FILE|-]

Each server in turn serves 64 requests of 500 prompt and 64 output tokens, 8 at a time; then the memory of its process
tree is summed, PSS and RSS (`benchmarks/servers.py` tells what they are). KV: 1 GiB in all, which for ours is 512 MiB
for each of the two instances. KV memory counts as far as it was written to.
"""

from __future__ import annotations

import argparse
import asyncio

from benchmarks import servers
from benchmarks.engine import demo_folder
from benchmarks.harness import describe, machine, report, say, table
from benchmarks.load import body, closed_loop, prompts


def measure(server: servers.Server) -> dict[str, int]:
    with server:
        say(f"{server.name}: ready, serving")
        bodies = [body(prompt, 64) for prompt in prompts(64, 500)]
        asyncio.run(closed_loop(server.url, bodies, 8))
        return server.memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    kind = machine()
    found = {"distserve": measure(servers.distserve("--kv-memory", "512MiB"))}
    if arguments.vllm_python:
        found["vLLM"] = measure(servers.vllm(arguments.vllm_python, demo_folder(), kv_gib=1, cores="1"))
    rows: list[list[str]] = [
        [name, str(of["processes"]), f"{of['pss'] / 2**20:,.0f} MiB", f"{of['rss'] / 2**20:,.0f} MiB"]
        for name, of in found.items()
    ]
    if "vLLM" in found:
        share = {key: found["distserve"][key] / found["vLLM"][key] for key in ("pss", "rss")}
        rows.append(["ours / vLLM", "", f"{share['pss']:.2f}", f"{share['rss']:.2f}"])
    else:
        rows.append(["vLLM", "", "not installed", "not installed"])
    text = f"{describe(kind)}\n\n{table(['after load', 'processes', 'PSS', 'RSS'], rows)}"
    report({"machine": kind, "memory": found}, text, arguments.json)


if __name__ == "__main__":
    main()
