"""Pulls through shared memory: the contract, and the memory itself."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.transfer.contract import NUM_BLOCKS, TransportContract, of
from tests.transfer.shared import SharedMedium

from distserve.errors import PullError
from distserve.transfer import shm
from distserve.transfer.layout import InstanceLayout
from distserve.transfer.memory import SharedMemory, attach
from distserve.transfer.shm import ShmSource, ShmTransport


class ShmMedium(SharedMedium):
    def make_source(self, memories: list[SharedMemory], num_blocks: int, layout: InstanceLayout) -> ShmSource:
        return ShmSource(memories, num_blocks, layout)

    def make_transport(self, memories: list[SharedMemory], num_blocks: int, layout: InstanceLayout) -> ShmTransport:
        return ShmTransport(memories, num_blocks, layout)


class TestInTheLoop(TransportContract):
    medium_class = ShmMedium


class TestInThreads(TransportContract):
    """As large pulls are made."""

    medium_class = ShmMedium

    @pytest.fixture(autouse=True)
    def all_are_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shm, "AT_ONCE", 0)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(10_000)
    memory.buffer[:] = random.Random(1).randbytes(memory.size)
    yield memory
    memory.close()


async def test_memory_that_is_gone_is_an_error() -> None:
    medium = ShmMedium()
    source, target = medium.source(of((4, 2), 2, 1), NUM_BLOCKS), medium.target(of((4, 2), 1, 1), NUM_BLOCKS)
    *paths, _ = source.where.location.split(";")
    location = ";".join([*paths, f"/proc/{os.getpid()}/fd/99999"])
    with pytest.raises(PullError) as caught:
        await target.transport.connect(replace(source.where, location=location))
    assert caught.value.reason == "gone"
    for wrong in ("shm:", ";".join(paths), "shm:many;" + location):
        with pytest.raises(PullError, match="which is no place") as refused:
            await target.transport.connect(replace(source.where, location=wrong))
        assert refused.value.reason == "transport"
    medium.close()


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
