"""One request's tokens on their way from the gateway, which hands them in, to the API, which takes them out; they are
observed in passing. Knows no instance and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine

from distserve.request import FinishReason, Request, Token
from distserve.serve.telemetry import Telemetry


class RequestStream:
    """See `base.TokenStream`. One reader.

    `work` is the request's life: it hands in tokens with `push` until `finish` is set, or ends with `fail`. It is a
    task of its own, so that a token on its way from the wire to the reader wakes nobody but the reader.
    """

    __slots__ = (
        "_clock",
        "_over",
        "_task",
        "_telemetry",
        "_tokens",
        "_waiter",
        "error",
        "finish",
        "first",
        "last",
        "request",
    )

    def __init__(
        self,
        request: Request,
        telemetry: Telemetry,
        clock: Callable[[], float],
        work: Callable[[RequestStream], Coroutine[None, None, None]],
    ) -> None:
        self.request = request
        self.finish: FinishReason | None = None  # why it has ended well
        self.error: Exception | None = None  # why it has not
        self.first = self.last = 0.0  # clock of the first and latest token; 0.0: none came
        self._telemetry = telemetry
        self._clock = clock
        self._tokens: list[Token] = []  # not taken yet
        self._waiter: asyncio.Future[None] | None = None
        self._over = False  # nothing more is taken in
        self._task = asyncio.create_task(work(self))

    # -- handed in ----------------------------------------------------------------------------------------------------

    def push(self, token: Token) -> None:
        if self._over:
            return  # it was closed, and the instance does not know yet
        now = self._clock()
        if self.first:
            self._telemetry.gap.observe(now - self.last)
        else:
            self.first = now
            self._telemetry.ttft.observe(now - self.request.arrival)
        self.last = now
        self.request.output.append(token.id)
        self._tokens.append(token)
        if token.finish is not None:
            self._end(token.finish)
        self._wake()

    def fail(self, error: Exception) -> None:
        self.error, self._over = error, True
        self._wake()

    def _end(self, finish: FinishReason) -> None:
        self.finish, self._over = finish, True
        request, now = self.request, self._clock()
        lengths = len(request.prompt), len(request.output)
        self._telemetry.observe_end(finish, *lengths, now - request.arrival, now - self.first)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- taken out ----------------------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[list[Token]]:
        return self

    async def __anext__(self) -> list[Token]:
        while not self._tokens:
            if self.error is not None:
                raise self.error
            if self._over:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        tokens, self._tokens = self._tokens, []
        return tokens

    def close(self, finish: FinishReason | None = None) -> None:
        if self._over:
            return
        if finish is not None:
            self._end(finish)
        else:
            self._over = True
            self._telemetry.ended_early()
        self._task.cancel()
