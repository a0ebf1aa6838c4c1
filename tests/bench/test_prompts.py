"""Prompts of known length: exact by the server's own count, or said to be approximate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from tests.bench.standin import StandIn, serving, tokens_of

from distserve.bench import prompts as making
from distserve.bench.client import Client
from distserve.bench.prompts import Prompts
from distserve.bench.server import Server
from distserve.traces import Arrival


@pytest.fixture
def standin() -> Iterator[StandIn]:
    with serving() as server:
        yield server


def client(standin: StandIn) -> Client:
    return Client(standin.url, api_key=None, timeout=5)


async def learn(standin: StandIn, *, chat: bool = False, kind: str = "auto", seed: int = 0) -> Prompts:
    async with client(standin) as connected:
        return await making.learn(connected, Server("stand-in", None), chat=chat, kind=kind, seed=seed)


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


@pytest.mark.parametrize("chat", [False, True])
async def test_text_without_a_tokenizer_is_counted_by_usage(standin: StandIn, chat: bool) -> None:
    standin.behaviour.tokenize = False
    prompts = await learn(standin, chat=chat, kind="text")
    assert prompts.note == ""
    for number in range(20):
        assert tokens_of(prompts.make(number, 40)) == 40  # "which", two tokens there, is not among its words


async def test_text_that_nobody_counts_says_so(standin: StandIn) -> None:
    standin.behaviour.tokenize = standin.behaviour.usage = False
    prompts = await learn(standin, kind="text")
    assert "approximate" in prompts.note
    assert len(prompts.make(0, 40)["prompt"].split()) == 40


STORY = "I know which road leads there,\n\nwhich none  of them took: which? " * 20


@pytest.mark.parametrize("chat", [False, True])
async def test_a_persons_own_text_is_cut_to_exact_lengths(standin: StandIn, chat: bool) -> None:
    async with client(standin) as connected:
        server = Server("stand-in", None)
        prompts = await making.learn(connected, server, chat=chat, kind="text", seed=0, text=STORY)
        asked = [Arrival(0.0, tokens, 1) for tokens in (12, 13, 14, 100, 101, 399)]
        ready: list[int] = []
        parts = await prompts.fit(asked, 0, ready.append)
        again = await prompts.fit(asked, 0, ready.append)
        other = await prompts.fit(asked, 1, ready.append)
    assert [tokens_of(parts[i]) for i in range(6)] == [12, 13, 14, 100, 101, 399]
    assert parts == again != other
    assert sorted(ready) == sorted([1, 2, 3, 4, 5, 6] * 3)
    assert prompts.missed == []
    text = parts[3]["messages"][0]["content"] if chat else parts[3]["prompt"]
    assert "leads there,\n\nwhich none  of them" in text  # as it was written


async def test_a_text_of_token_ids_goes_on_where_it_was_cut(standin: StandIn) -> None:
    async with client(standin) as connected:
        prompts = await making.learn(connected, Server(None, None), chat=False, kind="auto", seed=0, text=STORY)
        assert await prompts.fit([Arrival(0.0, 5, 1)], 0, print) == {}
    ids = prompts.make(0, 50)["prompt"]
    assert len(ids) == 50
    assert all(after in (before + 1, prompts.ids[0]) for before, after in itertools.pairwise(ids))


async def test_a_text_without_a_tokenizer_is_approximate_and_says_so(standin: StandIn) -> None:
    standin.behaviour.tokenize = False
    async with client(standin) as connected:
        prompts = await making.learn(connected, Server(None, None), chat=True, kind="auto", seed=0, text=STORY)
        assert await prompts.fit([Arrival(0.0, 50, 1)], 0, print) == {}
    assert "approximate" in prompts.note
    assert tokens_of(prompts.make(0, 300)) == pytest.approx(300, rel=0.1)


async def test_what_cannot_be_made_exactly_is_counted(standin: StandIn) -> None:
    async with client(standin) as connected:
        prompts = await making.learn(connected, Server(None, None), chat=True, kind="auto", seed=0, text=STORY)
        parts = await prompts.fit([Arrival(0.0, 2, 1)], 0, print)  # the template alone has five
    assert tokens_of(parts[0]) in (6, 7)
    assert len(prompts.missed) == 1


async def test_prompts_differ_by_request_and_repeat_by_seed(standin: StandIn) -> None:
    one, two, other = await learn(standin), await learn(standin), await learn(standin, seed=1)
    assert one.make(0, 30) == two.make(0, 30)
    assert one.make(0, 30) != one.make(1, 30)
    assert one.make(0, 30) != other.make(0, 30)
    assert one.make(0, 30) != one.make(0, 30, salt=1)  # of another run: no prefix cache may know it
