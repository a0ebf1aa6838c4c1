"""A simulated run as a picture: how TTFT and TPOT are distributed, attainment over time. Needs the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distserve import plots
from distserve.metrics import Record, Report
from distserve.sim.simulate import Imagination

SLICES = 40  # of the run, for attainment over time


def draw(found: Imagination, report: Report, path: Path) -> None:
    """Writes .png, .svg or what else matplotlib knows. Raises `UsageError` with the cure."""
    figure = plots.figure(12, 3.6)
    first, second, third = figure.subplots(1, 3)
    start = found.records[0].arrival + report.warmup
    good = [record for record in found.records if record.ok and record.arrival >= start]
    ttfts = [record.ttft for record in good if record.ttft is not None]
    tpots = [record.tpot for record in good if record.tpot is not None]
    plots.distribution(first, "TTFT", [("", ttfts)], report.slo.ttft)
    plots.distribution(second, "TPOT", [("", tpots)], report.slo.tpot)
    _over_time(third, found.records, report)
    plots.save(figure, path)


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
