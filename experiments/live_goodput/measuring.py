"""Measures what a record file lacks, cell after cell; a cell is a case, a rate and a contender. The file is that of
`distserve validate`, with contenders for plans, so that both can be read with the same code; a run keeps when it began.

Every contender gets the same requests at the same times, at the same rates: those around the capacities that the
simulator expects of ours. They are measured in turns: at each rate one directly behind the other, in an order that
changes from rate to rate, so that a bad quarter of an hour of the machine is everybody's. All of their servers are up
before the first of them is asked. Rates rise, and who is hopeless at one is left out above it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from statistics import fmean

import uvloop

from distserve.costs.base import Costs
from distserve.errors import DistserveError, UsageError
from distserve.interrupts import interruptible
from distserve.metrics import quantile
from distserve.plan import Plan
from distserve.validate.grid import offered, rounded
from distserve.validate.record import Chosen, Key, Measured, Recording
from experiments.live_goodput import peers
from experiments.live_goodput.cases import DURATION, RATES, SCALES, Case
from experiments.live_goodput.contenders import OURS, Contender, capacity, contenders, label
from experiments.live_goodput.neighbours import BEGAN
from experiments.live_goodput.results import joint, pointless
from experiments.live_goodput.servers import Servers

_LOWEST, _HIGHEST = 0.4, 1.25  # of the smallest and the largest capacity that is expected; weather takes its share
# Seconds until a run begins and behind its last answer, and those that one takes beyond its arrivals where none was
# measured yet, of ours and theirs; and those in which a server starts and is warmed up.
_AROUND, _BEYOND, _THEIR_BEYOND = 4.0, 6.0, 14.0
_START, _THEIR_START = 10.0, 130.0
_EVERYBODY = "all"  # whose rates are kept


@dataclass(frozen=True)
class Asked:
    """What to measure."""

    cases: Sequence[Case]
    names: Sequence[str]  # of contenders
    duration: float = DURATION
    seconds: float = float("inf")  # at most
    vllm_python: str | None = None
    rates: int = RATES  # of them, from the middle outwards


@dataclass
class Measuring:
    """One command's way through the cells."""

    asked: Asked
    recording: Recording
    cells: list[Key]  # in the order to measure
    who: dict[tuple[str, str], Contender]  # by name and workload
    deadline: float  # on the monotonic clock
    fresh: set[Key] = field(default_factory=set)  # measured by this command
    lost: set[str] = field(default_factory=set)  # contenders that did not start, or died
    failures: list[str] = field(default_factory=list)  # in words
    interrupted: bool = False

    def case(self, workload: str) -> Case:
        return next(case for case in self.asked.cases if case.workload == workload)

    def lacks(self, key: Key) -> bool:
        """Not measured, or when the machine had other work; and worth it, of who can be measured."""
        if key.plan in self.lost:
            return False
        runs = self.recording.runs
        open_ = key not in self.fresh and (key not in runs or runs[key].disturbed > 0)
        return open_ and not pointless(key, self.case(key.workload), self.recording)

    @property
    def left(self) -> list[Key]:
        return [key for key in self.cells if self.lacks(key)]

    def contender(self, key: Key) -> Contender:
        return self.who[key.plan, key.workload]

    def about(self, cells: Sequence[Key], servers: Servers | None = None) -> float:
        """Seconds that they take, with the starts of servers that are not up."""
        seconds = sum(map(self.takes, cells))
        plans: dict[str, Contender] = {}
        for key in cells:
            mine = self.contender(key)
            before = plans.get(key.plan)
            up = servers is not None and servers.has(mine) if before is None else before.plan == mine.plan
            plans[key.plan] = mine
            seconds += 0.0 if up else _START if key.plan in OURS else _THEIR_START
        return seconds

    def takes(self, key: Key) -> float:
        """Seconds of one cell: as those of the same contender and case did."""
        ends = [run.end for other, run in self.recording.runs.items() if (other.plan, other.workload) == key[:2]]
        beyond = _BEYOND if key.plan in OURS else _THEIR_BEYOND
        return _AROUND + (fmean(ends) if ends else self.asked.duration + beyond)

    def in_time(self, cells: Sequence[Key], servers: Servers) -> bool:
        return time.monotonic() + self.about(cells, servers) <= self.deadline


