"""From measured runs to goodput: of each case and contender, by rate (Figure 8) and by the scale of the targets (Figure
9), and the planner's choice beside the best that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distserve.cluster import Cluster
from distserve.costs.base import Costs
from distserve.costs.profile import ProfileCosts
from distserve.metrics import SLO, attainment
from distserve.plan import Role
from distserve.planner.answer import Answer, InfeasibleError
from distserve.planner.api import plan as choose
from distserve.validate.capacity import crossing
from distserve.validate.record import Key, Measured, Recording
from experiments.live_goodput.cases import GOAL, SCALES, Case
from experiments.live_goodput.contenders import ALL, APART, CHUNKED, MODEL, OURS, WHOLE

HALF = 0.5  # attainment below which a higher rate is not worth its time
NEAR = 0.05  # of the best: where the planner's choice should be


@dataclass(frozen=True)
class Row:
    """One contender under one case."""

    case: Case
    contender: str
    runs: tuple[Measured, ...]  # by rate

    def curve(self, slo: SLO) -> list[tuple[float, float]]:
        """(rate, attainment)."""
        return [(run.key.rate, joint(run, slo)) for run in self.runs]

    def goodput(self, slo: SLO) -> float | None:
        """Requests/s of both cores; None: not among the rates that were measured."""
        return crossing(self.curve(slo), GOAL)

    def scales(self, rate: float) -> list[tuple[float, float]]:
        """(scale of the targets, attainment) at a rate that was measured."""
        (run,) = (run for run in self.runs if run.key.rate == rate)
        return [(scale, joint(run, self.case.scaled(scale))) for scale in SCALES]


def joint(run: Measured, slo: SLO) -> float:
    return attainment([r for r in run.records if r.arrival >= run.warmup], slo).joint


def rows(case: Case, recording: Recording) -> list[Row]:
    """Those that were measured, when nothing spoiled it."""
    found = []
    for name in ALL:
        runs = [
            run
            for key, run in recording.runs.items()
            if (key.plan, key.workload) == (name, case.workload) and not run.spoiled
        ]
        if runs:
            found.append(Row(case, name, tuple(sorted(runs, key=lambda run: run.key.rate))))
    return found


def bounds(row: Row, slo: SLO) -> str:
    """Goodput in words, also where it lies beyond the rates."""
    found = row.goodput(slo)
    if found is not None:
        return f"{found:.2f}"
    curve = row.curve(slo)
    return f"over {curve[-1][0]:g}" if curve[-1][1] >= GOAL else f"below {curve[0][0]:g}"


def place(row: Row, slo: SLO) -> float:
    """To compare by: the goodput; beyond the rates, infinite above them and 0 below."""
    goodput = row.goodput(slo)
    if goodput is not None:
        return goodput
    return float("inf") if row.curve(slo)[-1][1] >= GOAL else 0.0


def ranked(found: Sequence[Row], slo: SLO) -> list[Row]:
    """The one with the highest goodput first; those that attain the goal at no rate that was measured are left out."""
    return sorted((row for row in found if place(row, slo) > 0), key=lambda row: -place(row, slo))


def ours(found: Sequence[Row]) -> list[Row]:
    return [row for row in found if row.contender in OURS]


def behind(mine: Row, winner: Row, slo: SLO) -> tuple[float, bool]:
    """(by what share of the winner's goodput this one's is lower, whether that is exact): where a goodput lies beyond
    the rates, the outermost rate stands in its place, and the share is the least that it can be."""
    if mine is winner:
        return 0.0, True
    low, high = place(mine, slo), place(winner, slo)
    most = low if low > 0 else mine.runs[0].key.rate
    least = high if high < float("inf") else winner.runs[-1].key.rate
    return max(0.0, 1.0 - min(most, least) / least), low > 0 and high < float("inf")


def pointless(key: Key, case: Case, recording: Recording) -> bool:
    """Whether at a lower rate, measured already, not even the loosest targets are met by half of the requests, or, of
    who is not ours, by as many as a goodput asks for: what is left above it takes long, and says nothing of that."""
    loosest, enough = case.scaled(SCALES[-1]), HALF if key.plan in OURS else GOAL
    return any(
        (other.plan, other.workload) == (key.plan, key.workload)
        and other.rate < key.rate
        and not run.spoiled
        and joint(run, loosest) < enough
        for other, run in recording.runs.items()
    )


@dataclass(frozen=True)
class Choice:
    """What `distserve plan` chooses for two cores."""

    contender: str  # which of ours it is, or what else it is; "": no deployment attains the targets
    goodput: float | None


def choice(case: Case, costs: Costs, scale: float = 1.0) -> Choice:
    assert isinstance(costs, ProfileCosts)
    local = Cluster("cpu", 1, 2, costs.device.link_bandwidth)
    try:
        found = choose(MODEL, local, case.lengths.workload, slo=case.scaled(scale), attainment=GOAL, costs=costs)
    except InfeasibleError:
        return Choice("", None)
    assert isinstance(found, Answer)
    spec = found.plan.instances[0]
    if found.prefill is not None:
        return Choice(APART, found.goodput.rate)
    assert spec.role is Role.COLOCATED
    if spec.num_ranks > 1:
        return Choice(f"1 colocated, tp {spec.tp}, pp {spec.pp}", found.goodput.rate)
    return Choice(WHOLE if spec.policy == "prefill-first" else CHUNKED, found.goodput.rate)
