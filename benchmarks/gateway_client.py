"""The client that measures the gateway: sends prepared bytes and notes when the first event came, and little else.

`distserve bench` (aiohttp) takes 1 to 2 ms of a core between a request and its first token, as much as the gateway may
add in all; this one a tenth of that. What it still takes is measured against a server that has nothing to do.
Time runs from the moment the request's bytes are handed to the socket of a connection that is open already: a timer
that fired late is this client's fault and no server's.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import uvloop

from benchmarks.load import poisson

clock = time.perf_counter


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer: seconds to its first event, and how many tokens it says it has."""

    ttft: float
    tokens: int


def post(body: bytes) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._answered: asyncio.Future[Seen] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's are no asyncio.Transport by name

    def send(self, data: bytes) -> asyncio.Future[Seen]:
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._parts: list[bytes] = []
        self._first = 0.0
        self._sent = clock()
        self._transport.write(data)
        return self._answered

    def data_received(self, data: bytes) -> None:
        now = clock()
        self._parts.append(data)
        if not self._first and b"data: " in b"".join(self._parts):
            self._first = now
        if b"".join(self._parts[-2:]).endswith(b"\r\n0\r\n\r\n"):
            self._close()

    def _close(self) -> None:
        answer = b"".join(self._parts)
        usage = re.search(rb'"completion_tokens":(\d+)', answer)
        assert self._answered is not None
        if not answer.startswith(b"HTTP/1.1 200 ") or b"[DONE]" not in answer or usage is None:
            self._answered.set_exception(RuntimeError(f"not an answer: {answer[:500]!r}"))
        else:
            self._answered.set_result(Seen(self._first - self._sent, int(usage[1])))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionError("the server closed the connection in an answer"))


class Connections:
    """As many as are needed at once; opened before a request is sent on one, not measured."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []

    async def send(self, data: bytes) -> Seen:
        if not self._idle:
            _, opened = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port)
            self._idle.append(opened)
        connection = self._idle.pop()
        seen = await connection.send(data)
        self._idle.append(connection)
        return seen


def open_loop(port: int, bodies: Sequence[bytes], rate: float, seed: int) -> list[Seen]:
    """Poisson arrivals: each is sent at its moment whatever became of the others."""

    async def run() -> list[Seen]:
        connections = Connections(port)
        begin = clock()

        async def one(data: bytes, moment: float) -> Seen:
            await asyncio.sleep(begin + moment - clock())
            return await connections.send(data)

        due = poisson(rate, len(bodies), seed)
        return await asyncio.gather(*(one(post(body), moment) for body, moment in zip(bodies, due, strict=True)))

    return uvloop.run(run())


def at_once(port: int, bodies: Sequence[bytes]) -> list[Seen]:
    """All of them together, one connection each."""

    async def run() -> list[Seen]:
        connections = Connections(port)
        return await asyncio.gather(*(connections.send(post(body)) for body in bodies))

    return uvloop.run(run())
