"""Measures what a record file lacks, cell after cell; a cell is a case, a contender and a rate. The file is that of
`distserve validate`, with contenders for plans, so that both can be read with the same code.

Every contender gets the same requests at the same times, at the same rates: those around the capacities that the
simulator expects of ours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from distserve.costs.base import Costs
from distserve.errors import DistserveError, UsageError
from distserve.plan import Plan
from distserve.validate.grid import offered, rounded
from distserve.validate.live import seconds_of
from distserve.validate.record import Chosen, Key, Recording
from experiments.live_goodput.cases import DURATION, RATES, SCALES, Case
from experiments.live_goodput.contenders import ALL, Contender, capacity, contenders, serving

_LOWEST, _HIGHEST = 0.6, 1.25  # of the smallest and the largest capacity that is expected
_START = 120.0  # seconds that a contender that is not ours may take to start
_EVERYBODY = "all"  # whose rates are kept


@dataclass(frozen=True)
class Asked:
    """What to measure."""

    cases: Sequence[Case]
    names: Sequence[str]  # of contenders
    duration: float = DURATION
    seconds: float = float("inf")  # at most
    vllm_python: str | None = None


def grid(asked: Asked, costs: Costs, recording: Recording) -> tuple[list[Key], dict[tuple[str, str], Contender]]:
    """Every cell, and who serves it. What was chosen once stays, for it is in the file."""
    cells, who = [], {}
    for case in asked.cases:
        mine = {contender.name: contender for contender in _of(case, costs, asked.names, recording)}
        rates = _rates(case, costs, mine, recording)
        for name, contender in mine.items():
            who[name, case.workload] = contender
            cells += [Key(name, case.workload, rate, 0, 0) for rate in rates]
    cells.sort(key=lambda key: (ALL.index(key.plan), key.workload))  # stable: rates stay in order
    return cells, who


def label(name: str, case: Case) -> str:
    """Under which a contender's plan is kept: that of chunked prefill differs from case to case."""
    return f"{name}, {case.name}"


def _of(case: Case, costs: Costs, names: Sequence[str], recording: Recording) -> list[Contender]:
    kept = [name for name in names if label(name, case) in recording.served]
    found = [Contender(name, recording.served[label(name, case)]) for name in kept]
    for contender in contenders(case, costs, [name for name in names if name not in kept]):
        if contender.plan is not None:
            recording.add_plan(label(contender.name, case), contender.plan, contender.plan)
        found.append(contender)
    return found


def _rates(case: Case, costs: Costs, mine: dict[str, Contender], recording: Recording) -> tuple[float, ...]:
    kept = recording.chosen.get((_EVERYBODY, case.workload))
    if kept is None:
        plans: list[Plan] = [contender.plan for contender in mine.values() if contender.plan is not None]
        found = [rate for plan in plans if (rate := capacity(case, plan, costs))]
        if not found:
            raise UsageError(
                f"{case.name}: by the simulator no rate attains its targets; were these costs measured here?"
            )
        low, high = _LOWEST * min(found), _HIGHEST * max(found)
        steps = [low * (high / low) ** (i / (RATES - 1)) for i in range(RATES)]
        kept = Chosen(tuple(dict.fromkeys(map(rounded, steps))), tuple(case.scaled(scale) for scale in SCALES))
        recording.add_chosen(_EVERYBODY, case.workload, kept)
    return kept.rates


async def measure(asked: Asked, costs: Costs, recording: Recording) -> None:
    """Everything that the file lacks, as far as the time allows. A contender that dies is said and left."""
    cells, who = grid(asked, costs, recording)
    deadline = time.monotonic() + asked.seconds
    lengths = {case.workload: case.lengths.workload for case in asked.cases}

    fresh: set[Key] = set()

    def left() -> list[Key]:
        """Not measured, or when the machine had other work."""
        runs = recording.runs
        return [key for key in cells if key not in fresh and (key not in runs or runs[key].disturbed)]

    for (name, workload), row in groupby(left(), key=lambda key: (key.plan, key.workload)):
        contender, mine = who[name, workload], list(row)
        start = _START if contender.plan is None else 0.0
        if time.monotonic() + start + seconds_of(mine[:1], asked.duration, None) > deadline:
            return
        try:
            async with serving(contender, asked.vllm_python) as site:
                await site.warm_up(lengths[workload])
                for key in mine:
                    if time.monotonic() + asked.duration + 6.0 > deadline:
                        break
                    rest = seconds_of(left(), asked.duration, None) / 60
                    measured = await site.measure(
                        key, offered(key, lengths[workload], asked.duration, None), f"{key} ({rest:.0f} min left)"
                    )
                    if measured is not None:
                        recording.add(measured)
                        fresh.add(key)
                        if measured.spoiled:
                            print(f"{key}: {measured.spoiled}: it does not count", file=sys.stderr)
        except DistserveError as error:
            print(f"{name}: {error}", file=sys.stderr)
