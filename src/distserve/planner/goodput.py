"""Whether a plan attains the goal at a rate, and the highest rate at which it does. Knows one plan at a time.

A run is long enough for its queues to settle, and counts neither its beginning nor its end:

    |-- warm-up: load, but no count --|---------- counted ----------|-- the load goes on until all counted are over --|

All three last a few residence times (how long a request stays), and the counted part has so many requests at least. A
run ends as soon as its answer is certain: when more requests have missed their targets than may, or when half of it is
over and the confidence interval lies above the goal. Where the second half attains clearly less than the first, or
first tokens (or each token after them) take clearly longer and longer, queues grow: the run is repeated at twice the
length, and what grows to the end does not attain the goal.

The same seed gives the same requests at every rate, at gaps that differ by a factor only (`Workload.draw`), so that two
rates, and two plans, are compared on the same luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance

from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.metrics import Attainment, Record, attainment, proportion_interval, tpot
from distserve.plan import Plan
from distserve.planner.demand import Demand
from distserve.sim.life import NEVER, Life
from distserve.sim.simulate import Imagination, imagine

_NOBODY = Life(0, 0.0, 0, 0)
_EARLY = 0.99  # confidence of an answer before the end
_LONGER = 2  # times that a run whose queues grow is repeated at twice the length


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is, in residence times; and requests at least."""

    warm: float
    counted: float
    requests: int  # counted
    cool: float = 1.0

    def numbers(self, rate: float, residence: float) -> tuple[int, int, int]:
        """(warm, counted, cool) requests."""
        stay = rate * residence  # requests in the system
        return (
            math.ceil(max(self.requests / 10, self.warm * stay)),
            math.ceil(max(self.requests, self.counted * stay)),
            math.ceil(max(20.0, self.cool * stay)),
        )


