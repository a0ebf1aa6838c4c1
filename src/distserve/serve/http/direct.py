"""The routes that carry the load, past the framework: one JSON body in, one response out.

FastAPI's middleware, routing and dependencies cost a request 0.3 ms, more than all that follows but the tokenizer. It
still documents these routes, answers other methods on them, and answers every other path; what is refused here is
refused in the same words.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distserve.errors import DistserveError, RequestError
from distserve.serve.http.answer import write_refusal
from distserve.serve.http.openai import Body, InvalidBodyError, validate
from distserve.serve.http.refusals import invalid_body

_log = logging.getLogger(__name__)

Endpoint = Callable[[Any, Request], Awaitable[Response]]  # (an instance of the model, the request)


class Direct:
    """An ASGI application: `endpoint` with its body read and validated as `model`."""

    def __init__(self, model: type[Body], endpoint: Endpoint) -> None:
        self._model = model
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            data = await _read(receive)
            if data is None:
                return
            body = _parse(self._model, data, dict(scope["headers"]).get(b"content-type", b""))
            response = await self._endpoint(body, Request(scope))
        except HTTPException as error:  # from the layers around: the body is too large
            await write_refusal(send, RequestError(error.detail, status=error.status_code))
        except Exception as error:  # noqa: BLE001  whatever it is, the client must be told
            if not isinstance(error, DistserveError):
                _log.error("a request failed by a fault of ours", exc_info=error)
            await write_refusal(send, error)
        else:
            await response(scope, receive, send)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None where the client left before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _parse(model: type[Body], data: bytes, content_type: bytes) -> Body:
    """As FastAPI reads a body. Raises `RequestError` in its words."""
    if not data:
        raise invalid_body([{"type": "missing", "loc": ("body",), "msg": "Field required"}], None)
    content: Any = data
    if _is_json(content_type):
        try:
            content = _load(data)
        except json.JSONDecodeError as error:
            raise invalid_body([{"type": "json_invalid", "loc": ("body",), "msg": error.msg}], error.doc) from error
        except (ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, or too deep
            raise RequestError("There was an error parsing the body") from error
    try:
        return validate(model, content)
    except InvalidBodyError as error:
        complaints = error.errors(include_url=False, include_context=False)
        raise invalid_body([{**one, "loc": ("body", *one["loc"])} for one in complaints], content) from error


def _load(data: bytes) -> Any:
    """msgspec is quicker where it agrees; the standard library decides, and words, the rest (NaN, half surrogates)."""
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        return json.loads(data)


def _is_json(content_type: bytes) -> bool:
    """application/json, or application/anything+json, whatever its parameters."""
    main, _, sub = content_type.partition(b";")[0].strip().lower().partition(b"/")
    return main == b"application" and (sub == b"json" or sub.endswith(b"+json"))
