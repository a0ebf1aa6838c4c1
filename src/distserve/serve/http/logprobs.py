"""Log-probabilities in OpenAI's two formats: the chat's list of entries and the completion's parallel lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from distserve.request import Logprobs
from distserve.serve.http.text import Utf8

_LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say (OpenAI's and vLLM's choice)

Position = tuple[int, Logprobs | None]  # a token and its log-probabilities (None: unknown, at a prompt's start)


class LogprobsFormat(Protocol):
    """Collects positions in order; `take` gives, as plain JSON, what was collected since the last `take`."""

    def add(self, positions: Iterable[Position]) -> None: ...

    def take(self) -> dict[str, Any]: ...


class ChatLogprobs:
    def __init__(self, spelled: Sequence[bytes]) -> None:
        self._spelled = spelled
        self._entries: list[dict[str, Any]] = []

    def add(self, positions: Iterable[Position]) -> None:
        for id, at in positions:
            if at is None:
                continue
            top = [self._entry(other, logprob) for other, logprob in at.top]
            self._entries.append({**self._entry(id, at.token), "top_logprobs": top})

    def take(self) -> dict[str, Any]:
        entries, self._entries = self._entries, []
        return {"content": entries, "refusal": None}

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        spelled = _spelling(self._spelled, id)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": max(logprob, _LOWEST),
            "bytes": list(spelled),
        }


class CompletionLogprobs:
    """`text_offset` counts characters from the start of the choice's text; a token within a character has the
    character's offset."""

    def __init__(self, spelled: Sequence[bytes], pieces: Sequence[bytes]) -> None:
        self._spelled = spelled
        self._pieces = pieces
        self._utf8 = Utf8()
        self._offset = 0
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, positions: Iterable[Position]) -> None:
        for id, at in positions:
            self._tokens.append(self._name(id))
            self._logprobs.append(None if at is None else max(at.token, _LOWEST))
            self._top.append(None if at is None else self._likeliest(id, at))
            self._offsets.append(self._offset)
            self._offset += len(self._utf8.decode(_spelling(self._pieces, id)))

    def take(self) -> dict[str, Any]:
        taken = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        self._clear()
        return taken

    def _likeliest(self, id: int, at: Logprobs) -> dict[str, float]:
        """The likeliest tokens, and the one that was drawn (so there may be one more than asked for)."""
        named = {self._name(other): max(logprob, _LOWEST) for other, logprob in at.top}
        named.setdefault(self._name(id), max(at.token, _LOWEST))
        return named

    def _name(self, id: int) -> str:
        """A token's text; one that is no whole character is named by its bytes, as OpenAI does."""
        spelled = _spelling(self._spelled, id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _spelling(table: Sequence[bytes], id: int) -> bytes:
    return table[id] if id < len(table) else b""  # models pad their vocabulary beyond the tokenizer's
