"""The fake must be as strict as a real device is silent: the same request the same tokens, and no KV mix-up unseen."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from tests import virtual

from distserve.engine.base import EngineOptions, EngineResult
from distserve.engine.fake import TINY_LAYOUT, FakeExecutor, FakeModel, KVMismatch
from distserve.errors import PlanError
from distserve.request import FinishReason, Request, SamplingParams
from distserve.sched.base import Batch, Sequence
from distserve.specs import KVLayout

DEFAULT = FakeModel()


async def started(model: FakeModel = DEFAULT, **arguments: Any) -> FakeExecutor:
    executor = FakeExecutor(EngineOptions("fake", kv_bytes=64 << 10, block_size=16), model, verify=True, **arguments)
    await executor.start(lambda fraction, what: None)
    return executor


def request(request_id: int, length: int = 20, **sampling: Any) -> Request:
    return Request(request_id, list(range(100, 100 + length)), SamplingParams(**{"max_tokens": 8, **sampling}))


async def generate(executor: FakeExecutor, asked: Request, blocks: list[int], chunk: int = 7) -> list[Any]:
    """Prompt in chunks, then token by token to the end."""
    executor.add(asked)
    sequence = Sequence(asked.id, asked.num_tokens, blocks=blocks)
    tokens = []
    while True:
        count = min(chunk, sequence.num_tokens - sequence.num_computed)
        result = await executor.execute(Batch(0, [(sequence, count)]))
        sequence.num_computed += count
        if token := result.tokens.get(asked.id):
            sequence.num_tokens += 1
            tokens.append(token)
            if token.finish:
                executor.forget(asked.id)
                return tokens


async def test_the_answer_depends_on_prompt_and_seed_alone() -> None:
    first, second = await started(), await started()
    answer = [token.id for token in await generate(first, request(1), [3, 1, 2])]
    assert [token.id for token in await generate(second, request(77), [9, 4, 8], chunk=100)] == answer
    other = [token.id for token in await generate(second, request(3, seed=5), [9, 4, 8])]
    assert other != answer
    retry = request(5)
    retry.output = answer[:3]
    assert [token.id for token in await generate(second, retry, [9, 4, 8])] == answer[3:]
    assert all(3 <= token < 1000 for token in answer)


async def test_it_ends_as_it_was_told() -> None:
    short = await started(FakeModel(num_output=lambda asked: 5))
    ended = await generate(short, request(1), [0, 1])
    assert (len(ended), ended[-1].id, ended[-1].finish) == (5, 2, FinishReason.STOP)
    assert len(await generate(short, request(2, ignore_eos=True), [0, 1])) == 8
    assert len(await generate(short, request(3, min_tokens=6), [0, 1])) == 7
    long = await generate(short, request(4, max_tokens=3), [0, 1])
    assert (len(long), long[-1].finish) == (3, FinishReason.LENGTH)
    stopped = request(5, ignore_eos=True, stop_token_ids=(long[1].id,))
    assert [token.finish for token in await generate(short, stopped, [0, 1])] == [None, FinishReason.STOP]
    full = await started(FakeModel(max_model_len=23))
    assert len(await generate(full, request(6), [0, 1])) == 3


async def test_logprobs_where_asked_for() -> None:
    tokens = await generate(await started(), request(1, logprobs=2, prompt_logprobs=1), [0, 1])
    assert all(len(token.logprobs.top) == 2 for token in tokens)
    assert [None if entry is None else entry.rank for entry in tokens[0].prompt_logprobs] == [None] + [1] * 19
    assert all(token.prompt_logprobs is None for token in tokens[1:])


@pytest.mark.parametrize("spoil", ["byte", "other sequence", "wrong blocks", "not computed"])
async def test_a_mix_up_is_seen_at_the_next_step(spoil: str) -> None:
    executor = await started()
    executor.add(request(1))
    sequence = Sequence(1, 20, blocks=[4, 7])
    await executor.execute(Batch(0, [(sequence, 20)]))
    sequence.num_computed, sequence.num_tokens = 20, 21
    executor.check(sequence)
    if spoil == "byte":
        executor.kv_buffers[0][7 * executor.layout.block_bytes + 1] ^= 1
    elif spoil == "other sequence":
        executor.add(request(2, length=5, seed=1))
        await executor.execute(Batch(1, [(Sequence(2, 5, blocks=[7]), 5)]))
        executor.add(Request(3, [1, 2, 3], SamplingParams()))
        await executor.execute(Batch(1, [(Sequence(3, 3, blocks=[7]), 3)]))
    elif spoil == "wrong blocks":
        sequence.blocks = [7, 4]
    else:
        sequence.num_computed = 21
    with pytest.raises(KVMismatch, match="sequence 1"):
        await executor.execute(Batch(2, [(sequence, 1)]))


async def test_kv_can_move_to_another_instance() -> None:
    source, target = await started(), await started()
    asked = request(1)
    source.add(asked)
    sequence = Sequence(1, 20, blocks=[4, 7])
    await source.execute(Batch(0, [(sequence, 20)]))
    size = source.layout.block_bytes
    for here, there in ((4, 1), (7, 0)):
        block = source.kv_buffers[0][here * size : (here + 1) * size]
        target.kv_buffers[0][there * size : (there + 1) * size] = block
    target.add(Request(9, asked.prompt, asked.sampling, output=list(asked.output)))
    moved = Sequence(9, 21, num_computed=20, blocks=[1, 0])
    result = await target.execute(Batch(0, [(moved, 1)]))
    sequence.num_computed, sequence.num_tokens = 20, 21
    assert result.tokens[9] == (await source.execute(Batch(1, [(sequence, 1)]))).tokens[1]


def test_time_is_the_event_loops() -> None:
    async def step() -> tuple[float, EngineResult]:
        executor = await started(FakeModel(seconds=lambda batch: 0.25 * batch.num_tokens))
        executor.add(request(1))
        result = await executor.execute(Batch(0, [(Sequence(1, 20, blocks=[0, 1]), 12)]))
        return asyncio.get_running_loop().time(), result

    now, result = virtual.run(step())
    assert (now, result.seconds) == (3.0, 3.0)
    assert not result.tokens


def test_batches_follow_each_other_through_the_stages() -> None:
    async def steps() -> list[float]:
        model = FakeModel(
            layout=replace(TINY_LAYOUT, num_layers=3),
            seconds=lambda batch: 0.5 * batch.num_tokens,
            host=lambda batch: 0.25,
        )
        options = EngineOptions("fake", kv_bytes=64 << 10, block_size=16, pp=3)
        executor = FakeExecutor(options, model, verify=True)
        await executor.start(lambda fraction, what: None)
        loop, landed = asyncio.get_running_loop(), []
        results = []
        for key, length in ((1, 4), (2, 2), (3, 2)):
            executor.add(request(key, length))
            results.append(executor.launch(Batch(key, [(Sequence(key, length, blocks=[key]), length)])))
        for result in results:
            assert len((await result).tokens) == 1
            landed.append(loop.time())
        return landed

    # The first: 0.25 for the host, 3 stages of 2 s. Each other leaves its last stage 1 s after the one before it.
    assert virtual.run(steps()) == [6.25, 7.25, 8.25]


async def test_any_layout_and_any_memory() -> None:
    memory: list[bytearray] = []

    def factory(size: int) -> bytearray:
        memory.append(bytearray(size))
        return memory[0]

    layout = KVLayout(num_layers=5, num_kv_heads=3, head_dim=64, block_size=32, dtype="bfloat16")
    executor = await started(FakeModel(layout=layout), kv_buffer_factory=factory)
    assert executor.layout.block_size == 16
    assert len(await generate(executor, request(1, length=1, max_tokens=2), [0])) == 2
    assert executor.kv_buffers == memory
    assert any(memory[0])
    with pytest.raises(PlanError, match="hold no block"):
        FakeExecutor(EngineOptions("fake", kv_bytes=10))
