"""The phases of a profile, one after the other: which steps are timed, how closely, and in which order. Knows workers
and numbers, no file and no display.

    prefill, decode     a coarse grid, settled; then closer where a point is predicted worst by the others, until the
                        fit is good or the phase's time is over
    neighbours          a phase's steps while the worker beside it is idle and while it computes, in turns
    pulls               KV from one worker to the other
    live                the server around the engine (`live.py`)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from distserve.bench.client import Client
from distserve.costs import fit
from distserve.costs.fit import DecodePoint, MixedPoint, PromptPoint
from distserve.knee import SIZES, knee
from distserve.profiler import grid
from distserve.profiler.grid import Cell, Lengths, Mixture, Range
from distserve.profiler.live import Around, Probe, Server
from distserve.profiler.messages import Chunks, Decodes, Prompts, Publish, Published, Pull, Took, Work
from distserve.profiler.series import Series
from distserve.profiler.survey import Survey
from distserve.profiler.workers import Remote

STEPS, FEWEST_STEPS = 4, 2  # of a visit
VISIT = 0.12  # seconds of a visit, if steps are short: rather many visits than long ones
DOUBTS = 3  # more visits to a point that the others contradict
GOOD_MEAN, GOOD_WORST = 0.02, 0.06  # left-out errors of a fit that needs no more points
SHARES = {
    "prefill": 0.24,
    "decode": 0.28,
    "mixed": 0.08,
    "neighbours": 0.14,
    "pulls": 0.02,
    "live": 0.24,
}  # of the time
_PULLS = 7  # times each size
_WARM = 0.02  # seconds until a neighbour is at work
_SPELL = 0.7  # seconds beside it at a time


@dataclass(slots=True)
class Findings:
    """Everything that was measured so far."""

    prompts: dict[Lengths, Series] = field(default_factory=dict)
    decodes: dict[Cell, Series] = field(default_factory=dict)
    contexts: dict[Cell, float] = field(default_factory=dict)  # summed over the batch
    mixed: dict[Mixture, Series] = field(default_factory=dict)
    quiet: dict[str, Series] = field(default_factory=dict)  # by phase
    beside: dict[tuple[str, str], Series] = field(default_factory=dict)  # (phase, the neighbour's)
    publish: dict[int, Series] = field(default_factory=dict)  # by bytes
    pull: dict[int, Series] = field(default_factory=dict)
    around: Around = field(default_factory=Around)

    @property
    def prompt_points(self) -> list[PromptPoint]:
        return [PromptPoint(lengths, series.seconds) for lengths, series in sorted(self.prompts.items())]

    @property
    def decode_points(self) -> list[DecodePoint]:
        return [
            DecodePoint(batch, round(self.contexts[batch, context]), series.seconds)
            for (batch, context), series in sorted(self.decodes.items())
        ]

    @property
    def mixed_points(self) -> list[MixedPoint]:
        return [
            MixedPoint(computed, new, batch, batch * context, series.seconds)
            for (computed, new, batch, context), series in sorted(self.mixed.items())
        ]

    def knee(self, longest: int) -> int:
        """Lm, of what was timed alone."""
        found = {n: self.prompts[n,].seconds for n in SIZES if (n,) in self.prompts}
        return knee(found, longest)


class Budget:
    """Seconds of the phase that runs, and of all."""

    def __init__(self, seconds: float, tell: Callable[[str, float], None]) -> None:
        self._left = dict(SHARES)
        self._seconds = seconds
        self._tell = tell
        self._end = 0.0
        self.phase = ""

    def begin(self, phase: str) -> None:
        self.phase = phase
        self._end = time.monotonic() + self._seconds * self._left.pop(phase)
        self.tick()

    def over(self) -> bool:
        return time.monotonic() >= self._end

    def tick(self) -> None:
        """Says how much is left at most: the rest of this phase and the phases to come."""
        rest = max(0.0, self._end - time.monotonic())
        self._tell(self.phase, rest + self._seconds * sum(self._left.values()))


async def prefill(worker: Remote, within: Range, found: Findings, budget: Budget) -> None:
    async def visit(lengths: Lengths) -> Sequence[float]:
        found = (await worker.ask(Prompts(list(lengths)), Took)).seconds
        while sum(found) < VISIT and len(found) < STEPS:
            found += (await worker.ask(Prompts(list(lengths)), Took)).seconds
        return found

    survey = Survey(visit, over=budget.over, tick=budget.tick, seed=1)
    found.prompts = survey.series
    await survey.settle([(n,) for n in (grid.SHORTEST, *SIZES) if n <= within.longest_prompt])
    await survey.settle(grid.prompts(within, found.knee(within.longest_prompt)))
    await _closer(survey, lambda: fit.prefill_unseen(found.prompt_points), grid.closer_prompts, budget)


async def decode(worker: Remote, within: Range, found: Findings, budget: Budget) -> None:
    async def visit(cell: Cell) -> Sequence[float]:
        known = survey.series.get(cell)
        steps = STEPS if known is None else max(FEWEST_STEPS, min(STEPS, round(VISIT / known.seconds)))
        took = await worker.ask(Decodes(*cell, steps), Took)
        found.contexts.setdefault(cell, took.context)
        return took.seconds

    survey: Survey[Cell] = Survey(visit, over=budget.over, tick=budget.tick, seed=2)
    found.decodes = survey.series
    await survey.settle(grid.decodes(within))
    await _closer(survey, lambda: fit.decode_unseen(found.decode_points), grid.closer_decodes, budget)


async def _closer(
    survey: Survey[grid.Point],
    unseen: Callable[[], list[float]],
    choose: Callable[[Mapping[grid.Point, float]], list[grid.Point]],
    budget: Budget,
) -> None:
    """More looks at points that the others contradict, then more points where the curve bends."""
    doubted: set[grid.Point] = set()
    while not budget.over():
        errors = dict(zip(sorted(survey.series), map(abs, unseen()), strict=False))
        if not errors or (sum(errors.values()) / len(errors) <= GOOD_MEAN and max(errors.values()) <= GOOD_WORST):
            return
        doubtful = {point for point, error in errors.items() if error > GOOD_WORST} - doubted
        if doubtful:
            doubted |= doubtful
            await survey.again(sorted(doubtful), DOUBTS)
            continue
        more: list[grid.Point] = []
        while errors and not more:
            more = [point for point in choose(errors) if point not in survey.series]
            errors.pop(max(errors, key=lambda point: errors[point]))
        if not more:
            return
        await survey.settle(more)


async def mixed(worker: Remote, within: Range, found: Findings, budget: Budget) -> None:
    """Steps of a colocated instance with chunked prompts: pieces up to the knee beside sequences that decode."""
    lm = found.knee(within.longest_prompt)

    async def visit(cell: Mixture) -> Sequence[float]:
        computed, new, batch, context = cell
        return (await worker.ask(Chunks([(computed, new)], batch, context), Took)).seconds

    survey = Survey(visit, over=budget.over, tick=budget.tick, seed=3)
    found.mixed = survey.series
    await survey.settle(grid.mixed(within, lm))


async def neighbours(workers: Sequence[Remote], within: Range, found: Findings, budget: Budget) -> None:
    """A second of each in turns, alone between any two: what slows the machine for longer falls on all of them."""
    mine, other = workers
    lm = found.knee(within.longest_prompt)
    works: dict[str, Work] = {"prefill": Prompts([lm]), "decode": Decodes(*grid.typical_decode(within), STEPS)}
    pairs = [(phase, theirs) for theirs in works for phase in works]
    while True:
        for phase, theirs in pairs:
            quiet = await _spell(mine, works[phase], _SPELL / 2)
            await other.begin(works[theirs])
            await asyncio.sleep(_WARM)
            beside = await _spell(mine, works[phase], _SPELL)
            await other.end()
            found.quiet.setdefault(phase, Series()).values.append(quiet)
            found.beside.setdefault((phase, theirs), Series()).values.append(beside)
            budget.tick()
            if budget.over() and len(found.beside) == len(pairs):
                return


async def _spell(worker: Remote, work: Work, seconds: float) -> float:
    """The mean step of so many seconds."""
    took: list[float] = []
    end = time.monotonic() + seconds
    while not took or time.monotonic() < end:
        took += (await worker.time(work)).seconds
    return sum(took) / len(took)


async def pulls(workers: Sequence[Remote], within: Range, found: Findings, budget: Budget) -> None:
    """A few blocks and many."""
    source, target = workers
    size = source.ready.block_size
    most = min(within.longest_prompt, within.room(1)) // size
    for turn in range(_PULLS + 1):
        for blocks in sorted({1, max(1, most // 8), max(1, most // 2)}):
            published = await source.ask(Publish(blocks), Published)
            took = await target.ask(Pull(published.handle), Took)
            if turn:  # the first maps the memory
                key = blocks * source.ready.block_bytes
                found.publish.setdefault(key, Series()).values.append(published.seconds)
                found.pull.setdefault(key, Series()).values += took.seconds
        budget.tick()


async def live(arguments: Sequence[str], within: Range, found: Findings, budget: Budget) -> None:
    async with Server(arguments) as server, Client(server.url, api_key=None, timeout=120.0) as client:
        await server.ready()
        probe = Probe(client, found.around)
        short, long = grid.probes(within)
        await probe.one(short)  # warms every part up
        probe.around.request.clear()
        probe.around.hand_off.clear()
        streams = [n for n in (1, 8, 32) if n <= within.largest_batch]
        turn = 0
        while turn < 2 or not budget.over():
            for tokens in (short, long, short):
                await probe.one(tokens)
            await probe.together(streams[turn % len(streams)], grid.SHORTEST, 40)
            turn += 1
            budget.tick()
            if turn >= 4 * len(streams):
                return
