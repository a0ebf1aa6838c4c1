"""Measures what a scheduler should know of this device, with the engine itself: today the knee Lm."""

from __future__ import annotations

import time

from distserve.engine.base import Executor
from distserve.knee import SIZES, knee
from distserve.request import Request, SamplingParams
from distserve.sched.base import Batch, Sequence

BUDGET = 1.5  # seconds; a device that needs longer is past its knee or will be measured by `distserve profile`


async def measure_knee(executor: Executor) -> int:
    """Tokens of a prefill batch beyond which it hardly gets more efficient. Uses the KV pool, which must be idle."""
    found: dict[int, float] = {}  # seconds by size
    began = time.monotonic()
    for size in SIZES:
        if size > executor.max_model_len or size > executor.num_blocks * executor.block_size:
            break
        seconds = await _time_prompt(executor, size)
        if time.monotonic() - began < BUDGET / 2:  # quick enough for a second look: the better one had fewer guests
            seconds = min(seconds, await _time_prompt(executor, size))
        found[size] = seconds
        if time.monotonic() - began > BUDGET:
            break
    return knee(found, executor.max_model_len)


async def _time_prompt(executor: Executor, size: int) -> float:
    """Seconds that a prompt of `size` tokens takes alone."""
    num_blocks = -(-size // executor.block_size)
    key = -1  # no request has it
    executor.add(Request(key, [1] * size, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)))
    try:
        began = time.perf_counter()
        await executor.execute(Batch(0, [(Sequence(key, size, blocks=list(range(num_blocks))), size)]))
        return time.perf_counter() - began
    finally:
        executor.forget(key)
