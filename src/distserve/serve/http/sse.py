"""Answers as bytes: the chunks of a stream (server-sent events) and the whole body. Knows formats, no sockets.

A stream's chunks differ in little more than their text, so everything before and after the text is made once per
choice: a chunk is then one JSON string between two constants.
"""

from __future__ import annotations

from typing import Any

import msgspec

from distserve.serve.http.choices import Answer, Choice

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold chunks back
]

encode = msgspec.json.Encoder().encode


def event(content: Any) -> bytes:
    return b"data: " + encode(content) + b"\n\n"


class Chunks:
    """Writes the chunks of one choice."""

    __slots__ = ("_answer", "_choice", "_head", "_later", "_plain", "_tail", "_text_end")

    def __init__(self, answer: Answer, choice: Choice) -> None:
        self._answer = answer
        self._choice = choice
        kind = "chat.completion.chunk" if answer.chat else "text_completion"
        common = {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}
        opening = b"data: " + encode(common)[:-1] + b',"choices":[{"index":%d,' % choice.index
        self._head = opening + (b'"delta":{"role":"assistant","content":' if answer.chat else b'"text":')
        self._later = opening + b'"delta":{"content":' if answer.chat else self._head  # the role comes once
        self._text_end = b"}" if answer.chat else b""
        self._tail = b',"usage":null}\n\n' if answer.include_usage else b"}\n\n"
        simple = choice.logprobs is None and not answer.continuous_usage
        self._plain = self._text_end + b',"logprobs":null,"finish_reason":null}]' + self._tail if simple else None

    def chunk(self, text: str) -> bytes:
        """The chunk for new text (empty: none is due yet, unless the choice has finished)."""
        finish = self._choice.finish
        if not text and finish is None:
            return b""
        head, self._head = self._head, self._later
        if finish is None and self._plain is not None:
            return head + encode(text) + self._plain
        logprobs = self._choice.logprobs
        parts = [head, encode(text), self._text_end, b',"logprobs":']
        parts.append(b"null" if logprobs is None else encode(logprobs.take()))
        parts += (b',"finish_reason":', encode(finish))
        if finish is not None:
            parts += (b',"stop_reason":', encode(self._choice.stop))
        parts.append(b"}]")
        if self._answer.continuous_usage:
            parts += (b',"usage":', encode(self._answer.usage()), b"}\n\n")
        else:
            parts.append(self._tail)
        return b"".join(parts)


def stream_end(answer: Answer) -> bytes:
    """What comes after the last choice's last chunk."""
    if not answer.include_usage:
        return DONE
    kind = "chat.completion.chunk" if answer.chat else "text_completion"
    common = {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}
    return event({**common, "choices": [], "usage": answer.usage()}) + DONE


def whole(answer: Answer, texts: list[str]) -> bytes:
    """The body of an answer that is not streamed; `texts[i]` is that of `answer.choices[i]`."""
    choices = [_whole_choice(answer, choice, text) for choice, text in zip(answer.choices, texts, strict=True)]
    kind = "chat.completion" if answer.chat else "text_completion"
    return encode(
        {
            "id": answer.id,
            "object": kind,
            "created": answer.created,
            "model": answer.model,
            "choices": choices,
            "usage": answer.usage(),
        }
    )


def _whole_choice(answer: Answer, choice: Choice, text: str) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if answer.chat else {"text": text}
    return {
        "index": choice.index,
        **said,
        "logprobs": None if choice.logprobs is None else choice.logprobs.take(),
        "finish_reason": choice.finish,
        "stop_reason": choice.stop,
    }
