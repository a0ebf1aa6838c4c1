"""Plots of docs/goodput.md: for each case, attainment against rate, and against the scale of the targets. The same runs
give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from experiments.accuracy.figures import STYLE, save
from experiments.live_goodput.cases import GOAL
from experiments.live_goodput.contenders import ALL
from experiments.live_goodput.results import Row, ours

_COLOURS = dict(zip(ALL, ("#0072b2", "#d55e00", "#009e73", "#999999", "#cc79a7"), strict=True))


def attainments(cases: Sequence[Sequence[Row]], file: Path) -> None:
    """A column for each case that was measured: above by rate, below by scale at the middle rate."""
    with matplotlib.rc_context(STYLE):
        figure, panels = plt.subplots(
            2, len(cases), figsize=(4.2 * len(cases), 6.4), layout="constrained", squeeze=False
        )
        for (above, below), found in zip(panels.T, cases, strict=True):
            case = found[0].case
            rate = shared_rate(found)
            for row in found:
                style = {"color": _COLOURS[row.contender], "marker": "o", "markersize": 3, "label": row.contender}
                above.plot(*zip(*row.curve(case.slo), strict=True), **style)
                if rate in (run.key.rate for run in row.runs):
                    below.plot(*zip(*row.scales(rate), strict=True), **style)
            above.set_title(f"{case.name} (TTFT {case.slo.ttft:g} s, TPOT {case.slo.tpot:g} s)")
            above.set_xlabel("rate [requests/s]")
            below.set_xlabel("scale of the targets" + f", at {rate:g} requests/s")
            for panel in (above, below):
                panel.axhline(GOAL, color="#999999", linewidth=0.8, linestyle="--")
                panel.set_ylim(-0.02, 1.02)
                panel.grid(alpha=0.2)
        panels[0, 0].set_ylabel("attainment")
        panels[1, 0].set_ylabel("attainment")
        panels[0, 0].legend(loc="lower left")
        save(figure, file)


def shared_rate(found: Sequence[Row]) -> float:
    """The rate at which most of ours were measured (of everybody, where none of ours was); of several the middle one.
    Who is slow from the start is measured at low rates alone, and does not decide it."""
    rates = [run.key.rate for row in ours(found) or found for run in row.runs]
    most = max(map(rates.count, rates))
    shared = sorted({rate for rate in rates if rates.count(rate) == most})
    return shared[len(shared) // 2]
