"""Predicted beside measured: the very requests that a live server got are imagined with these costs, and both judged by
`metrics`. Knows no server.

    predicted                where the costs saw weather, in all of it: the run is imagined beginning at several moments
                             of it, and these are judged together; nobody knows which of them the real one will meet
    error of an attainment   predicted - measured, as a share (0.01: a point)
    error of a latency       predicted / measured - 1
    as it was                predicted once more, on a machine as fast at each moment as it was in that run (explain.py)
    noise                    how far repeated runs of the same requests lie apart: the mean over their pairs

A run that the client or other programs spoiled is shown, and counts in no error. Of repeated runs the mean is what was
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any

from distserve.costs.base import Costs
from distserve.metrics import SLO, Record, Report, report
from distserve.plan import Plan
from distserve.sim.simulate import Imagination, imagine
from distserve.validate.capacity import Capacity, crossing, outermost
from distserve.validate.explain import Mean, as_measured, steps
from distserve.validate.record import Measured
from distserve.workload import Workload

MOMENTS = 6  # of the weather, at which a run is imagined to begin
STEEP = (0.05, 0.95)  # attainments between which a small change of the load is a large one of the answer
LATENCIES = tuple((name, part) for name in ("ttft", "tpot") for part in ("p50", "p90", "p99"))


@dataclass(frozen=True)
class Runs:
    """The same requests, measured once or several times, and imagined."""

    measured: tuple[Measured, ...]  # by repeat; at least one
    imagined: tuple[Imagination, ...]  # at each moment of the costs' weather; at least one
    as_measured: tuple[Imagination, ...] = ()  # each run again, on its machine as it was; (): nobody knows how it was

    @property
    def predicted(self) -> tuple[Record, ...]:
        """Of the first moment."""
        return self.imagined[0].records


@dataclass(frozen=True)
class Cell:
    """Runs, judged by one SLO."""

    runs: Runs
    slo: SLO
    measured: tuple[Report, ...]  # of each run
    predicted: Report
    as_it_was: tuple[Report, ...] = ()  # of each run, predicted on its machine as it was; (): nobody knows how it was

    @property
    def plan(self) -> str:
        return self.runs.measured[0].key.plan

    @property
    def workload(self) -> str:
        return self.runs.measured[0].key.workload

    @property
    def rate(self) -> float:
        return self.runs.measured[0].key.rate

    @property
    def spoiled(self) -> str:
        return next((run.spoiled for run in self.runs.measured if run.spoiled), "")

    @property
    def attainment(self) -> float:
        """Measured."""
        return fmean(r.attainment.joint for r in self.measured)

    @property
    def error(self) -> float:
        return self.predicted.attainment.joint - self.attainment

    @property
    def rest(self) -> float | None:
        """The error that is left where the machine is as it was."""
        rests = [cell.error for cell in self.each_as_it_was]
        return fmean(rests) if rests else None

    @property
    def each_as_it_was(self) -> list[Cell]:
        """Every run for itself, beside its prediction on the machine as it was."""
        parts = zip(self.runs.measured, self.runs.as_measured, self.measured, self.as_it_was, strict=False)
        return [Cell(Runs((run,), (lived,)), self.slo, (real,), found) for run, lived, real, found in parts]

    @property
    def steps(self) -> dict[str, Mean]:
        """By role, of the first run."""
        return steps(self.runs.measured[0], self.runs.imagined)

    @property
    def noise(self) -> float | None:
        """Of the attainment; None: measured once."""
        return _apart([r.attainment.joint for r in self.measured])

    def latency(self, name: str, part: str) -> tuple[float | None, float | None]:
        """(measured, predicted) seconds."""
        values = [value for r in self.measured if (value := getattr(getattr(r, name), part)) is not None]
        return (fmean(values) if values else None), getattr(getattr(self.predicted, name), part)

    def latency_error(self, name: str, part: str) -> float | None:
        measured, predicted = self.latency(name, part)
        return None if not measured or predicted is None else predicted / measured - 1

    def latency_noise(self, name: str, part: str) -> float | None:
        values = [value for r in self.measured if (value := getattr(getattr(r, name), part)) is not None]
        found = _apart(values)
        return found / fmean(values) if found is not None and any(values) else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "workload": self.workload,
            "rate": self.rate,
            "seed": self.runs.measured[0].key.seed,
            "slo": {"ttft": self.slo.ttft, "tpot": self.slo.tpot},
            "measured": [r.to_dict() for r in self.measured],
            "predicted": self.predicted.to_dict(),
            "predicted_as_it_was": [report.to_dict() for report in self.as_it_was],
            "steps": {role: asdict(each) for role, each in self.steps.items()},
            "attainment_error": self.error,
            "attainment_noise": self.noise,
            "errors": {f"{name}_{part}": self.latency_error(name, part) for name, part in LATENCIES},
            "noise": {f"{name}_{part}": self.latency_noise(name, part) for name, part in LATENCIES},
            "client": [dict(run.client) for run in self.runs.measured],
            "server": [dict(run.server) for run in self.runs.measured],
            "spoiled": self.spoiled or None,
            "warnings": [warning for run in self.runs.measured for warning in run.warnings],
        }


def _apart(values: Sequence[float]) -> float | None:
    """The mean distance of two of them."""
    return fmean(abs(a - b) for a, b in combinations(values, 2)) if len(values) > 1 else None


def grouped(runs: Iterable[Measured]) -> list[tuple[Measured, ...]]:
    """Runs of the same requests together, in the order of their first."""
    found: dict[tuple[Any, ...], list[Measured]] = {}
    for run in runs:
        found.setdefault((*run.key[:-1], len(run.records)), []).append(run)
    return [tuple(sorted(group, key=lambda run: run.key.repeat)) for group in found.values()]


def lived(group: tuple[Measured, ...], plan: Plan, costs: Costs) -> Runs:
    """Raises what `imagine` raises."""
    again = [found for run in group if (found := as_measured(run, plan, costs)) is not None]
    return Runs(group, at_moments(plan, group[0].workload(), costs), tuple(again) if len(again) == len(group) else ())


def at_moments(plan: Plan, workload: Workload, costs: Costs) -> tuple[Imagination, ...]:
    """The workload, begun at moments that are spread evenly over the weather that the costs saw; once without any.
    Raises what `imagine` raises."""
    span = costs.engine.weather.span
    starts = [span * i / MOMENTS for i in range(MOMENTS)] if span else [0.0]
    return tuple(imagine(plan, workload, costs, weather_at=start) for start in starts)


def one_after_another(found: Sequence[Imagination], warmup: float) -> tuple[list[Record], float]:
    """(what is left of each after its warm-up, as one run; when that is over)."""
    records: list[Record] = []
    offset = 0.0
    for each in found:
        start = each.records[0].arrival + warmup
        later = [record for record in each.records if record.arrival >= start]
        records += [replace(record, arrival=record.arrival - start + offset) for record in later]
        offset += each.end - start
    return records, offset


def judged(runs: Runs, slo: SLO) -> Cell:
    first = runs.measured[0]
    rate, seed = first.key.rate, first.key.seed
    measured = tuple(
        report(run.records, slo, end=run.end, rate=rate, warmup=run.warmup, seed=seed) for run in runs.measured
    )

    def imagined(*found: Imagination) -> Report:
        if len(found) == 1:
            return report(found[0].records, slo, end=found[0].end, rate=rate, warmup=first.warmup, seed=seed)
        records, end = one_after_another(found, first.warmup)
        return report(records, slo, end=end, rate=rate, seed=seed)

    return Cell(runs, slo, measured, imagined(*runs.imagined), tuple(map(imagined, runs.as_measured)))


# -- capacity ---------------------------------------------------------------------------------------------------------


def capacities(cells: Sequence[Cell], goal: float) -> list[Capacity]:
    """Of each plan, workload and SLO that was measured at two rates or more."""
    found: dict[tuple[str, str, SLO], list[Cell]] = {}
    for cell in cells:
        if not cell.spoiled:
            found.setdefault((cell.plan, cell.workload, cell.slo), []).append(cell)
    answers = []
    for (plan, workload, slo), row in found.items():
        by_rate = {cell.rate: cell for cell in sorted(row, key=lambda cell: cell.rate)}
        if len(by_rate) > 1:
            curves = (
                [(rate, cell.attainment) for rate, cell in by_rate.items()],
                [(rate, cell.predicted.attainment.joint) for rate, cell in by_rate.items()],
            )
            measured, predicted = (crossing(curve, goal) for curve in curves)
            ends = (
                outermost(curves[0], goal) if measured is None else measured,
                outermost(curves[1], goal) if predicted is None else predicted,
            )
            answers.append(Capacity(plan, workload, slo, measured, predicted, tuple(by_rate), ends))
    return answers


# -- the answer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One kind of error, over all cells that have it."""

    what: str
    target: float  # of the mean, as a share
    mean: float | None  # of absolute errors; None: no cell has it
    worst: float | None
    bias: float | None  # mean with signs
    noise: float | None  # mean; None: nothing was measured twice
    cells: int
    points: bool = False  # a difference of shares, not a ratio

    @property
    def met(self) -> bool | None:
        return None if self.mean is None else self.mean <= self.target

    def to_dict(self) -> dict[str, Any]:
        names = ("what", "target", "mean", "worst", "bias", "noise", "cells")
        return {name: getattr(self, name) for name in names} | {"met": self.met}


