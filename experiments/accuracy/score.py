"""Real, ours and upstream's simulator side by side, and whether the targets are met. Knows no plot and no text."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from distserve.costs.profile import ProfileCosts
from distserve.metrics import SLO, Record, Summary, attainment
from distserve.workload import Workload
from experiments.accuracy.runs import DATA, Run, real_runs

SLOS = (SLO(0.2, 0.1), SLO(0.25, 0.1))
MEAN_ERROR = 0.03  # of the attainments, at most
WORST_ERROR = 0.08
MEDIAN_ERROR = 0.08  # of each median, relative; DistServe's runs
VLLM_MEDIAN_ERROR = 0.17  # of vLLM's: two servers, one set of costs (docs/accuracy.md)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run comes to. Seconds and shares."""

    attainment: tuple[float, ...]  # by SLOS
    ttft: tuple[float, float]  # p50, p90
    tpot: tuple[float, float]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Measured:
        ttft = Summary.of(r.ttft for r in records if r.ttft is not None)
        tpot = Summary.of(r.tpot for r in records if r.tpot is not None)
        joint = tuple(attainment(records, slo).joint for slo in SLOS)
        return cls(joint, (ttft.p50 or 0.0, ttft.p90 or 0.0), (tpot.p50 or 0.0, tpot.p90 or 0.0))


@dataclass(frozen=True, slots=True)
class Score:
    """One run."""

    run: Run
    real: Measured
    ours: Measured
    upstream: Measured
    records: tuple[Record, ...]  # ours

    def errors(self, of: Measured | None = None) -> tuple[float, ...]:
        """Of the attainments, by SLOS: simulated less real. `of`: None: ours."""
        return tuple(a - b for a, b in zip((of or self.ours).attainment, self.real.attainment, strict=True))

    def median_errors(self, of: Measured | None = None) -> tuple[float, float]:
        """(TTFT, TPOT), relative. `of`: None: ours."""
        of = of or self.ours
        return of.ttft[0] / self.real.ttft[0] - 1, of.tpot[0] / self.real.tpot[0] - 1


def score(run: Run, costs: ProfileCosts | None = None, workload: Workload | None = None) -> Score:
    """Simulates it. `costs`, `workload`: see `Run.simulate`."""
    records = run.simulate(costs, workload).records
    return Score(run, Measured.of(run.records), Measured.of(records), published("sim")[run.name], records)


def scores() -> list[Score]:
    """Of all runs."""
    return [score(run) for run in real_runs().values()]


def mean_and_worst(errors: Iterable[float]) -> tuple[float, float]:
    sizes = [abs(error) for error in errors]
    return sum(sizes) / len(sizes), max(sizes)


@cache
def published(who: Literal["real", "sim"]) -> dict[str, Measured]:
    """By run: what the real one came to, and what the authors' simulator makes of the same arrivals and lengths."""
    with (DATA / "a100_runs_upstream_simulator.csv").open(encoding="utf-8", newline="") as lines:
        return {row["run"]: _published(row, who) for row in csv.DictReader(lines)}


def _published(row: dict[str, str], who: str) -> Measured:
    def values(names: tuple[str, str], unit: float) -> tuple[float, float]:
        first, second = (float(row[f"{who}_{name}"]) / unit for name in names)
        return first, second

    return Measured(
        values(("200_100", "250_100"), 100),
        values(("ttft_p50", "ttft_p90"), 1e3),
        values(("tpot_p50", "tpot_p90"), 1e3),
    )
