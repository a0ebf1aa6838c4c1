"""Which cells to measure: plans, workloads, and rates around the knee that the simulator expects. Knows no server.

A served plan has every size that both worlds would otherwise choose for themselves (how many prompt tokens go into a
step, how much KV there is) written into it, from the costs: what is compared is the prediction, not two measurements of
the knee.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distserve.costs.base import Costs
from distserve.errors import UsageError
from distserve.metrics import SLO, Record, Targets, quantile
from distserve.plan import InstanceSpec, Plan, Policy, Role
from distserve.planner.demand import Demand
from distserve.planner.goodput import ROUGH, Situation, highest_rate, judge
from distserve.sim.simulate import imagine
from distserve.sim.sizes import sized
from distserve.validate.record import Chosen, Key
from distserve.workload import Workload

PLANS = {
    "1p1d": Plan((InstanceSpec(Role.PREFILL), InstanceSpec(Role.DECODE))),
    "2c-whole": Plan((InstanceSpec(Role.COLOCATED, count=2, policy=Policy.PREFILL_FIRST),)),
    "2c-chunked": Plan((InstanceSpec(Role.COLOCATED, count=2, policy=Policy.CHUNKED),)),
}
_SCALE = re.compile(r"(?P<name>.+?):(?P<prompt>\d*\.?\d+)(,(?P<answer>\d*\.?\d+))?")
# Targets where nobody names any, in units of what an idle system takes (TTFT at p90, TPOT at p50): tight and loose.
SCALES = ((3.0, 1.5), (6.0, 2.5))
# Rates where nobody names any, in units of the capacity: from where all is well to where nearly nothing is.
_LOWEST, _HIGHEST = 0.6, 1.3
_IDLE_REQUESTS = 100
_IDLE_GAP = 20.0  # times that a request stays


@dataclass(frozen=True)
class Lengths:
    """A workload under the name that it was asked for with."""

    name: str
    workload: Workload

    @classmethod
    def load(cls, text: str) -> Lengths:
        """`NAME|FILE[:PROMPT[,ANSWER]]`: factors of the lengths. Raises `UsageError`."""
        found = _SCALE.fullmatch(text)
        if found is None:
            return cls(text, Workload.load(text))
        prompt, answer = float(found["prompt"]), float(found["answer"] or found["prompt"])
        return cls(text, Workload.load(found["name"]).scaled(prompt, answer))

    def clipped(self, context: int) -> Lengths:
        """Cut to the model's context; the workload's notes say how many requests that concerns."""
        return replace(self, workload=self.workload.clipped(context))


def load_plan(name: str) -> tuple[str, Plan]:
    """(what to call it, the plan) of one of `PLANS` or a file. Raises `UsageError`."""
    if name in PLANS:
        return name, PLANS[name]
    path = Path(name)
    if not path.suffix and not path.exists():
        raise UsageError(f"--plan {name}: no file, and none of {', '.join(PLANS)}")
    return path.stem, Plan.load(path)


def pinned(plan: Plan, costs: Costs, model: str, device: str) -> Plan:
    """The plan with sizes written down that both worlds would choose."""
    return replace(sized(plan, costs), model=model, device=device)


def idle_slos(plan: Plan, workload: Workload, costs: Costs) -> tuple[SLO, ...]:
    """Targets from what requests take that meet nobody."""
    stay = _stay(idle_records(plan, workload, costs, 1e4))
    records = idle_records(plan, workload, costs, _IDLE_GAP * stay)
    ttft = quantile(sorted(r.ttft for r in records if r.ttft is not None), 0.9)
    tpots = sorted(r.tpot for r in records if r.tpot is not None)
    if not tpots:
        return tuple(SLO(rounded(first * ttft)) for first, _ in SCALES)
    return tuple(SLO(rounded(first * ttft), rounded(each * quantile(tpots, 0.5))) for first, each in SCALES)


def idle_records(plan: Plan, workload: Workload, costs: Costs, gap: float) -> tuple[Record, ...]:
    """A few requests, so many seconds apart."""
    return imagine(plan, workload.draw(1 / gap, _IDLE_REQUESTS, cv=0), costs).records


def _stay(records: Sequence[Record]) -> float:
    """Seconds that a request stays, in the mean."""
    times = [(r.ttft or 0.0) + (r.tpot or 0.0) * (r.output_tokens - 1) for r in records]
    return sum(times) / len(times)


def around_the_knee(
    plan: Plan, workload: Workload, costs: Costs, slos: Sequence[SLO], goal: float, number: int
) -> tuple[float, ...]:
    """Rates, evenly spaced on the logarithm, from below the smallest capacity at these targets to above the largest.
    Raises `UsageError` where no rate attains the goal."""
    stay = _stay(idle_records(plan, workload, costs, 1e4))
    found = [capacity(plan, workload, costs, slo, goal, stay) for slo in slos]
    found = [rate for rate in found if rate]
    if not found:
        raise UsageError(
            f"{workload.name}: not even an idle system attains {goal:.0%} at {slos[0]}: give wider targets, or --rates"
        )
    low, high = _LOWEST * min(found), _HIGHEST * max(found)
    steps = [low * (high / low) ** (i / max(1, number - 1)) for i in range(number)]
    return tuple(dict.fromkeys(map(rounded, steps)))


def capacity(plan: Plan, workload: Workload, costs: Costs, slo: SLO, goal: float, stay: float) -> float:
    """The highest rate that attains the goal in steady state, by the simulator; 0: none."""
    situation = Situation(costs, None, Demand(workload, Targets(slo), goal), stay)

    def attains(rate: float) -> bool:
        return judge(situation, plan, rate, ROUGH).attains

    return highest_rate(attains, 2 / stay, most=1e4, tolerance=0.04)


def rounded(value: float) -> float:
    """To two digits: what is chosen should not look measured."""
    return float(f"{value:.2g}")


def choose(
    plan: Plan,
    workload: Workload,
    costs: Costs,
    *,
    rates: Sequence[float],
    slos: Sequence[SLO],
    goal: float,
    number: int,
) -> Chosen:
    """What was not given."""
    slos = tuple(slos) or idle_slos(plan, workload, costs)
    return Chosen(tuple(rates) or around_the_knee(plan, workload, costs, slos, goal, number), slos)


def cells(
    plans: Sequence[str],
    workloads: Sequence[str],
    rates: Callable[[str, str], Sequence[float]],
    seed: int,
    repeats: int,
) -> list[Key]:
    """In the order to measure: whatever ends it early, each plan has been measured as often as the others, almost."""
    return [
        Key(plan, workload, rate, seed, repeat)
        for repeat in range(repeats)
        for plan in plans
        for workload in workloads
        for rate in rates(plan, workload)
    ]


def offered(key: Key, workload: Workload, duration: float, requests: int | None) -> Workload:
    """The cell's requests, the same for every repeat."""
    return workload.draw(key.rate, requests or max(2, math.ceil(duration * key.rate)), seed=key.seed)