def verdicts(cells: Sequence[Cell], found: Sequence[Capacity]) -> list[Verdict]:
    """The targets of an accurate twin. Latencies are compared once for each run, however many SLOs judge it."""
    good = [cell for cell in cells if not cell.spoiled]
    steep = [cell for cell in good if STEEP[0] <= cell.attainment <= STEEP[1]]
    once = list({cell.runs.measured[0].key: cell for cell in good}.values())

    def latency(name: str, part: str, target: float) -> Verdict:
        errors = [cell.latency_error(name, part) for cell in once]
        noises = [cell.latency_noise(name, part) for cell in once]
        return _verdict(f"{name.upper()} {part}", target, errors, noises)

    return [
        _verdict("attainment", 0.02, [c.error for c in good], [c.noise for c in good], points=True),
        _verdict(
            f"attainment between {STEEP[0]:.0%} and {STEEP[1]:.0%}",
            0.03,
            [c.error for c in steep],
            [c.noise for c in steep],
            points=True,
        ),
        _verdict("capacity at the SLO", 0.05, [c.error for c in found], []),
        latency("ttft", "p50", 0.1),
        latency("ttft", "p90", 0.1),
        latency("tpot", "p50", 0.05),
        latency("tpot", "p90", 0.05),
    ]


def _verdict(
    what: str, target: float, errors: Sequence[float | None], noises: Sequence[float | None], points: bool = False
) -> Verdict:
    values = [error for error in errors if error is not None]
    noise = [value for value in noises if value is not None]
    return Verdict(
        what,
        target,
        fmean(map(abs, values)) if values else None,
        max(map(abs, values)) if values else None,
        fmean(values) if values else None,
        fmean(noise) if noise else None,
        len(values),
        points,
    )


