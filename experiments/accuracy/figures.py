"""Plots of docs/accuracy.md. The same runs give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from distserve.metrics import Record, quantile
from distserve.plan import Role
from distserve.sim.life import NEVER, Life
from distserve.sim.simulate import imagine
from experiments.accuracy.runs import Run
from experiments.accuracy.score import Measured, Score
from experiments.accuracy.spans import Floats, Spans

REAL, OURS, UPSTREAM, FAINT = "#222222", "#0072b2", "#d55e00", "#999999"
SHARES = [i / 100 for i in range(101)]
STYLE = {
    "svg.hashsalt": "distserve",
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def distributions(scores: Sequence[Score], name: str, file: Path) -> None:
    """`name` ("ttft" or "tpot") of every run: the share of requests below each value. Crosses: p50 and p90 of
    upstream's simulator."""
    with matplotlib.rc_context(STYLE):
        figure, panels = plt.subplots(2, 5, figsize=(13, 5), sharey=True, layout="constrained")
        for panel, found in zip(panels.flat, scores, strict=True):
            for records, colour, label in ((found.run.records, REAL, "real"), (found.records, OURS, "ours")):
                panel.plot(_milliseconds(records, name), SHARES, color=colour, label=label, linewidth=1.4)
            theirs: Measured = found.upstream
            panel.plot([1e3 * x for x in getattr(theirs, name)], [0.5, 0.9], "x", color=UPSTREAM, label="upstream")
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_title(found.run.name, fontsize=8)
            panel.grid(alpha=0.2)
        for panel in panels[1]:
            panel.set_xlabel(f"{name.upper()} [ms]")
        for panel in panels[:, 0]:
            panel.set_ylabel("share of requests")
        panels[0, 0].legend(loc="lower right")
        save(figure, file)


def _milliseconds(records: Sequence[Record], name: str) -> list[float]:
    values = sorted(1e3 * value for r in records if (value := getattr(r, name)) is not None)
    return [quantile(values, share) for share in SHARES]


def saturated(run: Run, file: Path) -> None:
    """TTFT over time, and where the KV of what is not over lies."""
    imagined = run.simulate()
    real, ours = Spans.real(run), Spans.imagined(run, imagined.lives)
    costs, (prefill, decode) = run.costs(), run.plan().instances
    room = [
        spec_tokens * costs.engine.block_size
        for spec_tokens in (costs.kv_blocks(s.tp, s.pp) for s in (decode, prefill))
    ]
    end = float(real.last.max())
    times = np.arange(0.0, end + 1, 1.0)
    with matplotlib.rc_context(STYLE):
        figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
        for spans, colour, label in ((real, REAL, "real"), (ours, OURS, "ours")):
            above.plot(*_medians(spans.arrival, spans.first - spans.arrival), color=colour, label=label)
            below.plot(times, [spans.context(t) / 1e3 for t in times], color=colour, label=f"{label}: all of it")
        above.set_yscale("log")
        above.set_ylabel("TTFT [s], median of 2 s of arrivals")
        above.legend(loc="upper left")
        held = _held(imagined.lives, times)
        below.fill_between(times, held / 1e3, color=OURS, alpha=0.2, label="ours: held in prefill memory")
        for tokens, text in ((room[0], "room of decode"), (sum(room), "room of both")):
            below.axhline(tokens / 1e3, color=FAINT, linestyle="--", linewidth=0.8)
            below.text(end + 2, tokens / 1e3, f"{text}, {tokens:,}", va="bottom", color="#666666")
        below.set_xlim(right=end + 45)
        below.set_ylabel("KV of unfinished requests [1,000 tokens]")
        below.set_xlabel("time [s]")
        below.legend(loc="upper left")
        save(figure, file)


def _medians(times: Floats, values: Floats, window: float = 2.0) -> tuple[Floats, Floats]:
    """(middle of each window, median of the values in it)."""
    windows = (times // window).astype(int)
    found = np.unique(windows)
    return (found + 0.5) * window, np.array([np.median(values[windows == w]) for w in found])


def _held(lives: Sequence[Life], times: Floats) -> Floats:
    """Prompt tokens that are in prefill memory at each time: from the start of their computation to their pull."""
    started, pulled = (np.array([getattr(life, name) for life in lives]) for name in ("started", "pulled"))
    pulled = np.where(pulled == NEVER, [life.last for life in lives], pulled)
    tokens = np.array([life.prompt_tokens for life in lives], float)
    return np.array([(tokens * ((started <= t) & (pulled > t))).sum() for t in times])


def micro_batches(run: Run, file: Path) -> None:
    """Sizes of the two decode micro-batches of a pipeline of two stages, as ours has them."""
    steps: list[tuple[float, int]] = []

    def saw(instance: str, start: float, items: list[tuple[int, int]]) -> None:
        if instance.startswith(Role.DECODE):
            steps.append((start, len(items)))

    imagine(run.plan(), run.workload(), run.costs(), trace=saw)
    end = run.records[-1].arrival
    sizes = {int(t): [n for start, n in steps if int(t) <= start < int(t) + 1] for t in np.arange(0, end, 1.0)}
    with matplotlib.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(9, 3), layout="constrained")
        for pick, colour, label in ((max, OURS, "larger"), (min, UPSTREAM, "smaller")):
            known = [(t, pick(found)) for t, found in sizes.items() if found]
            panel.step(*zip(*known, strict=True), color=colour, label=f"{label} micro-batch", where="mid")
        panel.set_ylabel("sequences")
        panel.set_xlabel("time [s]")
        panel.legend(loc="upper left")
        save(figure, file)


def save(figure: plt.Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    lines = file.read_text(encoding="utf-8").splitlines()  # matplotlib ends some with blanks
    file.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
