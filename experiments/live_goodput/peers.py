"""vLLM's CPU build as a contender: two servers, a core each, either as replicas behind a round robin or as one that
prefills and one that decodes (its NixlConnector).

Who goes between them is in the client, where it costs no server anything. Both start at the same time, for a compiler
runs in each; their logs stay under benchmarks/out. Knows no case and no rate.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from benchmarks.engine import demo_folder

from benchmarks import servers as processes
from distserve import metrics
from distserve.bench import prompts as making
from distserve.bench import server as servers
from distserve.bench.client import DISCONNECTED, TIMEOUT, UNREACHABLE, Client, Result, clock, reason
from distserve.bench.options import BenchOptions
from distserve.bench.runner import Runner
from distserve.bench.stream import Answer
from distserve.errors import DistserveError
from distserve.metrics import Record
from distserve.profiler.live import ServerFailed
from distserve.traces import Arrival
from distserve.validate import others
from distserve.validate.live import ServerDied, Site
from distserve.validate.others import Clocks
from distserve.validate.record import Key, Measured
from distserve.workload import Workload

CORES = ("0", "1")
KV_GIB = 1  # of each server, as our instances have by default
_LOOK = 0.2  # seconds between two looks whether a server is ready
# Seconds of one answer: longer than the longest may take at the loosest targets, so that who is hopelessly overloaded
# misses them, and does not hold up everybody else.
_TIMEOUT = 120.0
_CONNECTOR = {
    "kv_connector": "NixlConnector",
    "kv_connector_module_path": "experiments.live_goodput.patient",
    "kv_buffer_device": "cpu",
}
_ROLES = ("kv_producer", "kv_consumer")
_HAND_OFF = {"do_remote_decode": True, "do_remote_prefill": False}


class Absent(DistserveError):
    """A contender that is not installed."""


@asynccontextmanager
async def replicas(python: str) -> AsyncIterator[Site]:
    """Two that are ready, each of which serves whole requests. Raises `ServerFailed`."""
    found = [processes.vllm(python, demo_folder(), kv_gib=KV_GIB, cores=core) for core in CORES]
    async with _ready(_named(found, "vllm")), RoundRobin([server.url for server in found]) as client:
        yield await _site(client, found)


@asynccontextmanager
async def apart(python: str) -> AsyncIterator[Site]:
    """One that prefills and one that decodes. Raises `Absent` or `ServerFailed`."""
    if not await asyncio.to_thread(_has_nixl, python):
        raise Absent(f"{python} has no nixl, by which vLLM hands prompts over (docs/measurements.md installs it)")
    found = []
    for core, role in zip(CORES, _ROLES, strict=True):
        arguments = ["--kv-transfer-config", json.dumps({**_CONNECTOR, "kv_role": role})]
        env = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(processes.free_port()),
            "UCX_NET_DEVICES": "lo",
            "PYTHONPATH": str(Path(__file__).parents[2]),  # where the connector is
        }
        found.append(processes.vllm(python, demo_folder(), kv_gib=KV_GIB, cores=core, arguments=arguments, env=env))
    prefill, decode = found
    async with _ready(_named(found, "vllm-apart")), PrefillFirst([prefill.url, decode.url]) as client:
        yield await _site(client, found)


def _has_nixl(python: str) -> bool:
    asked = "import importlib.util, sys; sys.exit(importlib.util.find_spec('nixl') is None)"
    return subprocess.run([python, "-c", asked], check=False, capture_output=True).returncode == 0


def _named(found: Sequence[processes.Server], name: str) -> Sequence[processes.Server]:
    for number, server in enumerate(found):
        server.name = f"{name}-{number}"
        server.log = server.log.with_name(f"server-{name}-{number}.log")
    return found


@asynccontextmanager
async def _ready(found: Sequence[processes.Server]) -> AsyncIterator[None]:
    """All of them started at once; ended at the end, whatever happens."""
    begun: list[processes.Server] = []
    try:
        for server in found:
            server.begin()
            begun.append(server)
        waiting = list(found)
        print(f"starting {', '.join(f'{server.name} (log: {server.log})' for server in found)}", file=sys.stderr)
        while waiting := [server for server in waiting if not await asyncio.to_thread(server.healthy)]:
            for server in found:
                try:
                    server.check()
                except RuntimeError as error:
                    raise ServerFailed(str(error)) from None
            await asyncio.sleep(_LOOK)
        yield
    finally:
        # Without await: a second Ctrl-C must not leave one of them running, and nothing else runs in this loop now.
        _signal(begun, signal.SIGCONT)  # who is stopped would not hear
        for server in begun:
            server.ask_to_end()
        for server in begun:
            server.stop()


async def _site(client: Client, found: Sequence[processes.Server]) -> Site:
    named = await servers.look(client, None)
    prompts = await making.learn(client, named, chat=False, kind="auto", seed=0)
    return Peers(client, Runner(BenchOptions(url=client.url), client, named, prompts), found)


def _signal(found: Sequence[processes.Server], number: signal.Signals) -> None:
    for server in found:
        with suppress(ProcessLookupError):  # all of its processes have ended
            os.killpg(server.pid, number)


@contextmanager
def awake(site: Site) -> Iterator[None]:
    """One of vLLM's runs in here, and is stopped afterwards; nothing happens to ours."""
    if not isinstance(site, Peers):
        yield
        return
    site.signal(signal.SIGCONT)
    try:
        yield
    finally:
        site.signal(signal.SIGSTOP)


