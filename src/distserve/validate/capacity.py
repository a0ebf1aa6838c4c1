"""The rate up to which a goal is attained, read off attainments at some rates. Knows no run and no simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distserve.metrics import SLO


@dataclass(frozen=True)
class Capacity:
    """The rate up to which the goal is attained, of one plan and workload at one SLO; None: beyond the rates."""

    plan: str
    workload: str
    slo: SLO
    measured: float | None
    predicted: float | None
    rates: tuple[float, ...]
    ends: tuple[float, float]  # measured and predicted, or the outermost rate that they lie beyond

    @property
    def exact(self) -> bool:
        return self.measured is not None and self.predicted is not None

    @property
    def error(self) -> float | None:
        """Where only one of both is among the rates, as much as it is at least; None: neither is."""
        if self.measured is None and self.predicted is None:
            return None
        return self.ends[1] / self.ends[0] - 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "workload": self.workload,
            "slo": {"ttft": self.slo.ttft, "tpot": self.slo.tpot},
            "measured": self.measured,
            "predicted": self.predicted,
            "error": self.error,
            "rates": list(self.rates),
        }


def crossing(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """The rate where attainment, linear between the rates, falls below the goal; None: it does not, or is below it from
    the start."""
    for (low, above), (high, below) in pairwise(falling(curve)):
        if above >= goal > below:
            return low + (above - goal) / (above - below) * (high - low)
    return None


def outermost(curve: Sequence[tuple[float, float]], goal: float) -> float:
    """The rate that its crossing lies beyond."""
    (lowest, share), (highest, _) = falling(curve)[0], curve[-1]
    return lowest if share < goal else highest


def falling(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The closest curve that nowhere rises (isotonic regression by pooling adjacent violators): more load attains no
    more, so where runs of a few dozen requests say otherwise it is chance, and neighbours share their mean."""
    pools: list[tuple[float, list[float]]] = []  # (mean, rates)
    for rate, share in curve:
        mean, rates = share, [rate]
        while pools and pools[-1][0] < mean:
            before, others = pools.pop()
            mean = (before * len(others) + mean * len(rates)) / (len(others) + len(rates))
            rates = others + rates
        pools.append((mean, rates))
    return [(rate, mean) for mean, rates in pools for rate in rates]
