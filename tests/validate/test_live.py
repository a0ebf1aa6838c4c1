"""The live side: a real `distserve serve` as a child, with an engine that only sleeps, measured by the real client."""

from __future__ import annotations

import asyncio

import pytest

from distserve.plan import InstanceSpec, Plan, Role
from distserve.profiler.live import ServerFailed
from distserve.validate import live
from distserve.validate.record import Key, Measured
from distserve.workload import Workload

STEP = 0.01
SIZE = 8 << 20  # bytes of KV
PAIR = Plan(
    (InstanceSpec(Role.PREFILL, kv_memory=SIZE), InstanceSpec(Role.DECODE, kv_memory=SIZE)), f"fake:step={STEP}", "cpu"
)


def test_a_run_tells_what_requests_server_client_and_machine_did() -> None:
    lengths = Workload.load("humaneval").scaled(0.1, 0.1)
    drawn = lengths.draw(10.0, 20, seed=3)
    key = Key("pair", "humaneval:0.1", 10.0, 3, 0)

    async def go() -> Measured | None:
        async with live.site(PAIR, url=None, seed=3) as site:
            await site.warm_up(lengths)
            return await site.measure(key, drawn, "a run")

    found = asyncio.run(go())
    assert found is not None
    assert found.key == key
    assert [(r.prompt_tokens, r.output_tokens) for r in found.records] == [
        (request.prompt_tokens, request.output_tokens) for request in drawn
    ]
    assert all(record.ok and record.ttft is not None and record.ttft > STEP for record in found.records)
    handed_over = sum(request.output_tokens > 1 for request in drawn)
    told = found.server
    assert 1 <= told["distserve:step_seconds prefill count"] <= len(drawn)  # what came before does not count
    assert told["distserve:step_seconds decode sum"] >= 0.99 * STEP * told["distserve:step_seconds decode count"]
    assert told["distserve:pull_seconds count"] == handed_over
    assert {"cpu", "late_p99", "lag_p99", "sent_share"} <= set(found.client)


def test_a_server_that_does_not_start_says_why() -> None:
    bad = Plan((InstanceSpec(Role.PREFILL, kv_memory=100), InstanceSpec(Role.DECODE, kv_memory=100)), "fake", "cpu")

    async def go() -> None:
        async with live.site(bad, url=None, seed=0):
            pass

    with pytest.raises(ServerFailed, match="hold no block"):
        asyncio.run(go())


def test_how_long_it_takes_is_known_before() -> None:
    keys = [Key("a", "w", 2.0, 0, 0), Key("a", "w", 4.0, 0, 0), Key("b", "w", 2.0, 0, 0)]
    assert live.seconds_of([], 60.0, None) == 0
    assert live.seconds_of(keys, 60.0, None) > live.seconds_of(keys[:2], 60.0, None) + 60
    assert live.seconds_of(keys, 1.0, 400) > 200 + 100 + 200
