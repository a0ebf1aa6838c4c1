"""Ranks in processes of their own compute what one device computes, several batches at once; and when one of them ends,
everybody knows at once and none is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file
from tests.engine.support import make_checkpoint

from distserve.engine.base import EngineOptions, EngineResult, Executor
from distserve.engine.executor import LocalExecutor
from distserve.engine.group import GroupExecutor
from distserve.engine.messages import Stage, encode
from distserve.engine.worker import stage_blocks
from distserve.errors import DistserveError, InstanceGone, RequestError, UsageError
from distserve.line import WaitingLine
from distserve.ranks import RankProcess, end_ranks, spawn_ranks
from distserve.request import Request, SamplingParams, Token
from distserve.sched.base import Batch, Sequence
from distserve.sched.blocks import BlockPool
from distserve.sched.colocated import ChunkedScheduler
from distserve.sched.policy import ColocatedPolicy
from distserve.serve.launch import RANK
from distserve.transfer.memory import SharedMemory

OPTIONS = EngineOptions("", dtype="float32", block_size=16, kv_bytes=1 << 20)


@asynccontextmanager
async def group(
    folder: Path, tp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[GroupExecutor, list[RankProcess]]]:
    """Not started yet; its ranks are gone at the end."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = spawn_ranks(tp * pp, RANK)
    memories: list[SharedMemory] = []

    def allocate(size: int) -> str:
        memories.append(SharedMemory(size))
        return memories[-1].path

    core = min(os.sched_getaffinity(0))
    options = replace(OPTIONS, model=str(folder), tp=tp, pp=pp, ranks=((core,),) * (tp * pp))
    executor = GroupExecutor(options, processes, allocate, folder / "rendezvous")
    try:
        yield executor, processes
    finally:
        await executor.stop()
        end_ranks(processes)
        for memory in memories:
            memory.close()


async def answers(executor: Executor, requests: list[Request]) -> dict[int, list[Token]]:
    """Driven by a real scheduler, with as many batches in flight as there may be."""
    pool = BlockPool(executor.num_blocks, executor.block_size)
    policy = ColocatedPolicy(chunk_tokens=48, max_batch_size=8)
    scheduler = ChunkedScheduler(pool, policy, max_in_flight=executor.max_in_flight)
    found: dict[int, list[Token]] = {request.id: [] for request in requests}
    for request in requests:
        executor.add(request)
        scheduler.add(Sequence(request.id, request.num_tokens), 0.0)
    flights: deque[tuple[Batch, asyncio.Future[EngineResult]]] = deque()
    while True:
        while len(flights) < executor.max_in_flight and (batch := scheduler.next_batch(0.0)) is not None:
            flights.append((batch, executor.launch(batch)))
        if not flights:
            return found
        batch, launched = flights.popleft()
        result = await launched
        assert not result.failures
        for sequence in scheduler.complete(batch, result.ended, 0.0).finished:
            executor.forget(sequence.id)
        for request_id, token in result.tokens.items():
            found[request_id].append(token)


def mixture() -> list[Request]:
    """Greedy and sampled, short and in several chunks, with everything that the sampling rank must know of."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"temperature": 0, "min_tokens": 12, "stop_token_ids": (5, 6, 7), "logit_bias": ((9, 2.5),)},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 5},
    ]
    return [
        Request(i, [3 + (7 * i + j * j) % 120 for j in range(5 + 23 * i)], SamplingParams(max_tokens=20 + i, **ways[i]))
        for i in range(len(ways))
    ]


async def start(executor: Executor) -> list[tuple[float, str]]:
    heard: list[tuple[float, str]] = []
    await executor.start(lambda fraction, what: heard.append((fraction, what)))
    return heard


def batch(executor: Executor, request_id: int, length: int = 8) -> Batch:
    executor.add(Request(request_id, [3] * length, SamplingParams(max_tokens=4, temperature=0)))
    return Batch(request_id, [(Sequence(request_id, length, blocks=[request_id]), length)])


async def assert_gone(processes: list[RankProcess], since: float) -> None:
    assert not any(psutil.pid_exists(process.pid) for process in processes), "a rank is left, if only as a zombie"
    assert time.monotonic() - since < 2.0


async def test_ranks_answer_as_one_device_until_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path)
    alone = LocalExecutor(replace(OPTIONS, model=str(tmp_path)))
    await start(alone)
    expected = await answers(alone, mixture())
    await alone.stop()
    async with group(tmp_path, 2, 2, monkeypatch) as (executor, processes):
        heard = await start(executor)
        assert [fraction for fraction, _ in heard] == sorted(fraction for fraction, _ in heard)
        assert heard[-1] == (1.0, "ready")
        assert (executor.max_in_flight, executor.max_model_len) == (2, 512)
        assert executor.num_blocks == OPTIONS.kv_bytes // (2 * 2 * 16 * 16 * 4)  # 2 layers, 1 of 2 heads of 16
        for _ in range(2):  # the second time under the same ids
            found = await answers(executor, mixture())
            assert {i: [t.id for t in tokens] for i, tokens in found.items()} == {
                i: [t.id for t in tokens] for i, tokens in expected.items()
            }
            for (one,), (other,) in ((found[1][:1], expected[1][:1]),):
                assert one.logprobs is not None
                assert other.logprobs is not None
                assert one.logprobs.token == pytest.approx(other.logprobs.token, abs=1e-4)
                assert one.prompt_logprobs is not None
                assert len(one.prompt_logprobs) == 28
        with pytest.raises(RequestError, match="token 128"):
            executor.add(Request(9, [128], SamplingParams()))

        flights = [executor.launch(batch(executor, key)) for key in (20, 21)]
        since = time.monotonic()
        os.kill(processes[2].pid, signal.SIGKILL)
        with pytest.raises(InstanceGone, match=r"rank 2 \(process \d+\) was killed by signal 9"):
            await asyncio.gather(*flights, executor.launch(batch(executor, 22)))
        await assert_gone(processes, since)
        with pytest.raises(InstanceGone, match="rank 2"):
            await executor.launch(batch(executor, 23))


async def test_a_rank_that_ends_while_nothing_is_computed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path)
    async with group(tmp_path, 1, 2, monkeypatch) as (executor, processes):
        await start(executor)
        broken: asyncio.Future[DistserveError] = asyncio.get_running_loop().create_future()
        executor.on_broken(broken.set_result)
        since = time.monotonic()
        os.kill(processes[0].pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            assert "rank 0" in str(await broken)
        await assert_gone(processes, since)


async def test_what_a_rank_cannot_load_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    async with group(tmp_path, 1, 2, monkeypatch) as (executor, processes):
        with pytest.raises(UsageError, match=r"layers\.2"):
            await start(executor)
        since = time.monotonic()
        await assert_gone(processes, since)


def test_kv_is_staged_on_a_line_of_its_own() -> None:
    """As a rank on a GPU does it, in a thread beside the one that computes."""
    ours, theirs = socket.socketpair()
    moved: list[tuple[str, list[int]]] = []

    class Device:
        def export_blocks(self, blocks: list[int]) -> None:
            moved.append(("out", blocks))

        def import_blocks(self, blocks: list[int]) -> None:
            moved.append(("in", blocks))

    side, line = WaitingLine(theirs), WaitingLine(ours)
    thread = threading.Thread(target=stage_blocks, args=(side, Device()))
    thread.start()
    for blocks, to_device in (([1, 2], False), ([5], True)):
        line.send(encode(Stage(blocks, to_device)))
        assert line.receive() == b""
    assert moved == [("out", [1, 2]), ("in", [5])]
    line.close()
    thread.join()
    side.close()
