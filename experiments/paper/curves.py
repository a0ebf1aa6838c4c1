"""Attainment against rate, and against the scale of the targets; where each crosses the goal. Knows one system at a
time; its functions run in other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from distserve.metrics import SLO
from distserve.workload import Workload
from experiments.paper.living import Length, Sample, sample
from experiments.paper.published import GOAL
from experiments.paper.systems import System

_LOWEST = 1 / 16  # of the lowest published rate: below it the goal is out of reach
_OVERLOADED = 0.05  # attainment below which higher rates are not simulated in steady state


@dataclass(frozen=True)
class Point:
    """Attainment at one rate (requests/s and device)."""

    rate: float
    joint: float
    ttft: float
    tpot: float
    low: float  # steady: the interval of the joint attainment; as published: the worst and the best draw
    high: float
    grows: bool  # steady: queues grew to the end


@dataclass(frozen=True)
class Curve:
    """One system at one length of run."""

    system: str
    length: str
    points: tuple[Point, ...]
    goodput: float | None  # requests/s and device; None: the goal is not met at any rate
    at_least: bool = False  # the goal is still met at the highest rate that was tried


def rate_curve(system: System, lengths: Workload | str, slo: SLO, rates: Sequence[float], length: Length) -> Curve:
    """At `rates` (in steady state only until the system is overloaded), and around the crossing."""
    whole = length.name != "steady"
    found: dict[float, Point] = {}

    def joint(rate: float) -> float:
        if rate not in found:
            found[rate] = _point(sample(system, lengths, rate, length), slo, rate, whole)
        return found[rate].joint

    for rate in sorted(rates):
        if joint(rate) < _OVERLOADED and not whole:
            break
    low, high = _bracket(joint, sorted(found))
    if low is not None and high is not None:
        while high > low * length.fine:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if joint(middle) >= GOAL else (low, middle)
    ordered = tuple(found[rate] for rate in sorted(found))
    return Curve(system.name, length.name, ordered, low, at_least=high is None)


def _bracket(joint: Callable[[float], float], rates: Sequence[float]) -> tuple[float | None, float | None]:
    """(highest rate with the goal met before the first without it, that first one)."""
    low = None
    for rate in rates:
        if joint(rate) < GOAL:
            break
        low = rate
    else:
        while low is not None and low < 8 * rates[-1]:
            if joint(low * 1.25) < GOAL:
                return low, low * 1.25
            low *= 1.25
        return low, None
    high = rate
    while low is None and high / 2 >= rates[0] * _LOWEST:
        if joint(high / 2) >= GOAL:
            low = high / 2
        else:
            high /= 2
    return low, high


def _point(found: Sample, slo: SLO, rate: float, published: bool) -> Point:
    assert slo.ttft is not None
    assert slo.tpot is not None
    draws = found.by_draw(slo)
    low, high = (min(draws), max(draws)) if published else found.interval(slo)
    return Point(
        rate,
        float(found.met(slo).mean()),
        float((found.ttft <= slo.ttft).mean()),
        float((found.tpot <= slo.tpot).mean()),
        low,
        high,
        not published and found.grows(slo),
    )


@dataclass(frozen=True)
class Scales:
    """Attainment of one system at one rate under targets times each factor."""

    system: str
    length: str
    rate: float
    points: tuple[tuple[float, float], ...]  # (factor, attainment)
    needed: float  # the smallest factor at which the goal is met; infinite: none
    grows: bool  # steady: queues grew to the end, so that a longer run needs a larger factor


def scale_curve(
    system: System, lengths: Workload | str, slo: SLO, rate: float, scales: Sequence[float], length: Length
) -> Scales:
    """One simulation, the same records under each factor."""
    found = sample(system, lengths, rate, length)
    needed = np.sort(found.needed(slo))
    points = tuple((scale, float((needed <= scale).mean())) for scale in sorted(scales))
    enough = float(needed[min(len(needed) - 1, int(np.ceil(GOAL * len(needed))) - 1)])
    grows = length.name == "steady" and found.grows(slo)
    return Scales(system.name, length.name, rate, points, enough, grows)


def crossing(points: Sequence[tuple[float, float]], goal: float = GOAL) -> float | None:
    """Where a curve of (x, y) first falls below the goal, linear between its points; None: never, or from the start."""
    for (x, y), (following, below) in pairwise(sorted(points)):
        if y >= goal > below:
            return x + (y - goal) / (y - below) * (following - x)
    return None


def kept(curve: Curve | Scales) -> dict[str, Any]:
    """As plain values."""
    return asdict(curve)
