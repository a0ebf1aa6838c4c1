"""Instances of several ranks, served: two that compute prompts and two that decode, all of other degrees. One server
for all tests; whatever is killed, everybody is answered, and the server is whole again afterwards."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
import torch
from tests.engine.support import reference_tokens
from tests.engine.test_models import checkpoint
from tests.serve.http.small import make_tokenizer
from tests.serve.live import Server, serving

PLAN = """
[[instances]]
role = "prefill"
tp = 3
[[instances]]
role = "prefill"
pp = 2
[[instances]]
role = "decode"
tp = 2
pp = 2
[[instances]]
role = "decode"
pp = 3
"""
DEGREES = {"prefill-0": 3, "prefill-1": 2, "decode-0": 4, "decode-1": 3}
SHAPE = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6}
NUM_TOKENS = 40
Story = tuple[list[int], str]  # a prompt, and what greedy decoding makes of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def stories(folder: Path) -> list[Story]:
    tokenizer = make_tokenizer(folder / "model")
    reference = checkpoint(folder / "model", "mha", vocab_size=tokenizer.vocab_size, num_hidden_layers=6, **SHAPE)
    chance = torch.Generator().manual_seed(4)
    found = []
    for length in (1, 5, 16, 33, 64, 130, 200, 77):
        prompt = torch.randint(3, tokenizer.vocab_size, (length,), generator=chance).tolist()
        tokens = reference_tokens(reference, prompt, NUM_TOKENS)
        found.append((prompt, b"".join(tokenizer.pieces[token] for token in tokens).decode(errors="replace")))
    return found


@pytest.fixture(scope="module")
def server(folder: Path, stories: list[Story]) -> Iterator[Server]:
    (folder / "plan.toml").write_text(PLAN)
    plan = ("--plan", str(folder / "plan.toml"), "--kv-memory", "2MiB", "--max-batch-tokens", "256", "--awake", "0")
    with serving(folder, str(folder / "model"), *plan) as running:
        yield running


def ranks(server: Server, instance: str) -> list[psutil.Process]:
    pid = server.pid(instance)
    assert pid is not None
    return sorted(psutil.Process(pid).children(), key=lambda process: process.pid)


def whole(server: Server) -> bool:
    """Every instance is there with all of its ranks, and nobody else is."""
    if not all(server.pid(name) for name in DEGREES):
        return False
    expected = 1 + 1 + len(DEGREES) + sum(DEGREES.values())  # the gateway, the fork server, instances, ranks
    processes = server.processes()
    assert len(processes) <= expected
    return len(processes) == expected and all(p.status() != psutil.STATUS_ZOMBIE for p in processes)


async def load(server: Server, stories: list[Story], count: int, leavers: float = 0.0) -> None:
    """`count` requests, of which some leave before their end; asserts that the others got the right answers."""
    chance = random.Random(count)

    async def one(client: httpx2.AsyncClient, story: Story, leave_after: int | None) -> None:
        prompt, expected = story
        body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
        if leave_after is None:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == expected
            return
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as lines:
            async for _ in lines.aiter_lines():
                leave_after -= 1
                if leave_after <= 0:
                    return

    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
        draws = [chance.randint(0, 30) if chance.random() < leavers else None for _ in range(count)]
        requests = [one(client, stories[i % len(stories)], draw) for i, draw in enumerate(draws)]
        errors = [error for error in await asyncio.gather(*requests, return_exceptions=True) if error is not None]
    assert not errors, errors[0]


def lives(process: psutil.Process) -> bool:
    """Whether it can still do anything: a dead one that nobody has buried yet cannot."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def in_the_middle(server: Server, stories: list[Story], process: psutil.Process, number: int) -> None:
    """Sends a signal to a process while it is under load; everybody is answered, and the server is whole again."""
    await asyncio.to_thread(server.wait_for, "the server whole", lambda: whole(server))
    work = asyncio.create_task(load(server, stories, 24))
    await asyncio.to_thread(server.wait_for, "work", lambda: not server.idle())
    os.kill(process.pid, number)
    await work
    await asyncio.to_thread(server.wait_for, "the server whole again", lambda: whole(server))
    await asyncio.to_thread(server.wait_for, "all blocks free", server.idle, within=5)


async def test_a_mixed_load_with_departures_is_answered_right_and_leaks_nothing(
    server: Server, stories: list[Story]
) -> None:
    await load(server, stories, 150, leavers=0.4)
    server.wait_for("all blocks free", server.idle, within=5)
    for name, value in server.metrics().items():
        if name.startswith("distserve:batch_tokens_count"):
            assert value > 0, name  # everybody took part
    assert server.total("distserve:instance_restarts_total") == 0
    assert server.total("distserve:pull_failures_total") == 0
    assert server.total("distserve:digest_failures_total") == 0


@pytest.mark.parametrize(("instance", "rank"), [("decode-0", 3), ("prefill-0", 1)])
async def test_a_rank_that_is_killed_takes_its_instance_down_at_once_and_nobodys_answer(
    server: Server, stories: list[Story], instance: str, rank: int
) -> None:
    server.wait_for("the server whole", lambda: whole(server))
    family = [psutil.Process(server.pid(instance)), *ranks(server, instance)]
    restarts = server.total("distserve:instance_restarts_total")
    killed = time.monotonic()
    await in_the_middle(server, stories, family[1 + rank], signal.SIGKILL)
    assert server.total("distserve:instance_restarts_total") == restarts + 1
    assert f"rank {rank} (process {family[1 + rank].pid}) was killed by signal 9" in server.log.read_text()
    server.wait_for("the family gone", lambda: not any(map(lives, family)), within=5)
    assert time.monotonic() - killed < 60


async def test_the_family_of_a_rank_is_gone_within_two_seconds(server: Server) -> None:
    """Also where nothing is computed."""
    server.wait_for("the server whole", lambda: whole(server))
    family = [psutil.Process(server.pid("decode-1")), *ranks(server, "decode-1")]
    family[-1].kill()
    _, alive = psutil.wait_procs(family, timeout=2)
    assert not alive
    server.wait_for("the server whole again", lambda: whole(server))


async def test_a_rank_that_stands_still_is_found_by_its_late_step(server: Server, stories: list[Story]) -> None:
    server.wait_for("the server whole", lambda: whole(server))
    family = [psutil.Process(server.pid("prefill-1")), *ranks(server, "prefill-1")]
    await in_the_middle(server, stories, family[2], signal.SIGSTOP)
    assert "prefill-1 hung" in server.log.read_text()
    server.wait_for("the family gone", lambda: not any(map(lives, family)), within=5)


async def test_ranks_end_with_their_driver(server: Server, stories: list[Story]) -> None:
    server.wait_for("the server whole", lambda: whole(server))
    driver = psutil.Process(server.pid("decode-0"))
    family = [driver, *ranks(server, "decode-0")]
    await in_the_middle(server, stories, driver, signal.SIGKILL)
    server.wait_for("the family gone", lambda: not any(map(lives, family)), within=5)


async def test_nothing_outlives_the_gateway(server: Server, stories: list[Story]) -> None:
    """The last test: the server is killed while it is at work."""
    server.wait_for("the server whole", lambda: whole(server))
    children = server.processes()[1:]
    work = asyncio.create_task(load(server, stories, 24))
    await asyncio.to_thread(server.wait_for, "work", lambda: not server.idle())
    server.process.kill()
    server.process.wait()
    with pytest.raises(AssertionError):
        await work
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
