"""Where no deployment attains the goal: the nearest targets that one does. Knows that the answer stays no; nothing is
relaxed but to say by how much."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from distserve.metrics import SLO, Record, Targets
from distserve.plan import Plan
from distserve.planner.ask import Question, World
from distserve.planner.demand import Demand
from distserve.planner.goodput import FULL, Situation, lived
from distserve.planner.jobs import Jobs
from distserve.planner.search import Found, Search

FACTORS = (1.5, 2.5, 5.0, 12.0, 40.0, 200.0)  # of the targets, until something attains them


@dataclass(frozen=True, slots=True)
class Needs:
    """What targets one deployment attains the goal with. Infinite: none."""

    factor: float  # of all targets
    ttft: float  # with TPOT as asked
    tpot: float  # with TTFT as asked


def needs(world: World, question: Question) -> Needs:
    """Of a run to its end: what the goal's share of its requests stays within."""
    plan, demand = question.subject, world.demands[question.whose]
    assert isinstance(plan, Plan)
    situation = Situation(world.costs, world.cluster, demand, question.residence)
    run, warm, counted = lived(situation, plan, question.rate, question.length, seed=question.seed)
    records = [life.record() for life in run.lives[warm : warm + counted]]
    worst = [0.0, 0.0, 0.0]
    for app in demand.apps:
        slo = demand.targets.of(app)
        mine = [record for record in records if record.app == app]
        found = (
            _within(demand.goal, [_factor(record, slo) for record in mine]),
            _within(demand.goal, [_late(record.ttft) if slo.tpot_met(record) else math.inf for record in mine]),
            _within(demand.goal, [_pace(record) if slo.ttft_met(record) else math.inf for record in mine]),
        )
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
    return Needs(*worst)


def nearest(jobs: Jobs, whose: str, demand: Demand, rate: float | None, make: Callable[[float], Search]) -> str:
    """The cure, as the end of a sentence. `make(factor)`: a search with targets so many times as long."""
    for factor in FACTORS:
        search = make(factor)
        at = rate
        found: list[Found]
        if at is None:
            found = search.highest()
            at = min((each.goodput for each in found), default=1.0) / 20
        else:
            found = search.fewest(at, least=max(1, search.max_devices - search.smallest + 1))
        if found:
            break
    else:
        return (
            f"no targets help: the devices cannot serve {rate:g} requests/s of it. Lower the rate or take more devices"
            if rate
            else "no targets help: take a larger cluster or a smaller model"
        )
    best = found[:4]
    questions = [replace(search.question(each.deployment, at), whose=whose, scale=1.0, length=FULL) for each in best]
    return _sentence(demand.targets, list(zip(best, jobs.map(needs, questions), strict=True)))


def _sentence(targets: Targets, found: list[tuple[Found, Needs]]) -> str:
    each, least = min(found, key=lambda entry: entry[1].factor)
    factor = _up(least.factor)
    both = Targets(_times(targets.default, factor), tuple((app, _times(slo, factor)) for app, slo in targets.by_app))
    parts = [f"{both} (all targets times {factor:g}), with {each.deployment}"]
    slo = targets.default
    if not targets.by_app and slo.ttft is not None and slo.tpot is not None:
        ttft, tpot = min(needs.ttft for _, needs in found), min(needs.tpot for _, needs in found)
        parts += [f"ttft {_up(ttft):g} s with tpot {slo.tpot:g} s"] if ttft < math.inf else []
        parts += [f"tpot {_up(tpot):g} s with ttft {slo.ttft:g} s"] if tpot < math.inf else []
    return "the nearest that can be met: " + "; or ".join(parts)


def _times(slo: SLO, factor: float) -> SLO:
    return SLO(*(None if value is None else _up(value * factor) for value in (slo.ttft, slo.tpot)))


def _up(value: float) -> float:
    """Three digits, rounded up so that what is named can be met."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit - 1e-9) * unit


def _within(goal: float, values: list[float]) -> float:
    return sorted(values)[math.ceil(goal * len(values)) - 1]


def _factor(record: Record, slo: SLO) -> float:
    factors = [0.0]
    if slo.ttft is not None:
        factors.append(_late(record.ttft) / slo.ttft)
    if slo.tpot is not None:
        factors.append(_pace(record) / slo.tpot)
    return max(factors) if record.ok else math.inf


def _late(ttft: float | None) -> float:
    return math.inf if ttft is None else ttft


def _pace(record: Record) -> float:
    return (record.tpot or 0.0) if record.ok else math.inf
