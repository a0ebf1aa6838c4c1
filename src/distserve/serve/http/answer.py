"""Runs the requests of an answer and writes it to the socket, streamed or whole; stops everything when the client goes.

    start the choices ---> tokens ---> text ---> bytes ---> socket
          ^                                                   |
          `---- close every token stream <--- client gone ----'

Nothing is sent before the first token: an error up to there still has its own HTTP status. Afterwards it becomes an
event in the stream. Each wake-up writes to the socket once, whatever it brought.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distserve.errors import DistserveError, InstanceError
from distserve.serve.base import Generator, TokenStream
from distserve.serve.http import sse
from distserve.serve.http.choices import Answer, Choice
from distserve.serve.http.refusals import refusal

_log = logging.getLogger(__name__)

BODY_SEND = "distserve.body_send"  # key in the ASGI scope: the server's own `send`, for bodies
# All layers between server and route hand every body message on unchanged, at a microsecond each; a stream's chunks
# pass them by, its start does not.

Deliver = Callable[[Choice, str], Awaitable[None]]


class AnswerResponse(Response):
    """A response in the framework's eyes; it speaks to the socket itself."""

    def __init__(self, generator: Generator, answer: Answer) -> None:
        super().__init__()
        self._generator = generator
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        streams = [self._generator.generate(choice.request) for choice in self._answer.choices]
        try:
            async with asyncio.timeout(None) as present:  # ends what is inside when the client goes
                await asyncio.sleep(0)  # the requests leave first: there is time for the rest while they are computed
                watching = asyncio.create_task(_watch(receive, present))
                try:
                    if self._answer.stream:
                        await _write_stream(streams, self._answer, send, scope.get(BODY_SEND, send))
                    else:
                        await _write_whole(streams, self._answer, send)
                finally:
                    watching.cancel()
        except TimeoutError:
            if not present.expired():
                raise
        finally:
            for stream in streams:
                stream.close()


async def _watch(receive: Receive, present: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    present.reschedule(asyncio.get_running_loop().time())


async def _run(stream: TokenStream, choice: Choice, deliver: Deliver) -> None:
    """One choice from its first token to its last."""
    async for tokens in stream:
        text = choice.feed(tokens)
        finish = choice.finish
        if text or finish is not None:
            await deliver(choice, text)
        if finish is not None:
            stream.close(finish)
            return
    raise InstanceError("the answer ended before its last token")


async def _run_all(streams: Sequence[TokenStream], answer: Answer, deliver: Deliver) -> None:
    """All choices at once; the first failure ends the others."""
    if len(streams) == 1:
        await _run(streams[0], answer.choices[0], deliver)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for stream, choice in zip(streams, answer.choices, strict=True):
                group.create_task(_run(stream, choice, deliver))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


async def _write_stream(streams: Sequence[TokenStream], answer: Answer, send: Send, send_body: Send) -> None:
    chunks = {choice.index: sse.Chunks(answer, choice) for choice in answer.choices}
    unfinished = len(answer.choices)
    started = False

    async def deliver(choice: Choice, text: str) -> None:
        nonlocal started, unfinished
        body = chunks[choice.index].chunk(text)
        if choice.finish is not None:
            unfinished -= 1
            if not unfinished:
                body += sse.stream_end(answer)
        if not started:
            started = True
            await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        await send_body({"type": "http.response.body", "body": body, "more_body": unfinished > 0})

    try:
        await _run_all(streams, answer, deliver)
    except Exception as error:  # noqa: BLE001  whatever it is, the client must be told and the stream must end
        _note(error)
        if not started:
            await write_refusal(send, error)
        elif unfinished:
            body = sse.event(refusal(error).body) + sse.DONE
            await send_body({"type": "http.response.body", "body": body, "more_body": False})


async def _write_whole(streams: Sequence[TokenStream], answer: Answer, send: Send) -> None:
    texts: dict[int, list[str]] = {choice.index: [] for choice in answer.choices}

    async def deliver(choice: Choice, text: str) -> None:
        texts[choice.index].append(text)

    try:
        await _run_all(streams, answer, deliver)
    except Exception as error:  # noqa: BLE001  as above
        _note(error)
        await write_refusal(send, error)
        return
    body = sse.whole(answer, ["".join(texts[choice.index]) for choice in answer.choices])
    await write_json(send, 200, body)


def _note(error: Exception) -> None:
    if not isinstance(error, DistserveError):
        _log.error("an answer failed by a fault of ours", exc_info=error)


async def write_refusal(send: Send, error: Exception) -> None:
    told = refusal(error)
    await write_json(send, told.status, sse.encode(told.body), told.headers)


async def write_json(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    kind = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": kind + (headers or [])})
    await send({"type": "http.response.body", "body": body, "more_body": False})
