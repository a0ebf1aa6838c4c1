"""Figures 8 and 9: attainment against rate and against the scale of the targets, for some of the five cases. Knows no
document; `gains.py` makes the headline ratios of what is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    return living.as_published(system, case.requests_per_device, quick=quick), living.steady(quick=quick)


def _xs(lab: Lab, figure: str, name: str, kind: str) -> list[float]:
    """Where the paper has points."""
    every = sorted({x for curve in load(figure)[name][kind].values() for x, _ in curve})
    return every[:: max(1, len(every) - 1)] if lab.quick and kind == "rate" else every


def at(curve: dict[str, Any], x: float) -> float | None:
    """Ours at one of the paper's x, of what was kept. Beyond the last point of a curve that was given up: 0."""
    known = pairs(curve)
    for near, y in known:
        if abs(near / x - 1) < 1e-4:
            return y
    return 0.0 if x > known[-1][0] and known[-1][1] < 0.05 else None


def pairs(curve: dict[str, Any]) -> list[tuple[float, float]]:
    """(rate or scale, attainment) of what was kept."""
    return [(p["rate"], p["joint"]) if isinstance(p, dict) else (p[0], p[1]) for p in curve["points"]]


def _write(lab: Lab, figure: str, found: dict[str, Any]) -> None:
    rows: list[list[Cell]] = []
    for name, kinds in found.items():
        for kind, by_system in kinds.items():
            published = load(figure)[name][kind]
            for system, by_length in by_system.items():
                other = PUBLISHED.get(system, "")
                theirs = dict(points(published.get(other, [])))
                xs = sorted({*theirs, *(x for curve in by_length.values() for x, _ in pairs(curve))})
                for x in xs:
                    mine = [at(by_length[length], x) for length in LENGTHS]
                    paper = theirs.get(x)
                    rows.append([name, kind, x, system, other, paper] + [None if y is None else 100 * y for y in mine])
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
                    inside = [(x, 100 * y) for x, y in pairs(by_length[length]) if x <= 1.1 * max(xs)]
                    plots.ours(panel, inside, f"{system}, {length}", colour, faint=length == "as published")
                other = PUBLISHED.get(system, "")
                if other in published:
                    plots.theirs(panel, points(published[other]), f"{other} (paper)", colour)
            plots.goal(panel, 100 * GOAL)
            panel.set_ylim(-3, 103)
            panel.set_xlim(0, 1.05 * max(xs))
            panel.set_title(cases()[name].title if kind == "rate" else "")
            panel.set_xlabel("requests/s per device" if kind == "rate" else "scale of both targets")
            if kind == "scale":
                panel.invert_xaxis()
            if column == 0:
                panel.set_ylabel("requests that meet both targets, %")
    plots.legend(drawing, axes[0][0])
    lab.draw(figure, drawing)


def rate_table(figure: str, name: str, found: dict[str, Any]) -> str:
    """Paper beside ours at the paper's rates."""
    by_system = found[name]["rate"]
    head = ["requests/s per device"]
    for system in by_system:
        head += [f"{PUBLISHED.get(system)}, paper"] * (system in PUBLISHED) + [f"{system}, {LENGTHS[0]}", LENGTHS[1]]
    rows = []
    for x in sorted({x for curve in load(figure)[name]["rate"].values() for x, _ in curve}):
        row = [number(x)]
        for system, by_length in by_system.items():
            if system in PUBLISHED:
                paper = dict(points(load(figure)[name]["rate"].get(PUBLISHED[system], []))).get(x)
                row.append(NONE if paper is None else f"{paper:.1f}")
            row += [percent(at(by_length[length], x)) for length in LENGTHS]
        rows.append(row)
    return table(head, rows)


def differences(figure: str, name: str, system: str, found: dict[str, Any]) -> list[float]:
    """Ours less the paper's at each of its rates and at its length of run, in points of attainment."""
    curve = found[name]["rate"][system][LENGTHS[0]]
    published = load(figure)[name]["rate"].get(PUBLISHED.get(system, ""), [])
    return [100 * mine - y for x, y in points(published) if (mine := at(curve, x)) is not None]


def section(figure: str, found: dict[str, Any], reasons: Mapping[str, str]) -> str:
    """Tables of a figure, how far ours is from the paper's, and why."""
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
            + "\n\n"
            + reasons[name]
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
        other = PUBLISHED.get(system, "")
        row = [f"{system} ({other})" if other else system, number(case.goodput.get(other))]
        row += [_goodput(curve[length]) for length in LENGTHS]
        row.append(number(case.scale.get(other)))
        row += [number(scale[length]["needed"]) + "*" * scale[length]["grows"] for length in LENGTHS]
        rows.append(row)
    return table(head, rows)


def _goodput(curve: dict[str, Any]) -> str:
    if curve["goodput"] is None:
        return f"none from {number(curve['points'][0]['rate'])} on"
    return number(curve["goodput"]) + (" or more" if curve["at_least"] else "")


def _distances(figure: str, name: str, found: dict[str, Any]) -> str:
    said = []
    for system in found[name]["rate"]:
        apart = differences(figure, name, system, found)
        if apart:
            mean = sum(apart) / len(apart)
            size = sum(map(abs, apart)) / len(apart)
            largest = max(apart, key=abs)
            said.append(
                f"{system} is {size:.1f} points from {PUBLISHED[system]} ({abs(mean):.1f} "
                f"{'above' if mean > 0 else 'below'} it on balance; {abs(largest):.1f} at the worst rate)"
            )
    return f"At the paper's length of run and on average over its rates, {listed(said)}."
