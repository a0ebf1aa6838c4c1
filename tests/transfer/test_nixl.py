"""Pulls over NIXL: the contract by both ways that a machine without a network card has, and reads that are given up."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import pytest
from tests.transfer.contract import NUM_BLOCKS, TargetEnd, TransportContract, of
from tests.transfer.shared import SharedMedium

from distserve.errors import PullError, UsageError
from distserve.transfer import agent as nixl_agent
from distserve.transfer import nixl
from distserve.transfer.agent import Agent, require
from distserve.transfer.base import KVHandle
from distserve.transfer.layout import InstanceLayout
from distserve.transfer.memory import SharedMemory
from distserve.transfer.nixl import NixlSource, NixlTransport

try:
    require()
except UsageError as missing:
    pytest.skip(str(missing), allow_module_level=True)


class NixlMedium(SharedMedium):
    """Every end has an agent of its own, as instances have."""

    def make_source(self, memories: list[SharedMemory], num_blocks: int, layout: InstanceLayout) -> NixlSource:
        return NixlSource(memories, num_blocks, layout, agent=Agent(one_host=True))

    def make_transport(self, memories: list[SharedMemory], num_blocks: int, layout: InstanceLayout) -> NixlTransport:
        agent = Agent(one_host=True)
        self.pulling.callback(agent.close)  # after its transport
        return NixlTransport(memories, num_blocks, layout, agent=agent)


class TestNixl(TransportContract):
    """As NIXL chooses on one host: out of the other process's memory."""

    medium_class = NixlMedium


class TestOverTcp(TransportContract):
    """As between hosts without a better network, and in pieces of one block."""

    medium_class = NixlMedium

    @pytest.fixture(autouse=True)
    def tcp_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp,self")
        monkeypatch.setattr(nixl, "PIECE", 1)


@pytest.fixture
def medium() -> Iterator[NixlMedium]:
    medium = NixlMedium()
    yield medium
    medium.close()


# -- sources that do not answer ---------------------------------------------------------------------------------------


@pytest.fixture
async def stopped(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[KVHandle, TargetEnd, int]]:
    """A handle of more than sockets hold, of a source in another process that was met over TCP and then stopped."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=publish_much, args=(theirs,), daemon=True)
    process.start()
    medium = NixlMedium()
    try:
        theirs.close()
        handle = msgspec.msgpack.decode(await asyncio.to_thread(ours.recv_bytes), type=KVHandle)
        target = medium.target(LARGE, NUM_BLOCKS)
        await target.transport.connect(handle.source)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        yield handle, target, process.pid
    finally:
        medium.close()
        process.kill()
        await asyncio.to_thread(process.join)
        ours.close()


LARGE = replace(of((4, 2), 1, 1), head_dim=128, block_size=4096)  # 16 MiB a block


def publish_much(line: Connection) -> None:
    medium = NixlMedium()
    source = medium.source(LARGE, NUM_BLOCKS)
    source.ranks[0][:] = 0xAB
    line.send_bytes(msgspec.msgpack.encode(source.handle([0, 1, 2])))
    line.recv_bytes()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_what_arrives_after_its_pull_was_given_up_goes_nowhere(stopped: tuple[KVHandle, TargetEnd, int]) -> None:
    """NIXL writes on when the source goes on, whatever is done about it; the blocks are another request's by then."""
    handle, target, pid = stopped
    landings = target.transport._landings  # type: ignore[attr-defined]
    pull = asyncio.create_task(target.transport.pull(handle, [0, 1, 2]))
    await until(lambda: any(landing.reads for landing in landings._taken))
    (landing,) = landings._taken
    target.transport.disconnect("prefill-0", 1)
    with pytest.raises(PullError) as caught:
        await asyncio.wait_for(pull, 2)
    assert caught.value.reason == "gone"
    other = landings.take("another", landing.size)
    assert other is not landing, "given out though its reads are under way"
    landings.leave(other)
    (name,) = landings._leaving
    assert landings.is_leaving(name), "forgotten though reads of its memory are under way"

    os.kill(pid, signal.SIGCONT)
    await until(lambda: bool((landing.memory == 0xAB).all()))  # here it comes
    assert not target.ranks[0].any()
    assert not landings.is_leaving(name)
    assert not landing.reads


