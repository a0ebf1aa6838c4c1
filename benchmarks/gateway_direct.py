"""The fake engine without the gateway: what is left of a measurement when there is nothing between engine and client.

    python -m benchmarks.gateway_direct {socket|uvicorn} --port PORT --step SECONDS

Takes the same requests, has its prompts computed by the same `FakeExecutor`, and answers as many chunks, of constant
bytes and of the same size, at the same pace: all waiting prompts share a step, all running answers another (two loops,
as they are two instances). Of a request nothing is parsed but `max_tokens`; nothing is tokenized, routed or handed on.
A request without a body is answered at once, as /health is.

`socket` writes to bare sockets: a client against it shows its own time, the kernel's, and the engine's. `uvicorn` is an
ASGI application served as the gateway is: the floor of any server of ours. Both run on uvloop, as the gateway and the
instances do.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import socket
from collections.abc import Callable

import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from distserve.engine.base import EngineOptions
from distserve.engine.fake import FakeExecutor, parse_fake
from distserve.request import Request, SamplingParams
from distserve.sched.base import Batch, Sequence

CHUNK = b"data: " + b"x" * 210 + b"\n\n"
PROMPT = list(range(1000, 1200))  # as many tokens as the measured prompts have
HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"

Write = Callable[[bytes, bool], None]  # (a chunk's content, whether it is the last)


class Engine:
    """Two loops of steps; an answer is a `Write` and how many tokens it wants."""

    def __init__(self, step: float) -> None:
        model = f"fake:step={step},verify=0"
        self._executor = FakeExecutor(EngineOptions(model=model, kv_bytes=64 << 20), parse_fake(model))
        self._step = step
        self._ids = itertools.count(1)
        self._waiting: list[tuple[int, Write, int]] = []
        self._running: list[tuple[Write, int, int]] = []
        self._prompted, self._started = asyncio.Event(), asyncio.Event()
        self._loops = [asyncio.create_task(self._prefill()), asyncio.create_task(self._decode())]

    def add(self, write: Write, max_tokens: int) -> None:
        id = next(self._ids)
        self._executor.add(Request(id, PROMPT, SamplingParams(max_tokens=max_tokens, ignore_eos=True)))
        self._waiting.append((id, write, max_tokens))
        self._prompted.set()

    async def _prefill(self) -> None:
        while True:
            await self._prompted.wait()
            self._prompted.clear()
            batch, self._waiting = self._waiting, []
            size = len(PROMPT)
            await self._executor.execute(Batch(0, [(Sequence(id, size), size) for id, _, _ in batch]))
            for id, write, max_tokens in batch:
                self._executor.forget(id)
                self._token(write, 1, max_tokens)
            if self._waiting:
                self._prompted.set()

    async def _decode(self) -> None:
        while True:
            await self._started.wait()
            self._started.clear()
            batch, self._running = self._running, []
            await asyncio.sleep(self._step)
            for write, done, max_tokens in batch:
                self._token(write, done + 1, max_tokens)

    def _token(self, write: Write, done: int, max_tokens: int) -> None:
        if done < max_tokens:
            write(CHUNK, False)
            self._running.append((write, done, max_tokens))
            self._started.set()
        else:
            usage = b'data: {"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n' % max_tokens
            write(CHUNK + usage, True)


class _Raw(asyncio.Protocol):
    """One connection; requests come one at a time and with their length."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]  # not so by name on uvloop

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, _, body = self._data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length is None:
            self._transport.write(HEALTHY)
            self._transport.close()
        elif len(body) == int(length[1]):
            self._data, self._begun = b"", False
            self._engine.add(self._write, json.loads(body)["max_tokens"])

    def _write(self, content: bytes, last: bool) -> None:
        head = b"" if self._begun else HEAD
        self._begun = True
        end = b"0\r\n\r\n" if last else b""
        self._transport.write(b"%b%x\r\n%b\r\n%b" % (head, len(content), content, end))


async def _serve_socket(port: int, step: float) -> None:
    engine = Engine(step)
    server = await asyncio.get_running_loop().create_server(lambda: _Raw(engine), "127.0.0.1", port)
    await server.serve_forever()


async def _serve_uvicorn(port: int, step: float) -> None:
    engine = Engine(step)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message["body"]
        chunks: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue()
        if body:
            engine.add(lambda content, last: chunks.put_nowait((content, last)), json.loads(body)["max_tokens"])
        else:
            chunks.put_nowait((b"", True))
        content, last = await chunks.get()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content, "more_body": not last})
        while not last:
            content, last = await chunks.get()
            await send({"type": "http.response.body", "body": content, "more_body": not last})

    config = uvicorn.Config(app, http="httptools", lifespan="off", access_log=False, log_level="warning")
    with socket.create_server(("127.0.0.1", port)) as listener:
        await uvicorn.Server(config).serve(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("socket", "uvicorn"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step", type=float, required=True)
    arguments = parser.parse_args()
    if arguments.kind == "socket":
        uvloop.run(_serve_socket(arguments.port, arguments.step))
    else:
        uvloop.run(_serve_uvicorn(arguments.port, arguments.step))


if __name__ == "__main__":
    main()
