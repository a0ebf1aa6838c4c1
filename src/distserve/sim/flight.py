"""Batches on their way, and when their sequences end. Knows no scheduler, no instance and no world."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from distserve.sched.base import Batch, Clock, Sequence
from distserve.sim.events import Event, Heap
from distserve.sim.life import Imagined


class Crew(ABC):
    """Who launched a flight, and hears of its end."""

    @abstractmethod
    def ended(self, flight: Flight, now: float) -> None: ...


class Flight(Event):
    """A batch on its way, `times` times in a row."""

    __slots__ = (
        "batch",
        "crew",
        "growth",
        "prompts",
        "remaining",
        "seconds",
        "stage",
        "start",
        "times",
        "void",
    )

    def __init__(self, crew: Crew, batch: Batch, start: float, remaining: int) -> None:
        super().__init__()
        self.crew = crew
        self.batch = batch
        self.start = start
        self.remaining = remaining  # steps until somebody of its lockstep ends; 0: not known
        self.times = 1
        self.seconds = 0.0  # of the first step, where there are several
        self.growth = 0.0  # of each step over the one before
        self.prompts = False  # somebody in it may get a first token
        self.stage = 0.0  # seconds that each stage of a pipeline is busy with it
        self.void = False  # cut short: another flight took its place

    def happen(self, now: float) -> None:
        if not self.void:
            self.crew.ended(self, now)

    def steps_by(self, now: float) -> int:
        """How many steps are over at `now`, less than `times`."""
        passed = now - self.start
        s, g = self.seconds, self.growth
        steps = passed / s if not g else (math.sqrt((s - g / 2) ** 2 + 2 * g * max(0.0, passed)) - (s - g / 2)) / g
        count = min(max(0, int(steps)), self.times - 1)
        while count + 1 < self.times and self.time_of(count + 1) <= now:
            count += 1
        while count > 0 and self.time_of(count) > now:
            count -= 1
        return count

    def time_of(self, steps: int) -> float:
        """When the first `steps` are over."""
        return self.start + steps * self.seconds + self.growth * (steps * (steps - 1) // 2)


class _End(Event):
    """`time` is a tick."""

    __slots__ = ("sequence",)

    def __init__(self, sequence: Imagined, tick: int) -> None:
        super().__init__()
        self.sequence = sequence
        self.time = float(tick)


class Ends:
    """When those in one lockstep end."""

    __slots__ = ("_heap", "clock")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._heap = Heap()

    def steps(self) -> int:
        """Steps until the first of them ends. Asked once for each batch: those that joined become known now."""
        clock, heap = self.clock, self._heap
        ticks = clock.ticks
        for sequence in clock.joined:
            heap.push(_End(known(sequence), ticks + known(sequence).left()))
        while True:
            end = heap.first()
            assert isinstance(end, _End), "whoever is in lockstep ends"
            if self._is_true(end):
                return int(end.time) - ticks
            heap.pop()

    def by(self, tick: int) -> list[int]:
        """Ids of those that end at this tick or before, who are then forgotten."""
        heap = self._heap
        found: list[int] = []
        while True:
            end = heap.first()
            if end is None or end.time > tick:
                return found
            assert isinstance(end, _End)
            heap.pop()
            if self._is_true(end) and end.sequence.id not in found:  # who left and came back is here twice
                found.append(end.sequence.id)

    def _is_true(self, end: _End) -> bool:
        """It may have left since, and come back behind the others."""
        sequence, clock = end.sequence, self.clock
        return sequence.clock is clock and sequence.left() == int(end.time) - clock.ticks


def known(sequence: Sequence) -> Imagined:
    """As this world made it."""
    assert isinstance(sequence, Imagined)
    return sequence
