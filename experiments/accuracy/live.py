"""The second half of docs/accuracy.md: this project's own server on the machine that it was measured on, beside the
simulator with that machine's costs. Only recorded runs are read; every figure is computed from them, here or in
`distserve.validate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean

import matplotlib

from distserve.costs.base import Costs
from distserve.costs.choose import choose_costs
from distserve.metrics import SLO
from distserve.validate.capacity import Capacity
from distserve.validate.compare import Cell, Comparison, Verdict, compare
from distserve.validate.explain import slowness
from distserve.validate.plot import picture
from distserve.validate.record import Recording, read
from distserve.validate.show import attainment_pair, brief, latency_pair, step_pairs
from experiments.accuracy import lots
from experiments.accuracy.figures import STYLE, save
from experiments.accuracy.tables import table

DATA = Path(__file__).parents[1] / "data"
RUNS, COSTS = DATA / "live_runs.jsonl.gz", DATA / "live_costs.json"
GOAL = 0.9
TITLE = "# This project's own server, live"
OPENING = f"""
{TITLE}

*This part is written from recorded runs ([live_runs.jsonl.gz](../experiments/data/live_runs.jsonl.gz), `distserve
validate --record`) and the costs of the machine that they were measured on
([live_costs.json](../experiments/data/live_costs.json), `distserve profile`); the simulator is run again each time.*

The same requests went through `distserve serve` and through the simulator. A run lasts about {{span:.0f}} s, its first
tenth does not count; whatever failed counts as missed. One core for each instance, which the gateway and the client
share with them. Machine:

