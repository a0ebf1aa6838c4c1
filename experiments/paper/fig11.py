"""Figure 11, the ablation: what each algorithm adds over colocated instances, all of them simulated; OPT-66B, ShareGPT.

The paper's left panel has vLLM at some attainment at each rate, its right panel scales the targets at one rate that it
does not name. Each system's targets are scaled here at the rate at which its two panels agree.
"""

from __future__ import annotations

from typing import Any

from distserve.metrics import SLO
from distserve.plan import Policy
from experiments.paper import curves, living, plots, searching, systems
from experiments.paper.attainment import LENGTHS, at, pairs
from experiments.paper.lab import Cell, Lab
from experiments.paper.published import GOAL, cases, load, points
from experiments.paper.systems import System
from experiments.paper.words import NONE, listed, number, percent, table

NAME = "fig11"
TITLE = "Figure 11: the ablation"
CASE = cases()["opt-66b-sharegpt"]
HIGH, LOW, SAME, VLLM, BEST, CHUNKED = (
    "DistServe-High",
    "DistServe-Low",
    "the paper's placement",
    "vLLM",
    "vLLM++",
    "chunked",
)
# Parallelisms of vLLM++: those that fit a node and the KV of the longest prompt.
SHAPES = ((4, 1), (8, 1), (2, 2), (4, 2), (2, 4))
PUBLISHED = {HIGH: HIGH, LOW: LOW, SAME: LOW, VLLM: VLLM, BEST: BEST}


def slo() -> SLO:
    return SLO(**load(NAME)["slo"])


def run(lab: Lab) -> dict[str, Any]:
    compared, notes = _systems(lab)
    rates = sorted({x for curve in load(NAME)["rate"].values() for x, _ in curve})[:: 6 if lab.quick else 1]
    scales = sorted({x for curve in load(NAME)["scale"].values() for x, _ in curve})
    rate_tasks, scale_tasks = [], []
    for system in compared:
        lengths = (
            living.as_published(system, load(NAME)["requests_per_device"], quick=lab.quick),
            living.steady(quick=lab.quick),
        )
        for length in lengths:
            rate_tasks.append((system, CASE.workload, slo(), rates, length))
            scale_tasks.append((system, CASE.workload, slo(), scaled_at(system.name), scales, length))
    found: dict[str, Any] = {"placements": notes, "rate": {}, "scale": {}}
    for curve in lab.map(f"{NAME} rate", curves.rate_curve, rate_tasks):
        found["rate"].setdefault(curve.system, {})[curve.length] = curves.kept(curve)
    for scale in lab.map(f"{NAME} scale", curves.scale_curve, scale_tasks):
        found["scale"].setdefault(scale.system, {})[scale.length] = curves.kept(scale)
    _write(lab, found)
    _draw(lab, found)
    return found


def scaled_at(name: str) -> float:
    """The rate at which the paper's left panel has what its right panel has at the targets themselves."""
    published = PUBLISHED.get(name, VLLM)
    wanted = dict(points(load(NAME)["scale"][published]))[1.0]
    return min(points(load(NAME)["rate"][published]), key=lambda point: abs(point[1] - wanted))[0]


def _systems(lab: Lab) -> tuple[list[System], dict[str, str]]:
    """What is compared, and how the searched ones were chosen."""
    model = CASE.model
    same = systems.apart(model, CASE.prefill, CASE.decode, SAME)
    whole = systems.together(model, CASE.baseline_tp, Policy.PREFILL_FIRST, name=VLLM)
    chunked = systems.together(model, CASE.baseline_tp, Policy.CHUNKED, name=CHUNKED)
    shapes = SHAPES[:1] if lab.quick else SHAPES
    candidates = [systems.together(model, tp, Policy.PREFILL_FIRST, pp, name=BEST) for tp, pp in shapes]
    rates = [0.125, 0.25] if lab.quick else [0.0625, 0.125, 0.25, 0.375]
    tasks = [(s, CASE.workload, slo(), rates, living.steady(quick=lab.quick)) for s in candidates]
    tried = lab.map(f"{NAME} vLLM++", curves.rate_curve, tasks)
    best = max(range(len(shapes)), key=lambda place: tried[place].goodput or 0.0)
    notes = {BEST: f"tp{shapes[best][0]} pp{shapes[best][1]}"}
    swift = systems.together(model, CASE.baseline_tp, Policy.PREFILL_FIRST, swift=True)
    compared = [same, whole, candidates[best], chunked, swift]
    if lab.quick:
        return compared, notes
    searches = [
        (model, CASE.workload, slo(), "dgx-a100-1x8", 8, False, searching.APART),
        (model, CASE.workload, slo(), "a100-1x8", 8, True, searching.APART),
    ]
    for name, answer in zip((HIGH, LOW), lab.map(f"{NAME} search", searching.best, searches), strict=True):
        notes[name] = answer.said
        compared.insert(len(compared) - 5, System(name, model, answer.unit))
    return compared, notes


