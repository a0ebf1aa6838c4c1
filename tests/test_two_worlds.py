"""The test that keeps the project honest: the same workload through the simulator and through the server's instance
loop (fake executors, a clock that jumps) gives the same batches at the same times, for every scheduler."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
from tests import virtual

from distserve.catalogue import model_spec
from distserve.cluster import Cluster
from distserve.costs.base import Engine
from distserve.costs.latency import Coefficients, DecodeLine, Host, Latency, PrefillLine
from distserve.costs.memory import kv_token_bytes
from distserve.engine.base import EngineOptions, EngineResult
from distserve.engine.fake import FakeExecutor, FakeModel
from distserve.plan import InstanceSpec, Plan, Policy, Replica, Role
from distserve.request import Request, SamplingParams
from distserve.sched.base import Batch, Load, PullingScheduler, Scheduler, Sequence
from distserve.sched.blocks import BlockPool
from distserve.sched.continuous import ContinuousScheduler
from distserve.sched.roles import scheduler_for
from distserve.sched.router import Candidate, Router
from distserve.serve.instance import InstanceLoop, Wiring
from distserve.serve.messages import Beat, Step, Submit, ToGateway, decode_to_instance, encode
from distserve.sim.simulate import imagine
from distserve.sim.world import policies
from distserve.traces import Arrival
from distserve.transfer.base import KVHandle, KVSource
from distserve.transfer.layout import InstanceLayout
from distserve.workload import Workload

MODEL = "smollm2-135m-instruct"
LATENCY = Latency(
    Coefficients(
        prefill=(PrefillLine(0.0171, 0.0000913, 2.3e-9),),
        decode=(DecodeLine(1, 0.0113, 6.1e-7, 0.000071), DecodeLine(12, 0.0107, 6.3e-7, 0.000113)),
    ),
    prompt_step=Host(0.0011, 1.3e-6),
    decode_step=Host(0.0007, 0.0, 0.000031),
)


class SmallCosts:
    """An instance of the latency above, with so many KV blocks."""

    name = "small"
    dtype = "bfloat16"
    spec = model_spec(MODEL)
    engine = Engine(
        block_size=16,
        pull=0.0017,
        pull_bandwidth=3e9,
        prefill_batch_tokens=700,
        prefill_batch_size=6,
        decode_batch_size=24,
        chunk_tokens=96,
        colocated_batch_tokens=700,
        watermark_blocks=2,
    )

    def __init__(self, num_blocks: int, micro_batches: Literal["even", "joined"] = "even") -> None:
        self._num_blocks = num_blocks
        self.engine = replace(SmallCosts.engine, micro_batches=micro_batches)

    def latency(self, tp: int, pp: int) -> Latency:
        return LATENCY if pp == 1 else replace(LATENCY, pp=pp, share=0.04 + 1 / pp, handover=0.0003)

    def kv_blocks(self, tp: int, pp: int, kv_memory: int | float | None = None) -> int:
        return self._num_blocks

    def degrees(self) -> tuple[tuple[int, int | None], ...]:
        return ((1, None),)

    def assumed_cluster(self, num_devices: int) -> Cluster:
        return Cluster("a100-80g", 1, 8, 1e11)

    def notes(self, tokens: int, batch: int, context: int) -> list[str]:
        return []


@dataclass(frozen=True)
class Launched:
    """One batch: where, when, and how many tokens of whom."""

    instance: str
    start: float
    items: tuple[tuple[int, int], ...]


Happened = list[Launched]


def in_the_simulator(plan: Plan, workload: Workload, costs: SmallCosts) -> Happened:
    found: Happened = []
    imagine(plan, workload, costs, trace=lambda name, start, items: found.append(Launched(name, start, tuple(items))))
    return found


class Link:
    """A transport that only takes time."""

    location = "nowhere"

    def __init__(self, engine: Engine, token_bytes: int) -> None:
        self._engine, self._token_bytes = engine, token_bytes
        self.generations: list[int] = []

    def publish(self, blocks: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(blocks), (0,) * len(blocks)

    async def connect(self, source: KVSource) -> None: ...

    async def pull(self, handle: KVHandle, into: list[int]) -> int:
        assert self._engine.pull_bandwidth is not None
        size = handle.num_tokens * self._token_bytes
        await asyncio.sleep(self._engine.pull + size / self._engine.pull_bandwidth)
        return size

    def disconnect(self, instance: str, epoch: int) -> None: ...

    def close(self) -> None: ...


class Traced(FakeExecutor):
    """Writes down what it is asked to compute, and knows whether its host is at it: one of several stages cannot
    prepare two batches at once. (In a real one that is so because `launch` returns when the batch is on its way.)"""

    name = ""
    found: Happened
    wake: Callable[[], None]
    prepare: Callable[[Batch], float]
    prepared = 0.0  # when the host is done with the latest batch
    num_in_flight = 0

    def launch(self, batch: Batch) -> asyncio.Future[EngineResult]:
        loop = asyncio.get_running_loop()
        items = tuple((sequence.id >> 8, n) for sequence, n in batch.items)
        self.found.append(Launched(self.name, loop.time(), items))
        self.prepared = loop.time() + self.prepare(batch)
        self.num_in_flight += 1
        result = super().launch(batch)
        result.add_done_callback(self._landed)
        if self.max_in_flight > 1:
            loop.call_at(self.prepared, lambda: self.wake())
        return result

    def _landed(self, _: object) -> None:
        self.num_in_flight -= 1

    def prepares(self, now: float) -> bool:
        return now < self.prepared - 1e-9 and self.num_in_flight < self.max_in_flight


class HostsTime:
    """A scheduler that nobody asks what to do next while the host prepares what it was told to do last."""

    def __init__(self, scheduler: Scheduler, executor: Traced) -> None:
        self._scheduler, self._executor = scheduler, executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def next_batch(self, now: float) -> Batch | None:
        return None if self._executor.prepares(now) else self._scheduler.next_batch(now)

    def next_pulls(self, now: float) -> list[Sequence]:
        scheduler: PullingScheduler = self._scheduler  # type: ignore[assignment]
        return [] if self._executor.prepares(now) else scheduler.next_pulls(now)


@dataclass
class Node:
    loop: InstanceLoop
    task: asyncio.Task[None]
    load: Load


@dataclass
class LiveWorld:
    """The server's instance loops, and as much of a gateway as routes between them."""

    plan: Plan
    costs: SmallCosts
    found: Happened = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    router: Router = field(default_factory=Router)
    requests: dict[int, Request] = field(default_factory=dict)
    left: int = 0  # requests that are not over
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, workload: Workload) -> Happened:
        loop = asyncio.get_running_loop()
        self.left = len(workload)
        for replica in self.plan.replicas():
            await self._start(replica)
        for index, arrival in enumerate(workload):
            sampling = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True, seed=index)
            request = Request(index, [1 + index % 7] * arrival.prompt_tokens, sampling)
            self.requests[index] = request
            loop.call_at(arrival.arrival, self._arrive, request)
        done = asyncio.create_task(self.done.wait())
        tasks = {node.task for node in self.nodes.values()}
        await asyncio.wait({done, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
            task.cancel()
        return self.found

    def _arrive(self, request: Request) -> None:
        name = self.router.pick_prefill(len(request.prompt), self._candidates(Role.PREFILL, Role.COLOCATED))
        assert name is not None
        self._submit(name, Submit(1, request))

    def _submit(self, name: str, message: Submit) -> None:
        self.nodes[name].loop.handle(decode_to_instance(encode(message)))

    def _candidates(self, *roles: Role) -> list[Candidate]:
        return [
            Candidate(name, node.load, 512 / LATENCY.prompts([512]))
            for name, node in self.nodes.items()
            if name.rpartition("-")[0] in roles
        ]

    async def _start(self, replica: Replica) -> None:
        engine, latency = self.costs.engine, self.costs.latency(replica.spec.tp, replica.spec.pp)
        layout = replace(FakeModel().layout, num_layers=latency.pp)
        num_blocks = self.costs.kv_blocks(1, 1)
        rank_bytes = layout.token_bytes * engine.block_size // latency.pp
        options = EngineOptions("fake", block_size=engine.block_size, kv_bytes=num_blocks * rank_bytes, pp=latency.pp)
        prepare = lambda batch: latency.batch(batch.items)[0]  # noqa: E731
        model = FakeModel(
            max_model_len=1 << 20,
            layout=layout,
            host=prepare,
            seconds=lambda batch: latency.batch(batch.items)[1],
            writes_kv=False,
        )
        executor = Traced(options, model)
        executor.name, executor.found, executor.prepare = replica.name, self.found, prepare
        await executor.start(lambda fraction, what: None)
        pool = BlockPool(num_blocks, engine.block_size)
        tuned = policies(engine, latency.knee())
        tuned = replace(tuned, prefill=replace(tuned.prefill, lease=1e6))  # no gateway is here to renew it
        policy = replica.spec.policy or "chunked"
        scheduler = scheduler_for(replica.role, pool, tuned, policy=policy, max_in_flight=latency.pp)
        source = KVSource(replica.name, 1, InstanceLayout.of(executor.layout), "nowhere", notices=replica.name)
        link = Link(engine, kv_token_bytes(self.costs.spec, dtype=self.costs.dtype))
        wiring = Wiring(
            source,
            link,
            link if replica.role is Role.DECODE else None,
            lambda message: self._hear(replica.name, message),
            lambda address, notice: self.nodes[address].loop.handle(notice),
        )
        asked: Any = scheduler if latency.pp == 1 else HostsTime(scheduler, executor)
        loop = InstanceLoop(asked, executor, wiring, asyncio.get_running_loop().time)
        executor.wake = loop.beat
        self.nodes[replica.name] = Node(loop, asyncio.create_task(loop.run()), scheduler.load())

    def _hear(self, name: str, message: ToGateway) -> None:
        if isinstance(message, Beat):
            return
        assert isinstance(message, Step), message
        assert not message.failures, message.failures
        if message.num_batched_tokens:
            self.nodes[name].load = message.load
        for event in message.events:
            self.requests[event.id].output.append(event.token.id)
            if event.token.finish is not None:
                self.left -= 1
                if not self.left:
                    self.done.set()
        for handle in message.handles:
            request = self.requests[handle.request]
            decoder = self.router.pick_decode(request.num_tokens, self._candidates(Role.DECODE))
            assert decoder is not None
            self._submit(decoder, Submit(1, request, handle))


def in_the_server(plan: Plan, workload: Workload, costs: SmallCosts) -> Happened:
    return virtual.run(LiveWorld(plan, costs).run(workload))


def draw(seed: int, rate: float, num_requests: int, *, longest: int = 600) -> Workload:
    """Lengths from one token to nearly all KV memory; arrivals from idle to overload."""
    chance = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(num_requests):
        now += chance.expovariate(rate)
        prompt = min(longest, 1 + int(chance.expovariate(1 / 120)))
        arrivals.append(Arrival(now, prompt, min(longest, 1 + int(chance.expovariate(1 / 40)))))
    return Workload(f"seed {seed}", tuple(arrivals), timed=True)


def spec(role: Role, count: int = 1, policy: Policy | None = None, pp: int = 1) -> InstanceSpec:
    return InstanceSpec(role, count=count, policy=policy, pp=pp)


PLANS = {
    "prefill and decode": Plan((spec(Role.PREFILL), spec(Role.DECODE))),
    "two prefill, two decode": Plan((spec(Role.PREFILL, 2), spec(Role.DECODE, 2))),
    "colocated, chunked": Plan((spec(Role.COLOCATED),)),
    "colocated, prefill-first": Plan((spec(Role.COLOCATED, policy=Policy.PREFILL_FIRST),)),
    "two colocated": Plan((spec(Role.COLOCATED, 2),)),
    "a mixture": Plan((spec(Role.PREFILL), spec(Role.DECODE), spec(Role.COLOCATED))),
}


def assert_equal_batches(plan: Plan, workload: Workload, costs: SmallCosts) -> None:
    imagined, lived = in_the_simulator(plan, workload, costs), in_the_server(plan, workload, costs)
    for name in (replica.name for replica in plan.replicas()):
        theirs = sorted((b for b in imagined if b.instance == name), key=lambda b: b.start)
        ours = [b for b in lived if b.instance == name]
        for number, (one, other) in enumerate(zip(theirs, ours, strict=False)):
            where = f"{name}, batch {number}, {workload.name}"
            assert sorted(one.items) == sorted(other.items), where
            assert one.start == pytest.approx(other.start, abs=1e-7), where
        assert len(theirs) == len(ours)
        assert len(ours) > 20


@pytest.mark.parametrize("num_blocks", [400, 110, 84], ids=["roomy", "tight", "tightest"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_both_worlds_run_the_same_batches(plan: Plan, num_blocks: int) -> None:
    for seed, rate in ((1, 2.0), (2, 8.0), (3, 20.0)):
        assert_equal_batches(plan, draw(seed, rate, 90), SmallCosts(num_blocks))


PIPELINES = {
    "2 and 3 stages": Plan((spec(Role.PREFILL, pp=2), spec(Role.DECODE, pp=3))),
    "3 and 2 stages": Plan((spec(Role.PREFILL, pp=3), spec(Role.DECODE, pp=2))),
    "two of each": Plan((spec(Role.PREFILL, 2, pp=2), spec(Role.DECODE, pp=2), spec(Role.DECODE, pp=1))),
    "chunked, 2 stages": Plan((spec(Role.COLOCATED, pp=2),)),
    "chunked, 3 stages": Plan((spec(Role.COLOCATED, pp=3),)),
    "prefill-first, 2 stages": Plan((spec(Role.COLOCATED, policy=Policy.PREFILL_FIRST, pp=2),)),
    "prefill-first, 3 stages": Plan((spec(Role.COLOCATED, policy=Policy.PREFILL_FIRST, pp=3),)),
}


@pytest.mark.parametrize("num_blocks", [400, 110], ids=["roomy", "tight"])
@pytest.mark.parametrize("plan", PIPELINES.values(), ids=PIPELINES.keys())
def test_both_worlds_keep_the_same_batches_in_flight(plan: Plan, num_blocks: int) -> None:
    for seed, rate in ((1, 3.0), (3, 20.0)):
        assert_equal_batches(plan, draw(seed, rate, 90), SmallCosts(num_blocks))


@pytest.mark.parametrize("pp", [2, 3])
def test_both_worlds_take_the_same_turns(pp: int) -> None:
    plan = Plan((spec(Role.PREFILL), spec(Role.DECODE, pp=pp)))
    for seed, rate in ((1, 3.0), (3, 20.0)):
        assert_equal_batches(plan, draw(seed, rate, 90), SmallCosts(400, micro_batches="joined"))


@pytest.mark.parametrize("num_blocks", [400, 110, 84], ids=["roomy", "tight", "tightest"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_steps_in_closed_form_equal_steps_one_by_one(
    plan: Plan, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = SmallCosts(num_blocks)
    workloads = [draw(seed, rate, 150) for seed, rate in ((4, 1.0), (5, 5.0), (6, 20.0))]
    many = [(in_the_simulator(plan, workload, costs), imagine(plan, workload, costs)) for workload in workloads]
    monkeypatch.setattr(ContinuousScheduler, "repeats", lambda self, batch: 1)
    for workload, (batches, run) in zip(workloads, many, strict=True):
        one_by_one = in_the_simulator(plan, workload, costs)
        key = lambda b: (b.instance, b.start)  # noqa: E731
        pairs = zip(sorted(batches, key=key), sorted(one_by_one, key=key), strict=True)
        for one, other in pairs:
            assert sorted(one.items) == sorted(other.items)
            assert one.start == pytest.approx(other.start, abs=1e-7)
        for one_record, other_record in zip(run.records, imagine(plan, workload, costs).records, strict=True):
            assert one_record.ttft == pytest.approx(other_record.ttft, abs=1e-7)
            assert one_record.tpot == pytest.approx(other_record.tpot, abs=1e-7)
