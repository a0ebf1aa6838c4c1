"""A real server on a real socket, and an in-process client for what needs none."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import httpx2
import uvicorn
from starlette.types import ASGIApp

from distserve.serve.base import Generator
from distserve.serve.http.api import ApiOptions, build_app
from distserve.serve.http.tokens import Tokenizer

MODELS = ("small", "alias")


def make_app(generator: Generator, tokens: Tokenizer, options: ApiOptions | None = None) -> ASGIApp:
    return build_app(generator, tokens, options or ApiOptions(MODELS))


def in_process(app: ASGIApp) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


@contextlib.asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[str]:
    """The server's base URL while it runs, as it is run in earnest but for the event loop's make."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http="httptools", lifespan="off", log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
