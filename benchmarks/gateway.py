"""What the gateway adds: time to the first token, processor time per streamed token, and what a very long prompt costs.

    python -m benchmarks.gateway [--rounds 5] [--requests 200] [--rate 50] [--json FILE|-]

The whole server with instances whose engine only waits (`distserve serve fake:step=0.002,verify=0`): HTTP, tokenizer,
routing, the wire, the hand-off from prefill to decode and its pull are real. The gateway's process has one core; the
client and the fake instances, which mostly sleep, share another, so that neither takes the gateway's time.

- added TTFT: `--rounds` times `--requests` streamed completions of a text of about 200 tokens, 32 output tokens, at
  Poisson arrivals, in turns with the same client and the same load against the fake engine itself
  (`benchmarks.gateway_direct`, on the gateway's core): bare sockets, constant bytes, no gateway. That shows the
  client's time, the kernel's and the engine's, waiting for another prompt's step included. What is reported is the
  difference of the two: of the medians, the median round's; of the 99th percentiles, that of all requests. What uvicorn
  alone would add, with an application that writes constant bytes, is shown beside it: the floor.
- processor time per token: of the gateway's process, over a heavy load (32 streams of 500 tokens, a warm-up and
  `--rounds` times) and over the one above, divided by the tokens streamed; requests' own costs (parsing, tokenizing,
  admission) are in it. The floor is the same through the uvicorn server of constant bytes.
- a 200 KB prompt is tokenized once: what it takes until it is refused (it is longer than the model's context, which
  only its tokens tell) is held against one call of /tokenize with the same text, whose answer also lists the tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks import servers
from benchmarks.gateway_client import at_once, open_loop
from benchmarks.harness import describe, machine, report, say, table
from benchmarks.load import body, prompts
from distserve.metrics import quantile

SENTENCE = "the model reads what was asked and says one word after another until it has nothing more to say"
WORDS = SENTENCE.split()
STEP = 0.002  # seconds the fake engine takes for a step, of a prompt or of a batch of tokens
LONG = 200_000  # bytes of a very long prompt


def text(size: int, seed: int) -> str:
    """English-looking words, about `size` characters."""
    draw = random.Random(seed)
    words, length = [], 0
    while length < size:
        words.append(draw.choice(WORDS))
        length += len(words[-1]) + 1
    return " ".join(words)


def direct(kind: str) -> servers.Server:
    """The fake engine with no gateway before it."""
    port = servers.free_port()
    command = [sys.executable, "-m", "benchmarks.gateway_direct", kind, "--port", str(port), "--step", str(STEP)]
    return servers.Server(kind, command, port)


@dataclass
class Paced:
    """One server under the paced load."""

    ttfts: list[list[float]] = field(default_factory=list)  # of each round
    cpu: float = 0.0  # seconds of its own process
    tokens: int = 0

    def measure(self, server: servers.Server, bodies: list[bytes], rate: float) -> None:
        before = server.cpu()
        seen = open_loop(server.port, bodies, rate, len(self.ttfts))
        self.cpu += server.cpu() - before
        self.tokens += sum(one.tokens for one in seen)
        self.ttfts.append([one.ttft for one in seen])

    def quantile(self, q: float) -> float:
        return quantile(sorted(itertools.chain(*self.ttfts)), q)

    def over(self, other: Paced) -> tuple[float, float]:
        """What this adds to `other`, at the median and at the 99th percentile."""
        medians = [statistics.median(a) - statistics.median(b) for a, b in zip(self.ttfts, other.ttfts, strict=True)]
        return statistics.median(medians), self.quantile(0.99) - other.quantile(0.99)


def first_tokens(contenders: dict[str, servers.Server], rounds: int, requests: int, rate: float) -> dict[str, Paced]:
    found = {name: Paced() for name in contenders}
    for server in contenders.values():  # not counted
        open_loop(server.port, [body(text(1000, seed), 32) for seed in range(50)], rate, 0)
    for i in range(rounds):
        say(f"first tokens, round {i + 1} of {rounds}")
        bodies = [body(text(1000, i * requests + seed), 32) for seed in range(requests)]
        for name, server in contenders.items():
            found[name].measure(server, bodies, rate)
    return found


def streaming(contenders: Sequence[servers.Server], rounds: int, streams: int, tokens: int) -> list[float]:
    """Of each, seconds of its process per token with many long streams at once; they take turns."""
    bodies = [body(prompt, tokens) for prompt in prompts(streams, 16)]
    for server in contenders:
        at_once(server.port, bodies)  # not counted
    spent, streamed = [0.0] * len(contenders), [0] * len(contenders)
    for _ in range(rounds):
        for i, server in enumerate(contenders):
            before = server.cpu()
            seen = at_once(server.port, bodies)
            spent[i] += server.cpu() - before
            streamed[i] += sum(one.tokens for one in seen)
    return [seconds / count for seconds, count in zip(spent, streamed, strict=True)]


def long_prompt(server: servers.Server) -> tuple[float, float]:
    """Median seconds of (one /tokenize of the text, a completion of it until it is refused as too long)."""
    tokenized, refused = [], []
    for seed in range(7):
        prompt = text(LONG, seed)
        tokenized.append(timed(f"{server.url}/tokenize", prompt, 200))
        refused.append(timed(f"{server.url}/v1/completions", prompt, 400))
    return statistics.median(tokenized[2:]), statistics.median(refused[2:])


def timed(url: str, prompt: str, expected: int) -> float:
    """Seconds until the whole answer to `prompt` is here, which has to have the status `expected`."""
    data = json.dumps({"prompt": prompt, "max_tokens": 1}).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    begin = time.perf_counter()
    try:
        with urllib.request.urlopen(request) as response:
            response.read()
            status = response.status
    except urllib.error.HTTPError as error:
        error.read()
        status = error.code
    assert status == expected, f"{url} answered {status}"
    return time.perf_counter() - begin


def measure(rounds: int, requests: int, rate: float) -> dict[str, float]:
    """Every figure, in seconds."""
    fake = f"fake:step={STEP},verify=0"
    own, others = sorted(os.sched_getaffinity(0))[:2]
    with (
        direct("socket") as engine,
        direct("uvicorn") as floor,
        servers.distserve("--log-level", "warning", model=fake, name="fake") as gateway,
    ):
        contenders = {"engine": engine, "uvicorn": floor, "gateway": gateway}
        for server in contenders.values():
            server.pin(own, others)
        os.sched_setaffinity(0, {others})
        paced = first_tokens(contenders, rounds, requests, rate)
        say("many streams")
        floor_cpu, gateway_cpu = streaming([floor, gateway], rounds, 32, 500)
        say("long prompts")
        tokenize, refused = long_prompt(gateway)
    added, floor_added = paced["gateway"].over(paced["engine"]), paced["uvicorn"].over(paced["engine"])
    return {
        "ttft_p50": paced["gateway"].quantile(0.5),
        "ttft_p99": paced["gateway"].quantile(0.99),
        "engine_p50": paced["engine"].quantile(0.5),
        "engine_p99": paced["engine"].quantile(0.99),
        "added_p50": added[0],
        "added_p99": added[1],
        "uvicorn_added_p50": floor_added[0],
        "uvicorn_added_p99": floor_added[1],
        "cpu_per_token": gateway_cpu,
        "uvicorn_cpu_per_token": floor_cpu,
        "cpu_per_token_paced": paced["gateway"].cpu / paced["gateway"].tokens,
        "uvicorn_cpu_per_token_paced": paced["uvicorn"].cpu / paced["uvicorn"].tokens,
        "tokenize_200kb": tokenize,
        "refuse_200kb": refused,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200, help="of a round")
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    kind = machine()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("this needs two cores: one for the gateway, one for the client and the instances")
    found = measure(arguments.rounds, arguments.requests, arguments.rate)

    def pair(name: str) -> str:
        return f"{milli(found[f'{name}_p50'])}, {milli(found[f'{name}_p99'])}"

    def micro(name: str) -> str:
        return f"{1e6 * found[name]:.1f} us"

    rate = f"{arguments.rate:g} requests/s"
    tokenize = f"/tokenize: {milli(found['tokenize_200kb'])}"
    cpu = "processor time per token, 32 streams"
    rows = [
        [f"TTFT at {rate}, median and p99", pair("ttft"), "", ""],
        ["  of the fake engine without gateway", pair("engine"), "", ""],
        ["added TTFT, median and p99", pair("added"), pair("uvicorn_added"), "at most 2 ms, 10 ms"],
        [cpu, micro("cpu_per_token"), micro("uvicorn_cpu_per_token"), "at most 30 us"],
        [f"  {rate} of 32 tokens", micro("cpu_per_token_paced"), micro("uvicorn_cpu_per_token_paced"), ""],
        ["200 KB prompt, read and refused", milli(found["refuse_200kb"]), "", tokenize],
    ]
    text_ = f"{describe(kind)}\n\n{table(['gateway', 'measured', 'uvicorn alone', 'target'], rows)}"
    report({"machine": kind, "seconds": found}, text_, arguments.json)


def milli(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


if __name__ == "__main__":
    main()
