"""How figures look: one colour a system, ours as lines, the paper's as points; the same file for the same data. Knows
no experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("svg")

COLOURS = ("#1f5fa8", "#c0392b", "#d98e04", "#2a8f5a", "#7d4fa8", "#5c6670", "#c2569b")
STYLE = {
    "svg.hashsalt": "distserve",
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows times columns drawings."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * columns, 2.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in axes]


def ours(axes: Axes, points: Sequence[tuple[float, float]], label: str, colour: int, *, faint: bool = False) -> None:
    """`faint`: the other of two lengths of run."""
    x, y = zip(*points, strict=True)
    axes.plot(
        x,
        y,
        color=COLOURS[colour],
        label=label,
        linewidth=1.4,
        linestyle=(0, (4, 2)) if faint else "-",
        alpha=0.8 if faint else 1.0,
    )


def band(axes: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: int) -> None:
    axes.fill_between(x, low, high, color=COLOURS[colour], alpha=0.12, linewidth=0)


def theirs(axes: Axes, points: Sequence[tuple[float, float]], label: str, colour: int) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, "o", color=COLOURS[colour], label=label, markersize=3, markerfacecolor="none", markeredgewidth=0.9)


def mark(axes: Axes, x: float, y: float, shape: str, label: str, colour: int) -> None:
    axes.plot([x], [y], shape, color=COLOURS[colour], label=label, markersize=4, linestyle="none")


def legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Below all drawings: what the lines of one of them are."""
    handles, labels = axes.get_legend_handles_labels()
    shown = [(handle, label) for handle, label in zip(handles, labels, strict=True) if not label.startswith("_")]
    handles, labels = [handle for handle, _ in shown], [label for _, label in shown]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)


def goal(axes: Axes, y: float) -> None:
    axes.axhline(y, color="#888888", linewidth=0.7, linestyle=":")


def save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
