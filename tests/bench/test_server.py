"""What the load generator learns of a server before it starts."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from tests.bench.standin import StandIn, serving

from distserve.bench import server as servers
from distserve.bench.client import Client
from distserve.bench.server import NoServerError, Server
from distserve.errors import UsageError


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with serving() as server:
        yield server


def client(standin: StandIn, key: str | None = None) -> Client:
    return Client(standin.url, api_key=key, timeout=5)


async def test_look_finds_model_and_context(standin: StandIn) -> None:
    async with client(standin) as connected:
        assert await servers.look(connected, None) == Server("stand-in", 4096)
        with pytest.raises(UsageError, match="--model gpt: the server has stand-in"):
            await servers.look(connected, "gpt")
        standin.behaviour.context = None
        assert await servers.look(connected, "stand-in") == Server("stand-in", None)
        assert await servers.alive(connected)


async def test_look_asks_for_the_key(standin: StandIn) -> None:
    standin.behaviour.key = "secret"
    async with client(standin) as connected:
        with pytest.raises(UsageError, match="--api-key"):
            await servers.look(connected, None)
    async with client(standin, "secret") as connected:
        assert (await servers.look(connected, None)).model == "stand-in"


async def test_a_server_that_still_loads_is_not_measured(standin: StandIn) -> None:
    standin.behaviour.ready = False
    async with client(standin) as connected:
        with pytest.raises(NoServerError, match="not ready"):
            await servers.look(connected, None)


async def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with Client(f"http://127.0.0.1:{unused.getsockname()[1]}", api_key=None, timeout=5) as connected:
            with pytest.raises(NoServerError, match="no server answers at"):
                await servers.look(connected, None)
            assert not await servers.alive(connected)
