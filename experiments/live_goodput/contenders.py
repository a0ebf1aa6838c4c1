"""Who serves, on the same two cores: our own plans, and vLLM's CPU build as two replicas behind a round robin.

The round robin is in the client: it costs nobody anything. Each of vLLM's replicas is bound to a core, as each of our
instances is; our gateway and vLLM's front ends share the cores with them, and so does the client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import cycle

from benchmarks.engine import demo_folder

from benchmarks import servers as processes
from distserve.bench import prompts as making
from distserve.bench import server as servers
from distserve.bench.client import Client, Result
from distserve.bench.options import BenchOptions
from distserve.bench.runner import Runner
from distserve.bench.stream import Answer
from distserve.costs.base import Costs
from distserve.metrics import Targets
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.planner.demand import Demand
from distserve.planner.goodput import ROUGH, Situation, highest_rate, judge
from distserve.traces import Arrival
from distserve.validate.grid import PLANS, pinned
from distserve.validate.live import Site, site
from experiments.live_goodput.cases import GOAL, Case

MODEL = "smollm2-135m-instruct"
APART, WHOLE, CHUNKED, VLLM = "1 prefill + 1 decode", "2 colocated, whole prompts", "2 colocated, chunked", "2x vLLM"
OURS = (APART, WHOLE, CHUNKED)
ALL = (*OURS, VLLM)
CHUNKS = (256, 512, 1024)  # tokens a step; fewer than sequences that may decode in it would be no chunk
_TIMEOUT = 600.0


@dataclass(frozen=True)
class Contender:
    name: str
    plan: Plan | None  # None: not ours


def contenders(case: Case, costs: Costs, names: Sequence[str]) -> list[Contender]:
    """For a case: the chunk size that is best for it is chosen by the simulator."""
    found = []
    for name in names:
        if name == VLLM:
            found.append(Contender(name, None))
        elif name == CHUNKED:
            found.append(Contender(name, best_chunked(case, costs)))
        else:
            found.append(Contender(name, pinned(PLANS["1p1d" if name == APART else "2c-whole"], costs, MODEL, "cpu")))
    return found


def best_chunked(case: Case, costs: Costs) -> Plan:
    plans = [
        Plan((InstanceSpec(Role.COLOCATED, count=2, policy=Policy.CHUNKED, chunk_tokens=size),)) for size in CHUNKS
    ]
    return max((pinned(plan, costs, MODEL, "cpu") for plan in plans), key=lambda plan: capacity(case, plan, costs))


def capacity(case: Case, plan: Plan, costs: Costs) -> float:
    """By the simulator: the goodput in requests/s of both devices; 0: none."""
    situation = Situation(costs, None, Demand(case.lengths.workload, Targets(case.slo), GOAL), 2.0)

    def attains(rate: float) -> bool:
        return judge(situation, plan, rate, ROUGH).attains

    return highest_rate(attains, 2.0, most=1e3, tolerance=0.04)


@asynccontextmanager
async def serving(contender: Contender, vllm_python: str | None) -> AsyncIterator[Site]:
    """A contender that is ready."""
    if contender.plan is not None:
        async with site(contender.plan, url=None, seed=0) as found:
            yield found
        return
    assert vllm_python is not None, "vLLM is a contender where its interpreter is named"
    async with AsyncExitStack() as stack:
        folder = demo_folder()
        replicas = [processes.vllm(vllm_python, folder, kv_gib=1, cores=core) for core in ("0", "1")]
        for number, replica in enumerate(replicas):
            replica.log = replica.log.with_name(f"server-vllm-{number}.log")
            stack.enter_context(replica)  # nothing else runs in this loop while it starts
        urls = [replica.url for replica in replicas]
        client = await stack.enter_async_context(RoundRobin(urls))
        named = await servers.look(client, None)
        prompts = await making.learn(client, named, chat=False, kind="auto", seed=0)
        yield Site(client, Runner(BenchOptions(url=urls[0]), client, named, prompts))


class RoundRobin(Client):
    """Several servers in turns, request by request; what is asked of the server itself is asked of the first."""

    def __init__(self, urls: Sequence[str]) -> None:
        super().__init__(urls[0], api_key=None, timeout=_TIMEOUT)
        self._others = [Client(url, api_key=None, timeout=_TIMEOUT) for url in urls[1:]]
        self._turns = cycle([super().send, *(client.send for client in self._others)])

    async def __aenter__(self) -> RoundRobin:
        await super().__aenter__()
        for client in self._others:
            await client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._others:
            await client.__aexit__()
        await super().__aexit__()

    async def send(self, path: str, body: bytes, asked: Arrival, due: float, answer: Answer | None = None) -> Result:
        return await next(self._turns)(path, body, asked, due, answer)
