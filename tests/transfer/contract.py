"""What every transport promises (`transfer/base.py`), as tests: a transport's test file subclasses `TransportContract`
and says how its two ends are built.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.transfer.support import cut, whole_kv

from distserve.errors import PullError
from distserve.sharding import Sharding, heads_fit
from distserve.specs import KVLayout
from distserve.transfer.base import KVHandle, KVSource, Source, Transport
from distserve.transfer.copying import Bytes
from distserve.transfer.layout import InstanceLayout, reads

NUM_BLOCKS = 6
MODEL = KVLayout(num_layers=4, num_kv_heads=2, head_dim=8, block_size=4, dtype="bfloat16")
# layers, KV heads: 1, 2 and 4 heads are held several times by some tp, 5 and 7 layers make stages uneven
SHAPES = [(5, 1), (7, 2), (3, 3), (4, 4)]
DEGREES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (3, 2), (4, 2), (2, 3)]


@dataclass
class SourceEnd:
    """A publishing instance. `ranks`: the memory of each, [num_blocks, block_bytes], to be written by the test."""

    source: Source
    where: KVSource
    ranks: list[Bytes]

    def handle(self, blocks: list[int], request: int = 7) -> KVHandle:
        generations, digest = self.source.publish(blocks)
        num_tokens = len(blocks) * self.where.layout.block_size
        return KVHandle(self.where, request, 1, num_tokens, tuple(blocks), generations, digest)

    def fill(self, whole: NDArray[np.uint8]) -> None:
        for memory, part in zip(self.ranks, cut(whole, self.where.layout), strict=True):
            memory[:] = part


@dataclass
class TargetEnd:
    """A pulling instance."""

    transport: Transport
    layout: InstanceLayout
    ranks: list[Bytes]

    def assert_holds(self, whole: NDArray[np.uint8], placed: dict[int, int]) -> None:
        """`placed`: which block of `whole` each block here holds."""
        for rank, (memory, part) in enumerate(zip(self.ranks, cut(whole, self.layout), strict=True)):
            for into, block in placed.items():
                assert (memory[into] == part[block]).all(), f"rank {rank}, block {into}"


class Medium(ABC):
    """Builds the ends of one transport, and takes them away. An instance of it can be made in any process."""

    lives_in_processes = True  # its two ends may be in different ones

    @abstractmethod
    def source(self, layout: InstanceLayout, num_blocks: int, instance: str = "prefill-0", epoch: int = 1) -> SourceEnd:
        """A source whose ranks' memory is zeros."""

    @abstractmethod
    def target(self, layout: InstanceLayout, num_blocks: int) -> TargetEnd: ...

    @abstractmethod
    def close(self) -> None:
        """All ends that were built, and their memory."""


def of(shape: tuple[int, int], tp: int, pp: int) -> InstanceLayout:
    return InstanceLayout.of(replace(MODEL, num_layers=shape[0], num_kv_heads=shape[1]), tp, pp)


def layouts(shape: tuple[int, int]) -> list[InstanceLayout]:
    """Of all small degrees that the heads and layers allow, and one whose stages nobody would choose."""
    found = [of(shape, tp, pp) for tp, pp in DEGREES if heads_fit(shape[1], tp) and pp <= shape[0]]
    return [*found, replace(found[0], sharding=Sharding(shape[1], (shape[0] - 1, 1)))]


