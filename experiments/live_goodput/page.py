"""docs/goodput.md: what was measured, in tables, and what was not. Every figure in it is computed from the record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distserve.costs.base import Costs
from distserve.metrics import SLO
from distserve.validate.record import Recording
from experiments.accuracy.tables import table
from experiments.live_goodput.cases import CASES, GOAL, SCALES, Case
from experiments.live_goodput.contenders import ALL, VLLM
from experiments.live_goodput.results import Row, best, bounds, choice, rows

IMAGE = "goodput-live.svg"
OPENING = """# Goodput on one machine, measured

*Written by `python -m experiments.live_goodput`; edit `experiments/live_goodput/`, not this file.*

Does prefill and decode apart beat both together, on real processes and with real tokens? Two cores serve the demo model
(SmolLM2-135M, bf16), one instance on each: one prefill and one decode instance, or two colocated ones, or two replicas
of vLLM's CPU build behind a round robin. The same client sends everyone the same requests at the same times, and shares
the two cores with them. Goodput is the rate up to which {goal:.0%} of all requests meet both targets, read off the
measured rates; it is that of both cores together.

Each cell is one run of {duration} s or so of arrivals, of which the first tenth does not count. {runs} runs were
measured; {spoiled} of them do not count, because other programs used the machine meanwhile or the client was too slow.

- {machine}
- {versions}
"""
MISSING = """
## What was not measured

{missing}

`python -m experiments.live_goodput --costs COSTS --record {record}` goes on where the record ends. vLLM's own
prefill/decode mode was not measured: on two cores its idle processes spin, and its TTFT is then seconds.
"""


def text(recording: Recording, costs: Costs, record: str) -> str:
    """The document."""
    measured = [(case, rows(case, recording)) for case in CASES]
    spans = sorted(run.records[-1].arrival for run in recording.runs.values())
    duration = f"{spans[len(spans) // 2]:.0f}" if spans else "-"
    parts = [
        OPENING.format(
            goal=GOAL,
            machine=recording.machine,
            versions=recording.versions,
            duration=duration,
            runs=len(recording.runs),
            spoiled=sum(bool(run.spoiled) for run in recording.runs.values()),
        )
    ]
    if any(found for _, found in measured):
        parts.append(f"![Attainment against rate and against the scale of the targets](images/{IMAGE})")
    parts += [_case(case, found, recording, costs) for case, found in measured if found]
    parts.append(MISSING.format(missing=_missing(measured, recording), record=record))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _case(case: Case, found: Sequence[Row], recording: Recording, costs: Costs) -> str:
    rates = sorted({run.key.rate for row in found for run in row.runs})
    slo = case.slo
    by_rate = [[row.contender, *(_share(row, rate, slo) for rate in rates), bounds(row, slo)] for row in found]
    by_scale = [[row.contender, *(bounds(row, case.scaled(scale)) for scale in SCALES)] for row in found]
    return "\n\n".join(
        [
            f"## {case.name.capitalize()}",
            f"Lengths: `{case.workload}`. Targets: TTFT {slo.ttft:g} s, TPOT {slo.tpot:g} s. Attainment in %, by rate:",
            table(["", *(f"{rate:g}/s" for rate in rates), "goodput, requests/s"], by_rate),
            "Goodput with these targets times a scale, requests/s:",
            table(["", *(f"{scale:g}" for scale in SCALES)], by_scale),
            _chosen(case, found, costs),
        ]
    )


def _share(row: Row, rate: float, slo: SLO) -> str:
    shares = dict(row.curve(slo))
    return f"{100 * shares[rate]:.1f}" if rate in shares else "-"


def _chosen(case: Case, found: Sequence[Row], costs: Costs) -> str:
    chosen, winner = choice(case, costs), best(found, case.slo)
    if not chosen.contender or chosen.goodput is None:
        return "The planner says that no deployment on two cores attains these targets."
    mine = next((row for row in found if row.contender == chosen.contender), None)
    said = f"The planner, with this machine's costs, chooses {chosen.contender} ({chosen.goodput:.2f} requests/s)"
    if mine is None or winner is None:
        return f"{said}, which was not measured."
    if winner is mine:
        return f"{said}: of ours the best that was measured ({bounds(mine, case.slo)})."
    better = f"{winner.contender} ({bounds(winner, case.slo)})"
    return f"{said}, measured {bounds(mine, case.slo)}; the best measured is {better}."


def _missing(measured: Iterable[tuple[Case, Sequence[Row]]], recording: Recording) -> str:
    lines = []
    for case, found in measured:
        have = {row.contender: len(row.runs) for row in found}
        kept = recording.chosen.get(("all", case.workload))
        wanted = len(kept.rates) if kept is not None else 0
        lacks = [name for name in ALL if have.get(name, 0) == 0]
        partly = [f"{name} ({n} of {wanted} rates)" for name, n in have.items() if 0 < n < wanted]
        if not found:
            lines.append(f"- {case.name}: nothing")
        elif lacks or partly:
            lines.append(f"- {case.name}: {', '.join([*lacks, *partly])}")
    return "\n".join(lines) or f"Nothing: every contender, {VLLM} too, was measured at every rate."
