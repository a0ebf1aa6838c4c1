"""The client against a real server: what each thing that can happen on the wire is counted as."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from tests.bench.standin import StandIn, serving

from distserve.bench.client import Client, Result, clock
from distserve.traces import Arrival

ASKED = Arrival(3.0, 4, 6, "app")


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving() as standin:
        yield standin


async def send(
    url: str, *, due: float | None = None, timeout: float = 20.0, chat: bool = False, asked: Arrival = ASKED
) -> Result:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "a b"}]} if chat else {"prompt": [1, 2, 3, 4]}
    body = json.dumps({**prompt, "max_tokens": asked.output_tokens}).encode()
    async with Client(url, api_key=None, timeout=timeout) as client:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        return await client.send(path, body, asked, clock() if due is None else due)


async def test_latencies_are_the_servers_delays(server: StandIn) -> None:
    server.behaviour.first, server.behaviour.gap = 0.2, 0.05
    record = (await send(server.url)).record
    assert (record.status, record.arrival, record.prompt_tokens, record.output_tokens, record.app) == (
        "ok",
        3.0,
        4,
        6,
        "app",
    )
    assert record.ttft is not None
    assert record.tpot is not None
    assert 0.2 <= record.ttft < 0.5
    assert 0.05 <= record.tpot < 0.15


async def test_latency_counts_from_when_the_request_was_due(server: StandIn) -> None:
    result = await send(server.url, due=clock() - 5.0)
    assert result.record.ttft is not None
    assert 5.0 <= result.record.ttft < 6.0
    assert 5.0 <= result.late < 5.5


async def test_tokens_that_come_together_still_count_one_by_one(server: StandIn) -> None:
    server.behaviour.merge, server.behaviour.gap = 3, 0.05
    record = (await send(server.url)).record
    assert record.output_tokens == 6
    assert record.tpot is not None
    assert 0.03 <= record.tpot < 0.1  # 3 gaps of 0.05 lie between the first and the last write, 5 tokens


async def test_chat_waits_for_a_token_not_for_the_role(server: StandIn) -> None:
    server.behaviour.chat_role, server.behaviour.first = True, 0.2
    record = (await send(server.url, chat=True)).record
    assert record.ttft is not None
    assert record.ttft >= 0.2
    assert record.prompt_tokens == 7  # as the server counts


async def test_without_usage_events_are_counted(server: StandIn) -> None:
    server.behaviour.usage = False
    result = await send(server.url)
    assert (result.record.status, result.record.output_tokens, result.counted_events) == ("ok", 6, True)


async def test_one_token_has_no_tpot(server: StandIn) -> None:
    record = (await send(server.url, asked=Arrival(0, 4, 1))).record
    assert (record.status, record.tpot) == ("ok", None)
    assert record.ttft is not None


@pytest.mark.parametrize(
    ("behaviour", "status", "words"),
    [
        ({"status": 429}, "refused", "HTTP 429.*as told"),
        ({"status": 503}, "unavailable", "HTTP 503"),
        ({"status": 404}, "rejected", "HTTP 404"),
        ({"status": 500}, "server_error", "HTTP 500"),
        ({"error_after": 2}, "server_error", "instance gone"),
        ({"error_after": 0}, "server_error", "instance gone"),
        ({"break_after": 2}, "disconnected", "the connection broke in the middle of the answer"),
        ({"empty": True}, "disconnected", "without a token"),
        ({"held": True}, "timeout", "within 0.3 s"),
    ],
)
async def test_failures_are_told_apart(server: StandIn, behaviour: dict[str, Any], status: str, words: str) -> None:
    for name, value in behaviour.items():
        setattr(server.behaviour, name, value)
    result = await send(server.url, timeout=0.3 if "held" in behaviour else 20.0)
    server.behaviour.hold.set()
    assert result.record.status == status
    assert result.record.output_tokens == ASKED.output_tokens
    assert re.search(words, result.message)


async def test_no_server_and_no_stream(server: StandIn) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        result = await send(f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert result.record.status == "unreachable"
    assert result.record.ttft is None
    async with Client(server.url, api_key=None, timeout=5) as client:
        result = await client.send("/tokenize", b'{"prompt": "a b"}', ASKED, clock())
    assert (result.record.status, "application/json" in result.message) == ("bad_stream", True)
