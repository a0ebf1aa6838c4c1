"""Pulls through shared memory: the right bytes, and no broken promise unnoticed."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distserve.errors import PullError
from distserve.specs import KVLayout
from distserve.transfer import shm
from distserve.transfer.base import KVHandle, KVSource
from distserve.transfer.layout import InstanceLayout
from distserve.transfer.memory import SharedMemory, attach
from distserve.transfer.shm import ShmSource, ShmTransport

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, block_size=16, dtype="bfloat16")
WHOLE = InstanceLayout.of(LAYOUT)
NUM_BLOCKS = 12


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(NUM_BLOCKS * LAYOUT.block_bytes)
    memory.buffer[:] = random.Random(1).randbytes(memory.size)
    yield memory
    memory.close()


@pytest.fixture
def source(memory: SharedMemory) -> Iterator[ShmSource]:
    source = ShmSource([memory], NUM_BLOCKS, WHOLE)
    yield source
    source.close()


@pytest.fixture
def target() -> Iterator[SharedMemory]:
    memory = SharedMemory(NUM_BLOCKS * LAYOUT.block_bytes)
    yield memory
    memory.close()


@pytest.fixture
async def transport(target: SharedMemory) -> AsyncIterator[ShmTransport]:
    transport = ShmTransport([target], NUM_BLOCKS, WHOLE)
    yield transport
    transport.close()


def handle(source: ShmSource, blocks: list[int], *, layout: KVLayout = LAYOUT, epoch: int = 1) -> KVHandle:
    where = KVSource("prefill-0", epoch, InstanceLayout.of(layout), source.location, notices="")
    generations, digest = source.publish(blocks)
    return KVHandle(where, 7, 1, len(blocks) * LAYOUT.block_size, tuple(blocks), generations, digest)


def block(memory: SharedMemory, index: int) -> bytes:
    return bytes(memory.buffer[index * LAYOUT.block_bytes : (index + 1) * LAYOUT.block_bytes])


async def test_a_pull_copies_each_block_to_its_place_and_touches_no_other(
    memory: SharedMemory, source: ShmSource, target: SharedMemory, transport: ShmTransport
) -> None:
    assert await transport.pull(handle(source, [3, 0, 11]), [5, 6, 1, 2]) == 3 * LAYOUT.block_bytes
    assert [block(target, i) for i in (5, 6, 1)] == [block(memory, i) for i in (3, 0, 11)]
    assert not any(any(block(target, i)) for i in range(NUM_BLOCKS) if i not in (5, 6, 1))


async def test_a_block_that_was_reused_is_noticed(
    memory: SharedMemory, source: ShmSource, transport: ShmTransport
) -> None:
    promised = handle(source, [3, 4])
    source.generations[4] += 1
    with pytest.raises(PullError) as caught:
        await transport.pull(promised, [0, 1])
    assert caught.value.reason == "generation"


async def test_a_damaged_block_is_noticed(memory: SharedMemory, source: ShmSource, transport: ShmTransport) -> None:
    promised = handle(source, [3, 4])
    memory.buffer[4 * LAYOUT.block_bytes + 77] ^= 1
    with pytest.raises(PullError) as caught:
        await transport.pull(promised, [0, 1])
    assert caught.value.reason == "digest"


async def test_blocks_in_another_order_are_noticed(source: ShmSource, transport: ShmTransport) -> None:
    promised = handle(source, [3, 4])
    with pytest.raises(PullError) as caught:
        await transport.pull(replace(promised, blocks=(4, 3)), [0, 1])
    assert caught.value.reason == "digest"


async def test_a_block_that_the_source_does_not_have_is_not_read(source: ShmSource, transport: ShmTransport) -> None:
    for wrong in (NUM_BLOCKS, -1):
        with pytest.raises(PullError, match="does not have") as caught:
            await transport.pull(replace(handle(source, [3]), blocks=(wrong,)), [0])
        assert caught.value.reason == "stale"


async def test_an_epoch_that_is_over_is_not_read(source: ShmSource, transport: ShmTransport) -> None:
    promised = handle(source, [3], epoch=5)
    await transport.connect(promised.source)
    transport.disconnect("prefill-0", 5)
    with pytest.raises(PullError) as caught:
        await transport.pull(promised, [0])
    assert caught.value.reason == "gone"


async def test_memory_that_is_gone_is_an_error(source: ShmSource, transport: ShmTransport) -> None:
    promised = handle(source, [3])
    location = f"shm:{NUM_BLOCKS};/proc/{os.getpid()}/fd/99999;/proc/{os.getpid()}/fd/99998"
    with pytest.raises(PullError) as caught:
        await transport.connect(replace(promised.source, location=location))
    assert caught.value.reason == "gone"


async def test_another_layout_or_too_little_room_is_refused(source: ShmSource, transport: ShmTransport) -> None:
    with pytest.raises(PullError, match="block_size 32 and 16"):
        await transport.pull(handle(source, [3], layout=replace(LAYOUT, block_size=32)), [0])
    with pytest.raises(PullError, match="room for 1"):
        await transport.pull(handle(source, [3, 4]), [0])


def test_attached_memory_cannot_be_written(memory: SharedMemory) -> None:
    view = attach(memory.path, memory.size)
    assert bytes(view[:100]) == bytes(memory.buffer[:100])
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1


def test_memory_smaller_than_promised_is_stale(memory: SharedMemory) -> None:
    with pytest.raises(PullError) as caught:
        attach(memory.path, memory.size + 1)
    assert caught.value.reason == "stale"


def test_closing_leaves_no_file_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    memory = SharedMemory(4096)
    memory.close()
    memory.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_large_memory_is_touched_and_attached_without_a_change() -> None:
    """Page tables of large pages, holes behind what was taken, a size that is no multiple of a page."""
    memory = SharedMemory((9 << 20) + 77)
    written = random.Random(2).randbytes(3 << 20)
    memory.buffer[1000 : 1000 + len(written)] = written
    memory.touch(5 << 20)
    view = attach(memory.path, memory.size)
    assert len(view) == len(memory.buffer) == memory.size
    assert bytes(view[1000 : 1000 + len(written)]) == written
    assert not any(view[:1000])
    assert not any(view[1000 + len(written) :])
    memory.buffer[-1] = 7
    assert view[-1] == 7
    memory.close()
    assert view[-1] == 7  # the pages live as long as somebody sees them


def test_large_memory_is_unmapped_with_its_last_view() -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("distserve-kv") if sys.platform == "linux" else 0

    gc.collect()
    before = mappings()
    memory = SharedMemory(4 << 20)
    part = memory.buffer[:10]
    memory.close()
    assert not any(part)
    del part
    gc.collect()
    assert mappings() == before


@pytest.mark.parametrize("limit", [0, 1 << 30])
async def test_small_and_large_pulls_keep_the_same_promises(
    memory: SharedMemory,
    source: ShmSource,
    target: SharedMemory,
    transport: ShmTransport,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shm, "AT_ONCE", limit)
    promised = handle(source, [3, 4])
    await transport.pull(promised, [0, 1])
    assert [block(target, i) for i in (0, 1)] == [block(memory, i) for i in (3, 4)]
    memory.buffer[4 * LAYOUT.block_bytes + 77] ^= 1
    with pytest.raises(PullError) as damaged:
        await transport.pull(promised, [0, 1])
    source.generations[3] += 1
    with pytest.raises(PullError) as reused:
        await transport.pull(promised, [0, 1])
    assert (damaged.value.reason, reused.value.reason) == ("digest", "generation")