async def test_a_source_that_does_not_answer_fails_the_pull(
    stopped: tuple[KVHandle, TargetEnd, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, target, _ = stopped
    monkeypatch.setattr(nixl, "PATIENCE", 0.1)
    monkeypatch.setattr(nixl, "SLOWEST", 1e12)
    with pytest.raises(PullError, match="no answer from prefill-0") as caught:
        await asyncio.wait_for(target.transport.pull(handle, [0, 1, 2]), 5)
    assert caught.value.reason == "transport"
    late = NixlMedium()
    with pytest.raises(PullError, match="prefill-0 cannot be reached: no answer") as caught:
        await asyncio.wait_for(late.target(LARGE, 1).transport.connect(handle.source), 5)
    assert caught.value.reason == "gone"
    late.close()


async def test_the_event_loop_goes_on_while_a_pull_waits(stopped: tuple[KVHandle, TargetEnd, int]) -> None:
    handle, target, pid = stopped
    pull = asyncio.create_task(target.transport.pull(handle, [3, 4, 5]))
    turns = 0
    while turns < 1000:
        await asyncio.sleep(0)
        turns += 1
    assert not pull.done()
    os.kill(pid, signal.SIGCONT)
    await pull
    assert (target.ranks[0][3:] == 0xAB).all()


async def test_a_source_that_was_cut_off_is_met_again(medium: NixlMedium) -> None:
    source, target = medium.source(of((4, 2), 2, 1), NUM_BLOCKS), medium.target(of((4, 2), 1, 2), NUM_BLOCKS)
    source.ranks[1][:] = 0xCD
    handle = source.handle([0, 1])
    for _ in range(3):
        await target.transport.pull(handle, [2, 3])
        target.transport._agent.forget(source.source._agent.name)  # type: ignore[attr-defined]
        with pytest.raises(PullError, match="prefill-0 cannot be reached") as caught:
            await target.transport.pull(handle, [2, 3])
        assert caught.value.reason == "gone"
    assert (target.ranks[0][2:4] == 0xCD).any()


# -- the agent --------------------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "PACKAGES", ("no_such_nixl",))
    with pytest.raises(UsageError, match=r"not installed: pip install 'distserve\[cluster\]'"):
        require()
    with pytest.raises(UsageError, match="not installed"):
        Agent(one_host=True)


def test_settings_of_the_environment_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in nixl_agent.SETTINGS | nixl_agent.ONE_HOST:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UCX_NET_DEVICES", "all")
    Agent(one_host=True).close()
    assert os.environ["UCX_NET_DEVICES"] == "all"
    assert os.environ["UCX_TCP_TX_SEG_SIZE"] == "256k"


def test_an_agent_is_idle_when_nothing_is_read() -> None:
    """The progress thread that NIXL's own class would start spins: a whole core."""
    agent = Agent(one_host=True)
    before, began = time.process_time(), time.monotonic()
    time.sleep(1)
    assert time.process_time() - before < 0.1 * (time.monotonic() - began)
    agent.close()


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([(100, 0, 8), (108, 8, 8), (116, 16, 4)], [(100, 0, 20)]),
        ([(100, 0, 8), (108, 9, 8)], [(100, 0, 8), (108, 9, 8)]),
        ([(100, 0, 8), (107, 8, 8), (115, 16, 1)], [(100, 0, 8), (107, 8, 9)]),
        ([(100, 0, 8)], [(100, 0, 8)]),
    ],
)
def test_pieces_that_follow_each_other_on_both_sides_are_one(
    pieces: list[tuple[int, int, int]], expected: list[tuple[int, int, int]]
) -> None:
    assert nixl._merged(np.array(pieces, np.uint64)).tolist() == [list(piece) for piece in expected]


@pytest.mark.parametrize(("source", "target"), [((1, 1), (2, 2)), ((2, 2), (1, 1)), ((2, 1), (4, 2)), ((1, 3), (2, 2))])
def test_whole_blocks_cross_the_network_whatever_the_degrees(source: tuple[int, int], target: tuple[int, int]) -> None:
    layout = of((4, 2), *source)
    wanted = [found.tolist() for found in nixl._wanted(layout, of((4, 2), *target))]
    assert wanted == [[[0, layout.of_rank(rank).block_bytes]] for rank in range(layout.sharding.num_ranks)]


def test_of_heads_that_several_source_ranks_hold_each_is_read_once() -> None:
    layout = of((4, 2), 4, 1)
    wanted = nixl._wanted(layout, of((4, 2), 1, 2))
    assert sum(int(found[:, 1].sum()) for found in wanted) == of((4, 2), 1, 1).of_rank(0).block_bytes
