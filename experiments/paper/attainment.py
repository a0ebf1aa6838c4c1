"""Figures 8 and 9: attainment against rate and against the scale of the targets, for some of the five cases. Knows no
document; `gains.py` makes the headline ratios of what is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.paper import curves, living, plots, systems
from experiments.paper.lab import Cell, Lab
from experiments.paper.living import Length
from experiments.paper.published import GOAL, Case, cases, load, points
from experiments.paper.systems import PUBLISHED, System
from experiments.paper.words import NONE, listed, number, percent, table

LENGTHS = ("as published", "steady")


def run(lab: Lab, figure: str, names: Sequence[str]) -> dict[str, Any]:
    """Simulates the cases of a figure, draws them, writes their points."""
    found: dict[str, Any] = {}
    rate_tasks: list[tuple[Any, ...]] = []
    scale_tasks: list[tuple[Any, ...]] = []
    keys: list[tuple[str, str]] = []
    for name in names:
        case = cases()[name]
        found[name] = {"rate": {}, "scale": {}}
        for system in systems.of(case):
            for length in _lengths(lab, case, system):
                keys.append((name, system.name))
                rates = _xs(lab, figure, name, "rate")
                rate_tasks.append((system, case.workload, case.slo, rates, length))
                scales = _xs(lab, figure, name, "scale")
                scale_tasks.append((system, case.workload, case.slo, case.fixed_rate, scales, length))
    both: list[tuple[str, Callable[..., curves.Curve | curves.Scales], list[tuple[Any, ...]]]] = [
        ("rate", curves.rate_curve, rate_tasks),
        ("scale", curves.scale_curve, scale_tasks),
    ]
    for kind, work, tasks in both:
        answers: list[curves.Curve | curves.Scales] = lab.map(f"{figure} {kind}", work, tasks)
        for (name, label), curve in zip(keys, answers, strict=True):
            found[name][kind].setdefault(label, {})[curve.length] = curves.kept(curve)
    _write(lab, figure, found)
    _draw(lab, figure, found)
    return found


def _lengths(lab: Lab, case: Case, system: System) -> tuple[Length, Length]:
    quick = lab.quick
    return living.as_published(system, case.requests_per_device, quick=quick), living.steady(system, quick=quick)


def _xs(lab: Lab, figure: str, name: str, kind: str) -> list[float]:
    """Where the paper has points."""
    every = sorted({x for curve in load(figure)[name][kind].values() for x, _ in curve})
    return every[:: max(1, len(every) - 1)] if lab.quick and kind == "rate" else every


def at(curve: dict[str, Any], x: float) -> float | None:
    """Ours at one of the paper's x, of what was kept. Beyond the last point of a curve that was given up: 0."""
    pairs = _pairs(curve)
    for known, y in pairs:
        if abs(known / x - 1) < 1e-4:
            return y
    return 0.0 if x > pairs[-1][0] and pairs[-1][1] < 0.05 else None


def _pairs(curve: dict[str, Any]) -> list[tuple[float, float]]:
    return [(p["rate"], p["joint"]) if isinstance(p, dict) else (p[0], p[1]) for p in curve["points"]]


def _write(lab: Lab, figure: str, found: dict[str, Any]) -> None:
    rows: list[list[Cell]] = []
    for name, kinds in found.items():
        for kind, by_system in kinds.items():
            published = load(figure)[name][kind]
            for system, by_length in by_system.items():
                theirs = dict(points(published.get(PUBLISHED[system], [])))
                xs = sorted({*theirs, *(x for curve in by_length.values() for x, _ in _pairs(curve))})
                for x in xs:
                    mine = [at(by_length[length], x) for length in LENGTHS]
                    paper = theirs.get(x)
                    rows.append(
                        [name, kind, x, system, PUBLISHED[system], paper]
                        + [None if y is None else 100 * y for y in mine]
                    )
    head = ("case", "x_is", "x", "system", "paper_system", "paper_percent", "ours_as_published_percent")
    lab.table(figure, (*head, "ours_steady_percent"), rows)


