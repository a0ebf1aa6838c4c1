"""Why a plan: what it is like at the rate, what holds it back, how sure its goodput is. Knows one deployment at a time;
what else there was is the search's to say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from distserve.metrics import Report, report
from distserve.plan import Plan, Role
from distserve.planner.ask import Question, World
from distserve.planner.goodput import FULL, USUAL, Goodput, Situation, Verdict, lived
from distserve.sim.simulate import Imagination, Split

SEEDS = 3
_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile of Student's t, by number of seeds


@dataclass(frozen=True, slots=True)
class Portrait:
    """A deployment at a rate."""

    report: Report
    split: Split
    utilization: dict[str, float]
    notes: tuple[str, ...]


def portrait(world: World, asked: tuple[Question, int]) -> Portrait:
    """(about one copy of a unit at its share, how many copies): the report speaks of all of them."""
    question, copies = asked
    plan = question.subject
    assert isinstance(plan, Plan)
    demand = world.demands[question.whose]
    situation = Situation(world.costs, world.cluster, demand, question.residence)
    run, warm, counted = lived(situation, plan, question.rate, FULL, seed=question.seed)
    lives = run.lives[: warm + counted]
    start = lives[warm].arrival - lives[0].arrival
    whole = report(
        [life.record() for life in lives],
        demand.targets.default,
        end=run.end,
        rate=question.rate * copies,
        devices=plan.num_devices * copies,
        warmup=start,
        seed=demand.seed + question.seed,
        targets=demand.targets,
    )
    return Portrait(whole, run.split(start), _utilization(plan, run), run.notes)


def _utilization(plan: Plan, run: Imagination) -> dict[str, float]:
    seconds = run.end - run.lives[0].arrival
    roles = {replica.name: str(replica.role) for replica in plan.replicas()}
    shares: dict[str, list[float]] = {}
    for name, usage in run.usage.items():
        shares.setdefault(roles[name], []).append(usage.busy / seconds)
    return {role: min(1.0, fmean(of_role)) for role, of_role in shares.items()}


NEAR = (0.9, 1.02)  # of the goodput that short runs gave, which flatter: where longer ones are asked


def nearby(question: Question, rate: float) -> list[Question]:
    """What `measured` is made of: runs to their end with several seeds, below and above `rate`, roughly the goodput."""
    base = replace(question, length=USUAL, early=False, scale=1.0)
    return [replace(base, seed=seed, rate=rate * near) for seed in range(SEEDS) for near in NEAR]


def measured(verdicts: list[Verdict], goal: float, copies: int) -> tuple[Goodput, Verdict]:
    """(goodput of all copies with its interval, the verdict just beyond it): where each seed's attainment crosses the
    goal, on the straight line through its two rates.

    The interval is Student's over the seeds, and at least 1.5 % to each side."""
    rates = []
    for below, above in zip(verdicts[::2], verdicts[1::2], strict=True):
        fall = below.attainment.joint - above.attainment.joint
        share = (below.attainment.joint - goal) / fall if fall > 1e-3 else (1.0 if above.attains else 0.0)
        rates.append(below.rate + min(max(share, -0.75), 1.75) * (above.rate - below.rate))
    mean = fmean(rates)
    half = max(_T[SEEDS] * stdev(rates) / math.sqrt(SEEDS), 0.015 * mean)
    simulated = sum(verdict.requests for verdict in verdicts)
    found = Goodput(copies * mean, copies * max(0.0, mean - half), copies * (mean + half), simulated)
    return found, min(verdicts, key=lambda verdict: verdict.attainment.joint)


def bottleneck(binding: str, utilization: dict[str, float]) -> str:
    """The role that holds the plan back: the one whose target is missed first, or that has no time left."""
    busiest = max(utilization, key=lambda role: utilization[role])
    if str(Role.COLOCATED) in utilization and len(utilization) == 1:
        return str(Role.COLOCATED)
    if utilization[busiest] > 0.97:
        return busiest
    role = str(Role.PREFILL if binding == "ttft" else Role.DECODE)
    return role if role in utilization else busiest
