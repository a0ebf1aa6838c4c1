"""Sends streamed completions to a server and keeps what came back; the client of `distserve bench`, at a plain pace."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence

from distserve.bench.client import Client, Result, clock
from distserve.metrics import OK
from distserve.traces import Arrival


def body(prompt: list[int] | str, output_tokens: int) -> bytes:
    """A streamed completion of exactly so many tokens, greedy."""
    return json.dumps(
        {
            "prompt": prompt,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


def prompts(count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Random token ids of the demo model, past its control tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(100, 49_000) for _ in range(tokens)] for _ in range(count)]


def poisson(rate: float, count: int, seed: int = 0) -> list[float]:
    """Moments at which `count` requests are due, in seconds from the start."""
    draw, now, due = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        due.append(now)
    return due


async def open_loop(url: str, bodies: Sequence[bytes], due: Sequence[float], timeout: float = 120.0) -> list[Result]:
    """Sends each body at its moment whatever became of the others. Raises `RuntimeError` where one failed."""
    async with Client(url, api_key=None, timeout=timeout) as client:
        begin = clock()

        async def one(data: bytes, moment: float) -> Result:
            await asyncio.sleep(max(0.0, begin + moment - clock()))
            return await client.send("/v1/completions", data, Arrival(moment, 1, 1), begin + moment)

        return checked(await asyncio.gather(*(one(data, moment) for data, moment in zip(bodies, due, strict=True))))


async def closed_loop(url: str, bodies: Sequence[bytes], streams: int, timeout: float = 300.0) -> list[Result]:
    """Keeps `streams` requests in flight until all are done. Raises `RuntimeError` where one failed."""
    async with Client(url, api_key=None, timeout=timeout) as client:
        rest: Iterator[bytes] = iter(bodies)
        results: list[Result] = []

        async def worker() -> None:
            for data in rest:
                results.append(await client.send("/v1/completions", data, Arrival(0.0, 1, 1), clock()))

        await asyncio.gather(*(worker() for _ in range(streams)))
        return checked(results)


def checked(results: list[Result]) -> list[Result]:
    bad = [result for result in results if result.record.status != OK]
    if bad:
        raise RuntimeError(
            f"{len(bad)} of {len(results)} requests failed; the first: {bad[0].record.status} {bad[0].message}"
        )
    return results
