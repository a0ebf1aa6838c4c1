"""What the load generator learns of a server before it starts."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from tests.bench.standin import StandIn, serving, tokens_of

from distserve.bench import server as servers
from distserve.bench.client import Client
from distserve.bench.server import NoServerError, Prompts, Server
from distserve.errors import UsageError


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with serving() as server:
        yield server


def client(standin: StandIn, key: str | None = None) -> Client:
    return Client(standin.url, api_key=key, timeout=5)


async def learn(standin: StandIn, *, chat: bool = False, kind: str = "auto", seed: int = 0) -> Prompts:
    async with client(standin) as connected:
        return await servers.learn(connected, Server("stand-in", None), chat=chat, kind=kind, seed=seed)


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


async def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with Client(f"http://127.0.0.1:{unused.getsockname()[1]}", api_key=None, timeout=5) as connected:
            with pytest.raises(NoServerError, match="no server answers at"):
                await servers.look(connected, None)
            assert not await servers.alive(connected)


@pytest.mark.parametrize("tokens", [1, 17, 500])
async def test_ids_are_the_servers_own_and_exact(standin: StandIn, tokens: int) -> None:
    prompts = await learn(standin)
    ids = prompts.make(3, tokens)["prompt"]
    assert len(ids) == tokens
    assert set(ids) <= set(range(100, 300))  # what the server's /tokenize gives
    assert prompts.note == ""


async def test_ids_without_a_tokenizer(standin: StandIn) -> None:
    standin.behaviour.tokenize = False
    ids = (await learn(standin)).make(0, 50)["prompt"]
    assert len(ids) == 50
    assert min(ids) >= 1000


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("tokens", [10, 33, 500])
async def test_text_is_exact_by_the_servers_count(standin: StandIn, chat: bool, tokens: int) -> None:
    prompts = await learn(standin, chat=chat, kind="text" if not chat else "auto")
    assert tokens_of(prompts.make(0, tokens)) == tokens
    assert prompts.note == ""
    assert tokens_of(prompts.make(0, 1)) >= 1  # the template alone is longer: one word


async def test_text_without_a_tokenizer_says_so(standin: StandIn) -> None:
    standin.behaviour.tokenize = False
    prompts = await learn(standin, kind="text")
    assert "approximate" in prompts.note
    assert len(prompts.make(0, 40)["prompt"].split()) == 40


async def test_prompts_differ_by_request_and_repeat_by_seed(standin: StandIn) -> None:
    one, two, other = await learn(standin), await learn(standin), await learn(standin, seed=1)
    assert one.make(0, 30) == two.make(0, 30)
    assert one.make(0, 30) != one.make(1, 30)
    assert one.make(0, 30) != other.make(0, 30)
