"""Pulls between instances of different hosts, over NIXL: one-sided reads of the source's memory, which a network card
serves without the source's help where there is one for it. What NIXL asks for is in `agent.py`.

    source rank 0 [blocks] --- read: whole blocks ---> |         | --- copied by `blocks.py`, ---> own rank 0 [blocks]
    source rank 1 [blocks] --------------------------> | landing |     with digests    ----------> own rank 1 [blocks]

The ranks of an instance together need every byte of a block, whatever tp and pp either side has. So whole blocks cross
the network, each byte once, in few and large reads; cutting them up is a copy here, the one that `shm.py` makes, in the
pass that takes the digests anyway. While one piece of a request is copied, the next is on its way.

After the bytes, the generations are read, then both are checked as in `shm.py`. No scheduler and no message here.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from distserve.errors import PullError
from distserve.transfer.agent import Agent, Pieces, Read
from distserve.transfer.base import KVHandle, KVSource, Stage, check, refuse
from distserve.transfer.blocks import RankBlocks
from distserve.transfer.landing import Landings
from distserve.transfer.layout import InstanceLayout, reads
from distserve.transfer.memory import SharedMemory

NAME = "nixl"
PIECE = 8 << 20  # bytes, at least a block: what is read at once, and copied while it is in the cache
PULLS = 4  # under way at once; more wait
PATIENCE = 5.0  # seconds for an answer
SLOWEST = 50e6  # bytes/s; a pull that takes longer than PATIENCE and its bytes at this rate has failed

Key = tuple[str, int]  # instance, epoch


class NixlSource:
    """The publishing side. `memories`: one a rank. `generations` is the array that the scheduler's block pool counts
    in. All of them are closed with the source, and so is the agent."""

    def __init__(
        self,
        memories: Sequence[SharedMemory],
        num_blocks: int,
        layout: InstanceLayout,
        stage: Stage | None = None,
        *,
        agent: Agent,
    ) -> None:
        self._memories = list(memories)
        self._stage = stage
        self._agent = agent
        self._counts = SharedMemory(8 * num_blocks)
        self.generations = self._counts.buffer.cast("Q")
        self._blocks = RankBlocks([memory.buffer for memory in memories], num_blocks, layout)
        addresses = [agent.register(np.frombuffer(m.buffer, np.uint8)) for m in (self._counts, *memories)]
        where = {
            "agent": agent.name,
            "metadata": b64encode(agent.metadata()).decode(),
            "blocks": num_blocks,
            "generations": addresses[0],
            "memories": addresses[1:],
        }
        self.location = f"{NAME}:{json.dumps(where)}"

    def publish(self, blocks: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self._stage is not None:
            self._stage(blocks)
        return tuple(self.generations[b] for b in blocks), self._blocks.digests(blocks)

    def close(self) -> None:
        self._agent.close()
        for memory in (self._counts, *self._memories):
            memory.close()


@dataclass(frozen=True, slots=True)
class _Remote:
    """A source, as its location tells."""

    key: Key
    agent: str  # its name with NIXL
    metadata: bytes  # for NIXL to meet it
    layout: InstanceLayout
    num_blocks: int
    generations: int  # address of the array
    memories: tuple[int, ...]  # address of each rank's

    @classmethod
    def of(cls, source: KVSource) -> _Remote:
        where = json.loads(source.location.removeprefix(f"{NAME}:"))
        return cls(
            key=(source.instance, source.epoch),
            agent=where["agent"],
            metadata=b64decode(where["metadata"]),
            layout=source.layout,
            num_blocks=where["blocks"],
            generations=where["generations"],
            memories=tuple(where["memories"]),
        )


# -- the pulling side -------------------------------------------------------------------------------------------------


class NixlTransport:
    """The pulling side. Threads wait for NIXL and copy, so that the event loop stays free. `stage` (CUDA) moves pulled
    blocks from host memory to the device."""

    def __init__(
        self,
        memories: Sequence[SharedMemory],
        num_blocks: int,
        layout: InstanceLayout,
        stage: Stage | None = None,
        *,
        agent: Agent,
    ) -> None:
        self._own = RankBlocks([memory.buffer for memory in memories], num_blocks, layout)
        self._stage = stage
        self._agent = agent
        self._landings = Landings(agent)
        self._remotes: dict[Key, _Remote] = {}
        self._meeting: dict[Key, asyncio.Lock] = {}
        self._forgetting: dict[Key, Future[None]] = {}
        self._over: set[Key] = set()
        self._closing = False
        self._threads = ThreadPoolExecutor(PULLS, "pull")

    async def connect(self, source: KVSource) -> None:
        key = (source.instance, source.epoch)
        async with self._meeting.setdefault(key, asyncio.Lock()):
            if key in self._remotes:
                return
            self._check(key)
            refuse(source, NAME, self._own.layout)
            if (forgetting := self._forgetting.pop(key, None)) is not None:
                await asyncio.wrap_future(forgetting)
            try:
                remote = await asyncio.get_running_loop().run_in_executor(self._threads, self._meet, source)
            except PullError as error:
                raise PullError(f"{source.instance} cannot be reached: {error}", "gone") from None
            self._remotes[key] = remote
            if key in self._over:
                self._forget(remote)
            self._check(key)

    async def pull(self, handle: KVHandle, into: list[int]) -> int:
        await self.connect(handle.source)
        if len(into) < len(handle.blocks):
            raise PullError(f"{len(handle.blocks)} blocks to read, room for {len(into)}", "transport")
        remote = self._remotes[handle.source.instance, handle.source.epoch]
        targets = into[: len(handle.blocks)]
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._read, remote, handle, targets)
        except PullError as error:
            if error.reason == "gone":  # should it only have been cut off, the next pull is to meet it again
                self._forget(remote)
                raise PullError(f"{handle.source.instance} cannot be reached: {error}", "gone") from None
            raise
        self._check(remote.key)
        return len(targets) * self._own.block_bytes

    def disconnect(self, instance: str, epoch: int) -> None:
        self._over.add((instance, epoch))
        if (remote := self._remotes.get((instance, epoch))) is not None:
            self._forget(remote)

    def _forget(self, remote: _Remote) -> None:
        if self._remotes.get(remote.key) is remote:
            del self._remotes[remote.key]
            self._forgetting[remote.key] = self._threads.submit(self._landings.forget, remote.agent)

    def close(self) -> None:
        self._closing = True
        self._threads.shutdown(wait=True)
        self._remotes.clear()

    def _check(self, key: Key) -> None:
        if key in self._over or self._closing:
            raise PullError(f"epoch {key[1]} of {key[0]} is over", "gone")

    # -- in a thread --------------------------------------------------------------------------------------------------

    def _meet(self, source: KVSource) -> _Remote:
        """Reads a number: the first read is what makes the connection."""
        remote = _Remote.of(source)
        if self._landings.is_leaving(remote.agent):
            raise PullError("reads of an earlier contact are under way", "gone")
        self._agent.meet(remote.metadata)
        try:
            self._generations(remote, [0], time.monotonic() + PATIENCE)
        except PullError:
            self._landings.forget(remote.agent)
            raise
        return remote

    def _read(self, remote: _Remote, handle: KVHandle, into: list[int]) -> None:
        if not all(0 <= block < remote.num_blocks for block in handle.blocks):
            raise PullError(f"{remote.key[0]} promised blocks {handle.blocks} that it does not have", "stale")
        give_up = time.monotonic() + PATIENCE + len(into) * self._own.block_bytes / SLOWEST
        digests = self._blocks(remote, handle.blocks, into, give_up)
        check(handle, self._generations(remote, handle.blocks, give_up), digests)
        if self._stage is not None:
            self._stage(into)

    def _blocks(
        self, remote: _Remote, blocks: Sequence[int], into: Sequence[int], give_up: float
    ) -> list[tuple[int, ...]]:
        """Reads and copies piece by piece, one read ahead of the copies. Returns the digests, of each complete copy."""
        sizes = [remote.layout.of_rank(rank).block_bytes for rank in range(len(remote.memories))]
        landing = self._landings.take(remote.agent, max(PIECE, sum(sizes)))
        most = landing.size // sum(sizes)  # blocks
        under_way: list[tuple[Read, RankBlocks, Sequence[int]]] = []
        digests: list[list[tuple[int, ...]]] = []  # of each piece

        def finish() -> None:
            read, landed, targets = under_way.pop(0)
            self._wait(remote, read, give_up)
            digests.append(self._own.copy_from(landed, range(len(targets)), targets))

        try:
            for number, first in enumerate(range(0, len(blocks), most)):
                ids = blocks[first : first + most]
                parts, addresses = landing.split(number % 2, [len(ids) * size for size in sizes])
                read = landing.read(_places(remote, self._own.layout, ids, addresses))
                under_way.append((read, RankBlocks(parts, len(ids), remote.layout), into[first : first + most]))
                if len(under_way) == 2:
                    finish()
            while under_way:
                finish()
        finally:
            self._landings.leave(landing)
        return [tuple(chain.from_iterable(of_piece)) for of_piece in zip(*digests, strict=True)]

    def _generations(self, remote: _Remote, blocks: Sequence[int], give_up: float) -> list[int]:
        landing = self._landings.take(remote.agent, max(PIECE, 8 * len(blocks)))
        try:
            pieces = [(remote.generations + 8 * block, landing.address + 8 * i, 8) for i, block in enumerate(blocks)]
            self._wait(remote, landing.read(_merged(np.array(pieces, np.uint64))), give_up)
            return list(map(int, landing.memory[0, : 8 * len(blocks)].view(np.uint64)))
        finally:
            self._landings.leave(landing)

    def _wait(self, remote: _Remote, read: Read, give_up: float) -> None:
        """Until all its bytes are here. Raises `PullError`; the read may go on then."""
        pause = 20e-6
        while not self._agent.done(read):
            self._check(remote.key)
            if time.monotonic() > give_up:
                raise PullError(f"no answer from {remote.key[0]}", "transport")
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)


# -- addresses --------------------------------------------------------------------------------------------------------


def _places(remote: _Remote, own: InstanceLayout, blocks: Sequence[int], landing: Sequence[int]) -> Pieces:
    """What of these blocks is to be read. `landing`: the address of the first on each rank; they follow each other."""
    found = []
    ids, rows = np.array(blocks, np.uint64)[:, None], np.arange(len(blocks), dtype=np.uint64)[:, None]
    for rank, wanted in enumerate(_wanted(remote.layout, own)):
        size = np.uint64(remote.layout.of_rank(rank).block_bytes)
        there = np.uint64(remote.memories[rank]) + ids * size + wanted[:, 0]  # [blocks, ranges]
        here = np.uint64(landing[rank]) + rows * size + wanted[:, 0]
        found.append(np.stack((there, here, np.broadcast_to(wanted[:, 1], there.shape)), axis=-1).reshape(-1, 3))
    return _merged(np.concatenate(found))


@functools.cache
def _wanted(source: InstanceLayout, target: InstanceLayout) -> tuple[NDArray[np.uint64], ...]:
    """Of each source rank the ranges (offset, size) of a block that any target rank reads: one, the whole block, unless
    several source ranks hold the same heads."""
    found: list[set[tuple[int, int]]] = [set() for _ in range(source.sharding.num_ranks)]
    for of_rank in reads(source, target):
        for read in of_rank:
            found[read.source].update((at, size) for at, _, size in read.ranges)
    return tuple(np.array(_union(ranges), np.uint64).reshape(-1, 2) for ranges in found)


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes, each once, as few ranges as can be."""
    merged: list[tuple[int, int]] = []
    for offset, size in sorted(ranges):
        if merged and offset <= sum(merged[-1]):
            first = merged[-1][0]
            merged[-1] = first, max(sum(merged[-1]), offset + size) - first
        else:
            merged.append((offset, size))
    return merged


def _merged(pieces: Pieces) -> Pieces:
    """Pieces that follow each other on both sides made one."""
    there, here, size = pieces.T
    breaks = (there[1:] != there[:-1] + size[:-1]) | (here[1:] != here[:-1] + size[:-1])
    first = np.flatnonzero(np.concatenate(([True], breaks)))
    return np.stack((there[first], here[first], np.add.reduceat(size, first)), axis=-1)
