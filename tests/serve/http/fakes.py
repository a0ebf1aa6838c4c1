"""A generator that needs no model: it answers what a test tells it, at the pace that the test sets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from distserve.request import FinishReason, Logprobs, Request, Token

Script = Callable[[Request], Sequence[int]]


class FakeStream:
    """Takes its tokens from a generator."""

    def __init__(self, tokens: AsyncGenerator[list[Token], None], finishes: list[FinishReason | None]) -> None:
        self._tokens = tokens
        self._finishes = finishes
        self._closing: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[list[Token]]:
        return self

    async def __anext__(self) -> list[Token]:
        return await anext(self._tokens)

    def close(self, finish: FinishReason | None = None) -> None:
        self._finishes.append(finish)
        self._closing = asyncio.ensure_future(self._tokens.aclose())


class FakeGenerator:
    """`script` gives a request's token ids; the last ends it (`finish`), max_tokens ends it earlier ("length").

    Fails with `error` before token number `error_at`. Pauses before token number `pause_at` until `go` is set.
    """

    def __init__(self, script: Script, *, portion: int = 1, finish: FinishReason = FinishReason.STOP) -> None:
        self.script = script
        self.max_model_len = 8192
        self.max_kv_tokens: int | None = None
        self.portion = portion  # tokens of a wake-up
        self.finish = finish  # of the last token
        self.error: Exception | None = None
        self.error_at = 0
        self.pause_at: int | None = None
        self.go = asyncio.Event()
        self.missing: list[str] = []
        self.requests: list[Request] = []
        self.open = 0  # streams that have begun and not ended
        self.closed = asyncio.Event()  # set whenever the last one ends
        self.num_yielded = 0
        self.finishes: list[FinishReason | None] = []  # with which streams were closed
        self._ids = 0

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    def ready(self) -> bool:
        return not self.missing

    def status(self) -> dict[str, Any]:
        return {"missing": self.missing, "instances": []}

    def generate(self, request: Request) -> FakeStream:
        return FakeStream(self._generate(request), self.finishes)

    async def _generate(self, request: Request) -> AsyncGenerator[list[Token], None]:
        self.requests.append(request)
        self.open += 1
        self.closed.clear()
        try:
            ids = list(self.script(request))
            finish = self.finish
            if len(ids) > request.sampling.max_tokens:
                ids, finish = ids[: request.sampling.max_tokens], FinishReason.LENGTH
            for start in range(0, len(ids), self.portion):
                if self.error is not None and start >= self.error_at:
                    raise self.error
                if self.pause_at is not None and start >= self.pause_at:
                    await self.go.wait()
                await asyncio.sleep(0)
                end = min(start + self.portion, len(ids))
                self.num_yielded += end - start
                yield [
                    self._token(request, i, ids[i], finish if i == len(ids) - 1 else None) for i in range(start, end)
                ]
        finally:
            self.open -= 1
            if not self.open:
                self.closed.set()

    def _token(self, request: Request, position: int, id: int, finish: FinishReason | None) -> Token:
        params = request.sampling
        known = None if params.logprobs is None else fake_logprobs(id, params.logprobs)
        prompt = None
        if position == 0 and params.prompt_logprobs is not None:
            rest = [fake_logprobs(other, params.prompt_logprobs) for other in request.prompt[1:]]
            prompt = (None, *rest)
        return Token(id, finish, known, prompt)


def fake_logprobs(id: int, count: int) -> Logprobs:
    """The token itself is the likeliest; those with the next ids follow."""
    return Logprobs(-0.5, 1, tuple((id + i, -0.5 - i) for i in range(count)))
