"""A small world for tests: OPT-13B on a few A100, short answers, quick runs."""

from __future__ import annotations

from functools import cache

from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.costs.choose import choose_costs
from distserve.metrics import Targets
from distserve.planner.ask import World
from distserve.planner.choose import over_links
from distserve.planner.demand import Demand
from distserve.workload import Workload

MODEL = "facebook/opt-13b"


@cache
def costs() -> Costs:
    return over_links(choose_costs(MODEL, "a100-80g"))


def demand(slo: str = "ttft=0.25,tpot=0.1", workload: str = "humaneval", goal: float = 0.9) -> Demand:
    return Demand(Workload.load(workload), Targets.parse([slo]), goal)


def world(asked: Demand, cluster: str = "a100-1x4") -> World:
    return World(costs(), Cluster.load(cluster), {"": asked}, MODEL)
