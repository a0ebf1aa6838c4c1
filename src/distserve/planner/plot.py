"""A drawing of attainment against rate and against SLO scale, for the best few deployments. Knows matplotlib, and only
when it draws (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distserve import plots
from distserve.planner.curves import Curve


def draw(found: Sequence[Curve], goal: float, title: str, path: Path) -> None:
    """Writes a PNG or SVG."""
    figure = plots.figure(10, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    for line in found:
        name = f"{line.name} ({line.devices})"
        left.plot(*zip(*line.by_rate, strict=True), marker="o", markersize=3, label=name)
        right.plot(*zip(*line.by_scale, strict=True), marker="o", markersize=3, label=name)
    for axes, label in ((left, "requests/s per device"), (right, "SLO scale (smaller is stricter)")):
        axes.axhline(goal, color="grey", linestyle="--", linewidth=1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    left.set_ylabel("attainment")
    left.set_ylim(0, 1.02)
    right.invert_xaxis()
    right.legend(fontsize="small")
    figure.suptitle(title)
    plots.save(figure, path)
