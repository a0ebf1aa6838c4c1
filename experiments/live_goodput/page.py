"""docs/goodput.md: what was measured, in tables, and what was not. Every figure in it is computed from the record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from distserve.costs.base import Costs
from distserve.metrics import SLO
from distserve.validate.compare import judged, lived
from distserve.validate.explain import slowness
from distserve.validate.record import Key, Recording
from experiments.accuracy.tables import table
from experiments.live_goodput.cases import CASES, GOAL, SCALES, Case
from experiments.live_goodput.contenders import ALL, label
from experiments.live_goodput.neighbours import Pair, by_rate, pairs, summary
from experiments.live_goodput.results import NEAR, Choice, Row, behind, bounds, choice, ours, pointless, ranked, rows
from experiments.live_goodput.same_weather import in_the_same_weather

IMAGE = "goodput-live.svg"
OPENING = """# Goodput on one machine, measured

*Written by `python -m experiments.live_goodput`; edit `experiments/live_goodput/`, not this file.*

Does prefill and decode apart beat both together, on real processes and with real tokens? Two cores serve the demo model
(SmolLM2-135M, bf16), one instance on each: one prefill and one decode instance, or two colocated ones, or two replicas
of vLLM's CPU build behind a round robin, or vLLM's own prefill and decode apart (NixlConnector, with a NIXL that waits
a millisecond between two looks for messages, for without that it takes the core from who computes). The same client
sends everyone the same requests at the same times, is what stands between vLLM's two, and shares the two cores with
them.
Goodput is the rate up to which {goal:.0%} of all requests meet both targets, read off the measured rates; it is that of
both cores together.

Each cell is one run of {duration} s or so of arrivals, of which the first tenth does not count. {runs} runs were
measured; {spoiled} of them do not count, because other programs used the machine meanwhile or the client was too slow.

- {machine}
- {versions}
"""
WEATHER = """
**Mind the weather.** Somebody else's work on the same cores' matrix tiles makes steps with prompts two to three times
as long for seconds at a time ([Accuracy](accuracy.md)). Of the steps with prompts more than {slow:g} times as long as
the costs say: {shares}. Whoever was measured in a bad minute looks worse than he is, so each case has a second part:
all of ours in the same weather, that of every colocated run, lived through by the simulator. It is good for that: over
the {runs} runs of ours its attainment is off by {as_it_was:.1f} points in the mean when it knows how fast the machine
was (and by {ahead:.1f} ahead).
"""
NEIGHBOURS = """
## One directly behind the other

At each rate the contenders were measured in turns, one directly behind the other, in an order that changed from rate to
rate; so two neighbours met nearly the same machine. By how many points of attainment one is ahead of the other, in the
mean over all pairs that were neighbours, at the targets and over all scales of them, and how far apart their weather
was (below):
"""
THEIR_WEATHER = """
Neighbours: attainment at the targets of one contender and of the one that was measured directly behind it. The weather
is how many times as long as the costs say their steps with prompts took, in the mean ("-": vLLM does not tell).
"""
SLOW = 1.5
MISSING = """
## What was not measured

{missing}

