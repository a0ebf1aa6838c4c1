"""The second half of docs/accuracy.md: this project's own server on the machine that it was measured on, beside the
simulator with that machine's costs. Only recorded runs are read; every figure is computed from them, here or in
`distserve.validate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import matplotlib

from distserve.costs.choose import choose_costs
from distserve.metrics import SLO
from distserve.validate.compare import Cell, Comparison, compare
from distserve.validate.plot import picture
from distserve.validate.record import Recording, read
from distserve.validate.show import attainment_pair, brief, latency_pair, step_pairs
from experiments.accuracy.figures import STYLE, save
from experiments.accuracy.tables import table

DATA = Path(__file__).parents[1] / "data"
RUNS, COSTS = DATA / "live_runs.jsonl", DATA / "live_costs.json"
GOAL = 0.9
TITLE = "# This project's own server, live"
OPENING = f"""
{TITLE}

*This part is written from recorded runs ([live_runs.jsonl](../experiments/data/live_runs.jsonl), `distserve validate
--record`) and the costs of the machine that they were measured on
([live_costs.json](../experiments/data/live_costs.json), `distserve profile`); the simulator is run again each time.*

The same requests went through `distserve serve` and through the simulator. A run lasts about {{span:.0f}} s, its first
tenth does not count; whatever failed counts as missed. One core for each instance, which the gateway and the client
share with them. Machine:

