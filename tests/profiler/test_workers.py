"""Workers as processes: a fake engine with real KV memory and real pulls, and one tiny real model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from tests.engine.support import make_checkpoint

from distserve.engine.base import EngineOptions
from distserve.errors import UsageError
from distserve.profiler.messages import Chunks, Decodes, Prompts, Publish, Published, Pull, Took
from distserve.profiler.workers import WorkerDied, Workers

FAKE = EngineOptions(model="fake:step=0.002,token=0.0001", block_size=16, kv_bytes=1 << 20)


async def test_two_workers_time_steps_and_pull_from_each_other() -> None:
    async with Workers([FAKE, FAKE]) as workers:
        source, target = workers.all
        assert source.ready.num_blocks == (1 << 20) // source.ready.block_bytes
        took = await source.ask(Prompts([20, 10]), Took)
        assert took.seconds == [pytest.approx(0.005, rel=0.01)]
        took = await source.ask(Decodes(3, 40, 5), Took)
        assert took.seconds == pytest.approx([0.0023] * 5, rel=0.01)
        assert took.context == pytest.approx(120, abs=6)
        took = await source.ask(Chunks([(16, 8)], 2, 30), Took)
        assert took.seconds == [pytest.approx(0.003, rel=0.01)]
        published = await source.ask(Publish(4), Published)
        pulled = await target.ask(Pull(published.handle), Took)  # raises where a byte is not what was promised
        assert published.seconds > 0
        assert pulled.seconds[0] > 0


async def test_a_neighbour_is_busy_until_it_is_told_to_stop() -> None:
    async with Workers([FAKE, FAKE]) as workers:
        mine, other = workers.all
        await other.begin(Prompts([30]))
        await mine.ask(Prompts([300]), Took)
        took = await other.end()
        assert len(took.seconds) > 2
        assert (await other.ask(Prompts([10]), Took)).seconds == [pytest.approx(0.003, rel=0.01)]


async def test_a_real_model_is_timed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    options = EngineOptions(model=str(tmp_path), block_size=16, kv_bytes=1 << 20)
    async with Workers([options, options]) as workers:
        source, target = workers.all
        for work in (Prompts([40, 7]), Decodes(4, 100, 3), Chunks([(32, 16)], 2, 50)):
            took = await source.ask(work, Took)
            assert all(0 < seconds < 30 for seconds in took.seconds)
        published = await source.ask(Publish(3), Published)
        await target.ask(Pull(published.handle), Took)


async def test_what_cannot_be_started_is_the_persons_to_mend() -> None:
    too_small = replace(FAKE, kv_bytes=1)
    with pytest.raises(UsageError, match="hold no block"):
        async with Workers([too_small, too_small]):
            pass


async def test_a_worker_that_dies_is_told_and_the_others_leave() -> None:
    async with Workers([FAKE, FAKE]) as workers:
        pids = [process.pid for process in workers._processes]
        source = workers.all[0]
        published = await source.ask(Publish(1), Published)
        os.kill(published.handle.source.epoch, 9)  # a worker's epoch is its process
        with pytest.raises(WorkerDied, match="in the middle"):
            await source.ask(Prompts([10]), Took)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