def _draw(lab: Lab, figure: str, found: dict[str, Any]) -> None:
    drawing, axes = plots.panels(2, len(found))
    for column, (name, kinds) in enumerate(found.items()):
        for row, (kind, by_system) in enumerate(kinds.items()):
            panel = axes[row][column]
            published = load(figure)[name][kind]
            xs = [x for curve in published.values() for x, _ in curve]
            for colour, (system, by_length) in enumerate(by_system.items()):
                for length in LENGTHS:
                    pairs = [(x, 100 * y) for x, y in _pairs(by_length[length]) if x <= 1.1 * max(xs)]
                    plots.ours(panel, pairs, f"{system}, {length}", colour, faint=length == "as published")
                if PUBLISHED[system] in published:
                    plots.theirs(panel, points(published[PUBLISHED[system]]), f"{PUBLISHED[system]} (paper)", colour)
            plots.goal(panel, 100 * GOAL)
            panel.set_ylim(-3, 103)
            panel.set_xlim(0, 1.05 * max(xs))
            panel.set_title(cases()[name].title if kind == "rate" else "")
            panel.set_xlabel("requests/s per device" if kind == "rate" else "scale of both targets")
            if kind == "scale":
                panel.invert_xaxis()
            if column == 0:
                panel.set_ylabel("requests that meet both targets, %")
    axes[0][0].legend(loc="lower left")
    lab.draw(figure, drawing)


def rate_table(figure: str, name: str, found: dict[str, Any]) -> str:
    """Paper beside ours at the paper's rates."""
    by_system = found[name]["rate"]
    head = ["requests/s per device"]
    for system in by_system:
        head += [f"{PUBLISHED[system]}, paper", f"{system}, {LENGTHS[0]}", LENGTHS[1]]
    rows = []
    for x in sorted({x for curve in load(figure)[name]["rate"].values() for x, _ in curve}):
        row = [number(x)]
        for system, by_length in by_system.items():
            paper = dict(points(load(figure)[name]["rate"].get(PUBLISHED[system], []))).get(x)
            row.append(NONE if paper is None else f"{paper:.1f}")
            row += [percent(at(by_length[length], x)) for length in LENGTHS]
        rows.append(row)
    return table(head, rows)


def distance(figure: str, name: str, system: str, found: dict[str, Any], kind: str = "rate") -> float | None:
    """Mean absolute difference to the paper in points of attainment, at the paper's length of run."""
    published = load(figure)[name][kind].get(PUBLISHED[system])
    if published is None:
        return None
    curve = found[name][kind][system][LENGTHS[0]]
    apart = [abs(100 * mine - y) for x, y in published if (mine := at(curve, x)) is not None]
    return float(sum(apart) / len(apart))


def section(figure: str, found: dict[str, Any]) -> str:
    """Tables of a figure, and how far ours is from the paper's."""
    parts = []
    for name in found:
        case = cases()[name]
        parts.append(
            f"### {case.title}\n\nTargets: {case.slo}. Requests that meet both, in %:\n\n"
            + rate_table(figure, name, found)
            + "\n\n"
            + _crossings(name, found)
            + "\n\n"
            + _distances(figure, name, found)
        )
    return "\n\n".join(parts)


def _crossings(name: str, found: dict[str, Any]) -> str:
    """Where each curve crosses the goal."""
    case = cases()[name]
    head = [f"crosses {GOAL:.0%}", "rate, paper", f"rate, {LENGTHS[0]}", LENGTHS[1]]
    head += [f"scale at {number(case.fixed_rate)} requests/s, paper", f"scale, {LENGTHS[0]}", LENGTHS[1]]
    rows = []
    for system in found[name]["rate"]:
        curve, scale = found[name]["rate"][system], found[name]["scale"][system]
        row = [f"{system} ({PUBLISHED[system]})", number(case.goodput.get(PUBLISHED[system]))]
        row += [_goodput(curve[length]) for length in LENGTHS]
        row.append(number(case.scale.get(PUBLISHED[system])))
        row += [number(scale[length]["needed"]) + "*" * scale[length]["grows"] for length in LENGTHS]
        rows.append(row)
    return table(head, rows)


def _goodput(curve: dict[str, Any]) -> str:
    if curve["goodput"] is None:
        return f"none from {number(curve['points'][0]['rate'])} on"
    return number(curve["goodput"]) + (" or more" if curve["at_least"] else "")


def _distances(figure: str, name: str, found: dict[str, Any]) -> str:
    said = [
        f"{system} {apart:.1f}"
        for system in found[name]["rate"]
        if (apart := distance(figure, name, system, found)) is not None
    ]
    return f"Mean distance to the paper's points at its length of run, in points of attainment: {listed(said)}."
