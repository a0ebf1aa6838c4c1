"""The same path on a GPU: same tokens as on a CPU, and KV that reaches the shared buffer and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.support import greedy, make_checkpoint, reference_tokens

from distserve.engine.base import EngineOptions
from distserve.engine.executor import LocalExecutor
from distserve.request import Request, SamplingParams
from distserve.sched.base import Batch, Sequence

pytestmark = pytest.mark.gpu

PROMPT = torch.randint(3, 128, (50,), generator=torch.Generator().manual_seed(2)).tolist()


async def started(folder: Path, device: str) -> LocalExecutor:
    executor = LocalExecutor(EngineOptions(str(folder), device=device, kv_bytes=1 << 22))
    await executor.start(lambda fraction, what: None)
    return executor


async def generate(executor: LocalExecutor, request: Request, sequence: Sequence) -> list[int]:
    executor.add(request)
    while True:
        count = sequence.num_tokens - sequence.num_computed
        token = (await executor.execute(Batch(0, [(sequence, count)]))).tokens[request.id]
        sequence.num_computed += count
        sequence.num_tokens += 1
        if token.finish:
            return request.output


async def test_tokens_equal_those_of_the_cpu(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path)
    gpu, cpu = await started(tmp_path, "cuda:0"), await started(tmp_path, "cpu")
    expected = reference_tokens(reference, PROMPT, 40)
    assert await generate(gpu, greedy(1, PROMPT, 40), Sequence(1, 50, blocks=[4, 1, 2])) == expected
    answers = []
    for executor in (gpu, cpu):
        sampled = Request(
            2, PROMPT, SamplingParams(max_tokens=40, seed=3, top_p=0.9, frequency_penalty=0.4, logprobs=2)
        )
        answers.append(await generate(executor, sampled, Sequence(2, 50, blocks=[0, 6, 7])))
    assert answers[0] == answers[1]
    await gpu.stop()
    await cpu.stop()


async def test_kv_moves_through_the_shared_buffer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    source, target = await started(tmp_path, "cuda:0"), await started(tmp_path, "cuda:0")
    request = greedy(1, PROMPT, 1)
    source.add(request)
    await source.execute(Batch(0, [(Sequence(1, 50, blocks=[4, 1]), 50)]))
    source.export_blocks([4, 1])
    size = source.layout.block_bytes
    for here, there in ((4, 3), (1, 9)):
        moved = memoryview(source.kv_buffer)[here * size : (here + 1) * size]
        memoryview(target.kv_buffer)[there * size : (there + 1) * size] = moved
    target.import_blocks([3, 9])
    follow = greedy(2, PROMPT, 20)
    follow.output = list(request.output)
    moved_on = await generate(target, follow, Sequence(2, 51, num_computed=50, blocks=[3, 9, 5]))
    assert moved_on == await generate(source, greedy(3, PROMPT, 20), Sequence(3, 50, blocks=[7, 8, 10]))
    await source.stop()
    await target.stop()
