"""CPU that the gateway spends per streamed token: text, JSON, SSE and socket, on a real server with a source of tokens.

    python benchmarks/gateway_tokens.py MODEL [--streams 1,8,32] [--tokens 2000] [--interval 0.005] [--stop]

MODEL is a folder or .gguf file (only its tokenizer is used). The source wakes all streams every `--interval` seconds
with one token each, as an instance's step does. The server's CPU time is read (at /metrics) before and after a client,
in another process, has read the streams to their ends; the cost of the ticks themselves is measured alone.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from distserve.request import FinishReason, Request, SamplingParams, Token
from distserve.serve.http.api import ApiOptions, build_app
from distserve.serve.http.tokens import load_tokenizer

TARGET = 30e-6  # seconds of CPU per streamed token, receiving included


class Stream:
    """One request's tokens, out of its queue; the last one says so."""

    def __init__(self, queue: asyncio.Queue[list[Token]], num_tokens: int, on_close: Callable[[], object]) -> None:
        self._queue = queue
        self._left = num_tokens
        self._on_close = on_close

    def __aiter__(self) -> AsyncIterator[list[Token]]:
        return self

    async def __anext__(self) -> list[Token]:
        if not self._left:
            raise StopAsyncIteration
        tokens = await self._queue.get()
        self._left -= 1
        return tokens if self._left else [Token(tokens[0].id, FinishReason.LENGTH)]

    def close(self, finish: FinishReason | None = None) -> None:
        self._on_close()


class Source:
    """A generator whose streams all get a token at each tick, through a queue each, as the gateway's do."""

    def __init__(self, interval: float, vocab_size: int) -> None:
        self.max_model_len = 1 << 20
        self.max_kv_tokens: int | None = None
        self._interval = interval
        self._tokens = [Token(id) for id in random.Random(0).choices(range(1000, vocab_size), k=4096)]
        self._queues: dict[int, asyncio.Queue[list[Token]]] = {}
        self._ids = 0
        self._ticks = 0

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    def ready(self) -> bool:
        return True

    def status(self) -> dict[str, Any]:
        return {"missing": []}

    def generate(self, request: Request) -> Stream:
        queue: asyncio.Queue[list[Token]] = asyncio.Queue()
        self._queues[request.id] = queue
        return Stream(queue, request.sampling.max_tokens, lambda: self._queues.pop(request.id, None))

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            for id, queue in self._queues.items():
                queue.put_nowait([self._tokens[(self._ticks + 7 * id) % len(self._tokens)]])
            self._ticks += 1


def serve(arguments: argparse.Namespace, listener: socket.socket) -> None:
    async def run() -> None:
        tokens = load_tokenizer(arguments.model)
        source = Source(arguments.interval, tokens.vocab_size)
        api = build_app(source, tokens, ApiOptions(("model",), metrics=_cpu))
        app = _bare(api, source) if arguments.bare else api
        server = uvicorn.Server(
            uvicorn.Config(app, http="httptools", loop="uvloop", log_level="warning", lifespan="off")
        )
        gc.freeze()  # as the server does: the vocabulary need not be looked through again and again
        ticking = asyncio.create_task(source.tick())
        await server.serve(sockets=[listener])
        ticking.cancel()

    import uvloop

    uvloop.run(run())


def _bare(api: ASGIApp, source: Source) -> ASGIApp:
    """The floor: streams the same tokens as constant bytes, through the same server and sockets."""
    chunk = b"data: " + b"x" * 210 + b"\n\n"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics":
            await api(scope, receive, send)
            return
        body = json.loads((await receive())["body"])
        request = Request(source.next_id(), [1], SamplingParams(max_tokens=body["max_tokens"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        stream = source.generate(request)
        async for _ in stream:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        stream.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def _cpu() -> tuple[bytes, str]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = {"cpu": used.ru_utime + used.ru_stime, "user": used.ru_utime, "rss": used.ru_maxrss * 1024}
    return json.dumps(spent).encode(), "application/json"


async def _get(port: int, path: str) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    content = await reader.read()
    writer.close()
    found: dict[str, Any] = json.loads(content.partition(b"\r\n\r\n")[2])
    return found


async def _stream(port: int, body: dict[str, Any]) -> int:
    """Reads a stream to its end; returns the number of bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    size, last = 0, b""
    while received := await reader.read(1 << 16):
        size += len(received)
        last = received
    if not last.endswith(b"0\r\n\r\n"):
        raise SystemExit(f"the stream broke off: {last[-200:]!r}")
    writer.close()
    return size


async def _measure(port: int, num_streams: int, arguments: argparse.Namespace) -> dict[str, float]:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    body["max_tokens"] = arguments.tokens
    if arguments.stop:
        body["stop"] = ["\n\nUser:", "\n\nHuman:", "###", "<|end|>"]
    before, begun = await _get(port, "/metrics"), time.monotonic()
    sizes = await asyncio.gather(*(_stream(port, body) for _ in range(num_streams)))
    after, duration = await _get(port, "/metrics"), time.monotonic() - begun
    await asyncio.sleep(duration / 4)
    idle = await _get(port, "/metrics")
    ticking = (idle["cpu"] - after["cpu"]) * 4  # the same time without a stream
    num_tokens = num_streams * arguments.tokens
    return {
        "streams": num_streams,
        "cpu_per_token": (after["cpu"] - before["cpu"]) / num_tokens,
        "ticks_per_token": ticking / num_tokens,
        "user_per_token": (after["user"] - before["user"]) / num_tokens,
        "bytes_per_token": sum(sizes) / num_tokens,
        "tokens_per_second": num_tokens / duration,
        "rss": after["rss"],
    }


async def _wait(port: int) -> None:
    while True:
        try:
            await _get(port, "/health")
            return
        except ConnectionError:
            await asyncio.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--interval", type=float, default=0.005)
    parser.add_argument("--stop", action="store_true", help="with four stop strings")
    parser.add_argument(
        "--bare", action="store_true", help="constant bytes instead of text: what server and socket cost"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)  # the listening socket of the server process
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments, socket.socket(fileno=arguments.serve))
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", str(listener.fileno())]
        with subprocess.Popen(command, pass_fds=[listener.fileno()]) as server:
            try:
                for num_streams in map(int, arguments.streams.split(",")):
                    _tell(asyncio.run(_measure(port, num_streams, arguments)), arguments.json)
            finally:
                server.terminate()


def _tell(found: dict[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    cost, ticks = found["cpu_per_token"] * 1e6, found["ticks_per_token"] * 1e6
    print(
        f"{found['streams']:4.0f} streams: {cost:5.1f} us CPU a token (of it ticks {ticks:4.1f}, "
        f"user {found['user_per_token'] * 1e6:5.1f}; target {TARGET * 1e6:.0f}), "
        f"{found['bytes_per_token']:.0f} bytes a token, {found['tokens_per_second']:.0f} tokens/s, "
        f"{found['rss'] / 1e6:.0f} MB resident"
    )


if __name__ == "__main__":
    main()