Rates above one where not even the loosest targets are met by half of the requests are left out: they cannot hold a
goodput. `python -m experiments.live_goodput --costs COSTS --record {record}` goes on where the record ends.
"""
CHOICES = (0.75, 1.0, 1.5)  # scales of the targets at which the planner is asked: rates beyond them were not measured


def text(recording: Recording, costs: Costs, record: str) -> str:
    """The document. Asks the planner, which takes some seconds a case."""
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
    parts.append(_truth(recording, costs))
    if any(found for _, found in measured):
        parts.append(f"![Attainment against rate and against the scale of the targets](images/{IMAGE})")
    close = {case.name: pairs(case, recording, costs) for case in CASES}
    if neighbours := [pair for case in CASES for pair in close[case.name]]:
        parts += [NEIGHBOURS, summary(neighbours)]
    parts += [_case(case, found, recording, costs, close[case.name]) for case, found in measured if found]
    parts.append(MISSING.format(missing=_missing(measured, recording), record=record))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _case(case: Case, found: Sequence[Row], recording: Recording, costs: Costs, close: Sequence[Pair]) -> str:
    slo, chosen = case.slo, [choice(case, costs, scale) for scale in CHOICES]
    shares, by_scale = _tables(case, found)
    parts = [
        f"## {case.name.capitalize()}",
        f"Lengths: `{case.workload}`. Targets: TTFT {slo.ttft:g} s, TPOT {slo.tpot:g} s. Attainment in %, by rate:",
        shares,
        "Goodput with these targets times a scale, requests/s:",
        by_scale,
        _best(found, slo),
        "The planner's choice for two cores, with this machine's costs, beside the best of ours that was measured:",
        _choices(case, found, chosen),
    ]
    if close:
        parts += [THEIR_WEATHER.strip(), by_rate(close)]
    if same := in_the_same_weather(case, recording, costs):
        parts += [
            f"**{case.name.capitalize()} in the same weather for all, simulated**: by rate, by scale, the choice.",
            *_tables(case, same),
            _choices(case, same, chosen),
        ]
    return "\n\n".join(parts)


def _tables(case: Case, found: Sequence[Row]) -> tuple[str, str]:
    """(attainment by rate, goodput by scale)."""
    rates, slo = sorted({run.key.rate for row in found for run in row.runs}), case.slo
    shares = [[row.contender, *(_share(row, rate, slo) for rate in rates), bounds(row, slo)] for row in found]
    by_scale = [[row.contender, *(bounds(row, case.scaled(scale)) for scale in SCALES)] for row in found]
    return (
        table(["", *(f"{rate:g}/s" for rate in rates), "goodput, requests/s"], shares),
        table(["", *(f"{scale:g}" for scale in SCALES)], by_scale),
    )


def _truth(recording: Recording, costs: Costs) -> str:
    """How close the simulator is to these runs."""
    ahead: list[float] = []
    as_it_was: list[float] = []
    slow: dict[str, list[float]] = {}
    for case in CASES:
        for row in ours(rows(case, recording)):
            if not any(run.steps for run in row.runs):
                continue
            plan = recording.served[label(row.contender, case)]
            for run in row.runs:
                cell = judged(lived((run,), plan, costs), case.slo)
                if cell.rest is not None:
                    ahead.append(abs(cell.error))
                    as_it_was.append(abs(cell.rest))
                    mine = slow.setdefault(row.contender, [])
                    for steps in slowness(run.steps, plan, costs).values():
                        mine += [times for step, times in steps if step.prompt_tokens]
    if not ahead:
        return ""
    shares = ", ".join(f"{name} {fmean(each > SLOW for each in of):.0%}" for name, of in slow.items())
    return WEATHER.format(
        shares=shares, slow=SLOW, ahead=100 * fmean(ahead), as_it_was=100 * fmean(as_it_was), runs=len(ahead)
    )


def _share(row: Row, rate: float, slo: SLO) -> str:
    shares = dict(row.curve(slo))
    return f"{100 * shares[rate]:.1f}" if rate in shares else "-"


def _best(found: Sequence[Row], slo: SLO) -> str:
    order = ranked(found, slo)
    if not order:
        return f"Nobody attains {GOAL:.0%} with these targets at the rates that were measured."
    first, *others = order
    said = f"The highest goodput: {first.contender} ({bounds(first, slo)} requests/s)"
    if not others:
        return f"{said}; no other that was measured attains the goal at any rate."
    second = others[0]
    return f"{said}, then {second.contender} ({bounds(second, slo)}{_below(second, first, slo)})."


def _below(row: Row, winner: Row, slo: SLO) -> str:
    share, exact = behind(row, winner, slo)
    if not exact and share == 0:
        return ", both beyond the rates"
    return f", {'' if exact else 'at least '}{share:.0%} less"


def _choices(case: Case, found: Sequence[Row], chosen: Sequence[Choice]) -> str:
    titles = ["scale", "the planner's choice", "expected", "measured", "best", "second best", f"within {NEAR:.0%}"]
    return table(titles, [_judged(case, ours(found), *each) for each in zip(CHOICES, chosen, strict=True)])


def _judged(case: Case, found: Sequence[Row], scale: float, chosen: Choice) -> list[str]:
    """A line of the table."""
    slo = case.scaled(scale)
    best, second, *_ = [*(f"{row.contender}: {bounds(row, slo)}" for row in ranked(found, slo)), "-", "-"]
    line = [f"{scale:g}", chosen.contender or "none attains them", "-", "-", best, second]
    if not chosen.contender or chosen.goodput is None:
        return [*line, "yes" if found and not ranked(found, slo) else "-"]
    line[2] = f"{chosen.goodput:.2f}"
    mine = next((row for row in found if row.contender == chosen.contender), None)
    if mine is None:
        return [*line, "not measured"]
    line[3] = bounds(mine, slo)
    return [*line, _verdict(mine, ranked(found, slo), slo)]


def _verdict(mine: Row, order: Sequence[Row], slo: SLO) -> str:
    if not order:
        return "none attains them"
    share, exact = behind(mine, order[0], slo)
    if share > NEAR:
        return f"no, {'' if exact else 'at least '}{share:.0%} less"
    if mine is order[0]:
        return "yes, the best"
    return f"yes, {share:.1%} less" if exact else "the rates do not tell"


def _missing(measured: Iterable[tuple[Case, Sequence[Row]]], recording: Recording) -> str:
    lines = []
    for case, found in measured:
        have = {row.contender: {run.key.rate for run in row.runs} for row in found}
        kept = recording.chosen.get(("all", case.workload))
        if not found or kept is None:
            lines.append(f"- {case.name}: nothing")
            continue
        lacks = []
        for name in ALL:
            keys = [Key(name, case.workload, rate, 0, 0) for rate in kept.rates]
            open_ = [
                f"{k.rate:g}/s" for k in keys if k.rate not in have.get(name, ()) and not pointless(k, case, recording)
            ]
            if open_:
                lacks.append(f"{name} ({', '.join(open_)})" if name in have else name)
        if lacks:
            lines.append(f"- {case.name}: {'; '.join(lacks)}")
    return "\n".join(lines) or "Nothing: every contender was measured at every rate that says something of it."