def grid(asked: Asked, costs: Costs, recording: Recording) -> tuple[list[Key], dict[tuple[str, str], Contender]]:
    """Every cell in the order to measure, and who serves it. What was chosen once stays, for it is in the file."""
    found: list[Key] = []
    who = {}
    for number, case in enumerate(asked.cases):
        mine = {contender.name: contender for contender in _of(case, costs, asked.names, recording)}
        rates = from_the_middle(_rates(case, costs, mine, recording))[: asked.rates]
        for place, rate in enumerate(sorted(rates)):
            turn = in_turn(asked.names, number * RATES + place)
            found += [Key(name, case.workload, rate, 0, 0) for name in turn]
        who.update({(name, case.workload): contender for name, contender in mine.items()})
    return found, who


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The order of the round of this number. Over as many rounds as there are names (twice as many, where that is odd)
    each stands once (twice) at every place and directly behind every other one (Williams 1949, a balanced design)."""
    count = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]  # 0, 1, -1, 2, -2, ..
    order = [names[(place + number) % count] for place in zigzag]
    return order[::-1] if count % 2 and number // count % 2 else order


def from_the_middle(rates: Sequence[float]) -> list[float]:
    """Outwards, the lower of two first."""
    middle = len(rates) // 2
    return [rates[i] for i in sorted(range(len(rates)), key=lambda i: (abs(i - middle), i))]


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
        if not plans:
            raise UsageError(f"{case.name}: rates are chosen around what ours can do: measure one of ours first")
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


# -- the way through ---------------------------------------------------------------------------------------------------


def measure(asked: Asked, costs: Costs, recording: Recording) -> Measuring:
    """Everything that the file lacks, as far as the time allows. A contender that does not start or dies is said and
    left; Ctrl-C and SIGTERM end the measuring, not the command: whole cells are kept."""
    cells, who = grid(asked, costs, recording)
    measuring = Measuring(asked, recording, cells, who, time.monotonic() + asked.seconds)
    left = measuring.left
    _say(f"{len(cells)} cells, {len(left)} of them to be measured: about {measuring.about(left) / 60:.0f} min at most")
    gc.collect()
    gc.freeze()  # a collection that walks every workload would stop the clock-reader for milliseconds
    measuring.interrupted = uvloop.run(interruptible(partial(_all, measuring)))
    if measuring.interrupted:
        _say("stopped; what was measured is kept")
    return measuring


async def _all(measuring: Measuring) -> None:
    async with Servers(measuring.asked.vllm_python) as servers:
        for _, cells in groupby(measuring.cells, key=lambda key: (key.workload, key.rate)):
            open_ = [key for key in cells if _worth(measuring, key)]
            if not open_:
                continue
            if not measuring.in_time(open_[:1], servers):
                return
            await _round(measuring, servers, open_)


def _worth(measuring: Measuring, key: Key) -> bool:
    if measuring.lacks(key):
        return True
    if key not in measuring.recording.runs and key.plan not in measuring.lost:
        _say(f"{key}: not measured: what it attains at a lower rate says enough of it")
    return False


async def _round(measuring: Measuring, servers: Servers, cells: Sequence[Key]) -> None:
    """One contender directly behind the other: first all of them are made ready, then all are measured."""
    lengths = measuring.case(cells[0].workload).lengths.workload
    for key in cells:
        with _lost(measuring, key):
            await servers.ready(measuring.contender(key), lengths)
    for key in cells:
        if key.plan in measuring.lost:
            continue
        if not measuring.in_time([key], servers):
            return
        with _lost(measuring, key):
            await _cell(measuring, servers, key)
        if key.plan in measuring.lost:
            await servers.end(measuring.contender(key))


@contextmanager
def _lost(measuring: Measuring, key: Key) -> Iterator[None]:
    """A contender that does not start, or dies, is said, and measured no more."""
    try:
        yield
    except DistserveError as error:
        measuring.lost.add(key.plan)
        measuring.failures.append(f"{key.plan}: {error}")
        _say(f"error: {key.plan}: {error}")


async def _cell(measuring: Measuring, servers: Servers, key: Key) -> None:
    site, case = servers.of(measuring.contender(key)), measuring.case(key.workload)
    title = f"{key} ({_minutes(measuring, servers)})"
    began = time.time()
    with peers.awake(site):
        offer = offered(key, case.lengths.workload, measuring.asked.duration, None)
        measured = await site.measure(key, offer, title)
    if measured is None:
        raise asyncio.CancelledError
    measured = replace(measured, client={**measured.client, BEGAN: began})
    measuring.recording.add(measured)
    measuring.fresh.add(key)
    done = len(measuring.cells) - len(measuring.left)
    _say(f"{done} of {len(measuring.cells)}, {_minutes(measuring, servers)}: {_told(measured, case)}")


def _minutes(measuring: Measuring, servers: Servers) -> str:
    return f"{measuring.about(measuring.left, servers) / 60:.0f} min left"


def _told(measured: Measured, case: Case) -> str:
    """A cell in a clause."""
    counted = [record for record in measured.records if record.arrival >= measured.warmup]
    said = f"{measured.key}: {joint(measured, case.slo):.1%} within the targets"
    for name in ("ttft", "tpot"):
        values = sorted(value for record in counted if (value := getattr(record, name)) is not None)
        if values:
            said += f", {name.upper()} p90 {1e3 * quantile(values, 0.9):.0f} ms"
    failed = sum(not record.ok for record in measured.records)
    if failed:
        said += f"; {failed} of {len(measured.records)} requests failed"
    return f"{said}; it does not count: {measured.spoiled}" if measured.spoiled else said


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