def _write(lab: Lab, found: dict[str, Any]) -> None:
    rows: list[list[Cell]] = []
    for kind in ("rate", "scale"):
        for system, by_length in found[kind].items():
            theirs = dict(points(load(NAME)[kind].get(PUBLISHED.get(system, ""), [])))
            xs = sorted({*theirs, *(x for curve in by_length.values() for x, _ in pairs(curve))})
            for x in xs:
                mine = [at(by_length[length], x) for length in LENGTHS]
                rows.append([kind, x, system, theirs.get(x), *(None if y is None else 100 * y for y in mine)])
    head = ("x_is", "x", "system", "paper_percent", "ours_as_published_percent", "ours_steady_percent")
    lab.table(NAME, head, rows)


def _draw(lab: Lab, found: dict[str, Any]) -> None:
    drawing, (axes,) = plots.panels(1, 2)
    for panel, kind in zip(axes, ("rate", "scale"), strict=True):
        published = load(NAME)[kind]
        limit = max(x for curve in published.values() for x, _ in curve)
        for colour, (system, by_length) in enumerate(found[kind].items()):
            for length in LENGTHS:
                inside = [(x, 100 * y) for x, y in pairs(by_length[length]) if x <= 1.1 * limit]
                plots.ours(panel, inside, f"{system}, {length}", colour, faint=length == LENGTHS[0])
            if PUBLISHED.get(system) in published and system != SAME:
                plots.theirs(panel, points(published[PUBLISHED[system]]), f"{system} (paper)", colour)
        plots.goal(panel, 100 * GOAL)
        panel.set_xlim(0, 1.05 * limit)
        panel.set_ylim(-3, 103)
        panel.set_xlabel("requests/s per device" if kind == "rate" else "scale of both targets")
    axes[1].invert_xaxis()
    axes[0].set_ylabel("requests that meet both targets, %")
    plots.legend(drawing, axes[0], 2)
    lab.draw(NAME, drawing)


def section(found: dict[str, Any]) -> str:
    published = load(NAME)["rate"]
    head = ["requests/s per device"]
    for system in found["rate"]:
        head += [f"{system}, paper"] * (system in PUBLISHED and system != SAME)
        head += [f"{system}, {LENGTHS[0]}", LENGTHS[1]]
    rows = []
    for x in sorted({x for curve in published.values() for x, _ in curve}):
        row = [number(x)]
        for system, by_length in found["rate"].items():
            if system in PUBLISHED and system != SAME:
                theirs = dict(points(published[PUBLISHED[system]])).get(x)
                row.append(NONE if theirs is None else f"{theirs:.1f}")
            row += [percent(at(by_length[length], x)) for length in LENGTHS]
        rows.append(row)
    chosen = listed([f"{name}: {said}" for name, said in found["placements"].items()])
    crossings = [
        [system, *(number(by_length[length]["goodput"]) for length in LENGTHS)]
        for system, by_length in found["rate"].items()
    ]
    rates = listed(sorted({number(scaled_at(name)) for name in published}))
    return (
        f"Targets: {slo()} (those of the authors' repository). Chosen here: {chosen}. The panels of the paper agree "
        f"with each other if targets were scaled at {rates} requests/s per device, the larger for DistServe.\n\n"
        + table(head, rows)
        + "\n\n"
        + table([f"crosses {GOAL:.0%} at", *LENGTHS], crossings)
        + "\n\nThese are simulations in the paper, too, by its authors' simulator: no KV memory on the decode "
        "side, no transfers, targets judged one by one. Both searches had one node of eight devices, where "
        "the two algorithms choose among the same placements. At the paper's length of run our curves and "
        "theirs have the same order between DistServe and vLLM; the placements of both algorithms are those "
        "of our search, which knows of KV memory. Colocated instances on DistServe's step times, which the "
        "figure does not have, are the last two."
    )
