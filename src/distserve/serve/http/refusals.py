"""Errors as HTTP: status, headers and OpenAI's error body for each kind of ours. The one place that maps them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distserve.errors import InstanceError, OverloadedError, RequestError, UnavailableError


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def body(self) -> dict[str, Any]:
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(self.message), "type": self.type, "param": param, "code": self.code}}


def refusal(error: Exception) -> Refusal:
    """What a client is told about `error`. An error that is none of ours is a bug: its words stay in the log."""
    if isinstance(error, RequestError):
        return Refusal(error.status, str(error), "invalid_request_error", error.param, error.code)
    if isinstance(error, OverloadedError):
        return Refusal(
            429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=_retry_after(error.retry_after)
        )
    if isinstance(error, UnavailableError):
        return Refusal(
            503, str(error), "server_error", code="service_unavailable", headers=_retry_after(error.retry_after)
        )
    if isinstance(error, InstanceError):
        return Refusal(500, str(error), "server_error", code="instance_failed")
    return Refusal(500, "The server had an error while processing your request.", "server_error", code="internal_error")


def _retry_after(seconds: float) -> list[tuple[bytes, bytes]]:
    """In whole seconds, as HTTP has it, and exactly, as OpenAI's clients read it first."""
    whole = max(1, math.ceil(seconds))
    return [(b"retry-after", b"%d" % whole), (b"retry-after-ms", b"%d" % max(1, math.ceil(seconds * 1000)))]


def _encodable(text: str) -> str:
    """What a client sent may hold halves of surrogate pairs, which no UTF-8 body can repeat."""
    return text.encode("utf-8", "replace").decode()


def invalid_body(errors: Sequence[Mapping[str, Any]], body: Any) -> RequestError:
    """pydantic's complaints in one sentence; the field is named as OpenAI does: `messages[0].role`."""
    first = errors[0]
    if isinstance(body, bytes):
        return RequestError("The body must be JSON, sent with 'Content-Type: application/json'.", status=415)
    if first["type"] == "json_invalid":
        return RequestError(f"The body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    # where several alternatives were tried, the deepest complaint is about the one that was meant
    field = first["loc"][:2]
    first = max((error for error in errors[:100] if error["loc"][:2] == field), key=lambda error: _depth(error, body))
    path = _path(first, body)
    alike = [error for error in errors[:100] if _path(error, body) == path]
    said = " or ".join(dict.fromkeys(_lower(error["msg"]) for error in alike))
    if first["type"] == "missing":
        return RequestError(f"{path or 'The body'} is missing", param=path or None)
    value = "" if isinstance(first.get("input"), dict | list) else f", not {first.get('input')!r:.60}"
    return RequestError(f"{path or 'The body'}: {said}{value}", param=path or None)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _depth(error: Mapping[str, Any], body: Any) -> int:
    return _path(error, body).count(".") + _path(error, body).count("[")


def _path(error: Mapping[str, Any], body: Any) -> str:
    """The place of an error in `body`: pydantic's `loc` less the names of the alternatives that it tried."""
    path, here = "", body
    for step in error["loc"][1:]:  # the first is "body"
        if isinstance(step, int) and isinstance(here, list) and step < len(here):
            path, here = f"{path}[{step}]", here[step]
        elif isinstance(step, str) and isinstance(here, dict) and (step in here or error["type"] == "missing"):
            path, here = f"{path}.{step}" if path else step, here.get(step)
    return path
