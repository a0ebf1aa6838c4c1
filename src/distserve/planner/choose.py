"""The whole choice: from what a user knows to an answer that explains itself. Knows no file and no screen.

choose()  ->  algorithm (affinity.py)  ->  search, shared and a deployment per application  ->  explain.py  ->  Answer
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.errors import UsageError
from distserve.planner.affinity import low_affinity
from distserve.planner.answer import Alternative, Answer, InfeasibleError
from distserve.planner.ask import World
from distserve.planner.demand import Demand
from distserve.planner.explain import bottleneck, measure, portrait
from distserve.planner.goodput import FULL
from distserve.planner.jobs import Jobs
from distserve.planner.search import Found, Search

ALGORITHMS = ("auto", "high", "low")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks for."""

    model: str
    cluster: Cluster
    demand: Demand
    rate: float | None = None  # requests/s; None: as many as the devices can
    max_devices: int | None = None  # None: all of the cluster
    algorithm: str = "auto"
    cluster_name: str = "cluster"
    jobs: int = 1  # processes

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UsageError(f"--algorithm {self.algorithm} is unknown: one of {', '.join(ALGORITHMS)}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise UsageError(f"the rate {self.rate:g} must be above 0 requests a second")
        if self.max_devices is not None and self.max_devices < 1:
            raise UsageError(f"--devices {self.max_devices} is too small: at least 1")


def choose(wish: Wish, costs: Costs, say: Callable[[str], None] = lambda _: None) -> Answer:
    """The best plan. Raises `InfeasibleError` where there is none, `UsageError` where the question has no sense."""
    began = time.monotonic()
    costs = over_links(costs)
    world = World(costs, wish.cluster, {"": wish.demand}, wish.model)
    with Jobs(world, wish.jobs) as jobs:
        answer = _Choice(wish, world, jobs, say).answer()
    return replace(answer, seconds=time.monotonic() - began)


def over_links(costs: Costs) -> Costs:
    """The same costs, with pulls as fast as the cluster's links instead of those that were measured on."""
    if costs.engine.pull_bandwidth is None:
        return costs
    changed = copy.copy(costs)
    changed.engine = replace(costs.engine, pull_bandwidth=None)
    return changed


class _Choice:
    """One demand's."""

    def __init__(self, wish: Wish, world: World, jobs: Jobs, say: Callable[[str], None]) -> None:
        low, self._why = low_affinity(world.costs, wish.cluster, wish.demand, wish.rate)
        if wish.algorithm != "auto":
            low, self._why = wish.algorithm == "low", "as asked"
        self._algorithm = "low" if low else "high"
        self._wish, self._world, self._jobs, self._say = wish, world, jobs, say
        self._search = Search(world, jobs, low_affinity=low, max_devices=wish.max_devices, say=say)

    def answer(self) -> Answer:
        search, wish = self._search, self._wish
        if wish.rate is None:
            found = search.highest()
        else:
            found = search.fewest(wish.rate)
        if not found:
            raise InfeasibleError(
                f"no deployment of up to {search.max_devices} devices meets {wish.demand.targets} for "
                f"{wish.demand.goal:.0%} of the requests"
            )
        rate = wish.rate or found[0].goodput
        ranked = search.raise_(found[:4], rate)
        return self._explained(ranked[0], ranked[1:], rate)

    def _explained(self, best: Found, others: list[Found], rate: float) -> Answer:
        search, wish = self._search, self._wish
        self._say(f"measuring {best.deployment}")
        question = replace(search.question(best.deployment, rate), length=FULL)
        copies = best.deployment.copies
        goodput, beyond = measure(self._jobs, question, copies, best.goodput / copies, 1.5 * best.goodput / copies)
        seen = portrait(self._world, question, copies)
        return Answer(
            plan=best.plan,
            goodput=goodput,
            rate=wish.rate,
            report=seen.report,
            targets=wish.demand.targets,
            goal=wish.demand.goal,
            algorithm=self._algorithm,
            workload=wish.demand.workload.name,
            costs=self._world.costs.name,
            cluster=wish.cluster_name,
            binding=beyond.binding,
            bottleneck=bottleneck(beyond.binding, seen.utilization),
            utilization=seen.utilization,
            split=seen.split,
            runner_up=self._alternative(others[0], best) if others else None,
            colocated=None,
            notes=(f"{self._algorithm} node affinity: {self._why}", *seen.notes),
            simulated=search.simulated + goodput.requests,
            best=tuple((str(f.deployment), f.plan) for f in [best, *others][:3]),
        )

    def _alternative(self, other: Found, best: Found) -> Alternative:
        loss = 1 - other.goodput / other.num_devices / (best.goodput / best.num_devices)
        return Alternative(
            str(other.deployment), other.num_devices, other.goodput, f"{loss:.1%} less goodput per device"
        )
