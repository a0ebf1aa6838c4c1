"""Attainment against rate and against SLO scale, for the best few deployments: data, and a drawing of it. Knows
matplotlib only when it draws (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distserve.errors import UsageError
from distserve.planner.ask import Question, ask
from distserve.planner.goodput import USUAL
from distserve.planner.jobs import Jobs

FORMATS = (".png", ".svg")
RATES = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)  # of the best goodput
SCALES = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0)  # of the targets


@dataclass(frozen=True, slots=True)
class Line:
    """One deployment's."""

    name: str
    devices: int
    by_rate: tuple[tuple[float, float], ...]  # (requests/s per device, attainment)
    by_scale: tuple[tuple[float, float], ...]  # (factor of the targets, attainment)


def check(path: Path) -> None:
    """Refuses before the search what would only fail after it. Raises `UsageError`."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: name a file that ends in {' or '.join(FORMATS)}")
    _pyplot()


def lines(jobs: Jobs, subjects: Sequence[tuple[str, int, int, Question]], goodput: float, rate: float) -> list[Line]:
    """`subjects`: (name, devices, copies, a question about one copy). Rates are around the best goodput (of the whole
    deployment), scales are at `rate`."""
    questions = []
    for _, _, copies, question in subjects:
        base = replace(question, length=USUAL, early=False)
        questions += [replace(base, rate=goodput * share / copies) for share in RATES]
        questions += [replace(base, rate=rate / copies, scale=scale) for scale in SCALES]
    verdicts = iter(jobs.map(ask, questions))
    found = []
    for name, devices, _, _ in subjects:
        by_rate = tuple((goodput * share / devices, next(verdicts).attainment.joint) for share in RATES)
        by_scale = tuple((scale, next(verdicts).attainment.joint) for scale in SCALES)
        found.append(Line(name, devices, by_rate, by_scale))
    return found


def draw(found: Sequence[Line], goal: float, title: str, path: Path) -> None:
    """Writes a PNG or SVG."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
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
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install 'distserve[plots]', or leave --plot out"
        ) from None
    matplotlib.use("agg")
    import matplotlib.pyplot as pyplot

    return pyplot
