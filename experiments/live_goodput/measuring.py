"""Measures what a record file lacks, cell after cell; a cell is a case, a contender and a rate. The file is that of
`distserve validate`, with contenders for plans, so that both can be read with the same code.

Every contender gets the same requests at the same times, at the same rates: those around the capacities that the
simulator expects of ours. Ours go case by case, each from its middle rate outwards, so that what was measured is of use
whenever it is stopped. A contender that is not ours takes minutes to start: it comes last, and stays up over all cases.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import uvloop

from distserve.costs.base import Costs
from distserve.errors import DistserveError, UsageError
from distserve.metrics import quantile
from distserve.plan import Plan
from distserve.validate.grid import offered, rounded
from distserve.validate.live import Site
from distserve.validate.record import Chosen, Key, Measured, Recording
from distserve.workload import Workload
from experiments.live_goodput.cases import DURATION, RATES, SCALES, Case
from experiments.live_goodput.contenders import ALL, OURS, VLLM_APART, Contender, capacity, contenders, label, serving
from experiments.live_goodput.results import joint, pointless

_LOWEST, _HIGHEST = 0.6, 1.25  # of the smallest and the largest capacity that is expected
# Seconds that a contender takes to start and warm up, that of ours and the other, and a cell beyond its arrivals.
_START, _THEIR_START, _BEYOND = 15.0, 130.0, 6.0
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
    failures: list[str] = field(default_factory=list)  # of contenders
    interrupted: bool = False

    def case(self, workload: str) -> Case:
        return next(case for case in self.asked.cases if case.workload == workload)

    def lacks(self, key: Key) -> bool:
        """Not measured, or when the machine had other work; and worth it."""
        runs = self.recording.runs
        open_ = key not in self.fresh and (key not in runs or runs[key].disturbed > 0)
        return open_ and not pointless(key, self.case(key.workload), self.recording)

    @property
    def left(self) -> list[Key]:
        return [key for key in self.cells if self.lacks(key)]

    def about(self, cells: Sequence[Key]) -> float:
        """Seconds that they take, with their contenders' starts."""
        starts = {stay(key) for key in cells}
        return len(cells) * (self.asked.duration + _BEYOND) + sum(
            _START if name in OURS else _THEIR_START for name, _ in starts
        )

    def in_time(self, cells: Sequence[Key], *, started: bool) -> bool:
        takes = self.asked.duration + _BEYOND if started else self.about(cells)
        return time.monotonic() + takes <= self.deadline


def stay(key: Key) -> tuple[str, str]:
    """Cells of the same stay are measured without a start between them: a plan of ours differs from case to case."""
    return key.plan, key.workload if key.plan in OURS else ""


def grid(asked: Asked, costs: Costs, recording: Recording) -> tuple[list[Key], dict[tuple[str, str], Contender]]:
    """Every cell in the order to measure, and who serves it. What was chosen once stays, for it is in the file."""
    found: list[tuple[tuple[int, ...], Key]] = []
    who = {}
    for number, case in enumerate(asked.cases):
        mine = {contender.name: contender for contender in _of(case, costs, asked.names, recording)}
        rates = _rates(case, costs, mine, recording)
        for name, contender in mine.items():
            who[name, case.workload] = contender
            place = (0, number, ALL.index(name)) if name in OURS else (1, ALL.index(name), number)
            # the one that is slow from the start, from below: where that is hopeless, the rest need not be measured
            order = from_the_middle(rates) if name != VLLM_APART else sorted(rates)
            found += [(place, Key(name, case.workload, rate, 0, 0)) for rate in order[: asked.rates]]
    found.sort(key=lambda pair: pair[0])  # stable: rates stay in order
    return [key for _, key in found], who


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
    uvloop.run(_interruptible(measuring))
    return measuring


async def _interruptible(measuring: Measuring) -> None:
    task = asyncio.create_task(_all(measuring))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        measuring.interrupted = True
        _say("stopped; what was measured is kept")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _all(measuring: Measuring) -> None:
    for (name, _), row in groupby(measuring.left, key=stay):
        mine = list(row)
        if not measuring.in_time(mine[:1], started=False):
            return
        try:
            async with serving(measuring.who[name, mine[0].workload], measuring.asked.vllm_python) as site:
                for workload, cells in groupby(mine, key=lambda key: key.workload):
                    lengths = measuring.case(workload).lengths.workload
                    await site.warm_up(lengths)
                    await _row(measuring, site, list(cells), lengths)
        except DistserveError as error:
            measuring.failures.append(f"{name}: {error}")
            _say(f"error: {name}: {error}")


async def _row(measuring: Measuring, site: Site, cells: Sequence[Key], workload: Workload) -> None:
    for key in cells:
        if not measuring.lacks(key):  # what was measured meanwhile says enough of it
            _say(f"{key}: not measured: at a lower rate it attains nearly nothing")
            continue
        if not measuring.in_time([key], started=True):
            return
        left = measuring.left
        title = f"{key} ({measuring.about(left) / 60:.0f} min left)"
        measured = await site.measure(key, offered(key, workload, measuring.asked.duration, None), title)
        if measured is None:
            raise asyncio.CancelledError
        measuring.recording.add(measured)
        measuring.fresh.add(key)
        left, told = measuring.left, _told(measured, measuring.case(key.workload))
        done = len(measuring.cells) - len(left)
        _say(f"{done} of {len(measuring.cells)}, {measuring.about(left) / 60:.0f} min left: {told}")


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