@dataclass(frozen=True)
class Comparison:
    """Everything."""

    cells: tuple[Cell, ...]
    capacities: tuple[Capacity, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]  # of the simulator
    as_it_was: tuple[Verdict, ...] = ()  # the same errors, on the machine as it was in each run; (): nobody knows
    capacities_as_it_was: tuple[Capacity, ...] = ()

    @property
    def attainment_error(self) -> float:
        """The mean over all cells; infinite where there are none."""
        mean = self.verdicts[0].mean
        return math.inf if mean is None else mean

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "verdicts_as_it_was": [verdict.to_dict() for verdict in self.as_it_was],
            "capacities": [capacity.to_dict() for capacity in self.capacities],
            "cells": [cell.to_dict() for cell in self.cells],
            "notes": list(self.notes),
        }


def compare(
    runs: Iterable[Measured],
    plans: Mapping[str, Plan],
    costs: Costs,
    slos: Callable[[str, str], Sequence[SLO]],
    goal: float,
) -> Comparison:
    """`plans`: as they were served. `slos`: of a plan and a workload."""
    cells: list[Cell] = []
    notes: dict[str, None] = {}
    for imagined in _all(runs, plans, costs):
        key = imagined.measured[0].key
        cells += [judged(imagined, slo) for slo in slos(key.plan, key.workload)]
        notes |= dict.fromkeys(imagined.imagined[0].notes)
    found = capacities(cells, goal)
    again = [each for cell in cells for each in cell.each_as_it_was]
    theirs = capacities(again, goal)
    judged_again = tuple(verdicts(again, theirs)) if again else ()
    return Comparison(
        tuple(cells), tuple(found), tuple(verdicts(cells, found)), tuple(notes), judged_again, tuple(theirs)
    )


def _all(runs: Iterable[Measured], plans: Mapping[str, Plan], costs: Costs) -> Iterator[Runs]:
    for group in grouped(runs):
        yield lived(group, plans[group[0].key.plan], costs)
