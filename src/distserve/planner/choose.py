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
from distserve.plan import Role
from distserve.planner.affinity import low_affinity
from distserve.planner.answer import Alternative, Answer, Dedicated, InfeasibleError
from distserve.planner.ask import Question, World, ask, climb
from distserve.planner.curves import Curve, curves
from distserve.planner.demand import Demand
from distserve.planner.explain import Portrait, bottleneck, measured, nearby, portrait
from distserve.planner.goodput import FULL, QUICK
from distserve.planner.jobs import Jobs
from distserve.planner.nearest import nearest
from distserve.planner.pack import pack
from distserve.planner.search import COLOCATED, DISAGGREGATED, MIXED, Found, Search
from distserve.sim.sizes import sized

ALGORITHMS = ("auto", "high", "low")
_RANKED = 6  # deployments of equally many devices whose goodput is compared


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
    curves: bool = False  # attainment by rate and by SLO scale, too

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UsageError(f"--algorithm {self.algorithm} is unknown: one of {', '.join(ALGORITHMS)}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise UsageError(f"the rate {self.rate:g} must be above 0 requests a second")
        if self.max_devices is not None and self.max_devices < 1:
            raise UsageError(f"--devices {self.max_devices} is too small: at least 1")


def choose(wish: Wish, costs: Costs, say: Callable[[str], None] = lambda _: None) -> Answer | Dedicated:
    """The best plan. Several applications share instances or have their own, whichever needs fewer devices (of equals,
    shared: a burst of one then finds room that another does not need). Raises `InfeasibleError` where there is none,
    `UsageError` where the question has no sense."""
    demand = wish.demand
    demands = {"": demand} | ({app: demand.only(app) for app in demand.apps} if len(demand.apps) > 1 else {})
    world = World(over_links(costs), wish.cluster, demands, wish.model)
    with Jobs(world, wish.jobs) as jobs:
        if len(demand.apps) == 1 or wish.rate is None:
            return _Choice(wish, world, jobs, say).answer()
        return _shared_or_not(wish, world, jobs, say)


def _shared_or_not(wish: Wish, world: World, jobs: Jobs, say: Callable[[str], None]) -> Answer | Dedicated:
    shared = _Choice(wish, world, jobs, say)
    together = shared.search()
    own = {app: _Choice(wish, world, jobs, say, app) for app in wish.demand.apps}
    found = {app: choice.search() for app, choice in own.items()}
    apart = sum(each[0].num_devices for each in found.values()) if all(found.values()) else 0
    most = wish.max_devices or wish.cluster.num_devices
    if not 0 < apart <= most or (together and together[0].num_devices <= apart):
        return shared.answer(together)
    answers: dict[str, Answer] = {}
    taken: list[str] = []
    for app, choice in own.items():
        plan = pack(found[app][0].deployment, wish.cluster, wish.model, taken=taken)
        if plan is None:  # each fits the cluster, but not all together
            return shared.answer(together)
        answers[app] = replace(choice.answer(found[app][:1]), plan=plan)
        taken += [device for replica in plan.replicas() for device in replica.devices]
    return Dedicated(answers, shared.alternative(together[0], apart) if together else None)


def over_links(costs: Costs) -> Costs:
    """The same costs, with pulls as fast as the cluster's links instead of those that were measured on."""
    if costs.engine.pull_bandwidth is None:
        return costs
    changed = copy.copy(costs)
    changed.engine = replace(costs.engine, pull_bandwidth=None)
    return changed


class _Choice:
    """Of all requests, or of one application's."""

    def __init__(self, wish: Wish, world: World, jobs: Jobs, say: Callable[[str], None], app: str = "") -> None:
        self._began = time.monotonic()
        self._wish, self._world, self._jobs, self._say, self._app = wish, world, jobs, say, app
        self._demand = world.demands[app]
        self._rate = None if wish.rate is None else wish.rate * (wish.demand.shares[app] if app else 1.0)
        low, self._why = low_affinity(world.costs, wish.cluster, self._demand, self._rate)
        if wish.algorithm != "auto":
            low, self._why = wish.algorithm == "low", "as asked"
        self._algorithm = "low" if low else "high"
        self._search = self._searching()

    def _searching(self, scale: float = 1.0) -> Search:
        return Search(
            self._world,
            self._jobs,
            whose=self._app,
            low_affinity=self._algorithm == "low",
            max_devices=self._wish.max_devices,
            scale=scale,
            say=self._say,
        )

    def search(self) -> list[Found]:
        return self._search.highest() if self._rate is None else self._search.fewest(self._rate)

    def answer(self, found: list[Found] | None = None) -> Answer:
        """Raises `InfeasibleError`."""
        found = self.search() if found is None else found
        while found:
            ranked = found if self._rate is None else self._search.raise_(found[:_RANKED], self._rate)
            best, seen, attains = ranked[0], *self._confirmed(ranked[0])
            if attains or self._rate is None:
                return self._explained(best, ranked[1:], seen)
            self._search.rejected.add(best.deployment)
            found = [each for each in found if each.deployment != best.deployment]
            found = found or self._search.fewest(self._rate, least=best.num_devices)
        at = "at any rate" if self._rate is None else f"at {self._rate:g} requests/s"
        cure = nearest(self._jobs, self._app, self._demand, self._rate, self._searching)
        raise InfeasibleError(
            f"no deployment of up to {self._search.max_devices} devices meets {self._demand.targets} for "
            f"{self._demand.goal:.0%} of the requests {at}; {cure}"
        )

    def _confirmed(self, best: Found) -> tuple[Portrait, bool]:
        """(how it fares in a long run, whether it attains the goal there, and with another seed)."""
        question = self._asked(best)
        copies = best.deployment.copies
        self._say(f"confirming {best.deployment}")
        seen, other = self._jobs.gather([(portrait, (question, copies)), (ask, replace(question, seed=1))])
        self._search.simulated += other.requests + seen.report.requests
        joint = [each.joint for each in seen.report.by_app.values()] or [seen.report.attainment.joint]
        return seen, other.attains and min(joint) >= self._demand.goal

    def _asked(self, best: Found) -> Question:
        return replace(self._search.question(best.deployment, self._rate or best.goodput), length=FULL)

    def _explained(self, best: Found, others: list[Found], seen: Portrait) -> Answer:
        search, rate = self._search, self._rate or best.goodput
        self._say(f"measuring {best.deployment}")
        question, copies = self._asked(best), best.deployment.copies
        runner_up, other_kind = self._others(best, others)
        others = list(dict.fromkeys(each for each in (runner_up, other_kind) if each))
        questions = nearby(question, best.goodput / copies)
        climbs = [search.climbing(each, rate, 0.06, QUICK) for each in others]
        answers = self._jobs.gather([(ask, q) for q in questions] + [(climb, c) for c in climbs])
        goodput, beyond = measured(answers[: len(questions)], self._demand.goal, copies)
        found = zip(others, answers[len(questions) :], strict=True)
        raised = {other: _no_more(search.climbed(other, verdicts), other.goodput) for other, verdicts in found}
        runner_up = raised.get(runner_up, runner_up) if runner_up else None
        other_kind = raised.get(other_kind, other_kind) if other_kind else None
        return Answer(
            plan=sized(best.plan, self._world.costs),
            goodput=goodput,
            rate=self._rate,
            report=seen.report,
            targets=self._demand.targets,
            goal=self._demand.goal,
            algorithm=self._algorithm,
            workload=self._demand.workload.name,
            costs=self._world.costs.name,
            cluster=self._wish.cluster_name,
            binding=beyond.binding,
            bottleneck=bottleneck(beyond.binding, seen.utilization),
            utilization=seen.utilization,
            split=seen.split,
            runner_up=self._compared(runner_up, best) if runner_up else None,
            other_kind=self._compared(other_kind, best) if other_kind else None,
            notes=self._notes(seen.notes),
            app=self._app,
            seconds=time.monotonic() - self._began,
            simulated=search.simulated + goodput.requests,
            curves=self._curves([best, *(each for each in (runner_up, other_kind) if each)], rate),
        )

    def _others(self, best: Found, ranked: list[Found]) -> tuple[Found | None, Found | None]:
        """(the runner-up, the best of the other kind)."""
        search = self._search
        wanted = DISAGGREGATED if _kind(best) == COLOCATED else COLOCATED
        other = next((each for each in ranked if _kind(each) == wanted), None)
        if other is None and self._rate is None:
            other = next(iter(search.highest([wanted])), None)
        elif other is None and self._rate is not None:
            least = best.num_devices
            other = next(iter(search.fewest(self._rate, [wanted], least=least, most=2 * least, limit=4)), None)
        return (ranked[0] if ranked else other), other

    def _curves(self, found: list[Found], rate: float) -> tuple[Curve, ...]:
        if not self._wish.curves:
            return ()
        self._say("drawing")
        different = {each.deployment: each for each in found}.values()
        subjects = [
            (str(d), d.num_devices, d.copies, self._search.question(d, rate))
            for d in (each.deployment for each in different)
        ]
        return tuple(curves(self._jobs, subjects, found[0].goodput / found[0].num_devices, rate))

    def _compared(self, other: Found, best: Found) -> Alternative:
        more = other.num_devices - best.num_devices
        loss = 1 - other.goodput / other.num_devices / (best.goodput / best.num_devices)
        words = [f"{more} more devices"] if more else []
        words.append(f"{abs(loss):.1%} {'less' if loss >= 0 else 'more'} goodput per device")
        return Alternative(str(other.deployment), other.num_devices, other.goodput, ", ".join(words))

    def alternative(self, shared: Found, devices: int) -> Alternative:
        """What a plan for all would take, beside `devices` of plans for each."""
        more = shared.num_devices - devices
        return Alternative(str(shared.deployment), shared.num_devices, self._rate or 0.0, f"{more} more devices")

    def _notes(self, seen: tuple[str, ...]) -> tuple[str, ...]:
        notes = [f"{self._algorithm} node affinity: {self._why}", *self._demand.workload.notes, *seen]
        if self._wish.cluster.overrides:
            notes.append("what the cluster says of single devices (overrides) is not planned for: all count as equal")
        if self._algorithm == "low":
            notes.append(
                "KV stays inside nodes: a copy of the unit was simulated at its share of the requests, which needs a "
                "router that hands over inside a node"
            )
        return tuple(dict.fromkeys(notes))


def _no_more(found: Found, bound: float) -> Found:
    """By a short run, which may flatter: at most what a longer one ruled out (0: none did)."""
    return replace(found, goodput=min(found.goodput, bound)) if bound else found


def _kind(found: Found) -> str:
    if not found.deployment.count(Role.DECODE):
        return COLOCATED
    return MIXED if found.deployment.count(Role.COLOCATED) else DISAGGREGATED
