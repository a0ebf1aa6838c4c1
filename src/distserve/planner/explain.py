"""Why a plan: what it is like at the rate, what holds it back, how sure its goodput is. Knows one deployment at a time;
what else there was is the search's to say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from distserve.metrics import Report, report
from distserve.plan import Plan, Role
from distserve.planner.ask import Climb, Question, World, ask, climb
from distserve.planner.goodput import FULL, USUAL, Goodput, Situation, Verdict, lived
from distserve.planner.jobs import Jobs
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


def portrait(world: World, question: Question, copies: int = 1) -> Portrait:
    """Of one copy of a unit, at its share; the report speaks of all copies."""
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


def measure(jobs: Jobs, question: Question, copies: int, start: float, most: float) -> tuple[Goodput, Verdict]:
    """(goodput of all copies with its interval, a verdict just beyond it): by bisection with each of several seeds.

    The interval is Student's over the seeds' goodputs, and at least as wide as the bisection is coarse."""
    tolerance = 0.025
    base = replace(question, length=USUAL, rate=start)
    climbs = [Climb(replace(base, seed=seed), most, tolerance, step=1.05) for seed in range(SEEDS)]
    rates, requests, beyond = [], 0, []
    for verdicts in jobs.map(climb, climbs):
        rates.append(max((v.rate for v in verdicts if v.attains), default=0.0))
        requests += sum(v.requests for v in verdicts)
        beyond += [v for v in verdicts if not v.attains]
    mean = fmean(rates)
    half = max(_T[SEEDS] * stdev(rates) / math.sqrt(SEEDS), tolerance / 2 * mean)
    found = Goodput(copies * mean, copies * max(0.0, mean - half), copies * (mean + half), requests)
    nearest = min(beyond, key=lambda v: v.rate, default=None)
    if nearest is None or not nearest.whole:
        nearest = jobs.map(ask, [replace(base, rate=mean * 1.05, early=False)])[0]
    return found, nearest


def bottleneck(binding: str, utilization: dict[str, float]) -> str:
    """The role that holds the plan back: the one whose target is missed first, or that has no time left."""
    busiest = max(utilization, key=lambda role: utilization[role])
    if str(Role.COLOCATED) in utilization and len(utilization) == 1:
        return str(Role.COLOCATED)
    if utilization[busiest] > 0.97:
        return busiest
    role = str(Role.PREFILL if binding == "ttft" else Role.DECODE)
    return role if role in utilization else busiest
