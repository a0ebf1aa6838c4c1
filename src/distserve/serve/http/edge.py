"""What every HTTP exchange passes first, as plain ASGI: request id, API key, size of the body. Knows no routes."""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Iterable, Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distserve.errors import RequestError
from distserve.serve.http.answer import BODY_SEND, write_refusal

OPEN_PATHS = frozenset({"/health", "/ping", "/metrics"})  # probes and scrapers bring no key
REQUEST_ID = "distserve.request_id"  # key in the ASGI scope
_SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Edge:
    """Wraps the application. `x-request-id` is the client's own where it is short and printable, else a new one; every
    response carries it, errors too."""

    def __init__(self, app: ASGIApp, direct: Mapping[str, ASGIApp], api_keys: Iterable[str], max_body: int) -> None:
        """`direct`: by path, who answers a POST in place of `app`. `max_body`: bytes; larger ones are refused (413)."""
        self._app = app
        self._direct = dict(direct)
        # digests have one length, so that comparing takes the same time whatever was sent
        self._keys = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope[REQUEST_ID] = request_id.decode()
        scope[BODY_SEND] = send

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        error = self._refuse(scope["path"], headers)
        if error is not None:
            await write_refusal(send_with_id, error)
            return
        app = self._direct.get(scope["path"], self._app) if scope["method"] == "POST" else self._app
        await app(scope, _counted(receive, self._max_body), send_with_id)

    def _refuse(self, path: str, headers: dict[bytes, bytes]) -> RequestError | None:
        if self._keys and path not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            return RequestError(
                "Incorrect API key provided: send the server's key as 'Authorization: Bearer KEY'.",
                status=401,
                code="invalid_api_key",
            )
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size) > self._max_body:
            return RequestError(_too_large(self._max_body), status=413)
        return None

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        known = [hmac.compare_digest(digest, one) for one in self._keys]
        return scheme.lower() == b"bearer" and any(known)


def _counted(receive: Receive, limit: int) -> Receive:
    """Stops a body that came without its length when it grows beyond `limit`."""
    size = 0

    async def receive_counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise HTTPException(413, _too_large(limit))
        return message

    return receive_counted


def _too_large(limit: int) -> str:
    return f"The body is larger than {limit} bytes: send less, or raise the server's limit."
