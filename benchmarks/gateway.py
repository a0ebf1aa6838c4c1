"""What the gateway adds: time to the first token, processor time per streamed token, and what a very long prompt costs.

    python -m benchmarks.gateway [--requests 1000] [--rate 50] [--json FILE|-]

The whole server with instances whose engine only waits (`distserve serve fake:step=0.002,verify=0`): HTTP, tokenizer,
routing, ZeroMQ, the hand-off from prefill to decode and its pull are real. Server and client share the machine's cores.

- added TTFT: Poisson arrivals, `--requests` streamed completions of a text of about 200 tokens, 32 output tokens; what
  the client measures less the 2 ms that the fake engine takes for a prompt. Waiting for another prompt's 2 ms is in it.
  The client's own share is measured against a bare server that answers at once, and shown beside it, not subtracted.
- processor time per token: of the gateway's process, over the same load and over a heavy one (32 streams of 500
  tokens), divided by the tokens streamed; requests' own costs (parsing, tokenizing, admission) are in it.
- a 200 KB prompt is tokenized once: what it takes until it is refused (it is longer than the model's context, which
  only its tokens tell) is held against one call of /tokenize with the same text, whose answer also lists the tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
import urllib.error
import urllib.request

from benchmarks import servers
from benchmarks.harness import describe, machine, report, say, table
from benchmarks.load import body, closed_loop, open_loop, poisson, prompts
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


async def bare(requests: int, rate: float) -> list[float]:
    """TTFT of this client against a server that has its answer ready: what is not the gateway's in the figures."""
    event = b'data: {"choices":[{"index":0,"text":"a","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(event)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in request.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                writer.write(head + event)
                await writer.drain()
        except asyncio.IncompleteReadError:
            writer.close()  # the client has gone

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        bodies = [body(text(1000, seed), 1) for seed in range(requests)]
        results = await open_loop(f"http://127.0.0.1:{port}", bodies, poisson(rate, requests))
    return [ttft for result in results if (ttft := result.record.ttft) is not None]


def first_tokens(server: servers.Server, requests: int, rate: float) -> tuple[list[float], float]:
    """What was added to the TTFT of every request of the paced load, and the gateway's processor seconds per token."""
    bodies = [body(text(1000, seed), 32) for seed in range(requests)]
    asyncio.run(open_loop(server.url, bodies[:100], poisson(rate, min(100, requests))))  # not counted
    before = server.cpu()
    results = asyncio.run(open_loop(server.url, bodies, poisson(rate, requests)))
    per_token = (server.cpu() - before) / sum(result.record.output_tokens for result in results)
    return [ttft - STEP for result in results if (ttft := result.record.ttft) is not None], per_token


def streaming(server: servers.Server, streams: int, tokens: int) -> float:
    """The gateway's processor seconds per token with many long streams at once."""
    bodies = [body(prompt, tokens) for prompt in prompts(streams, 16)]
    asyncio.run(closed_loop(server.url, bodies, streams))  # not counted
    before = server.cpu()
    results = asyncio.run(closed_loop(server.url, bodies, streams))
    return (server.cpu() - before) / sum(result.record.output_tokens for result in results)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--json", metavar="FILE|-")
    arguments = parser.parse_args()
    kind = machine()
    with servers.distserve("--log-level", "warning", model=f"fake:step={STEP},verify=0", name="fake") as server:
        say("ready, measuring first tokens")
        client = asyncio.run(bare(arguments.requests, arguments.rate))
        first, paced = first_tokens(server, arguments.requests, arguments.rate)
        say("many streams")
        streamed = streaming(server, 32, 500)
        say("long prompts")
        tokenize, refused = long_prompt(server)
    found = {
        "ttft_p50": quantile(sorted(first), 0.5),
        "ttft_p99": quantile(sorted(first), 0.99),
        "client_p50": quantile(sorted(client), 0.5),
        "client_p99": quantile(sorted(client), 0.99),
        "cpu_per_token_paced": paced,
        "cpu_per_token_32_streams": streamed,
        "tokenize_200kb": tokenize,
        "refuse_200kb": refused,
    }
    rows = [
        [f"added TTFT at {arguments.rate:g} requests/s, median", milli(found["ttft_p50"]), "at most 2 ms"],
        ["  p99", milli(found["ttft_p99"]), "at most 10 ms"],
        ["  of it the client's own, median and p99", f"{milli(found['client_p50'])}, {milli(found['client_p99'])}", ""],
        ["processor time per token, 32 streams", f"{1e6 * streamed:.1f} us", "at most 30 us"],
        [f"processor time per token, {arguments.rate:g} requests/s of 32 tokens", f"{1e6 * paced:.1f} us", ""],
        ["200 KB prompt, read and refused", milli(refused), f"/tokenize: {milli(tokenize)}"],
    ]
    text_ = f"{describe(kind)}\n\n{table(['gateway', 'measured', 'target'], rows)}"
    report({"machine": kind, "seconds": found}, text_, arguments.json)


def milli(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


if __name__ == "__main__":
    main()