class Peers(Site):
    """Several servers under one client."""

    def __init__(self, client: Client, runner: Runner, found: Sequence[processes.Server]) -> None:
        super().__init__(client, runner)
        self._found = found

    def signal(self, number: signal.Signals) -> None:
        """To all of their processes."""
        _signal(self._found, number)

    async def measure(self, key: Key, workload: Workload, title: str) -> Measured | None:
        before = self._clocks()
        measured = await super().measure(key, workload, title)
        dead = [server for server in self._found if not server.running]
        if dead:
            raise ServerDied(f"{dead[0].name} died in the middle of {key}: see {dead[0].log}")
        if measured is None:
            return None
        return replace(measured, client={**measured.client, **others.between(before, self._clocks())})

    def _clocks(self) -> Clocks | None:
        """As if all of their sessions were one; this process is in each look, and counts once."""
        looks = [look for server in self._found if (look := others.look(server.pid)) is not None]
        if not looks:
            return None
        again = (len(looks) - 1) * time.process_time()
        return replace(looks[0], ours=sum(look.ours for look in looks) - again)


class Pair(Client):
    """Two servers. What is asked of the server itself is asked of the first."""

    def __init__(self, urls: Sequence[str]) -> None:
        first, second = urls
        super().__init__(first, api_key=None, timeout=_TIMEOUT)
        self._second = Client(second, api_key=None, timeout=_TIMEOUT)

    async def __aenter__(self) -> Pair:
        await super().__aenter__()
        await self._second.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._second.__aexit__()
        await super().__aexit__()


class RoundRobin(Pair):
    """In turns, request by request."""

    def __init__(self, urls: Sequence[str]) -> None:
        super().__init__(urls)
        self._turns = cycle([super().send, self._second.send])

    async def send(self, path: str, body: bytes, asked: Arrival, due: float, answer: Answer | None = None) -> Result:
        return await next(self._turns)(path, body, asked, due, answer)


class PrefillFirst(Pair):
    """A request's prompt at the first server, its answer from the second, which pulls the prompt's KV: what vLLM's own
    proxies do (examples/disaggregated of its repository)."""

    async def send(self, path: str, body: bytes, asked: Arrival, due: float, answer: Answer | None = None) -> Result:
        sent, request = clock(), msgspec.json.decode(body)
        prompt = {**request, "max_tokens": 1, "stream": False, "kv_transfer_params": _HAND_OFF}
        prompt.pop("stream_options", None)
        status, message, found = await self._prefill(path, msgspec.json.encode(prompt))
        if status == metrics.OK:
            whole = msgspec.json.encode({**request, "kv_transfer_params": found})
            result = await self._second.send(path, whole, asked, due, answer)
            return replace(result, late=max(0.0, sent - due))  # the prefill's time is the servers', not the client's
        record = Record(asked.arrival, asked.prompt_tokens, asked.output_tokens, status=status, app=asked.app)
        return Result(record, clock(), max(0.0, sent - due), asked, message)

    async def _prefill(self, path: str, body: bytes) -> tuple[str, str, Any]:
        """(status, message of a failure, what the second server must be told)."""
        try:
            async with (
                asyncio.timeout(_TIMEOUT),
                self.session.post(self.url + path, data=body) as response,
            ):
                if response.status != 200:
                    return metrics.SERVER_ERROR, f"prefill: HTTP {response.status}: {await response.text()}"[:300], None
                found = (await response.json(content_type=None)).get("kv_transfer_params")
        except TimeoutError:
            return TIMEOUT, f"no prefill within {_TIMEOUT:g} s", None
        except aiohttp.ClientConnectorError as error:
            return UNREACHABLE, reason(error), None
        except (aiohttp.ClientError, ConnectionError) as error:
            return DISCONNECTED, reason(error), None
        if not found:
            return metrics.SERVER_ERROR, "the prefill server does not say where the prompt's KV is", None
        return metrics.OK, "", found
