"""Runs that were measured directly behind one another, with the same requests: they met nearly the same machine. How
nearly is told by the steps of ours. Runs that did not keep when they began are nobody's neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean

from distserve.costs.base import Costs
from distserve.metrics import SLO
from distserve.validate.explain import slowness
from distserve.validate.record import Measured, Recording
from experiments.accuracy.tables import table
from experiments.live_goodput.cases import SCALES, Case
from experiments.live_goodput.contenders import ALL, label
from experiments.live_goodput.results import joint, rows

BEGAN = "began"  # in a run's `client`: seconds since 1970
_CLOSE = 30.0  # seconds that may lie between two neighbours


@dataclass(frozen=True)
class Pair:
    """Two neighbours of a case and rate, in their order."""

    case: Case
    first: Measured
    second: Measured
    weather: tuple[
        float | None, float | None
    ]  # times as long as their costs say, of steps with prompts; None: not told

    @property
    def names(self) -> tuple[str, str]:
        return self.first.key.plan, self.second.key.plan

    def gain(self, name: str, slo: SLO) -> float:
        """By how much more of the requests it attains than the other."""
        ahead = joint(self.first, slo) - joint(self.second, slo)
        return ahead if self.first.key.plan == name else -ahead


def pairs(case: Case, recording: Recording, costs: Costs) -> list[Pair]:
    """By rate, and as they were measured."""
    by_rate: dict[float, list[Measured]] = {}
    for row in rows(case, recording):
        for run in row.runs:
            if BEGAN in run.client:
                by_rate.setdefault(run.key.rate, []).append(run)
    found = []
    for _, runs in sorted(by_rate.items()):
        runs.sort(key=lambda run: run.client[BEGAN])
        seen = {run.key: _weather(run, case, recording, costs) for run in runs}
        found += [
            Pair(case, one, other, (seen[one.key], seen[other.key]))
            for one, other in pairwise(runs)
            if other.client[BEGAN] - one.client[BEGAN] - one.end < _CLOSE
        ]
    return found


def _weather(run: Measured, case: Case, recording: Recording, costs: Costs) -> float | None:
    if not run.steps:
        return None
    of_steps = slowness(run.steps, recording.served[label(run.key.plan, case)], costs).values()
    times = [each for steps in of_steps for step, each in steps if step.prompt_tokens]
    return fmean(times) if times else None


def by_rate(found: Sequence[Pair]) -> str:
    """A table of one case: a line for each pair."""
    lines = []
    for pair in found:
        slo = pair.case.slo
        one, other = joint(pair.first, slo), joint(pair.second, slo)
        weather = " / ".join("-" if each is None else f"{each:.2f}" for each in pair.weather)
        shares = [f"{100 * one:.1f}", f"{100 * other:.1f}", f"{100 * (other - one):+.1f}"]
        lines.append([f"{pair.first.key.rate:g}/s", pair.names[0], pair.names[1], *shares, weather])
    return table(["rate", "one", "directly behind it", "%", "%", "points", "weather"], lines)


def summary(found: Sequence[Pair]) -> str:
    """A table over all cases: a line for each two contenders that were neighbours."""
    lines = []
    for one, other in combinations(ALL, 2):
        mine = [pair for pair in found if set(pair.names) == {one, other}]
        if mine:
            tight = fmean(pair.gain(one, pair.case.slo) for pair in mine)
            loose = fmean(pair.gain(one, pair.case.scaled(scale)) for pair in mine for scale in SCALES)
            apart = [abs(a - b) for a, b in (pair.weather for pair in mine) if a is not None and b is not None]
            weather = f"{fmean(apart):.2f}" if apart else "-"
            lines.append([one, other, str(len(mine)), f"{100 * tight:+.1f}", f"{100 * loose:+.1f}", weather])
    return table(["one", "other", "pairs", "at the targets", "over all scales", "weather apart by"], lines)
