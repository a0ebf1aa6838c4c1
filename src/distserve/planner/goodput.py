"""Whether a plan attains the goal at a rate, and the highest rate at which it does. Knows one plan at a time.

A run is long enough for its queues to settle, and counts neither its beginning nor its end:

    |-- warm-up: load, but no count --|---------- counted ----------|-- the load goes on until all counted are over --|

All three last a few residence times (how long a request stays), and the counted part has so many requests at least; on
a machine with weather half of it sees all of that. A run ends as soon as its answer is certain: when more requests have
missed their targets than may, or when half of it is over and the confidence interval lies above the goal. Where the
second half attains clearly less than the first, or first tokens (or each token after them) take clearly longer and
longer, queues grow: the run is repeated at twice the length, and what grows to the end does not attain the goal.

The same seed gives the same requests at every rate, at gaps that differ by a factor only (`Demand.lives`), so that two
rates, and two plans, are compared on the same luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distserve import steady
from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.metrics import Attainment, proportion_interval
from distserve.plan import Plan
from distserve.planner.demand import Demand
from distserve.sim.life import NEVER, Life
from distserve.sim.simulate import Imagination, live

_EARLY = 0.99  # confidence of an answer before the end
_LONGER = 2  # times that a run whose queues grow is repeated at twice the length


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is, in residence times; and requests at least."""

    warm: float
    counted: float
    requests: int  # counted
    cool: float = 1.0

    def numbers(self, rate: float, residence: float, span: float = 0.0) -> tuple[int, int, int]:
        """(warm, counted, cool) requests. `span`: seconds of the machine's weather, 0: it has none."""
        stay = rate * residence  # requests in the system
        return (
            math.ceil(max(self.requests / 10, self.warm * stay)),
            math.ceil(max(self.requests, self.counted * stay, 2 * span * rate)),
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

    def numbers(self, rate: float, length: Length) -> tuple[int, int, int]:
        """(warm, counted, cool) requests of a run."""
        return length.numbers(rate, self.residence, self.costs.engine.weather.span)


_OVER, _TTFT, _TPOT = 1, 2, 4
_MET = _OVER | _TTFT | _TPOT


class _Watch:
    """Sees requests end, and says when the answer is certain."""

    def __init__(self, demand: Demand, lives: list[Life], early: bool) -> None:
        """`lives`: those that count."""
        self.failed = self.passed = False
        self.fates = bytearray(len(lives))  # by place among the counted: 0, or what is true of one that is over
        self._lives = lives
        self._first = lives[0].index
        self._goal = demand.goal
        self._slos = {app: demand.targets.of(app) for app in demand.apps}
        self._left = len(lives)
        self._early = early
        self._next = 0  # the first that is not over
        self._missed = dict.fromkeys(demand.apps, 0)
        number = self._missed.copy()
        for life in lives:
            number[life.app] += 1
        # 1 - 0.9 is a little less than a tenth: whoever attains exactly the goal attains it
        self._may_miss = {app: (1 - demand.goal) * count + 1e-9 for app, count in number.items()}

    def __call__(self, life: Life) -> bool:
        place = life.index - self._first
        if not 0 <= place < len(self._lives):
            return False
        self._left -= 1
        slo = self._slos[life.app]
        fate = _OVER
        if slo.ttft_is(life.first - life.arrival):
            fate |= _TTFT
        if slo.tpot_is(life.tpot):
            fate |= _TPOT
        self.fates[place] = fate
        if fate != _MET:
            self._missed[life.app] += 1
            self.failed = self._early and self._missed[life.app] > self._may_miss[life.app]
        if self._early and place == self._next:
            self._advance()
        return self.failed or self.passed or not self._left

    def _advance(self) -> None:
        half, before = len(self._lives) // 2, self._next
        after = self.fates.find(0, before)
        self._next = after if after >= 0 else len(self._lives)
        if before < half <= self._next:
            self.passed = self._surely_above(half) and not waits_grow(self._lives[:half])

    def _surely_above(self, number: int) -> bool:
        for app in self._slos:
            mine = [fate == _MET for fate in self._of(app, number)]
            if not mine or proportion_interval(mine, _EARLY)[0] < self._goal:
                return False
        return True

    def _of(self, app: str, number: int) -> list[int]:
        """The fates of an application's, among the first `number`."""
        if len(self._slos) == 1:
            return list(self.fates[:number])
        return [fate for fate, life in zip(self.fates[:number], self._lives, strict=False) if life.app == app]

    def worst(self) -> tuple[str, Attainment, list[bool]]:
        """(the application that attains least, what it attains, who of it met both targets). What is not over counts as
        missed, but for a run that was cut short."""
        cut = self.failed or self.passed
        found: list[tuple[str, Attainment, list[bool]]] = []
        for app in self._slos:
            fates = self._of(app, len(self._lives))
            fates = [fate for fate in fates if fate] if cut else fates
            if fates:
                met = [fate == _MET for fate in fates]
                ttft, tpot = (sum([fate & bit > 0 for fate in fates]) for bit in (_TTFT, _TPOT))
                found.append((app, Attainment(*(count / len(fates) for count in (sum(met), ttft, tpot))), met))
        return min(found, key=lambda entry: entry[1].joint)


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
    demand, (warm, counted, cool) = situation.demand, situation.numbers(rate, length)
    lives = demand.lives(rate, warm + counted + cool, seed)
    watch = _Watch(demand, lives[warm : warm + counted], early=False)
    return live(plan, lives, situation.costs, cluster=situation.cluster, stop=watch), warm, counted


def _judge(
    situation: Situation,
    plan: Plan,
    rate: float,
    length: Length,
    seed: int,
    early: bool,
    cancelled: Callable[[], bool] | None,
) -> Verdict:
    demand, (warm, counted, cool) = situation.demand, situation.numbers(rate, length)
    lives = demand.lives(rate, warm + counted + cool, seed)
    watch = _Watch(demand, lives[warm : warm + counted], early)
    stop: Callable[[Life], bool] = watch if cancelled is None else _either(watch, cancelled)
    live(plan, lives, situation.costs, cluster=situation.cluster, stop=stop)
    app, worst, met = watch.worst()
    whole = not (watch.failed or watch.passed)
    attains = not watch.failed and (watch.passed or worst.joint >= demand.goal)
    growing = attains and whole and (_worsens(met, demand.goal) or waits_grow(lives[warm : warm + counted]))
    simulated = sum([one.last < NEVER for one in lives])
    return Verdict(rate, attains, worst, proportion_interval(met), app, simulated, whole, growing)


def _either(watch: _Watch, cancelled: Callable[[], bool]) -> Callable[[Life], bool]:
    count = 0

    def stop(life: Life) -> bool:
        nonlocal count
        count += 1
        return watch(life) or (count % 256 == 0 and cancelled())

    return stop


def _worsens(met: list[bool], goal: float) -> bool:
    """Whether the second half attains clearly less than the first, and is not far above the goal."""
    second = met[len(met) // 2 :]
    return sum(second) <= (1 + goal) / 2 * len(second) and steady.falls(met)


def waits_grow(lives: Sequence[Life]) -> bool:
    """Whether TTFT or TPOT grow."""
    over = [life for life in lives if life.last < NEVER]
    paces = [pace for life in over if (pace := life.tpot) is not None]
    return steady.grows([life.first - life.arrival for life in over]) or steady.grows(paces)


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
