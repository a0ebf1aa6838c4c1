"""The phases of a profile, one after the other: which steps are timed, how closely, and in which order. Knows workers
and numbers, no file and no display.

    steps               with prompts, that decode, and mixed: a coarse grid, settled; then closer where a point is
                        predicted worst by the others, until the fit is good or the phase's time is over
    neighbours          a phase's steps while the worker beside it is idle and while it computes, in turns
    pulls               KV from one worker to the other
    live                the server around the engine (`live.py`)
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from distserve.bench.client import Client
from distserve.costs import fit
from distserve.costs.fit import DecodePoint, MixedPoint, PromptPoint
from distserve.knee import SIZES, knee
from distserve.profiler import grid
from distserve.profiler.grid import Cell, Lengths, Mixture, Range
from distserve.profiler.live import Around, Probe, Server
from distserve.profiler.messages import Chunks, Decodes, Prompts, Publish, Published, Pull, Took, Work
from distserve.profiler.series import Series
from distserve.profiler.survey import Survey, settle
from distserve.profiler.workers import Remote

STEPS, FEWEST_STEPS = 8, 2  # of a visit
VISIT = 0.15  # seconds of a visit, if steps are short: rather many visits than long ones
DOUBTS = 3  # more visits to a point that the others contradict
GOOD_MEAN, GOOD_WORST = 0.02, 0.06  # left-out errors of a fit that needs no more points
SHARES = {
    "steps": 0.62,
    "neighbours": 0.12,
    "pulls": 0.02,
    "live": 0.24,
}  # of the time
_PULLS = 7  # times each size
_WARM = 0.02  # seconds until a neighbour is at work
_SPELL = 0.6  # seconds beside it at a time, and alone


class Turn(NamedTuple):
    """Seconds of steps of a phase within two seconds or less: alone, before and after, and beside a neighbour's."""

    alone: list[float]
    beside: list[float]


@dataclass(slots=True)
class Findings:
    """Everything that was measured so far."""

    prompts: dict[Lengths, Series] = field(default_factory=dict)
    decodes: dict[Cell, Series] = field(default_factory=dict)
    contexts: dict[Cell, float] = field(default_factory=dict)  # summed over the batch
    surveys: tuple[Survey[Lengths], Survey[Cell], Survey[Mixture]] | None = None  # that found them
    mixed: dict[Mixture, Series] = field(default_factory=dict)
    beside: dict[tuple[str, str], list[Turn]] = field(default_factory=dict)  # (phase, the neighbour's)
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


async def steps(worker: Remote, within: Range, found: Findings, budget: Budget) -> None:
    """Of every kind, in one survey after the other's turn: prompts, sequences that decode, and pieces of prompts beside
    sequences that decode, as a colocated instance with chunked prompts computes them."""
    prompts, decodes, mixtures = _surveys(worker, found)
    every = (prompts, decodes, mixtures)
    rounds = partial(settle, every, over=budget.over, tick=budget.tick, chance=random.Random(1))
    prompts.ask([(n,) for n in SIZES if n <= within.longest_prompt])
    await rounds()
    lm = found.knee(within.longest_prompt)
    prompts.ask(grid.prompts(within, lm))
    decodes.ask(grid.decodes(within))
    mixtures.ask(grid.mixed(within, lm))
    await rounds()
    doubted: set[Hashable] = set()
    while not budget.over():
        _closer(prompts, fit.prefill_unseen(found.prompt_points), grid.closer_prompts, doubted)
        _closer(decodes, fit.decode_unseen(found.decode_points), grid.closer_decodes, doubted)
        if not any(survey.waiting for survey in every):
            return
        await rounds()


def _surveys(worker: Remote, found: Findings) -> tuple[Survey[Lengths], Survey[Cell], Survey[Mixture]]:
    """What they find is in `found`."""

    async def prompts(lengths: Lengths) -> Sequence[float]:
        took = (await worker.ask(Prompts(list(lengths)), Took)).seconds
        while sum(took) < VISIT and len(took) < STEPS:
            took += (await worker.ask(Prompts(list(lengths)), Took)).seconds
        return took

    async def decodes(cell: Cell) -> Sequence[float]:
        known = found.decodes.get(cell)
        number = STEPS // 2 if known is None else max(FEWEST_STEPS, min(STEPS, round(VISIT / known.seconds)))
        took = await worker.ask(Decodes(*cell, number), Took)
        found.contexts.setdefault(cell, took.context)
        return took.seconds

    async def mixed(mixture: Mixture) -> Sequence[float]:
        computed, new, batch, context = mixture
        return (await worker.ask(Chunks([(computed, new)], batch, context), Took)).seconds

    surveys = Survey(prompts), Survey(decodes), Survey(mixed)
    found.prompts, found.decodes, found.mixed = (survey.series for survey in surveys)  # type: ignore[assignment]
    found.surveys = surveys
    return surveys


def _closer(
    survey: Survey[grid.Point],
    unseen: Sequence[float],
    choose: Callable[[Mapping[grid.Point, float]], list[grid.Point]],
    doubted: set[Hashable],
) -> None:
    """Asks for more looks at points that the others contradict, then for more points where the curve bends."""
    errors = dict(zip(sorted(survey.series), map(abs, unseen), strict=False))
    if not errors or (sum(errors.values()) / len(errors) <= GOOD_MEAN and max(errors.values()) <= GOOD_WORST):
        return
    doubtful = {point for point, error in errors.items() if error > GOOD_WORST} - doubted
    if doubtful:
        doubted |= doubtful
        survey.doubt(doubtful, DOUBTS)
        return
    more: list[grid.Point] = []
    while errors and not more:
        more = [point for point in choose(errors) if point not in survey.series]
        errors.pop(max(errors, key=lambda point: errors[point]))
    survey.ask(more)


async def neighbours(workers: Sequence[Remote], within: Range, found: Findings, budget: Budget) -> None:
    """In turns, half of the time alone right before and half right after: what slows the machine for longer falls on a
    whole turn. Every step counts for itself, so that its quick ones can be told from those of a slow spell."""
    mine, other = workers
    lm = found.knee(within.longest_prompt)
    works: dict[str, Work] = {"prefill": Prompts([lm]), "decode": Decodes(*grid.typical_decode(within), STEPS)}
    pairs = [(phase, theirs) for theirs in works for phase in works]
    while True:
        for phase, theirs in pairs:
            alone = await _spell(mine, works[phase], _SPELL / 2)
            await other.begin(works[theirs])
            await asyncio.sleep(_WARM)
            beside = await _spell(mine, works[phase], _SPELL)
            await other.end()
            alone += await _spell(mine, works[phase], _SPELL / 2)
            found.beside.setdefault((phase, theirs), []).append(Turn(alone, beside))
            budget.tick()
            if budget.over() and len(found.beside) == len(pairs):
                return


async def _spell(worker: Remote, work: Work, seconds: float) -> list[float]:
    """The steps of so many seconds."""
    took: list[float] = []
    end = time.monotonic() + seconds
    while not took or time.monotonic() < end:
        took += (await worker.time(work)).seconds
    return took


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
        lm = found.knee(within.longest_prompt)
        await probe.one(short)  # warms every part up
        probe.around.request.clear()
        probe.around.hand_off.clear()
        streams = [n for n in (1, 8, 32) if n <= within.largest_batch]
        turn = 0
        while turn < 2 or not budget.over():
            for tokens in (short, long, short):
                await probe.one(tokens)
            await probe.together(streams[turn % len(streams)], grid.SHORTEST, 40, lm)
            turn += 1
            budget.tick()
            if turn >= 4 * len(streams):
                return