QUICK = Length(1.2, 2.0, 300)  # to tell candidates apart
USUAL = Length(2.0, 5.0, 1000)
ROUGH = Length(1.5, 3.0, 500)  # to draw a curve
FULL = Length(2.5, 8.0, 2500)  # to say a figure


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer of one run, or of several."""

    rate: float
    attains: bool
    attainment: Attainment  # of the application that attains least; of what was counted until the answer was certain
    interval: tuple[float, float]  # of the joint attainment
    app: str  # which application
    requests: int  # simulated
    whole: bool  # the run was not cut short
    growing: bool = False  # queues grew to the end

    @property
    def binding(self) -> str:
        """The target that is missed more often."""
        return "ttft" if self.attainment.ttft < self.attainment.tpot else "tpot"


@dataclass(frozen=True, slots=True)
class Situation:
    """Where plans are judged."""

    costs: Costs
    cluster: Cluster | None
    demand: Demand
    residence: float  # seconds that a request stays, about

    def at(self, rate: float, requests: int, seed: int) -> Demand:
        demand = self.demand
        return replace(demand, workload=demand.workload.draw(rate, requests, seed=demand.seed + seed, cv=demand.cv))


class _Watch:
    """Sees requests end, and says when the answer is certain."""

    def __init__(self, demand: Demand, warm: int, counted: int, early: bool) -> None:
        self.failed = self.passed = False
        self._lives: list[Life] = [_NOBODY] * counted
        self.over = bytearray(counted)  # 1: met, 2: missed; by place among the counted
        self._demand = demand
        self._warm, self._counted = warm, counted
        self._left = counted
        self._early = early
        self._next = 0  # the first that is not over
        total = dict.fromkeys(demand.apps, 0)
        for request in demand.workload.arrivals[warm : warm + counted]:
            total[request.app] += 1
        self._may_miss = {app: (1 - demand.goal) * number for app, number in total.items()}
        self._missed = dict.fromkeys(total, 0)

    def __call__(self, life: Life) -> bool:
        place = life.index - self._warm
        if not 0 <= place < self._counted:
            return False
        self._left -= 1
        met = self._demand.targets.met(life.record())
        self.over[place] = 1 if met else 2
        self._lives[place] = life
        if not met:
            self._missed[life.app] += 1
            self.failed = self._early and self._missed[life.app] > self._may_miss[life.app]
        if self._early and place == self._next:
            self._advance()
        return self.failed or self.passed or not self._left

    def _advance(self) -> None:
        over, half = self.over, self._counted // 2
        before = self._next
        while self._next < self._counted and over[self._next]:
            self._next += 1
        if before < half <= self._next:
            self.passed = self._surely_above(half) and not waits_grow(self._lives[:half])

    def _surely_above(self, number: int) -> bool:
        requests = self._demand.workload.arrivals[self._warm : self._warm + number]
        for app in self._missed:
            mine = [over == 1 for over, request in zip(self.over, requests, strict=False) if request.app == app]
            if not mine or proportion_interval(mine, _EARLY)[0] < self._demand.goal:
                return False
        return True


def judge(
    situation: Situation,
    plan: Plan,
    rate: float,
    length: Length = USUAL,
    *,
    seed: int = 0,
    early: bool = True,
    cancelled: Callable[[], bool] | None = None,
) -> Verdict:
    """Whether `plan` attains the goal at `rate`. `early` False: the run is lived to its end, for its figures' sake.
    Raises what `imagine` raises."""
    simulated = 0
    for times in range(_LONGER + 1):
        longer = replace(length, **{k: getattr(length, k) * 2**times for k in ("warm", "counted", "requests")})
        verdict = _judge(situation, plan, rate, longer, seed, early, cancelled)
        simulated += verdict.requests
        if not verdict.growing:
            break
    return replace(verdict, requests=simulated, attains=verdict.attains and not verdict.growing)


def lived(
    situation: Situation, plan: Plan, rate: float, length: Length = FULL, *, seed: int = 0
) -> tuple[Imagination, int, int]:
    """(a whole run, its warm-up, its counted) in requests."""
    warm, counted, cool = length.numbers(rate, situation.residence)
    demand = situation.at(rate, warm + counted + cool, seed)
    watch = _Watch(demand, warm, counted, early=False)
    run = imagine(plan, demand.workload, situation.costs, cluster=situation.cluster, stop=watch)
    return run, warm, counted


def _judge(
    situation: Situation,
    plan: Plan,
    rate: float,
    length: Length,
    seed: int,
    early: bool,
    cancelled: Callable[[], bool] | None,
) -> Verdict:
    warm, counted, cool = length.numbers(rate, situation.residence)
    demand = situation.at(rate, warm + counted + cool, seed)
    watch = _Watch(demand, warm, counted, early)
    stop: Callable[[Life], bool] = watch if cancelled is None else _either(watch, cancelled)
    run = imagine(plan, demand.workload, situation.costs, cluster=situation.cluster, stop=stop)
    lives = run.lives[warm : warm + counted]
    if watch.failed or watch.passed:
        lives = tuple(life for life in lives if life.last < NEVER)
    records = [life.record() for life in lives]
    app, worst = _worst(demand, records)
    mine = [demand.targets.met(record) for record in records if record.app == app]
    attains = not watch.failed and (watch.passed or worst.joint >= demand.goal)
    growing = attains and not watch.passed and (_worsens(mine, demand.goal) or waits_grow(lives))
    simulated = sum(life.last < NEVER for life in run.lives)
    interval = proportion_interval(mine)
    return Verdict(rate, attains, worst, interval, app, simulated, not (watch.failed or watch.passed), growing)


def _either(watch: _Watch, cancelled: Callable[[], bool]) -> Callable[[Life], bool]:
    count = 0

    def stop(life: Life) -> bool:
        nonlocal count
        count += 1
        return watch(life) or (count % 256 == 0 and cancelled())

    return stop


def _worst(demand: Demand, records: list[Record]) -> tuple[str, Attainment]:
    found = []
    for app in demand.apps:
        mine = [record for record in records if record.app == app]
        if mine:
            found.append((app, attainment(mine, demand.targets)))
    return min(found, key=lambda entry: entry[1].joint)


def _worsens(met: list[bool], goal: float) -> bool:
    """Whether the second half attains clearly less than the first, and is not far above the goal."""
    half = len(met) // 2
    if half < 50:
        return False
    first, second = met[:half], met[half:]
    if sum(second) > (1 + goal) / 2 * len(second):
        return False
    return proportion_interval(second)[1] < proportion_interval(first)[0]


def waits_grow(lives: Sequence[Life]) -> bool:
    """Whether TTFT or TPOT grow."""
    over = [life for life in lives if life.last < NEVER]
    paces = [pace for life in over if (pace := tpot(life.first, life.last, life.output_tokens)) is not None]
    return _grow([life.first - life.arrival for life in over]) or _grow(paces)


def _grow(values: list[float]) -> bool:
    """Whether the last third is larger than the middle one, which is larger than the first, and by more than chance.

    Chance is judged by the means of batches of consecutive requests, since neighbours fare alike."""
    third = len(values) // 3
    if third < 30:
        return False
    first, middle, last = (values[i * third : (i + 1) * third] for i in range(3))
    means = [fmean(part) for part in (first, middle, last)]
    if not means[0] < means[1] < means[2] or means[2] < 1.25 * means[0]:
        return False
    size = max(1, math.isqrt(third))
    spreads = []
    for part in (first, last):
        batches = [fmean(part[i : i + size]) for i in range(0, third - size + 1, size)]
        spreads.append(variance(batches) / len(batches))
    return means[2] - means[0] > 2 * math.sqrt(sum(spreads))


@dataclass(frozen=True, slots=True)
class Goodput:
    """The highest rate at which the goal is attained, in requests/s of the whole plan."""

    rate: float
    low: float  # where it lies with 95 % confidence
    high: float
    requests: int  # simulated for it


def highest_rate(
    attains: Callable[[float], bool], start: float, *, most: float, tolerance: float = 0.02, step: float = 1.25
) -> float:
    """By bisection on the logarithm of the rate: `attains` is asked first at `start`, never above `most`. 0 where not
    even a hundredth of `start` attains."""
    low, high = 0.0, math.inf
    rate = min(start, most)
    while high > low * (1 + tolerance):
        if attains(rate):
            low = rate
            if rate >= most:
                break
        else:
            high = rate
            if high < start / 100:
                break
        if not low:
            rate, step = rate / step, min(step * 1.3, 3.0)
        elif math.isinf(high):
            rate, step = min(rate * step, most), min(step * 1.3, 3.0)
        else:
            rate = math.sqrt(low * high)
    return low
