"""The knee of devices whose speed is known, because they are fake."""

from __future__ import annotations

import pytest

from distserve.engine.base import EngineOptions
from distserve.engine.fake import FakeExecutor, FakeModel
from distserve.engine.measure import measure_knee
from distserve.sched.base import Batch


async def knee(fixed: float, saturated: int, *, max_model_len: int = 4096) -> int:
    """Of a device whose step takes `fixed` seconds up to `saturated` tokens, and in proportion beyond."""

    def seconds(batch: Batch) -> float:
        return fixed * max(1.0, batch.num_tokens / saturated)

    options = EngineOptions(model="fake", block_size=16, kv_bytes=1 << 22, max_model_len=max_model_len)
    executor = FakeExecutor(options, FakeModel(seconds=seconds))
    await executor.start(lambda fraction, what: None)
    return await measure_knee(executor)


@pytest.mark.parametrize("saturated", [64, 256, 1024])
async def test_the_knee_is_where_more_tokens_stop_paying(saturated: int) -> None:
    assert await knee(0.02, saturated) in (saturated, saturated * 2)


async def test_a_device_that_is_never_saturated_takes_the_most_that_was_tried() -> None:
    assert await knee(0.005, 1 << 20) == 2048


async def test_the_context_and_the_time_bound_what_is_tried() -> None:
    assert await knee(0.001, 1 << 20, max_model_len=128) == 128
    assert await knee(1.0, 1 << 20) <= 128
