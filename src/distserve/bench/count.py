"""Asks a server how many tokens a text is to it. Knows no prompt and no load."""

from __future__ import annotations

from typing import Any, Protocol

import aiohttp

from distserve.bench.client import Client
from distserve.bench.server import PROBE_TIMEOUT


class Counter(Protocol):
    """Counts a whole request with this text as prompt or message; None: this server does not tell."""

    async def count(self, text: str, chat: bool) -> int | None: ...


class Tokenizer:
    """The server's /tokenize, in vLLM's form or llama.cpp's; answers None where it has neither."""

    def __init__(self, client: Client, model: str | None) -> None:
        self._client = client
        self._model = {"model": model} if model is not None else {}
        self._missing = False

    async def ids(self, text: str) -> list[int] | None:
        """Token ids of `text` alone, without special tokens."""
        body = {**self._model, "prompt": text, "content": text, "add_special_tokens": False, "add_special": False}
        return await self._ask(body)

    async def count(self, text: str, chat: bool) -> int | None:
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "add_generation_prompt": True} if chat else {"prompt": text, "content": text}
        ids = await self._ask({**self._model, **body})
        return None if ids is None else len(ids)

    async def _ask(self, body: dict[str, Any]) -> list[int] | None:
        if self._missing:
            return None
        found = await _post(self._client, "/tokenize", body, "tokens")
        if not isinstance(found, list) or not all(isinstance(token, int) for token in found):
            self._missing = True
            return None
        return found


class Usage:
    """`usage.prompt_tokens` of a real request for one token: for servers without /tokenize."""

    def __init__(self, client: Client, model: str | None) -> None:
        self._client = client
        self._model = {"model": model} if model is not None else {}
        self._missing = False

    async def count(self, text: str, chat: bool) -> int | None:
        if self._missing:
            return None
        path = "/v1/chat/completions" if chat else "/v1/completions"
        prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        body = {**self._model, **prompt, "max_tokens": 1, "temperature": 0, "stream": False}
        usage = await _post(self._client, path, body, "usage")
        found = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        self._missing = not isinstance(found, int)
        return found if isinstance(found, int) else None


async def _post(client: Client, path: str, body: dict[str, Any], field: str) -> Any:
    """A field of the answer; None where there is no such answer."""
    try:
        async with client.session.post(client.url + path, json=body, timeout=PROBE_TIMEOUT) as response:
            return (await response.json(content_type=None)).get(field) if response.status == 200 else None
    except (aiohttp.ClientError, ConnectionError, TimeoutError, ValueError, AttributeError):
        return None