- {{machine}}
- {{versions}}
"""
NOT_QUIET = """
**Nothing can be said yet of how close these predictions are: while every one of the recorded runs went on, other
programs used the same two cores.** What the runs are good for is said below: the steps were several times as long as
the costs say, and whether the twin is right about everything but their length can be seen all the same. On a quiet
machine `distserve validate --costs COSTS --record FILE` measures them again.
"""
NOISE = """
Noise is how far repeated runs of the same requests lie apart, in the mean over their pairs; no prediction can be closer
to one run than runs are to each other. A dash: nothing was measured twice.
"""
CELLS = """
Every cell, measured and predicted, and the difference: attainment in points, latencies relative to what was measured.
"""
WHY = """
Where an error comes from: the server counts its steps and their seconds. *Steps* compares their mean, measured and
predicted, by role. The last two columns are errors of attainment at the first SLO, in points: as predicted, and
predicted again with steps as long, on average, as they were in that very run. What is left then is the error of
queues, batches, pulls, gateway and client; the difference is a machine that was slower or faster than when its costs
were measured. *Others* is what programs that are neither server nor client used of a core meanwhile: a run with more
than a tenth of a core of them is shown, but counts in no error above and in no capacity.
"""
GRID = """
Of the grid that `distserve validate` measures unless told otherwise (three plans, three workloads, five rates each: 45
cells), {cells} cells are recorded here, {runs} runs with their repeats.
"""


@dataclass(frozen=True)
class Live:
    """What was recorded, compared."""

    recording: Recording
    comparison: Comparison


@cache
def live() -> Live:
    recording = read(RUNS)
    costs = choose_costs(recording.model, "cpu", COSTS)

    def slos(plan: str, workload: str) -> Sequence[SLO]:
        return recording.chosen[plan, workload].slos

    return Live(recording, compare(recording.runs.values(), recording.served, costs, slos, GOAL))


def text() -> str:
    found = live()
    recording, comparison = found.recording, found.comparison
    spans = sorted(run.records[-1].arrival for run in recording.runs.values())
    keys = {run.key[:3] for run in recording.runs.values()}
    parts = [
        OPENING.format(span=spans[len(spans) // 2], machine=recording.machine, versions=recording.versions),
        verdicts(comparison) if comparison.verdicts[0].cells else NOT_QUIET,
        NOISE if comparison.verdicts[0].cells else "",
        GRID.format(cells=len(keys), runs=len(recording.runs)),
        "![Predicted beside measured](images/accuracy-live.svg)",
        capacities(comparison),
        WHY,
        why(comparison.cells),
        own_steps(comparison.cells),
        CELLS,
        *cells(comparison.cells),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def verdicts(comparison: Comparison) -> str:
    rows = []
    for each in comparison.verdicts:
        unit = "points" if each.points else "%"
        if each.mean is None or each.worst is None or each.bias is None:
            rows.append([each.what, f"{100 * each.target:.0f} {unit}", "-", "", "-", "-", "-", "0"])
            continue
        noise = "-" if each.noise is None else f"{100 * each.noise:.1f}"
        rows.append(
            [
                each.what,
                f"{100 * each.target:.0f} {unit}",
                f"{100 * each.mean:.1f}",
                "met" if each.met else "**not met**",
                f"{100 * each.worst:.1f}",
                f"{100 * each.bias:+.1f}",
                noise,
                str(each.cells),
            ]
        )
    return table(["error of", "target: at most", "mean", "", "worst", "bias", "noise", "cells"], rows)


def capacities(comparison: Comparison) -> str:
    rows = []
    for each in comparison.capacities:
        pair = [f"{rate:.2f}" if rate is not None else "-" for rate in (each.measured, each.predicted)]
        error = "" if each.error is None else f"{100 * each.error:+.1f} %"
        rows.append([f"{each.plan}, {each.workload}", brief(each.slo), *pair, error])
    head = ["", "SLO (TTFT, TPOT)", "measured", "predicted", "error"]
    words = (
        f"Rate up to which {GOAL:.0%} of the requests meet both targets, requests/s; a dash: not among the rates.\n\n"
    )
    return words + table(head, rows) if rows else ""


def why(found: Sequence[Cell]) -> str:
    rows = []
    for cell in {id(cell.runs): cell for cell in reversed(found)}.values():
        others = [run.client["others"] for run in cell.runs.measured if "others" in run.client]
        rows.append(
            [
                f"{cell.plan}, {cell.workload} at {cell.rate:g}/s",
                step_pairs(cell),
                f"{100 * max(others):.0f} %" if others else "-",
                f"{100 * cell.error:+.1f}",
                "-" if cell.rest is None else f"{100 * cell.rest:+.1f}",
            ]
        )
    return table(["", "steps", "others", "error", "with its own steps"], reversed(rows))


def own_steps(found: Sequence[Cell]) -> str:
    """What can be said of every run, whatever else the machine did: the twin without its costs."""
    known = [(cell, cell.with_its_steps) for cell in found if cell.with_its_steps is not None]
    if not known:
        return ""
    attainment = fmean(abs(cell.rest) for cell, _ in known if cell.rest is not None)
    spoiled = len({id(cell.runs) for cell, _ in known if cell.spoiled})
    parts = []
    for name, part in (("ttft", "p50"), ("ttft", "p90"), ("tpot", "p50"), ("tpot", "p90")):
        errors = []
        for cell, report in known:
            measured, predicted = cell.latency(name, part)[0], getattr(getattr(report, name), part)
            if measured and predicted is not None:
                errors.append(predicted / measured - 1)
        parts.append(f"{name.upper()} {part} {100 * fmean(map(abs, errors)):.0f} % ({100 * fmean(errors):+.0f} %)")
    return (
        f"Over all runs, {spoiled} of which do not count above, and predicted with each run's own mean steps: "
        f"attainment is off by {100 * attainment:.1f} points in the mean, {', '.join(parts)} (with sign)."
    )


def cells(found: Sequence[Cell]) -> list[str]:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in found:
        groups.setdefault((cell.plan, cell.workload), []).append(cell)
    parts = []
    for (plan, workload), mine in groups.items():
        slos = list(dict.fromkeys(cell.slo for cell in mine))
        head = [f"{plan}, {workload}", *(f"attainment ({brief(slo)})" for slo in slos)]
        head += ["TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90"]
        by_rate: dict[float, list[Cell]] = {}
        for cell in sorted(mine, key=lambda cell: cell.rate):
            by_rate.setdefault(cell.rate, []).append(cell)
        rows = []
        for rate, row in by_rate.items():
            judged = {cell.slo: attainment_pair(cell) for cell in row}
            latencies = [latency_pair(row[0], name, part) for name in ("ttft", "tpot") for part in ("p50", "p90")]
            rows.append([f"{rate:g}/s", *(judged[slo] for slo in slos), *latencies])
        parts.append(table(head, rows))
    return parts


def draw(file: Path) -> None:
    with matplotlib.rc_context(STYLE):
        save(picture(live().comparison, GOAL), file)
