"""A small real OpenAI server over HTTP with known delays, in a thread of its own: what bench is tested with.

It serves tokens as told (a delay before the first, a gap between them) and fails as told; it computes nothing.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Behaviour:
    """How the server answers. Tests set it before a load."""

    first: float = 0.0  # seconds before the first token
    gap: float = 0.0  # seconds before every other
    usage: bool = True  # sends the usage chunk
    chat_role: bool = False  # sends the role alone, before the first token's delay
    merge: int = 1  # tokens in one network write
    status: int = 200  # of completions
    fail_every: int = 0  # every n-th request fails with 429
    room: int | None = None  # requests at a time; more are refused with 429
    break_after: int | None = None  # drops the connection after this many tokens
    error_after: int | None = None  # sends an error event after this many tokens
    empty: bool = False  # 200 with a stream that holds nothing
    tokenize: bool = True
    context: int | None = 4096
    key: str | None = None
    ready: bool = True  # as /health says
    short: int = 0  # tokens fewer than asked for
    hold: threading.Event = field(default_factory=threading.Event)  # when `held`, nothing is answered before it is set
    held: bool = False


class StandIn:
    """What tests read: the bodies that came, and the address."""

    def __init__(self) -> None:
        self.behaviour = Behaviour()
        self.bodies: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._inside = 0
        self._stop: Callable[[], None] = lambda: None
        self.url = ""

    def wait_for(self, requests: int) -> None:
        """Returns once so many have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.bodies) >= requests, 60)

    def stop(self) -> None:
        """Stops listening and drops every connection, as a server that dies; returns when it is gone."""
        self._stop()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.behaviour.ready else 503)

    async def _models(self, request: web.Request) -> web.Response:
        if self.behaviour.key is not None and request.headers.get("Authorization") != f"Bearer {self.behaviour.key}":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        entry: dict[str, Any] = {"id": "stand-in", "object": "model"}
        if self.behaviour.context is not None:
            entry["max_model_len"] = self.behaviour.context
        return web.json_response({"object": "list", "data": [entry]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        """A word is a token, except that "which" is two; a chat's template adds five, special tokens one."""
        if not self.behaviour.tokenize:
            return web.json_response({"detail": "Not Found"}, status=404)
        body = await request.json()
        return web.json_response({"tokens": list(range(100, 100 + tokens_of(body)))})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("stream") is False:  # a probe: what bench asks before the load
            usage = {"prompt_tokens": tokens_of(body), "completion_tokens": body["max_tokens"]}
            return web.json_response({"usage": usage} if self.behaviour.usage else {"choices": []})
        with self._changed:
            self.bodies.append(body)
            self._changed.notify_all()
        if self.behaviour.room is not None and self._inside >= self.behaviour.room:
            return web.json_response({"error": {"message": "full"}}, status=429)
        self._inside += 1
        try:
            return await self._answer(request, body)
        finally:
            self._inside -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        how = self.behaviour
        if how.held:
            await asyncio.to_thread(how.hold.wait, 60)
        failed = how.fail_every and len(self.bodies) % how.fail_every == 0
        if how.status != 200 or failed:
            status = 429 if failed else how.status
            return web.json_response({"error": {"message": "as told"}}, status=status, headers={"Retry-After": "1"})
        chat = "messages" in body
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if chat and how.chat_role:
            await response.write(_event(chat, {"role": "assistant", "content": ""}))
        total = 0 if how.empty else body["max_tokens"] - how.short
        pending = b""
        for i in range(total):
            await asyncio.sleep(how.first if i == 0 else how.gap)
            if i == how.break_after:
                assert request.transport is not None
                request.transport.close()
                return response
            if i == how.error_after:
                await response.write(b'data: {"error": {"message": "instance gone"}}\n\ndata: [DONE]\n\n')
                return response
            pending += _event(chat, {"content": f"t{i} "}, "length" if i == total - 1 else None)
            if (i + 1) % how.merge == 0 or i == total - 1:
                await response.write(pending)
                pending = b""
        if how.usage and not how.empty:
            usage = {"prompt_tokens": tokens_of(body), "completion_tokens": total}
            await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


def tokens_of(body: dict[str, Any]) -> int:
    """What this server takes a request's prompt to hold: a word is a token, except that "which" is two."""
    if isinstance(body.get("prompt"), list):
        return len(body["prompt"])
    text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
    words = sum(2 if word == "which" else 1 for word in text.split())
    if "messages" in body:
        return words + 5
    return words + (1 if body.get("add_special_tokens", True) else 0)


def _event(chat: bool, delta: dict[str, str], finish: str | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    choice |= {"delta": delta} if chat else {"text": delta["content"]}
    return b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"


@contextmanager
def serving() -> Iterator[StandIn]:
    """The server, listening on a free port of this machine until the block ends."""
    standin = StandIn()
    ready, loop, stopped = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def main() -> None:
        runner = web.AppRunner(standin.app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        standin.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stopped.wait()
        await runner.cleanup()

    def stop() -> None:
        if thread.is_alive():
            loop.call_soon_threadsafe(stopped.set)
            thread.join(20)

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    standin._stop = stop
    thread.start()
    assert ready.wait(20)
    try:
        yield standin
    finally:
        standin.behaviour.hold.set()
        stop()
        loop.close()
