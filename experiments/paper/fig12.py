"""Figure 12: how long the search takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from experiments.paper import plots, searching
from experiments.paper.lab import Cell, Lab
from experiments.paper.published import cases, load
from experiments.paper.words import number, table

NAME = "fig12"
TITLE = "Figure 12: how long the search takes"
CASE = "opt-13b-sharegpt"  # fits any number of devices; the paper says that the model does not matter
SHAPES = {2: "1x2", 4: "1x4", 8: "1x8", 16: "2x8", 32: "4x8"}  # nodes x devices
ALGORITHMS = {"low": "a100", "high": "dgx-a100"}  # a cluster with the network that asks for it
LOAD = 1.0  # requests/s that are asked for, for each device of the cluster: takes more than half of it


def run(lab: Lab) -> dict[str, Any]:
    case = cases()[CASE]
    sizes = [int(row[0]) for row in load(NAME)["seconds"]][: 1 if lab.quick else None]
    algorithms = dict(list(ALGORITHMS.items())[:1]) if lab.quick else ALGORITHMS
    tasks = [
        (case.model, case.workload, case.slo, f"{cluster}-{SHAPES[size]}", LOAD * size, name)
        for name, cluster in algorithms.items()
        for size in sizes
    ]
    answers = iter(lab.map(NAME, searching.search_for, tasks))
    found: dict[str, Any] = {name: {str(size): asdict(next(answers)) for size in sizes} for name in algorithms}
    _write(lab, found)
    _draw(lab, found)
    return found


def _published() -> dict[str, dict[int, float]]:
    rows = load(NAME)["seconds"]
    return {"low": {int(row[0]): row[1] for row in rows}, "high": {int(row[0]): row[2] for row in rows}}


def _write(lab: Lab, found: dict[str, Any]) -> None:
    rows: list[list[Cell]] = [
        [name, int(size), _published()[name][int(size)], each["seconds"], each["requests"], each["said"]]
        for name, by_size in found.items()
        for size, each in by_size.items()
    ]
    head = ("algorithm", "devices", "paper_seconds", "ours_core_seconds", "ours_simulated_requests", "ours_found")
    lab.table(NAME, head, rows)


def _draw(lab: Lab, found: dict[str, Any]) -> None:
    drawing, ((panel,),) = plots.panels(1, 1)
    for colour, (name, by_size) in enumerate(found.items()):
        pairs = [(int(size), each["seconds"]) for size, each in by_size.items()]
        plots.ours(panel, pairs, f"{name} affinity, one core", colour)
        plots.theirs(panel, list(_published()[name].items()), f"{name} affinity (paper)", colour)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("devices")
    panel.set_ylabel("seconds")
    plots.legend(drawing, panel, 1)
    lab.draw(NAME, drawing)


def section(found: dict[str, Any]) -> str:
    rows = []
    for size in next(iter(found.values())):
        row = [size]
        for name, by_size in found.items():
            row += [number(_published()[name][int(size)]), number(by_size[size]["seconds"])]
        rows.append(row)
    head = ["devices"]
    for name in found:
        head += [f"{name} affinity, paper (s)", "ours (s of one core)"]
    case = cases()[CASE]
    return (
        f"{case.title}, {number(LOAD)} requests/s for each device of the cluster: the fewest devices that attain it, "
        ""
        "colocated instances and the goodput of the answers included.\n\n"
        + table(head, rows)
        + "\n\nThe paper's search enumerates and simulates each phase; ours rules out by bounds first, but judges the "
        "whole deployment over thousands of requests instead of hundreds. Times differ from run to run."
    )
