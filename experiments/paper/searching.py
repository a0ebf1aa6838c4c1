"""What our search finds where the paper names a placement. Knows no figure."""

from __future__ import annotations

import time
from dataclasses import dataclass

from distserve.cluster import Cluster
from distserve.metrics import SLO, Targets
from distserve.plan import Plan
from distserve.planner.ask import World
from distserve.planner.choose import over_links
from distserve.planner.demand import Demand
from distserve.planner.jobs import Jobs
from distserve.planner.search import COLOCATED, DISAGGREGATED, Search
from experiments.paper import living, systems
from experiments.paper.systems import DISTSERVE

APART, TOGETHER = (DISAGGREGATED,), (COLOCATED,)
_LOWER = 0.93  # each rate that is asked for, of the one before


@dataclass(frozen=True)
class Best:
    """The highest goodput of one kind of deployment."""

    said: str  # in words
    unit: Plan  # that it is copies of, without seats
    devices: int
    goodput: float  # requests/s and device


@dataclass(frozen=True)
class Searched:
    """What a search took, and what it found."""

    seconds: float  # of one core
    requests: int  # simulated
    devices: int
    said: str


def best(model: str, workload: str, slo: SLO, cluster: str, devices: int, low: bool, kinds: tuple[str, ...]) -> Best:
    """With exactly so many devices: rates are asked for from what arithmetic allows downwards, until something attains
    one. `low`: KV stays inside nodes (the paper's Algorithm 2)."""
    world = _world(model, workload, slo, cluster)
    with Jobs(world, 1) as jobs:
        search = Search(world, jobs, low_affinity=low, max_devices=devices)
        rate = max(search.promise(deployment) for deployment in search.deployments(devices, 0.0, kinds))
        while not (found := search.with_devices(devices, rate, kinds)):
            rate *= _LOWER
        first = search.raise_(found, rate)[0]
    return Best(str(first.deployment), first.deployment.unit(), first.num_devices, first.goodput / first.num_devices)


def search_for(model: str, workload: str, slo: SLO, cluster: str, rate: float, algorithm: str) -> Searched:
    """The fewest devices of a cluster that attain a rate, in one process."""
    began = time.process_time()
    world = _world(model, workload, slo, cluster)
    with Jobs(world, 1) as jobs:
        search = Search(world, jobs, low_affinity=algorithm == "low")
        first = search.raise_(search.fewest(rate), rate)[0]
    return Searched(time.process_time() - began, search.simulated, first.num_devices, str(first.deployment))


def _world(model: str, workload: str, slo: SLO, cluster: str) -> World:
    demand = Demand(living.workload(workload), Targets(slo))
    return World(over_links(systems.costs(model, DISTSERVE)), Cluster.load(cluster), {"": demand}, model)