- {{machine}}
- {{versions}}
"""
AHEAD = """
**Predicted ahead**, with nothing but the costs, measured before (and the machine's weather in them, below):
"""
AS_IT_WAS = """
**Predicted on the machine as it was**: the same, once more, on a machine as fast at each moment of a run as the
server's own steps say that it was; which steps there were, when, and with whom in them is the simulator's. What is
left is the error of everything but the steps' lengths: scheduling, batches, queues, pulls, gateway and client.
"""
WEATHER = """
## The machine's weather

Steps of this machine do not always take equally long: {prompts} of the steps with prompts in all runs took more than
1.5 times what the costs say, {decodes} of those that decode; by run, the former from {least} to {most}. Such spells
last for seconds. They come with nothing else at work in this virtual machine, and they concern the matrix tiles of a
core: beside products in these, `python -m benchmarks.weather` times products in the vector units, an interpreter and
copies, which then take hardly longer ([Measurements](measurements.md)). So another tenant computes on the same core's
tiles. A profile keeps what it saw of it for as long as it measured, {span:.0f} s, and the simulator lives through that
over and over; what the weather will be in the very minute of a run nobody can say. That is the difference between the
two tables.
"""
LOTS = """
## What nobody can know ahead

Which weather (below) falls on which run is not to be known. How much that is worth can be computed: each run's
requests were imagined in the weather of {draws} other runs of its plan. *Apart*: how far two such answers lie from
each other, in the mean, for the very same requests. *Missed at least*: the error of somebody who had known all the
weather of these runs, but not on which of them it would fall, and had predicted the median. On a machine with such
weather no prediction made ahead is much closer than that, so the targets cannot be met ahead where it is above them.
"""
NOISE = """
Noise is how far repeated runs of the same requests lie apart, in the mean over their pairs; no prediction can be closer
to one run than runs are to each other. A dash: nothing was measured twice.
"""
CELLS = """
Every cell, measured and predicted, and the difference: attainment in points, latencies relative to what was measured.
"""
WHY = """
Run by run: *steps* are the mean steps of each role, measured and predicted; the errors are of attainment at the first
SLO, in points, predicted ahead and as it was. *Others* is what programs that are neither server nor client used of a
core meanwhile: a run with more than a tenth of a core of them is shown, but counts in no error above and in no
capacity.
"""
GRID = """
Of the grid that `distserve validate` measures unless told otherwise (three plans, three workloads, five rates each: 45
cells), {cells} cells are recorded here, {runs} runs with their repeats.
"""


@dataclass(frozen=True)
class Slow:
    """Shares of the steps with prompts that took more than 1.5 times what their costs say, and of those that decode."""

    all: float
    decodes: float
    least: float  # prompts, by run
    most: float


@dataclass(frozen=True)
class Live:
    """What was recorded, compared."""

    recording: Recording
    costs: Costs
    comparison: Comparison

    @cached_property
    def slow(self) -> Slow:
        return slow_steps(self)


@cache
def live(runs: Path = RUNS, of_the_machine: Path = COSTS) -> Live:
    recording = read(runs)
    costs = choose_costs(recording.model, "cpu", of_the_machine)

    def slos(plan: str, workload: str) -> Sequence[SLO]:
        return recording.chosen[plan, workload].slos

    return Live(recording, costs, compare(recording.runs.values(), recording.served, costs, slos, GOAL))


def text() -> str:
    found = live()
    recording, comparison = found.recording, found.comparison
    spans = sorted(run.records[-1].arrival for run in recording.runs.values())
    keys = {run.key[:3] for run in recording.runs.values()}
    parts = [
        OPENING.format(span=spans[len(spans) // 2], machine=recording.machine, versions=recording.versions),
        GRID.format(cells=len(keys), runs=len(recording.runs)),
        AHEAD,
        verdicts(comparison.verdicts),
        AS_IT_WAS,
        verdicts(comparison.as_it_was),
        NOISE,
        "![Predicted beside measured](images/accuracy-live.svg)",
        capacities(comparison),
        LOTS.format(draws=lots.DRAWS),
        drawn(found),
        weather(found),
        WHY,
        why(comparison.cells),
        CELLS,
        *cells(comparison.cells),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def verdicts(found: Sequence[Verdict]) -> str:
    rows = []
    for each in found:
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
    again = {(each.plan, each.workload, each.slo): each for each in comparison.capacities_as_it_was}
    rows = []
    for each in comparison.capacities:
        mine = again.get((each.plan, each.workload, each.slo))
        measured = f"{each.measured:.2f}" if each.measured is not None else "-"
        rows.append([f"{each.plan}, {each.workload}", brief(each.slo), measured, _predicted(each), _predicted(mine)])
    head = ["", "SLO (TTFT, TPOT)", "measured", "predicted ahead", "as it was"]
    words = (
        f"Rate up to which {GOAL:.0%} of the requests meet both targets, requests/s; a dash: not among the rates. Each "
        "curve is first made to fall: where some dozens of requests attain more at a higher rate, neighbours share "
        "their mean.\n\n"
    )
    return words + table(head, rows) if rows else ""


def _predicted(capacity: Capacity | None) -> str:
    if capacity is None:
        return "-"
    rate = "-" if capacity.predicted is None else f"{capacity.predicted:.2f}"
    if capacity.error is None:
        return rate
    return f"{rate} ({100 * capacity.error:+.1f} %{'' if capacity.exact else ' or more'})"


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
    return table(["", "steps", "others", "ahead", "as it was"], reversed(rows))


def drawn(found: Live) -> str:
    """What the lot alone is worth."""
    lot = lots.lots(found.recording, found.costs)
    assert lot is not None
    rows = [
        ["attainment", f"{100 * lot.attainment:.1f} points", f"{100 * lot.apart:.1f} points"],
        ["attainment between 5% and 95%", f"{100 * lot.steep:.1f} points", f"{100 * lot.steep_apart:.1f} points"],
    ]
    for (name, part), error in lot.latencies.items():
        rows.append([f"{name.upper()} {part}", f"{100 * error:.1f} %", ""])
    return table(["", "missed at least", "apart"], rows)


def weather(found: Live) -> str:
    return WEATHER.format(
        prompts=f"{found.slow.all:.0%}",
        decodes=f"{found.slow.decodes:.0%}",
        least=f"{found.slow.least:.0%}",
        most=f"{found.slow.most:.0%}",
        span=found.costs.engine.weather.span,
    )


def slow_steps(found: Live) -> Slow:
    """How long the steps of the runs took, beside their costs."""
    slow: dict[bool, list[float]] = {True: [], False: []}
    by_run = []
    for run in found.recording.runs.values():
        mine: dict[bool, list[float]] = {True: [], False: []}
        for steps in slowness(run.steps, found.recording.served[run.key.plan], found.costs).values():
            for step, times in steps:
                mine[step.prompt_tokens > 0].append(times)
        if mine[True]:
            by_run.append(_share_slow(mine[True]))
        for prompts, all_times in mine.items():
            slow[prompts] += all_times
    return Slow(_share_slow(slow[True]), _share_slow(slow[False]), min(by_run), max(by_run))


def _share_slow(times: Sequence[float]) -> float:
    return fmean(each > 1.5 for each in times)


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
