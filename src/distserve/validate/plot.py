"""Predicted beside measured as a picture: a row for each workload, with attainment, TTFT and TPOT against the rate.
Lines are predicted, marks measured, whiskers reach from one repeat to another; crosses are predicted on the machine as
fast as it was in each run. Knows no run and no simulator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distserve import plots
from distserve.validate.compare import Cell, Comparison
from distserve.validate.show import brief

_STYLES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "v", "D")


def draw(found: Comparison, goal: float, path: Path) -> None:
    """Writes a PNG or SVG."""
    plots.save(picture(found, goal), path)


def picture(found: Comparison, goal: float) -> Any:
    """The figure."""
    workloads = list(dict.fromkeys(cell.workload for cell in found.cells))
    figure = plots.figure(14, 3.6 * len(workloads))
    panels = figure.subplots(len(workloads), 3, squeeze=False)
    plans = list(dict.fromkeys(cell.plan for cell in found.cells))
    for row, workload in zip(panels, workloads, strict=True):
        for number, plan in enumerate(plans):
            mine = [cell for cell in found.cells if (cell.plan, cell.workload) == (plan, workload)]
            mine.sort(key=lambda cell: cell.rate)
            if mine:
                _attainment(row[0], mine, f"C{number}", plan)
                for axes, name in zip(row[1:], ("ttft", "tpot"), strict=True):
                    _latency(axes, mine, name, f"C{number}")
        row[0].axhline(goal, color="tab:gray", linewidth=1)
        row[0].set(title=workload, ylabel="attainment", ylim=(-0.02, 1.02))
        row[0].legend(fontsize="x-small")
        for axes, name in zip(row[1:], ("TTFT", "TPOT"), strict=True):
            axes.set(title=f"{name}: p50 (circles), p90 (squares)", ylabel="s")
            axes.set_yscale("log")
        for axes in row:
            axes.set_xlabel("rate (requests/s)")
            axes.grid(alpha=0.3)
    figure.suptitle("marks: measured; lines: predicted; crosses: predicted as the machine was", fontsize="medium")
    return figure


def _attainment(axes: Any, cells: Sequence[Cell], color: str, plan: str) -> None:
    slos = list(dict.fromkeys(cell.slo for cell in cells))
    for number, slo in enumerate(slos):
        mine = [cell for cell in cells if cell.slo == slo]
        style, mark = _STYLES[number % len(_STYLES)], _MARKS[number % len(_MARKS)]
        rates = [cell.rate for cell in mine]
        axes.plot(rates, [cell.predicted.attainment.joint for cell in mine], style, color=color, linewidth=1.2)
        again = [(cell.rate, report.attainment.joint) for cell in mine for report in cell.as_it_was]
        axes.plot([rate for rate, _ in again], [share for _, share in again], "x", color=color, markersize=6)
        values = [[r.attainment.joint for r in cell.measured] for cell in mine]
        _marks(axes, rates, values, mark, color, f"{plan} ({brief(slo)})")


def _latency(axes: Any, cells: Sequence[Cell], name: str, color: str) -> None:
    once = list({id(cell.runs): cell for cell in cells}.values())
    rates = [cell.rate for cell in once]
    for part, style, mark in (("p50", "-", "o"), ("p90", "--", "s")):
        predicted = [getattr(getattr(cell.predicted, name), part) for cell in once]
        axes.plot(rates, [float("nan") if v is None else v for v in predicted], style, color=color, linewidth=1.2)
        again = [(cell.rate, v) for cell in once for r in cell.as_it_was if (v := getattr(getattr(r, name), part))]
        axes.plot([rate for rate, _ in again], [value for _, value in again], "x", color=color, markersize=6)
        values = [[v for r in cell.measured if (v := getattr(getattr(r, name), part)) is not None] for cell in once]
        _marks(axes, rates, values, mark, color, None)


def _marks(
    axes: Any, rates: Sequence[float], values: Sequence[Sequence[float]], mark: str, color: str, label: str | None
) -> None:
    known = [(rate, row) for rate, row in zip(rates, values, strict=True) if row]
    if not known:
        return
    means = [sum(row) / len(row) for _, row in known]
    low = [mean - min(row) for mean, (_, row) in zip(means, known, strict=True)]
    high = [max(row) - mean for mean, (_, row) in zip(means, known, strict=True)]
    axes.errorbar(
        [rate for rate, _ in known],
        means,
        yerr=(low, high),
        fmt=mark,
        markersize=4,
        capsize=2,
        color=color,
        label=label,
    )
