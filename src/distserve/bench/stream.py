"""Reads a streamed answer as bytes arrive: when the first and the last token came, how many, and how it ended.

Costs a split per network read: JSON is parsed until the first token is found, and at the end for the last few events
(the finish, the usage, an error); what lies between is only counted. Knows no socket and no clock.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

_TAIL = 4  # events that may follow the last token, and one more: finish, usage, error


class BadStreamError(ValueError):
    """What came is not a stream of OpenAI's events."""


class Answer:
    """One answer. `feed` what comes, `close` at its end, then read the fields."""

    __slots__ = (
        "_rest",
        "_tail",
        "done",
        "error",
        "finished",
        "first",
        "last",
        "num_events",
        "output_tokens",
        "prompt_tokens",
    )

    def __init__(self) -> None:
        self.first: float | None = None  # when the first token came
        self.last: float | None = None  # when the last token came; known after `close`
        self.num_events = 0  # from the first token on
        self.done = False  # [DONE] came
        self.finished = False  # an event carried a finish reason; known after `close`
        self.output_tokens: int | None = None  # by the server's count; None: it sent no usage
        self.prompt_tokens: int | None = None
        self.error: str | None = None  # the server's message in an error event
        self._rest = b""
        self._tail: deque[tuple[float, bytes]] = deque(maxlen=_TAIL)

    def feed(self, data: bytes, now: float) -> None:
        """Takes what the network read at `now`. Raises `BadStreamError` where no token came yet and this is no JSON."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        end = data.rfind(b"\n\n")
        if end < 0:
            self._rest = data
            return
        self._rest = data[end + 2 :]
        for event in data[:end].split(b"\n\n"):
            payload = _payload(event)
            if payload == b"[DONE]":
                self.done = True
            elif payload:
                self._take(payload, now)

    def _take(self, payload: bytes, now: float) -> None:
        if self.first is None:
            if not _has_token(_decode(payload)):
                self._tail.append((now, payload))
                return
            self.first = now
            self._tail.clear()
        self.num_events += 1
        self._tail.append((now, payload))

    def close(self) -> None:
        """The stream is over. Raises `BadStreamError` where its last events are no JSON."""
        if self._rest.strip():  # a last event whose blank line never came
            payload = _payload(self._rest)
            if payload == b"[DONE]":
                self.done = True
            elif payload.endswith(b"}"):
                self._take(payload, self._tail[-1][0] if self._tail else 0.0)
        for now, payload in reversed(self._tail):
            event = _decode(payload)
            if event.get("error"):
                error = event["error"]
                self.error = str(error.get("message") if isinstance(error, dict) else error)
            usage = event.get("usage")
            if isinstance(usage, dict) and self.output_tokens is None:
                self.output_tokens = _count(usage.get("completion_tokens"))
                self.prompt_tokens = _count(usage.get("prompt_tokens"))
            choice = _choice(event)
            if choice is not None:
                self.finished = self.finished or choice.get("finish_reason") is not None
                if self.last is None:
                    self.last = now
            elif self.first is not None:
                self.num_events -= 1
        self._tail.clear()


def _payload(event: bytes) -> bytes:
    """The data of one event; empty for comments (keep-alive) and events without data."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[5:].strip()
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def _decode(payload: bytes) -> dict[str, Any]:
    try:
        event = msgspec.json.decode(payload)
    except msgspec.DecodeError:
        event = None
    if not isinstance(event, dict):
        raise BadStreamError(f"the stream holds {payload[:80]!r}, which is no JSON object")
    return event


def _choice(event: dict[str, Any]) -> dict[str, Any] | None:
    """The answer's part in an event; None in one that only carries usage or an error."""
    choices = event.get("choices")
    if not choices:
        return None
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise BadStreamError("the stream holds an event whose choices are no list of objects")
    return choices[0]


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _has_token(event: dict[str, Any]) -> bool:
    """Some chat servers first send the role alone, before they have computed anything: that is no token. An empty text
    is one, though: its characters are not complete yet."""
    choice = _choice(event)
    if choice is None:
        return False
    delta = choice.get("delta")
    if not isinstance(delta, dict) or "role" not in delta or choice.get("finish_reason") is not None:
        return True
    return any(value for key, value in delta.items() if key != "role")
