"""Which rate to measure next, and what the goodput is by what was measured. Knows no clock and no server.

Goodput is the highest rate up to which attainment stays at the goal in steady state. The search

    1. doubles or halves the rate until one attains the goal and one does not;
    2. halves the gap between them (on the logarithm) until it is within the tolerance;
    3. repeats, with other arrivals, rates that chance could have decided either way, until the highest rate that surely
       attains and the lowest that surely does not are close, too, or a rate was measured often enough.

Where queues grow during a run that attains the goal, it is repeated at twice the length; if they still grow there is no
steady state, and the rate does not attain. The interval is made of the rates that are sure: a rate surely attains when
the confidence interval of its attainment (`metrics.proportion_interval`) lies above the goal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from distserve.metrics import proportion_interval

FLOOR = 32  # below this part of the first rate nothing is tried
_LONGER = 2.0  # times as long, where queues grew
_REPEATS = 3  # of one rate


@dataclass(frozen=True, slots=True)
class Trial:
    """One run."""

    rate: float
    met: tuple[bool, ...]  # of the requests that count, in order of arrival
    growing: bool = False  # queues grew
    length: float = 1.0  # of the run, in usual ones
    kept_up: bool = True  # the client offered the rate


@dataclass(frozen=True, slots=True)
class Step:
    """The next run."""

    rate: float
    length: float = 1.0
    repeat: int = 0  # which other arrivals


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of the goodput, in requests/s."""

    rate: float  # 0: not even the lowest rate attains the goal
    low: float  # where it lies with 95 % confidence
    high: float | None  # None: no rate was surely too high
    why: str  # the search ended, or what holds it open


@dataclass(slots=True)
class Search:
    """Ask `next`, run it, `tell`; `found` at any time."""

    start: float  # requests/s of the first run
    goal: float
    tolerance: float = 0.05
    most: int = 20  # runs
    trials: list[Trial] = field(default_factory=list)

    def tell(self, trial: Trial) -> None:
        self.trials.append(trial)

    def next(self) -> Step | None:
        """None: nothing more to learn."""
        step = self._next()
        return step if isinstance(step, Step) else None

    @property
    def found(self) -> Found:
        step = self._next()
        low, _ = self._bracket()
        sure_low, sure_high = self._sure()
        return Found(low, sure_low, sure_high, "stopped early" if isinstance(step, Step) else step)

    # -- what to do -----------------------------------------------------------------------------------------------

    def _next(self) -> Step | str:
        """The next run, or why there is none."""
        if not self.trials:
            return Step(self.start)
        last = self.trials[-1]
        low, high = self._bracket()
        if not last.kept_up:
            return f"the client could not offer {last.rate:g} requests/s"
        if len(self.trials) >= self.most:
            return f"{self.most} runs are the most that are made"
        if last.growing and last.length < _LONGER and self._share(last.rate) >= self.goal:
            return Step(last.rate, _LONGER, len(self._at(last.rate)))
        if high is None:
            return Step(low * 2)
        if not low:
            return Step(high / 2) if high > self.start / FLOOR else f"not even {high:g} requests/s attain the goal"
        if high > low * (1 + self.tolerance):
            return Step(_round(math.sqrt(low * high)))
        return self._doubtful() or f"the gap between attaining and not is within {self.tolerance:.0%}"

    def _doubtful(self) -> Step | None:
        """A rate between the sure ones to measure again; None: there is none, or they are close."""
        low, high = self._sure()
        if high is not None and low and high <= low * (1 + self.tolerance) ** 2:
            return None
        doubtful = [
            rate
            for rate in self._rates()
            if low < rate < (high or math.inf) and len(self._at(rate)) < _REPEATS and not self._verdict(rate)
        ]
        if not doubtful:
            return None
        rate = min(doubtful, key=lambda rate: (len(self._at(rate)), abs(self._share(rate) - self.goal)))
        return Step(rate, max(trial.length for trial in self._at(rate)), len(self._at(rate)))

    # -- what is known --------------------------------------------------------------------------------------------

    def _at(self, rate: float) -> list[Trial]:
        return [trial for trial in self.trials if trial.rate == rate]

    def _rates(self) -> list[float]:
        return sorted({trial.rate for trial in self.trials if trial.kept_up})

    def _met(self, rate: float) -> list[bool]:
        """Of the longest runs at this rate: a shorter one whose queues grew is no evidence."""
        trials = self._at(rate)
        longest = max(trial.length for trial in trials)
        return [met for trial in trials if trial.length == longest for met in trial.met]

    def _share(self, rate: float) -> float:
        met = self._met(rate)
        return sum(met) / len(met) if met else 0.0

    def _grows(self, rate: float) -> bool:
        return any(trial.growing and trial.length >= _LONGER for trial in self._at(rate))

    def _attains(self, rate: float) -> bool:
        return not self._grows(rate) and self._share(rate) >= self.goal

    def _verdict(self, rate: float) -> int:
        """1: surely attains, -1: surely does not, 0: chance could have decided it."""
        met = self._met(rate)
        if self._grows(rate) or not met:
            return -1
        low, high = proportion_interval(met)
        return 1 if low >= self.goal else -1 if high < self.goal else 0

    def _bracket(self) -> tuple[float, float | None]:
        """The highest rate up to which all attain (0: none), and the lowest that does not (None: all do)."""
        low = 0.0
        for rate in self._rates():
            if not self._attains(rate):
                return low, rate
            low = rate
        return low, None

    def _sure(self) -> tuple[float, float | None]:
        """As `_bracket`, of the rates that are sure."""
        verdicts = [(rate, self._verdict(rate)) for rate in self._rates()]
        high = next((rate for rate, verdict in verdicts if verdict < 0), None)
        return max((rate for rate, verdict in _below(verdicts, high) if verdict > 0), default=0.0), high


def _below(verdicts: list[tuple[float, int]], high: float | None) -> Iterator[tuple[float, int]]:
    return (one for one in verdicts if high is None or one[0] < high)


def _round(rate: float) -> float:
    """Three digits: a rate that a person can read and type."""
    return float(f"{rate:.3g}")
