"""What a server costs around its engine, asked over HTTP of a `distserve serve` that runs as a process of its own, as
any client would: one prefill and one decode instance of the model.

A step's own time is taken from the server's metrics and subtracted from what the client and the gateway saw at the same
moment, so that a slow spell of the machine falls out:

    request    time to the first token  -  prefill's step
    hand-off   first to second token  -  decode's first step       at a short and at a long prompt
    host       between two tokens of a stream  -  decode's step     with few and with many streams

Knows neither the server's code nor the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import msgspec

from distserve import metrics
from distserve.bench.client import Client, clock
from distserve.errors import DistserveError
from distserve.profiler.series import Series
from distserve.traces import Arrival

READY = 300.0  # seconds that a server may take to load
_LOOK = 0.1  # seconds between two looks whether it is ready
_PATIENCE = 20.0  # seconds to drain after SIGTERM
_TIMEOUT = 120.0  # seconds of one answer
_SETTLE = 4  # tokens until a stream's pace counts
_PREFILL, _DECODE = "prefill", "decode"


class ServerFailed(DistserveError):
    """`distserve serve` ended, or answered with an error; its last words are in the message."""


@dataclass(slots=True)
class Around:
    """What was measured around the engine: seconds, by prompt tokens or by streams."""

    request: dict[int, Series] = field(default_factory=dict)
    hand_off: dict[int, Series] = field(default_factory=dict)
    host: dict[int, Series] = field(default_factory=dict)


class Server:
    """`distserve serve` as a child, in a context."""

    def __init__(self, arguments: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "distserve", "serve", *arguments, "--port", str(port)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the server

    async def __aenter__(self) -> Server:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # the terminal's Ctrl-C is for the command, which then ends this
        )
        return self

    @property
    def pid(self) -> int:
        """Of its first process, and the session of all of them."""
        return self._process.pid

    async def ready(self) -> None:
        began = time.monotonic()
        while not await _healthy(self.url):
            if self._process.returncode is not None or time.monotonic() - began > READY:
                raise ServerFailed(f"distserve serve did not start: {self.last_words()}")
            await asyncio.sleep(_LOOK)

    def last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return " / ".join(line for line in lines[-3:] if line.strip()) or "it said nothing"

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), _PATIENCE)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        self._log.close()


class Probe:
    """Asks one server. `around` grows."""

    def __init__(self, client: Client, around: Around) -> None:
        self.around = around
        self._client = client
        self._count = 0
        self._enough = False  # prompts that keep a prefill instance busy

    async def one(self, tokens: int) -> None:
        """A request alone: what its way to the first token and the hand-off cost."""
        before = await self._scrape()
        ttft, gap = await self._send(tokens, 2)
        after = await self._until(before, 2)
        request, hand_off = ttft - _step(before, after, _PREFILL), gap - _step(before, after, _DECODE)
        self.around.request.setdefault(tokens, Series()).values.append(request)
        self.around.hand_off.setdefault(tokens, Series()).values.append(hand_off)

    async def together(self, streams: int, prompt: int, tokens: int, beside: int) -> None:
        """So many streams of `tokens` tokens, beside prompts of `beside` tokens one after the other: what lies between
        two steps, from all having begun until one ends."""
        name = "vllm:inter_token_latency_seconds"
        start = _total(await self._scrape(), f"{name}_count")
        sent = [asyncio.create_task(self._send(prompt, tokens)) for _ in range(streams)]
        busy = asyncio.create_task(self._prompts(beside))
        try:
            first, last = start + _SETTLE * streams, start + (tokens - _SETTLE) * streams
            before = await self._when(f"{name}_count", first)
            after = await self._when(f"{name}_count", last)
            host = _mean(before, after, name, "") - _step(before, after, _DECODE)
            self.around.host.setdefault(streams, Series()).values.append(host)
        finally:
            await asyncio.gather(*sent)
            self._enough = True
            await busy

    async def _prompts(self, tokens: int) -> None:
        self._enough = False
        while not self._enough:
            await self._send(tokens, 1)

    async def _send(self, prompt: int, tokens: int) -> tuple[float, float]:
        """(TTFT, mean gap) that the client saw."""
        self._count += 1
        ids = [(i * 7919 + self._count) % 61 + 3 for i in range(prompt)]  # ids that the smallest vocabulary has
        body = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        asked = Arrival(0.0, prompt, tokens)
        result = await self._client.send("/v1/completions", msgspec.json.encode(body), asked, clock())
        record = result.record
        if record.status != metrics.OK or record.ttft is None:
            raise ServerFailed(f"a request failed: {result.message or record.status}")
        return record.ttft, record.tpot or 0.0

    async def _when(self, name: str, total: float) -> dict[str, float]:
        """The metrics when `name` has come to `total`."""
        deadline = time.monotonic() + _TIMEOUT
        while time.monotonic() < deadline:
            if _total(found := await self._scrape(), name) >= total:
                return found
            await asyncio.sleep(_LOOK)
        raise ServerFailed(f"the server's metrics never told of {name} {total:g}")

    async def _until(self, before: dict[str, float], tokens: int) -> dict[str, float]:
        """The metrics when all of a request is in them: its end is told a moment after its last token."""
        name = "vllm:request_success_total"
        return await self._when(name, _total(before, name) + 1)

    async def _scrape(self) -> dict[str, float]:
        async with self._client.session.get(f"{self._client.url}/metrics") as response:
            return _parse(await response.text())


def _parse(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def _total(scrape: dict[str, float], name: str) -> float:
    return sum(value for key, value in scrape.items() if key.startswith(name))


def _mean(before: dict[str, float], after: dict[str, float], name: str, label: str) -> float:
    """Of what a histogram saw between two scrapes."""

    def grown(part: str) -> float:
        return sum(
            after[key] - before.get(key, 0.0) for key in after if key.startswith(f"{name}_{part}") and label in key
        )

    count = grown("count")
    if not count:
        raise ServerFailed(f"the server's metrics show no {name} {label}")
    return grown("sum") / count


def _step(before: dict[str, float], after: dict[str, float], role: str) -> float:
    return _mean(before, after, "distserve:step_seconds", f'role="{role}"')


async def _healthy(url: str) -> bool:
    """Whether all of its instances are ready."""

    def ask() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    return await asyncio.to_thread(ask)
