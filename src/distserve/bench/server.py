"""What a server tells about itself before a load: its model, its context, and prompts of exactly known length.

A prompt is random, so that no prefix cache helps. Exact lengths are had in three ways, best first: token ids (they are
the length), text made of words that the server's own /tokenize counts, and, where there is no /tokenize, words taken
for a token each; then `Prompts.note` says so.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import aiohttp

from distserve.bench.client import Client, reason
from distserve.errors import DistserveError, UsageError

_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=30)
# Short and common: a token each in most vocabularies (asked of /tokenize where there is one).
_TEXT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other into has more her two like him see time could no make than first been its who now people my "
    "made over did down only way find use may water long little very after words called just where most know"
)
_WORDS = tuple(_TEXT.split())
_UNKNOWN_IDS = range(1000, 10_000)  # ordinary tokens in every common vocabulary: past the special ones, before its end


class NoServerError(DistserveError):
    """Nothing answers where a server was promised. Ends a bench with exit status 1."""


@dataclass(frozen=True, slots=True)
class Server:
    """One model of one server."""

    model: str | None  # None: the server names none; requests then leave it out
    context: int | None  # tokens of prompt and answer; None: not told


@dataclass(frozen=True, slots=True)
class Prompts:
    """How prompts of this run are made."""

    chat: bool
    seed: int
    ids: tuple[int, ...] = ()  # drawn from; empty: text
    words: tuple[str, ...] = ()
    overhead: int = 0  # tokens that the template and special tokens add to the words
    per_word: float = 1.0  # tokens
    note: str = ""  # what the person should know about lengths

    def make(self, number: int, tokens: int) -> dict[str, Any]:
        """The prompt's part of the body of request `number`, `tokens` long (at least one word)."""
        chance = random.Random(f"prompt {self.seed} {number}")
        if self.ids:
            return {"prompt": chance.choices(self.ids, k=tokens)}
        text = " ".join(chance.choices(self.words, k=max(1, round((tokens - self.overhead) / self.per_word))))
        return {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}


async def look(client: Client, wanted: str | None) -> Server:
    """Asks for the models. Raises `NoServerError`, or `UsageError` where the model or the key is wrong."""
    try:
        async with client.session.get(f"{client.url}/v1/models", timeout=_PROBE_TIMEOUT) as response:
            if response.status in (401, 403):
                raise UsageError(
                    f"{client.url} asks for a key (HTTP {response.status}): give the right one with --api-key"
                )
            if response.status == 404:
                return Server(wanted, None)  # not every server lists its models
            if response.status != 200:
                raise NoServerError(f"{client.url}/v1/models answers HTTP {response.status}: is the server ready?")
            listed = (await response.json(content_type=None))["data"]
            models = {str(entry["id"]): entry.get("max_model_len") for entry in listed}
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise NoServerError(f"no server answers at {client.url} ({reason(error)}): start one, or mend --url") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise NoServerError(f"{client.url}/v1/models does not answer as OpenAI's API: is --url right?") from None
    if wanted is not None and wanted not in models:
        raise UsageError(f"--model {wanted}: the server has {', '.join(models) or 'none'}")
    model = wanted if wanted is not None else next(iter(models), None)
    context = models.get(model) if model is not None else None
    return Server(model, context if isinstance(context, int) and context >= 2 else None)


async def alive(client: Client) -> bool:
    """Whether anything still answers there."""
    try:
        async with client.session.get(f"{client.url}/v1/models", timeout=_PROBE_TIMEOUT):
            return True
    except (aiohttp.ClientError, ConnectionError, TimeoutError):
        return False


async def learn(client: Client, server: Server, *, chat: bool, kind: str, seed: int) -> Prompts:
    """Finds out how to make prompts of known length. `kind` is "auto", "ids" or "text"."""
    tokens = _Tokenizer(client, server.model)
    if not chat and kind != "text":
        ids = await tokens.ids(" ".join(_WORDS))
        return Prompts(chat, seed, ids=tuple(sorted(set(ids))) if ids else tuple(_UNKNOWN_IDS))
    words = tuple([word for word in _WORDS[:64] if len(await tokens.ids(f" {word}") or ()) == 1])
    if len(words) >= 8:  # some: the few that this vocabulary writes in one token
        short = await tokens.count(" ".join((words * 16)[:32]), chat)
        long = await tokens.count(" ".join((words * 16)[:96]), chat)
        if short is not None and long is not None and long > short:
            per_word = (long - short) / 64
            note = "" if per_word == 1 else f"prompt lengths are approximate: {per_word:.2f} tokens a word"
            return Prompts(chat, seed, words=words, overhead=round(short - 32 * per_word), per_word=per_word, note=note)
    return Prompts(
        chat,
        seed,
        words=_WORDS,
        note="prompt lengths are approximate: the server has no /tokenize, a word counts as a token",
    )


class _Tokenizer:
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
        """Tokens of a whole request with this text."""
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "add_generation_prompt": True} if chat else {"prompt": text, "content": text}
        ids = await self._ask({**self._model, **body})
        return None if ids is None else len(ids)

    async def _ask(self, body: dict[str, Any]) -> list[int] | None:
        if self._missing:
            return None
        try:
            url = f"{self._client.url}/tokenize"
            async with self._client.session.post(url, json=body, timeout=_PROBE_TIMEOUT) as response:
                found = (await response.json(content_type=None)).get("tokens") if response.status == 200 else None
        except (aiohttp.ClientError, ConnectionError, TimeoutError, ValueError, AttributeError):
            found = None
        if not isinstance(found, list) or not all(isinstance(token, int) for token in found):
            self._missing = True
            return None
        return found