class TransportContract:
    """Subclass as `Test...` with `medium_class`."""

    medium_class: type[Medium]

    @pytest.fixture
    async def medium(self) -> AsyncIterator[Medium]:
        medium = self.medium_class()
        yield medium
        medium.close()

    # -- the right bytes ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    async def test_any_degrees_to_any_give_every_byte_in_its_place(
        self, medium: Medium, shape: tuple[int, int]
    ) -> None:
        model = replace(MODEL, num_layers=shape[0], num_kv_heads=shape[1])
        whole = whole_kv(model, NUM_BLOCKS)
        blocks, into = [4, 0, 5], [1, 3, 2]
        sources = [medium.source(layout, NUM_BLOCKS, f"prefill-{i}") for i, layout in enumerate(layouts(shape))]
        for source in sources:
            source.fill(whole)
        for layout in layouts(shape):
            target = medium.target(layout, NUM_BLOCKS)
            expected = np.zeros_like(whole)
            expected[into] = whole[blocks]
            for source in sources:
                read = await target.transport.pull(source.handle(blocks), into)
                assert read == sum(memory.shape[1] for memory in target.ranks) * len(blocks)
                for rank, (found, wanted) in enumerate(zip(target.ranks, cut(expected, layout), strict=True)):
                    assert (found == wanted).all(), f"rank {rank} of {layout} from {source.where.layout}"
                    found[:] = 0
            target.transport.close()

    async def test_every_layout_makes_the_same_promise(self, medium: Medium) -> None:
        whole = whole_kv(MODEL, NUM_BLOCKS)
        shape = (MODEL.num_layers, MODEL.num_kv_heads)
        sources = [medium.source(layout, NUM_BLOCKS, f"prefill-{i}") for i, layout in enumerate(layouts(shape))]
        for source in sources:
            source.fill(whole)
        assert len({source.handle([2, 0, 1]).digest for source in sources}) == 1

    async def test_a_handle_survives_its_way_through_the_gateway(self, medium: Medium) -> None:
        source, target, whole = self.pair(medium, (2, 2), (1, 3))
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(source.handle([1, 2])), type=KVHandle)
        await target.transport.connect(sent.source)
        await target.transport.pull(sent, [0, 1])
        target.assert_holds(whole, {0: 1, 1: 2})

    async def test_pulls_at_once_do_not_disturb_each_other(self, medium: Medium) -> None:
        source, target, whole = self.pair(medium, (2, 1), (1, 2))
        other = medium.source(of((4, 2), 1, 2), NUM_BLOCKS, "prefill-1")
        other.fill(whole)
        handles = [(source if i % 2 else other).handle([i], request=i) for i in range(NUM_BLOCKS)]
        await asyncio.gather(*(target.transport.pull(handle, [5 - i]) for i, handle in enumerate(handles)))
        target.assert_holds(whole, {5 - i: i for i in range(NUM_BLOCKS)})

    # -- broken promises ----------------------------------------------------------------------------------------------

    async def test_a_block_that_was_reused_is_noticed(self, medium: Medium) -> None:
        source, target, _ = self.pair(medium, (2, 1), (1, 2))
        promised = source.handle([3, 4])
        source.source.generations[4] += 1
        assert await self.reason(target, promised) == "generation"
        source.ranks[1][4, 17] ^= 1  # what is reused is also overwritten
        assert await self.reason(target, promised) == "generation"
        promised = source.handle([3, 4])
        await target.transport.pull(promised, [0, 1])

    @pytest.mark.parametrize("pair", [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((2, 2), (4, 1)), ((4, 1), (4, 2))], ids=str)
    async def test_damage_on_any_rank_is_noticed(
        self, medium: Medium, pair: tuple[tuple[int, int], tuple[int, int]]
    ) -> None:
        """One bit of any rank in what any rank reads of it, also where another holds the same."""
        source, target, _ = self.pair(medium, *pair)
        promised = source.handle([3, 4])
        for found in reads(source.where.layout, target.layout):
            for read in found:
                byte = read.ranges[-1].source + 5
                source.ranks[read.source][4, byte] ^= 0x10
                assert await self.reason(target, promised) == "digest"
                source.ranks[read.source][4, byte] ^= 0x10
        await target.transport.pull(promised, [0, 1])

    async def test_blocks_in_another_order_are_noticed(self, medium: Medium) -> None:
        source, target, _ = self.pair(medium, (1, 2), (2, 1))
        assert await self.reason(target, replace(source.handle([3, 4]), blocks=(4, 3))) == "digest"

    async def test_a_block_that_the_source_does_not_have_is_not_read(self, medium: Medium) -> None:
        source, target, _ = self.pair(medium, (2, 1), (2, 1))
        for wrong in (NUM_BLOCKS, -1):
            assert await self.reason(target, replace(source.handle([3, 2]), blocks=(3, wrong))) == "stale"

    # -- ends that do not fit -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"block_size": 8}, "block_size 8 and 4: give both the same model, dtype and block size"),
            ({"dtype": "float32"}, "dtype float32 and bfloat16"),
            ({"num_layers": 5}, "layers 5 and 4"),
            ({"num_kv_heads": 4}, "KV heads 4 and 2"),
        ],
        ids=lambda value: "" if isinstance(value, str) else ",".join(value),
    )
    async def test_another_model_is_refused_with_the_cure(
        self, medium: Medium, change: dict[str, object], message: str
    ) -> None:
        other = replace(MODEL, **change)  # type: ignore[arg-type]
        source = medium.source(InstanceLayout.of(other, 2, 1), NUM_BLOCKS)
        target = medium.target(InstanceLayout.of(MODEL, 1, 2), NUM_BLOCKS)
        for attempt in (target.transport.connect(source.where), target.transport.pull(source.handle([0]), [0])):
            with pytest.raises(PullError, match=message) as caught:
                await attempt
            assert caught.value.reason == "transport"

    async def test_the_location_of_another_transport_is_refused_with_the_cure(self, medium: Medium) -> None:
        source, target, _ = self.pair(medium, (1, 1), (1, 1))
        with pytest.raises(PullError, match="give both the same --transport") as caught:
            await target.transport.connect(replace(source.where, location="pigeon:7"))
        assert caught.value.reason == "transport"

    async def test_too_little_room_is_refused(self, medium: Medium) -> None:
        source, target, _ = self.pair(medium, (1, 1), (2, 1))
        with pytest.raises(PullError, match="2 blocks to read, room for 1"):
            await target.transport.pull(source.handle([3, 4]), [0])
        assert not any(memory.any() for memory in target.ranks)

    # -- ends that go away --------------------------------------------------------------------------------------------

    async def test_an_epoch_that_is_over_is_not_read(self, medium: Medium) -> None:
        source, target, whole = self.pair(medium, (2, 1), (1, 1))
        promised = source.handle([3])
        await target.transport.pull(promised, [0])
        target.transport.disconnect("prefill-0", 1)
        assert await self.reason(target, promised) == "gone"
        with pytest.raises(PullError):
            await target.transport.connect(source.where)
        again = medium.source(source.where.layout, NUM_BLOCKS, epoch=2)
        again.fill(whole)
        await target.transport.pull(again.handle([5]), [1])
        target.assert_holds(whole, {0: 3, 1: 5})

    async def test_a_pull_on_its_way_when_its_source_dies_is_not_used(self, medium: Medium) -> None:
        """Either it was over before, or it fails; it never says that all is well afterwards."""
        source, target, _ = self.pair(medium, (2, 2), (1, 1))
        pulls = [asyncio.create_task(target.transport.pull(source.handle([i]), [i])) for i in range(NUM_BLOCKS)]
        await asyncio.sleep(0)
        done_before = {pull for pull in pulls if pull.done()}
        target.transport.disconnect("prefill-0", 1)
        for pull in set(pulls) - done_before:
            with pytest.raises(PullError) as caught:
                await pull
            assert caught.value.reason == "gone"

    async def test_contact_that_is_made_when_its_source_dies_is_none(self, medium: Medium) -> None:
        source, target, _ = self.pair(medium, (2, 1), (1, 2))
        contact = asyncio.create_task(target.transport.connect(source.where))
        await asyncio.sleep(0)
        target.transport.disconnect("prefill-0", 1)
        await asyncio.gather(contact, return_exceptions=True)
        assert await self.reason(target, source.handle([1])) == "gone"

    async def test_a_killed_source_is_an_error_or_the_right_bytes_never_a_wait(self, medium: Medium) -> None:
        if not medium.lives_in_processes:
            pytest.skip("both ends live in one process")
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=publish_and_wait, args=(self.medium_class, theirs), daemon=True)
        process.start()
        try:
            theirs.close()
            handle = msgspec.msgpack.decode(await asyncio.to_thread(ours.recv_bytes), type=KVHandle)
            target = medium.target(of((4, 2), 1, 2), NUM_BLOCKS)
            whole = whole_kv(MODEL, NUM_BLOCKS)
            await target.transport.pull(handle, [0, 1, 2])
            pulls = [asyncio.create_task(target.transport.pull(handle, [i, i + 1, i + 2])) for i in (0, 3)]
            process.kill()
            results = await asyncio.wait_for(asyncio.gather(*pulls, return_exceptions=True), 20)
            for start, result in zip((0, 3), results, strict=True):
                if isinstance(result, BaseException):
                    assert isinstance(result, PullError)
                else:
                    target.assert_holds(whole, {start + i: block for i, block in enumerate(handle.blocks)})
            await asyncio.to_thread(process.join)
            late = medium.target(of((4, 2), 2, 1), NUM_BLOCKS)
            with pytest.raises(PullError) as caught:
                await asyncio.wait_for(late.transport.connect(handle.source), 20)
            assert caught.value.reason in ("gone", "transport")
            target.transport.disconnect(handle.source.instance, handle.source.epoch)
            assert await self.reason(target, handle, into=[0, 1, 2]) == "gone"
        finally:
            process.kill()
            await asyncio.to_thread(process.join)
            ours.close()

    async def test_memory_is_returned(self, medium: Medium) -> None:
        """After the first round, which libraries may keep something of."""

        async def round_of_pulls() -> int:
            medium = self.medium_class()
            for epoch in range(3):
                source = medium.source(of((4, 2), 2, 2), NUM_BLOCKS, epoch=epoch)
                target = medium.target(of((4, 2), 4, 1), NUM_BLOCKS)
                await target.transport.pull(source.handle([0, 1]), [3, 4])
                target.transport.disconnect("prefill-0", epoch)
                target.transport.close()
                target.transport.close()
            medium.close()
            del medium, source, target
            gc.collect()
            return open_files()

        assert await round_of_pulls() >= await round_of_pulls()

    # -- what they share ----------------------------------------------------------------------------------------------

    def pair(
        self, medium: Medium, source_degrees: tuple[int, int], target_degrees: tuple[int, int]
    ) -> tuple[SourceEnd, TargetEnd, NDArray[np.uint8]]:
        """A source filled with random KV, a target, and that KV."""
        shape, whole = (MODEL.num_layers, MODEL.num_kv_heads), whole_kv(MODEL, NUM_BLOCKS)
        source = medium.source(of(shape, *source_degrees), NUM_BLOCKS)
        source.fill(whole)
        return source, medium.target(of(shape, *target_degrees), NUM_BLOCKS), whole

    async def reason(self, target: TargetEnd, handle: KVHandle, into: list[int] | None = None) -> str:
        with pytest.raises(PullError) as caught:
            await target.transport.pull(handle, into or [0, 1])
        return caught.value.reason


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def publish_and_wait(medium_class: type[Medium], line: Connection) -> None:
    """The life of a source's process, until it is killed."""
    medium = medium_class()
    source = medium.source(of((MODEL.num_layers, MODEL.num_kv_heads), 2, 2), NUM_BLOCKS)
    source.fill(whole_kv(MODEL, NUM_BLOCKS))
    line.send_bytes(msgspec.msgpack.encode(source.handle([4, 1, 2])))
    line.recv_bytes()
