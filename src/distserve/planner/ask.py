"""The questions that processes answer: does this attain the goal at that rate, and up to which. Knows no search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.plan import InstanceSpec, Plan, Role
from distserve.planner.demand import Demand
from distserve.planner.goodput import USUAL, Length, Situation, Verdict, highest_rate, judge
from distserve.planner.jobs import cancelled
from distserve.planner.phases import decode_apart, prefill_apart


@dataclass
class World:
    """What every process knows."""

    costs: Costs
    cluster: Cluster
    demands: Mapping[str, Demand]  # all requests under "", those of one application under its name
    model: str | None = None

    def __post_init__(self) -> None:
        self._made: dict[tuple[str, Role | None, float], Demand] = {}

    def demand(self, whose: str, role: Role | None, scale: float = 1.0) -> Demand:
        """What instances of this role alone see of it (None, colocated: all), with targets `scale` times as long."""
        key = (whose, role, scale)
        if key not in self._made:
            demand = self.demands[whose].scaled_targets(scale) if scale != 1.0 else self.demands[whose]
            if role is Role.PREFILL:
                demand = demand.of_prefill()
            elif role is Role.DECODE:
                demand = demand.of_decode()
            self._made[key] = demand
        return self._made[key]


@dataclass(frozen=True, slots=True)
class Question:
    """About a plan with its seats, or about instances of one role apart."""

    subject: Plan | InstanceSpec
    rate: float  # requests/s
    residence: float  # seconds
    whose: str = ""  # demand
    length: Length = USUAL
    seed: int = 0
    early: bool = True
    scale: float = 1.0  # of the targets


@dataclass(frozen=True, slots=True)
class Climb:
    """Up to which rate."""

    question: Question  # at the rate to begin with
    most: float
    tolerance: float
    step: float = 1.25  # from the first rate to the next


@dataclass(frozen=True, slots=True)
class Descent:
    """Whether at this rate, and if not, down to which (in such steps, so many at most)."""

    question: Question
    step: float = 1.25
    times: int = 2


def ask(world: World, question: Question) -> Verdict:
    situation, plan = _situation(world, question)
    return judge(
        situation,
        plan,
        question.rate,
        question.length,
        seed=question.seed,
        early=question.early,
        cancelled=cancelled,
    )


def climb(world: World, request: Climb) -> list[Verdict]:
    """Every verdict on the way."""
    question = request.question
    situation, plan = _situation(world, question)
    found: list[Verdict] = []

    def attains(rate: float) -> bool:
        found.append(judge(situation, plan, rate, question.length, seed=question.seed, cancelled=cancelled))
        return found[-1].attains or cancelled()

    highest_rate(attains, question.rate, most=request.most, tolerance=request.tolerance, step=request.step)
    return found


def descend(world: World, request: Descent) -> list[Verdict]:
    """Every verdict on the way."""
    question = request.question
    situation, plan = _situation(world, question)
    found: list[Verdict] = []
    rate = question.rate
    for _ in range(request.times):
        found.append(judge(situation, plan, rate, question.length, seed=question.seed, cancelled=cancelled))
        if found[-1].attains or cancelled():
            break
        rate /= request.step
    return found


def _situation(world: World, question: Question) -> tuple[Situation, Plan]:
    subject = question.subject
    role = None if isinstance(subject, Plan) else subject.role
    demand = world.demand(question.whose, role, question.scale)
    if isinstance(subject, Plan):
        return Situation(world.costs, world.cluster, demand, question.residence), subject
    if role is Role.COLOCATED:
        return Situation(world.costs, None, demand, question.residence), Plan((subject,))
    apart = prefill_apart if role is Role.PREFILL else decode_apart
    plan, costs = apart(world.costs, subject)
    return Situation(costs, None, demand, question.residence), plan
