"""Who serves, on the same two cores: our own plans, and vLLM's CPU build, two replicas or prefill and decode apart.

Each of vLLM's servers is bound to a core, as each of our instances is; our gateway and vLLM's front ends share the
cores with them, and so does the client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from distserve.costs.base import Costs
from distserve.metrics import Targets
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.planner.demand import Demand
from distserve.planner.goodput import ROUGH, Situation, highest_rate, judge
from distserve.validate.grid import PLANS, pinned
from distserve.validate.live import Site, site
from experiments.live_goodput import peers
from experiments.live_goodput.cases import GOAL, Case

MODEL = "smollm2-135m-instruct"
APART, WHOLE, CHUNKED = "1 prefill + 1 decode", "2 colocated, whole prompts", "2 colocated, chunked"
VLLM, VLLM_APART = "2x vLLM", "vLLM, 1 prefill + 1 decode"
OURS, VLLMS = (APART, WHOLE, CHUNKED), (VLLM, VLLM_APART)
ALL = (*OURS, *VLLMS)
CHUNKS = (256, 512, 1024)  # tokens a step; fewer than sequences that may decode in it would be no chunk


@dataclass(frozen=True)
class Contender:
    name: str
    plan: Plan | None  # None: not ours


def label(name: str, case: Case) -> str:
    """Under which a contender's plan is kept: that of chunked prefill differs from case to case."""
    return f"{name}, {case.name}"


def contenders(case: Case, costs: Costs, names: Sequence[str]) -> list[Contender]:
    """For a case: the chunk size that is best for it is chosen by the simulator."""
    found = []
    for name in names:
        if name in VLLMS:
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
    """A contender that is ready. Raises `ServerFailed`, or `peers.Absent` of what is not installed."""
    if contender.plan is not None:
        async with site(contender.plan, url=None, seed=0) as found:
            yield found
        return
    assert vllm_python is not None, "vLLM is a contender where its interpreter is named"
    async with (peers.replicas if contender.name == VLLM else peers.apart)(vllm_python) as found:
        yield found
