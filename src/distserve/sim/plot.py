"""A simulated run as a picture: how TTFT and TPOT are distributed, attainment over time. Needs the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distserve.errors import UsageError
from distserve.metrics import Record, Report
from distserve.sim.simulate import Imagination

SLICES = 40  # of the run, for attainment over time


def draw(found: Imagination, report: Report, path: Path) -> None:
    """Writes .png, .svg or what else matplotlib knows. Raises `UsageError` with the cure."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'distserve[plots]'") from None
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    start = found.records[0].arrival + report.warmup
    good = [record for record in found.records if record.ok and record.arrival >= start]
    _distribution(first, "TTFT", [record.ttft for record in good if record.ttft is not None], report.slo.ttft)
    _distribution(second, "TPOT", [record.tpot for record in good if record.tpot is not None], report.slo.tpot)
    _over_time(third, found.records, report)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}: name a file that ends in .png or .svg") from None


def _distribution(axes: Any, name: str, values: Sequence[float], target: float | None) -> None:
    ordered = sorted(values)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axes.plot(ordered, shares)
    if target is not None:
        axes.axvline(target, color="tab:red", linestyle="--", label=f"target {target:g} s")
        axes.legend()
    if ordered and ordered[-1] > 20 * ordered[len(ordered) // 2]:
        axes.set_xscale("log")
    axes.set(xlabel=f"{name} (s)", ylabel="share of requests", ylim=(0, 1.02), title=name)
    axes.grid(alpha=0.3)


def _over_time(axes: Any, records: Sequence[Record], report: Report) -> None:
    start, end = records[0].arrival, records[-1].arrival
    width = (end - start) / SLICES or 1.0
    met: dict[int, list[bool]] = {}
    for record in records:
        met.setdefault(min(SLICES - 1, int((record.arrival - start) / width)), []).append(report.slo.met(record))
    slices = sorted(met)
    axes.step([start + i * width for i in slices], [sum(met[i]) / len(met[i]) for i in slices], where="post")
    if report.warmup:
        axes.axvspan(start, start + report.warmup, color="tab:gray", alpha=0.2, label="warm-up")
        axes.legend()
    axes.set(xlabel="arrival (s)", ylabel="targets met", ylim=(0, 1.02), title="attainment over time")
    axes.grid(alpha=0.3)
