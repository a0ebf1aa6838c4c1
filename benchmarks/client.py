"""What the load generator itself takes: its share of a core at fifty streams, beside the client that most scripts use.

    python -m benchmarks.client [--streams 50] [--step 0.04] [--rounds 3] [--json FILE|-]

Both send the same arrivals (evenly spaced, so many that as many streams are open as asked for) to the same fake server
and take every token as it comes: `distserve bench` as a script starts it (no live table), which reports its own share;
and `openai.AsyncOpenAI`, one task a request. The server has one core, the client of the moment the other; they take
turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Worker, describe, machine, report, say, serve_commands, table
from benchmarks.servers import Server, free_port

PROMPT, OUTPUT = 200, 128  # tokens
SECONDS = 12.0  # of arrivals in a round


def arrivals(streams: int, step: float) -> list[float]:
    """So many a second that `streams` are open at once."""
    gap = OUTPUT * step / streams
    return [i * gap for i in range(round(SECONDS / gap))]


def bench(url: str, times: list[float], core: int) -> float:
    """The share of a core that `distserve bench` reports of itself."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "w.csv"
        rows = "".join(f"{time},{PROMPT},{OUTPUT}\n" for time in times)
        path.write_text("arrival,prompt_tokens,output_tokens\n" + rows)
        command = [
            "taskset",
            "-c",
            str(core),
            sys.executable,
            "-m",
            "distserve",
            "bench",
            "--url",
            url,
            "-w",
            str(path),
        ]
        done = subprocess.run([*command, "--json", "-"], check=True, capture_output=True, text=True)
    told = json.loads(done.stdout)
    if told["completed"] != len(times):
        raise RuntimeError(f"requests failed: {told['failed']}")
    return float(told["client"]["cpu"])


def openai_share(url: str, times: list[float]) -> float:
    """The same by openai's client."""
    from openai import AsyncOpenAI

    async def go() -> float:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            model = (await client.models.list()).data[0].id

            async def one(due: float) -> None:
                await asyncio.sleep(begin + due - time.perf_counter())
                stream = await client.completions.create(
                    model=model,
                    prompt=list(range(1000, 1000 + PROMPT)),
                    max_tokens=OUTPUT,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )
                tokens = 0
                async for chunk in stream:
                    tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                if tokens != OUTPUT:
                    raise RuntimeError(f"{tokens} tokens came")

            cpu, begin = time.process_time(), time.perf_counter()
            await asyncio.gather(*(one(due) for due in times))
            return (time.process_time() - cpu) / (time.perf_counter() - begin)

    return asyncio.run(go())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--step", type=float, default=0.04, help="seconds of a step of the fake server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE|-")
    asked = parser.parse_args()
    kind = machine()
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    times, port = arrivals(asked.streams, asked.step), free_port()
    model = f"fake:step={asked.step},verify=0"
    command = ["taskset", "-c", str(first), sys.executable, "-m", "distserve", "serve", model, "--port", str(port)]
    shares: dict[str, list[float]] = {"distserve bench": [], "openai.AsyncOpenAI": []}
    with Server("client", command, port) as server, Worker("benchmarks.client", "worker", core=last) as worker:
        for number in range(asked.rounds):
            shares["distserve bench"].append(bench(server.url, times, last))
            shares["openai.AsyncOpenAI"].append(worker.seconds("openai", url=server.url, times=times))
            say(f"round {number + 1}: " + ", ".join(f"{name} {found[-1]:.1%}" for name, found in shares.items()))
    middle = {name: sorted(found)[len(found) // 2] for name, found in shares.items()}
    ours = middle["distserve bench"]
    rows = [[name, f"{share:.1%}", f"{share / ours:.1f}"] for name, share in middle.items()]
    head = f"{asked.streams} streams, {asked.streams / asked.step:.0f} tokens/s; {describe(kind)}"
    text = f"{head}\n\n{table(['client', 'share of a core', 'times ours'], rows)}"
    report({"machine": kind, "streams": asked.streams, "step": asked.step, "shares": shares}, text, asked.json)


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        serve_commands({"openai": openai_share})
    else:
        main()
