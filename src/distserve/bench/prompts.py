"""Makes prompts of exactly so many tokens: random, so that no prefix cache helps, or pieces of a person's own text.

    how it is sent    exact because
    token ids         they are the length
    words             the server counts them: its /tokenize (vLLM's form or llama.cpp's), or, where it has none, tiny
                      requests whose `usage.prompt_tokens` tell which words are one token each
    else              it is not, and `Prompts.note` says so: a word is taken for a token

Text of a file is cut between words, counted, and mended until it fits, before the load begins. Knows no schedule.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from distserve.bench.client import Client
from distserve.bench.count import Counter, Tokenizer, Usage
from distserve.bench.server import Server
from distserve.traces import Arrival

# Short and common: a token each in most vocabularies (asked of the server where it can tell).
_TEXT = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other into has more her two like him see time could no make than first been its who now people my "
    "made over did down only way find use may water long little very after words called just where most know"
)
_WORDS = tuple(_TEXT.split())
_UNKNOWN_IDS = range(1000, 10_000)  # ordinary tokens in every common vocabulary: past the special ones, before its end
_FEW = 8  # words of one token: enough for prompts that differ
_ASKED = 64  # words that /tokenize is asked about
_PROBED = 24  # words that tiny requests ask about
_TRIES = 12  # to make a text fit
_AT_ONCE = 16  # texts being counted
_PIECE = 20_000  # characters of a file in one request to /tokenize
_FILLER = " the"  # closes a gap that no word of the file does

Part = dict[str, Any]  # the prompt's part of a request's body
Unit = TypeVar("Unit")


@dataclass(frozen=True, slots=True)
class Prompts:
    """How prompts of this command are made."""

    chat: bool
    seed: int
    ids: tuple[int, ...] = ()  # units are token ids; (): they are words, each with the space before it
    words: tuple[str, ...] = ()
    in_order: bool = False  # units follow each other as in the file; else they are drawn
    overhead: float = 0.0  # tokens that the template and special tokens add to the words
    per_word: float = 1.0  # tokens
    counter: Counter | None = None  # every prompt must be counted
    note: str = ""  # what the person should know about lengths
    missed: list[int] = field(default_factory=list)  # tokens by which counted prompts miss their length

    def make(self, number: int, tokens: int, salt: int = 0) -> Part:
        """Of request `number`; exact where nothing need be counted. Another `salt` makes another prompt: a server that
        keeps prefixes must not know it from an earlier run."""
        chance = self._chance(number, salt)
        if self.ids:
            return {"prompt": self._units(self.ids, chance, tokens)}
        return self._part(self._text(chance, self._guess(tokens)))

    async def fit(self, requests: Sequence[Arrival], salt: int, done: Callable[[int], None]) -> dict[int, Part]:
        """Every prompt that must be counted, by number; {} where none must. `done` hears how many are ready."""
        counter, found = self.counter, dict[int, Part]()
        if counter is None:
            return found
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(number: int, request: Arrival) -> None:
            async with gate:
                text = await self._fitted(self._chance(number, salt), request.prompt_tokens, counter)
            found[number] = self._part(text)
            done(len(found))

        await asyncio.gather(*(one(number, request) for number, request in enumerate(requests)))
        return found

    async def _fitted(self, chance: random.Random, tokens: int, counter: Counter) -> str:
        """As many words as fit, found by counting; the gap to the next word's end is closed with `_FILLER`."""
        state = chance.getstate()
        words, too_many = self._guess(tokens), 1 << 60
        fits, text, gap = 0, "", tokens
        for _ in range(_TRIES):
            chance.setstate(state)
            tried = self._text(chance, words)
            counted = await counter.count(tried, self.chat)
            if counted is None:
                break
            left = tokens - counted
            if left == 0:
                return tried
            if left > 0:
                fits, text, gap = words, tried, left
            else:
                too_many, text = words, text or tried
            if too_many - fits == 1:
                break
            step = round(left / self.per_word) or (1 if left > 0 else -1)
            words = min(max(words + step, fits + 1), too_many - 1)
        if fits and await counter.count(filled := text + _FILLER * gap, self.chat) == tokens:
            return filled
        self.missed.append(gap)
        return text or self._text(chance, 1)

    def _guess(self, tokens: int) -> int:
        return max(1, round((tokens - self.overhead) / self.per_word))

    def _chance(self, number: int, salt: int) -> random.Random:
        return random.Random(f"prompt {self.seed} {salt} {number}")

    def _text(self, chance: random.Random, words: int) -> str:
        return "".join(self._units(self.words, chance, words)).strip()

    def _units(self, units: Sequence[Unit], chance: random.Random, number: int) -> list[Unit]:
        if not self.in_order:
            return chance.choices(units, k=number)
        start = chance.randrange(len(units))
        return [units[(start + i) % len(units)] for i in range(number)]

    def _part(self, text: str) -> Part:
        return {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}


