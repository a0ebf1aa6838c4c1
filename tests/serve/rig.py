"""A whole server in one event loop: the real gateway, driver, schedulers and shared-memory transport, and fake
executors that check on every step that each block holds what its sequence's tokens imply. Faults are injected at the
wire.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from distserve.engine.base import EngineOptions
from distserve.engine.fake import TINY_LAYOUT, FakeExecutor, FakeModel
from distserve.plan import Role
from distserve.request import Request, SamplingParams, Token
from distserve.sched.base import Scheduler
from distserve.sched.blocks import BlockPool
from distserve.sched.colocated import ChunkedScheduler
from distserve.sched.decode import DecodeScheduler
from distserve.sched.policy import AdmissionPolicy, ColocatedPolicy, DecodePolicy, PrefillPolicy
from distserve.sched.prefill import PrefillScheduler
from distserve.sched.router import Router
from distserve.serve.gateway import Gateway, GatewayLimits
from distserve.serve.instance import InstanceLoop, Wiring
from distserve.serve.messages import (
    Meet,
    Notice,
    Part,
    Ready,
    ToGateway,
    ToInstance,
    decode_to_gateway,
    decode_to_instance,
    encode,
)
from distserve.serve.rpc import RemoteInstance
from distserve.serve.telemetry import Telemetry
from distserve.specs import KVLayout
from distserve.transfer.base import KVSource
from distserve.transfer.layout import InstanceLayout
from distserve.transfer.memory import SharedMemory
from distserve.transfer.shm import ShmSource, ShmTransport

BLOCK = 16
Filter = Callable[[object], int]  # how many times a message arrives: 1, or 0 (lost), or 2 (doubled)


def once(message: object) -> int:
    return 1


@dataclass
class Node:
    """One instance and the epoch it lives in."""

    remote: RemoteInstance
    num_blocks: int
    pool: BlockPool | None = None
    loop: InstanceLoop | None = None
    memory: SharedMemory | None = None
    task: asyncio.Task[None] | None = None
    closers: list[Callable[[], None]] = field(default_factory=list)


class Rig:
    """`async with Rig({...}) as rig:` roles by name; then `rig.gateway.generate`, `rig.kill`, `rig.restart`."""

    def __init__(
        self,
        roles: dict[str, Role],
        *,
        num_blocks: int = 64,
        decode_blocks: int | None = None,
        seconds: float = 0.0,
        lease: float = 5.0,
        limits: GatewayLimits | None = None,
        admission: AdmissionPolicy | None = None,
        degrees: Mapping[str, tuple[int, int]] = {},  # (tp, pp) of an instance; (1, 1) where it is not named
        layout: KVLayout = TINY_LAYOUT,
    ) -> None:
        self.to_instance: Filter = once
        self.to_gateway: Filter = once
        self.notices: Filter = once
        self._lease = lease
        self._degrees = degrees
        self._model = FakeModel(seconds=lambda batch: seconds, layout=layout)
        self._epochs = itertools.count(1)
        self.nodes = {
            name: Node(RemoteInstance(name, role, time.monotonic), decode_blocks or num_blocks)
            if role is Role.DECODE
            else Node(RemoteInstance(name, role, time.monotonic), num_blocks)
            for name, role in roles.items()
        }
        self.telemetry = Telemetry("rig")
        remotes = [node.remote for node in self.nodes.values()]
        limits = limits or GatewayLimits(restart_deadline=5.0)
        router = Router(admission)
        self.gateway = Gateway(remotes, router, self.telemetry, time.monotonic, max_model_len=512, limits=limits)
        self._timer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Rig:
        for name in self.nodes:
            await self.restart(name)
        self._timer = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._timer is not None
        self._timer.cancel()
        for name in self.nodes:
            await self.kill(name)

    async def _tick(self) -> None:
        """What the fleet's timers and the instances' beats do, quicker."""
        while True:
            await asyncio.sleep(0.02)
            for node in self.nodes.values():
                if node.loop is not None:
                    node.loop.beat()
                node.remote.audit()

    def _scheduler(self, role: Role, pool: BlockPool, pp: int) -> Scheduler:
        if role is Role.PREFILL:
            prefill = PrefillPolicy(max_batch_tokens=128, lease=self._lease)
            return PrefillScheduler(pool, prefill, max_in_flight=pp)
        if role is Role.DECODE:
            decode = DecodePolicy(max_batch_size=32, chunk_tokens=64, watermark_blocks=1)
            return DecodeScheduler(pool, decode, max_in_flight=pp)
        colocated = ColocatedPolicy(max_batch_size=32, chunk_tokens=64, watermark_blocks=1)
        return ChunkedScheduler(pool, colocated, max_in_flight=pp)

    async def restart(self, name: str) -> None:
        """A new process under an old name, with a new epoch."""
        node = self.nodes[name]
        role, epoch = node.remote.role, next(self._epochs)
        tp, pp = self._degrees.get(name, (1, 1))
        sharding, model = self._model.sharding(tp, pp), self._model.layout
        held = max(len(sharding.layers(rank)) * len(sharding.heads(rank)) for rank in range(sharding.num_ranks))
        block_bytes = held * 2 * model.head_dim * model.itemsize * BLOCK  # of the rank that holds most
        memories: list[SharedMemory] = []

        def allocate(size: int) -> memoryview:
            memories.append(SharedMemory(size))
            return memories[-1].buffer

        kv_bytes = block_bytes * node.num_blocks
        options = EngineOptions(model="fake", block_size=BLOCK, kv_bytes=kv_bytes, tp=tp, pp=pp)
        executor = FakeExecutor(options, self._model, kv_buffer_factory=allocate, verify=True)
        await executor.start(lambda fraction, what: None)
        layout = InstanceLayout.of(executor.layout, tp, pp)
        source = ShmSource(memories, executor.num_blocks, layout)
        transport = ShmTransport(memories, executor.num_blocks, layout) if role is Role.DECODE else None
        node.pool = BlockPool(executor.num_blocks, BLOCK, source.generations)
        where = KVSource(name, epoch, layout, source.location, notices=name)
        remote = node.remote

        def send(message: ToGateway) -> None:
            for _ in range(self.to_gateway(message)):
                asyncio.get_running_loop().call_soon(remote.receive, decode_to_gateway(encode(message)))

        loop = InstanceLoop(
            self._scheduler(role, node.pool, pp),
            executor,
            Wiring(where, source, transport, send, self._notify),
            time.monotonic,
        )

        def receive(message: ToInstance) -> None:
            for _ in range(self.to_instance(message)):
                asyncio.get_running_loop().call_soon(loop.handle, decode_to_instance(encode(message)))

        node.loop, node.memory = loop, memories[0]
        node.closers = [source.close] + ([transport.close] if transport is not None else [])
        node.task = asyncio.create_task(loop.run())
        remote.on_change, remote.on_timing = self.gateway.changed, self.telemetry.observe_timing
        remote.begin(epoch, receive)
        remote.receive(Ready(epoch, where, executor.num_blocks, BLOCK, executor.max_model_len, 0))
        self._introduce(remote)

    def _introduce(self, changed: RemoteInstance) -> None:
        sources = [n.remote.ready.source for n in self.nodes.values() if n.remote.ready is not None]
        for node in self.nodes.values():
            if node.remote.role is Role.DECODE and node.remote.alive:
                node.remote.tell(Meet(node.remote.epoch, [s for s in sources if s.instance != node.remote.name]))

    def _notify(self, address: str, notice: Notice) -> None:
        loop = self.nodes[address].loop
        if loop is not None:
            for _ in range(self.notices(notice)):
                loop.handle(notice)

    async def kill(self, name: str) -> None:
        """As a process dies: at once, in the middle of whatever it does."""
        node = self.nodes[name]
        if node.task is None:
            return
        epoch = node.remote.epoch
        node.task.cancel()
        with suppress(asyncio.CancelledError):
            await node.task
        node.task = node.loop = None
        node.remote.lost("was killed")
        for close in node.closers:
            close()
        for other in self.nodes.values():
            if other.remote.role is Role.DECODE and other.remote.alive:
                other.remote.tell(Part(other.remote.epoch, name, epoch))

    def request(self, num_prompt: int, max_tokens: int, seed: int = 0) -> Request:
        prompt = [(seed * 7919 + i * 31) % 997 for i in range(num_prompt)]
        return Request(self.gateway.next_id(), prompt, SamplingParams(max_tokens=max_tokens, seed=seed))

    async def answer(self, num_prompt: int, max_tokens: int, seed: int = 0) -> list[int]:
        """All tokens of one request."""
        found: list[Token] = []
        stream = self.gateway.generate(self.request(num_prompt, max_tokens, seed))
        try:
            async for tokens in stream:
                found.extend(tokens)
        finally:
            stream.close()
        assert [token.finish is not None for token in found] == [False] * (len(found) - 1) + [True]
        return [token.id for token in found]

    async def idle(self, within: float = 5.0) -> None:
        """Waits until every block of every instance is free; fails where that does not happen."""
        deadline = time.monotonic() + within
        while True:
            taken = {
                name: node.pool.num_blocks - node.pool.num_free
                for name, node in self.nodes.items()
                if node.pool is not None and node.task is not None
            }
            if not any(taken.values()) and not self.gateway.num_live:
                return
            assert time.monotonic() < deadline, f"blocks still taken: {taken}, live: {self.gateway.num_live}"
            await asyncio.sleep(0.005)

    def metric(self, name: str, **labels: str) -> float:
        return self.telemetry.registry.get_sample_value(name, {"model_name": "rig", **labels}) or 0.0


def disaggregated(num_prefill: int = 1, num_decode: int = 1) -> dict[str, Role]:
    return {f"prefill-{i}": Role.PREFILL for i in range(num_prefill)} | {
        f"decode-{i}": Role.DECODE for i in range(num_decode)
    }
