"""Runs as a picture: attainment against rate where there are several, how TTFT and TPOT spread, and how many requests
were in flight and waiting over time. Knows no load and no server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distserve import plots
from distserve.bench.client import Result
from distserve.bench.measure import Outcome
from distserve.tables import rounded

_CURVES = 8  # runs of a sweep whose latencies are drawn; more lines than that tell nothing


def draw(outcomes: Sequence[Outcome], goal: float, goodput: float | None, title: str, path: Path) -> None:
    """Writes a PNG or SVG. `goodput` in requests/s; None: one rate was measured."""
    several = len(outcomes) > 1
    figure = plots.figure(16 if several else 12, 3.8)
    axes = list(figure.subplots(1, 4 if several else 3))
    if several:
        _attainment(axes.pop(0), outcomes, goal, goodput)
    shown = _spread(sorted(outcomes, key=lambda outcome: outcome.report.rate or 0.0))
    slo = shown[0].report.slo
    names = [f"{rounded(outcome.report.rate)}/s" if several and outcome.report.rate else "" for outcome in shown]
    for name, target in (("ttft", slo.ttft), ("tpot", slo.tpot)):
        sets = [(label, _latencies(outcome, name)) for label, outcome in zip(names, shown, strict=True)]
        plots.distribution(axes.pop(0), name.upper(), sets, target)
    _timeline(axes.pop(0), shown, names)
    figure.suptitle(title, fontsize="medium")
    plots.save(figure, path)


def _spread(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Some of them, the first and the last among them."""
    if len(outcomes) <= _CURVES:
        return list(outcomes)
    return [outcomes[round(i * (len(outcomes) - 1) / (_CURVES - 1))] for i in range(_CURVES)]


def _latencies(outcome: Outcome, name: str) -> list[float]:
    values = (getattr(record, name) for record in outcome.counted if record.ok)
    return [value for value in values if value is not None]


def _attainment(axes: Any, outcomes: Sequence[Outcome], goal: float, goodput: float | None) -> None:
    reports = sorted((outcome.report for outcome in outcomes), key=lambda report: report.rate or 0.0)
    rates = [report.rate for report in reports]
    joint = [report.attainment.joint for report in reports]
    low = [report.attainment.joint - report.interval.joint[0] for report in reports]
    high = [report.interval.joint[1] - report.attainment.joint for report in reports]
    axes.errorbar(rates, joint, yerr=(low, high), marker="o", markersize=4, capsize=3, label="both targets")
    axes.plot(rates, [report.attainment.ttft for report in reports], ":", label="TTFT")
    axes.plot(rates, [report.attainment.tpot for report in reports], "--", label="TPOT")
    axes.axhline(goal, color="tab:gray", linewidth=1, label=f"goal {goal:g}")
    if goodput:
        axes.axvline(goodput, color="tab:green", linewidth=1, label=f"goodput {rounded(goodput)}/s")
    axes.set(xlabel="rate (requests/s)", ylabel="attainment", ylim=(-0.02, 1.02), title="attainment against rate")
    axes.set_xlim(left=0)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _timeline(axes: Any, outcomes: Sequence[Outcome], names: Sequence[str]) -> None:
    """In flight, and of those the ones that wait for their first token."""
    for number, (outcome, name) in enumerate(zip(outcomes, names, strict=True)):
        color = f"C{number}"
        in_flight, waiting = timelines(outcome.run.results, outcome.run.start, outcome.run.origin)
        axes.step(*in_flight, where="post", color=color, linewidth=1, label=name or "in flight")
        label = "waiting for a token" if len(outcomes) == 1 else None
        axes.step(*waiting, where="post", color=color, linewidth=1, linestyle=":", label=label)
    if len(outcomes) == 1 and outcomes[0].report.warmup:
        axes.axvspan(0, outcomes[0].report.warmup, color="tab:gray", alpha=0.2, label="warm-up")
    title = "requests in flight" if len(outcomes) == 1 else "in flight (dotted: waiting for a token)"
    axes.set(xlabel="since the first arrival (s)", ylabel="requests", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


Line = tuple[list[float], list[int]]  # seconds, requests from then on


def timelines(results: Sequence[Result], start: float, origin: float) -> tuple[Line, Line]:
    """How many requests were in flight, and how many of them had no token yet, since the first was due."""
    flying, waiting = [], []
    for result in results:
        due = result.asked.arrival - origin
        over = max(due, result.end - start)
        first = due + result.record.ttft if result.record.ttft is not None else over
        flying += [(due, 1), (over, -1)]
        waiting += [(due, 1), (min(first, over), -1)]
    return _counted(flying), _counted(waiting)


def _counted(changes: list[tuple[float, int]]) -> Line:
    times, counts, now = [0.0], [0], 0
    for time, change in sorted(changes):
        now += change
        times.append(time)
        counts.append(now)
    return times, counts