async def learn(
    client: Client, server: Server, *, chat: bool, kind: str, seed: int, text: str | None = None
) -> Prompts:
    """Finds out how to make prompts of known length. `kind` is "auto", "ids" or "text"; `text` is a file's."""
    tokenizer, usage = Tokenizer(client, server.model), Usage(client, server.model)
    if not chat and kind != "text":
        ids = await _ids(tokenizer, text if text is not None else _TEXT)
        if text is not None and ids:
            return Prompts(chat, seed, ids=tuple(ids), in_order=True)
        if text is None:
            return Prompts(chat, seed, ids=tuple(sorted(set(ids))) if ids else tuple(_UNKNOWN_IDS))
    if text is not None:
        return await _of_text(text, tokenizer, usage, chat, seed)
    words = [f" {word}" for word in _WORDS[:_ASKED] if len(await tokenizer.ids(f" {word}") or ()) == 1]
    counter: Counter = tokenizer
    if len(words) < _FEW:
        words, counter = await _probed(usage, chat), usage
    if len(words) >= _FEW:
        found = await _rate(words, counter, chat)
        if found is not None:
            overhead, per_word = found
            note = "" if per_word == 1 else f"prompt lengths are approximate: {per_word:.2f} tokens a word"
            return Prompts(chat, seed, words=tuple(words), overhead=overhead, per_word=per_word, note=note)
    note = "prompt lengths are approximate: the server has neither /tokenize nor usage, a word is taken for a token"
    return Prompts(chat, seed, words=tuple(f" {word}" for word in _WORDS), note=note)


async def _of_text(text: str, tokenizer: Tokenizer, usage: Usage, chat: bool, seed: int) -> Prompts:
    words = tuple(re.findall(r"\s*\S+", f" {text.lstrip()}"))
    counters: tuple[Counter, ...] = (tokenizer, usage)
    for counter in counters:
        found = await _rate(words, counter, chat)
        if found is not None:
            overhead, per_word = found
            exact = counter is tokenizer
            note = "" if exact else f"prompt lengths are approximate ({per_word:.2f} tokens a word): no /tokenize"
            return Prompts(
                chat, seed, words=words, in_order=True, overhead=overhead, per_word=per_word,
                counter=counter if exact else None, note=note,
            )  # fmt: skip
    note = "prompt lengths are approximate: the server has neither /tokenize nor usage, a word is taken for a token"
    return Prompts(chat, seed, words=words, in_order=True, note=note)


async def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Of a whole text, asked for in pieces that end between words."""
    ids: list[int] = []
    for piece in _pieces(text):
        found = await tokenizer.ids(piece)
        if found is None:
            return None
        ids += found
    return ids


def _pieces(text: str) -> Iterator[str]:
    words: list[str] = []
    size = 0
    for word in re.findall(r"\s*\S+", text):
        words.append(word)
        size += len(word)
        if size >= _PIECE:
            yield "".join(words)
            words, size = [], 0
    if words:
        yield "".join(words)


async def _probed(usage: Usage, chat: bool) -> list[str]:
    """Words of one token each, by what tiny requests count."""
    found: list[str] = []
    for word in _WORDS[:_PROBED]:
        rate = await _rate([f" {word}"], usage, chat)
        if rate is None or len(found) == _FEW:
            break
        if rate[1] == 1:
            found.append(f" {word}")
    return found


async def _rate(words: Sequence[str], counter: Counter, chat: bool) -> tuple[float, float] | None:
    """(tokens beside the words, tokens a word); None where the server does not count."""
    few, many = ("".join(words[i % len(words)] for i in range(number)).strip() for number in (32, 96))
    short, long = await counter.count(few, chat), await counter.count(many, chat)
    if short is None or long is None or long <= short:
        return None
    per_word = (long - short) / 64
    return short - 32 * per_word, per_word
