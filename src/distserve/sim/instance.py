"""Driver 1: connects a scheduler to imagined time. The counterpart of `serve/instance.py`; knows no policy.

    kick: start the admitted pulls -> ask for the next batch -> launch it -> (its end) complete -> tell -> kick

A decode batch whose members stay is launched for as many steps as nothing can change it, and ends in closed form. What
touches the instance meanwhile (`settle`) cuts it after the step that runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from distserve.costs.base import Engine
from distserve.costs.latency import Latency
from distserve.plan import Role
from distserve.sched.base import Batch, Clock, Load, Outcome, PullingScheduler, Scheduler, Sequence
from distserve.sim.events import Events
from distserve.sim.life import NEVER, Imagined

_Ends = list[tuple[int, int, Imagined]]  # heap: tick at which one in lockstep ends, its id, itself
Trace = Callable[[str, float, list[tuple[int, int]]], None]  # (instance, start, [(sequence, tokens)])


@dataclass(frozen=True, slots=True)
class _Ended:
    """A `StepResult`."""

    ended: Collection[int] = frozenset()


_NOBODY = _Ended()


@dataclass(slots=True, eq=False)
class _Flight:
    """A batch on its way, `times` times in a row."""

    batch: Batch
    start: float
    end: float
    times: int = 1
    seconds: float = 0.0  # of the first step, where there are several
    growth: float = 0.0  # of each step over the one before
    prompts: bool = True  # somebody in it may get a first token
    remaining: int = 0  # steps until somebody ends; 0: not known
    stage: float = 0.0  # seconds that each stage of a pipeline is busy with it
    void: bool = False  # cut short: another flight took its place

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


class Surroundings(Protocol):
    """Whom an instance tells."""

    def start_pull(self, instance: Instance, sequence: Imagined, now: float) -> float:
        """Starts it; its end comes as `pull_ended`. Returns the seconds that it takes if nothing else is pulled."""
        ...

    def held(self, instance: Instance, sequence: Imagined, now: float) -> None:
        """Its first token is out and its KV waits here to be pulled."""
        ...

    def finished(self, sequence: Imagined, now: float) -> None: ...


@dataclass(slots=True)
class Usage:
    """What an instance did, and its largest steps."""

    busy: float = 0.0  # seconds of its first stage
    steps: int = 0
    prompt_tokens: int = 0
    batch: int = 0  # sequences that decode
    context: int = 0  # summed over them

    def saw(self, prompt_tokens: int, batch: int, context: int) -> None:
        if prompt_tokens > self.prompt_tokens:
            self.prompt_tokens = prompt_tokens
        if batch > self.batch:
            self.batch = batch
        if context > self.context:
            self.context = context


class Instance:
    """One replica."""

    def __init__(
        self,
        name: str,
        role: Role,
        scheduler: Scheduler,
        latency: Latency,
        engine: Engine,
        events: Events,
        world: Surroundings,
        *,
        token_bytes: float = 0.0,  # KV of a token on one rank
        reports: bool = True,  # False: nobody asks for its load
    ) -> None:
        self.name = name
        self.role = role
        self.scheduler = scheduler
        self.usage = Usage()
        self.trace: Trace | None = None
        self._latency = latency
        self._pp = latency.pp
        self._stalls = engine.pulls_stall
        self._engine = engine
        self._events = events
        self._world = world
        self._token_bytes = token_bytes
        self._pulls: PullingScheduler | None = scheduler if role is Role.DECODE else None  # type: ignore[assignment]
        self._flights: deque[_Flight] = deque()
        self._free = 0.0  # when the host may prepare another batch
        self._stages = [0.0] * latency.pp  # when each is free
        self._woken = -1.0  # a kick is planned for then
        self._idle_since = 0.0
        self._stalled = False
        self._reports = reports
        self._report = scheduler.load()
        self._ends: dict[int, _Ends] = {}  # by id of a lockstep

    # -- what the world does to it -------------------------------------------------------------------------------------

    def add(self, sequence: Imagined, now: float) -> None:
        self.settle(now)
        self.scheduler.add(sequence, now)
        self.look(now)

    def look(self, now: float) -> None:
        """Something may have changed what can run."""
        poll = self._engine.poll
        if poll and not self._flights and not self._stalled:
            self._wake(now + poll - (now - self._idle_since) % poll)
        elif not (self._flights and self._stalls):
            self._kick(now)

    def pull_ended(self, sequence: Imagined, now: float) -> None:
        self.settle(now)
        self.scheduler.pulled(sequence.id, now)  # type: ignore[attr-defined]  # only decode pulls
        if not self._stalled:
            self._kick(now)

    def load(self, now: float) -> Load:
        """As it reported at the end of its last step; where it does not report, as it is."""
        self.settle(now)
        return self._report if self._reports else self.scheduler.load()

    def settle(self, now: float) -> None:
        """Brings the scheduler to `now`: the steps that are over are completed, the one that runs will end alone."""
        if not self._flights or self._flights[0].times == 1:
            return
        flight = self._flights.pop()
        flight.void = True
        done = flight.steps_by(now)
        batch, start = flight.batch, flight.start
        if done:
            start = flight.time_of(done)
            self._count(flight, done, start)
            self.scheduler.complete(batch, _NOBODY, start, done)
            if self._reports:
                self._report = self.scheduler.load()
            again = self.scheduler.next_batch(start)
            assert again is not None
            assert len(again.items) == len(batch.items), "a batch that should have been made again was not"
            batch = again
        end = flight.time_of(done + 1)
        self._flights.append(_Flight(batch, start, end, prompts=False, remaining=flight.remaining - done))
        self._events.at(end, self._ended, self._flights[-1])

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _wake(self, time: float) -> None:
        if self._woken < time:
            self._woken = time
            self._events.at(time, self._woke)

    def _woke(self, now: float, _: None) -> None:
        if not self._stalled:
            self._kick(now)

    def _kick(self, now: float) -> None:
        """Starts whatever can start."""
        flights, pulls = self._flights, self._pulls
        while not self._stalled and len(flights) < self._pp:
            if self._free > now:
                self._wake(self._free)
                return
            if pulls is not None and self._start_pulls(pulls, now):
                return
            batch = self.scheduler.next_batch(now)
            if batch is None:
                if not flights:
                    self._idle_since = now
                return
            self._launch(batch, now)
        if pulls is not None and not self._stalls:  # a step that runs keeps nobody from pulling
            self._start_pulls(pulls, now)

    def _start_pulls(self, scheduler: PullingScheduler, now: float) -> bool:
        """True: the instance stands still until they are over."""
        pulls = scheduler.next_pulls(now)
        if not pulls:
            return False
        end = now
        for sequence in pulls:
            assert isinstance(sequence, Imagined)
            sequence.life.pull_started = end
            seconds = self._world.start_pull(self, sequence, end)
            if self._stalls:
                end += seconds
        if end > now:
            self._stalled = True
            self._events.at(end, self._resume)
        return end > now

    def _resume(self, now: float, _: None) -> None:
        self._stalled = False
        self._kick(now)

    def _launch(self, batch: Batch, now: float) -> None:
        times = self.scheduler.repeats(batch) if self._pp == 1 else 1
        flight = self._bulk(batch, now, times) if times > 1 else self._single(batch, now)
        self._flights.append(flight)
        self._events.at(flight.end, self._ended, flight)

    def _bulk(self, batch: Batch, now: float, times: int) -> _Flight:
        """A batch in lockstep, until somebody ends or blocks are short."""
        lockstep = batch.lockstep
        assert lockstep is not None
        num, context = batch.num_lockstep, lockstep.context
        remaining = self._next_end(lockstep)
        run = self._latency.run(num, context)
        times = int(min(times, remaining, run.steps))
        flight = _Flight(batch, now, 0.0, times, run.seconds, run.growth, False, remaining)
        flight.end = flight.time_of(times)
        self.usage.saw(0, num, context + num * (times - 1))
        return flight

    def _single(self, batch: Batch, now: float) -> _Flight:
        lockstep, num, context, remaining = batch.lockstep, batch.num_lockstep, 0, 0
        if lockstep is not None:
            context, remaining = lockstep.context, self._next_end(lockstep)
        others = batch.items[num:] if num else batch.items
        tokens = 0
        for sequence, n in others:
            life = sequence.life  # type: ignore[attr-defined]  # this world's sequences have one
            if life.started == NEVER:
                life.started = now
            if n > 1 or not sequence.num_computed:
                tokens += n
        items, swap = self._swapped(others) if tokens and self._engine.swap_bandwidth else (others, 0.0)
        host, stage = self._latency.batch(items, num, context)
        self.usage.saw(tokens, num, context)
        host += swap
        time = self._free = now + host
        for i, free in enumerate(self._stages):
            time = self._stages[i] = max(time, free) + stage
        return _Flight(batch, now, time, prompts=tokens > 0, remaining=remaining, stage=stage)

    def _next_end(self, lockstep: Clock) -> int:
        """Steps until the first of those in lockstep ends."""
        ends, ticks = self._ends.setdefault(id(lockstep), []), lockstep.ticks
        for sequence in lockstep.joined:
            assert isinstance(sequence, Imagined)
            heappush(ends, (ticks + sequence.target - sequence.num_tokens, sequence.id, sequence))
        while True:
            end, _, sequence = ends[0]
            if _is_true(end, sequence, lockstep):
                return end - ticks
            heappop(ends)

    def _swapped(self, others: list[tuple[Sequence, int]]) -> tuple[list[tuple[Sequence, int]], float]:
        """The items as an engine sees them that kept the KV of preempted sequences in host memory, and the seconds to
        bring it back."""
        items: list[tuple[Sequence, int]] = []
        tokens = 0
        for sequence, n in others:
            if n > 1 and sequence.life.first != NEVER:  # type: ignore[attr-defined]
                tokens += n
                computed = sequence.num_computed + n - 1
                items.append((Sequence(sequence.id, sequence.num_tokens, num_computed=computed), 1))
            else:
                items.append((sequence, n))
        assert self._engine.swap_bandwidth is not None
        return items, tokens * self._token_bytes / self._engine.swap_bandwidth

    def _ended(self, now: float, flight: _Flight) -> None:
        if flight.void:
            return
        self._flights.popleft()
        times = flight.times
        self._count(flight, times, now)
        result = _Ended(self._whose_last(flight))
        outcome = self.scheduler.complete(flight.batch, result, now, times)
        if self._reports:
            self._report = self.scheduler.load()
        self._tell(outcome, flight.prompts, now)
        self._idle_since = now
        self._kick(now)

    def _whose_last(self, flight: _Flight) -> set[int]:
        """Who ends with this flight's last step."""
        batch, ended = flight.batch, set()
        if batch.lockstep is not None and flight.remaining <= flight.times:
            end, ends = batch.lockstep.ticks + flight.times, self._ends[id(batch.lockstep)]
            while ends and ends[0][0] <= end:
                known, _, member = heappop(ends)
                if _is_true(known, member, batch.lockstep):
                    ended.add(member.id)
        others = batch.items[batch.num_lockstep :] if batch.num_lockstep < len(batch.items) else ()
        for sequence, n in others:
            if sequence.target - sequence.num_tokens <= 1 and sequence.num_computed + n >= sequence.num_tokens:  # type: ignore[attr-defined]
                ended.add(sequence.id)
        return ended

    def _tell(self, outcome: Outcome, prompts: bool, now: float) -> None:
        world = self._world
        if prompts:
            prefill = self.role is Role.PREFILL
            for sequence in outcome.sampled:
                if sequence.life.first == NEVER:  # type: ignore[attr-defined]
                    sequence.life.first = now  # type: ignore[attr-defined]
                if prefill and sequence.num_tokens < sequence.target:  # type: ignore[attr-defined]
                    world.held(self, sequence, now)  # type: ignore[arg-type]
        for sequence in outcome.finished:
            world.finished(sequence, now)  # type: ignore[arg-type]

    def _count(self, flight: _Flight, times: int, end: float) -> None:
        """The first `times` steps of a flight are over."""
        self.usage.busy += end - flight.start if self._pp == 1 else flight.stage
        self.usage.steps += times
        if self.trace is not None:
            items = [(sequence.id, n) for sequence, n in flight.batch.items]
            for i in range(times):
                self.trace(self.name, flight.time_of(i), items)


def _is_true(end: int, sequence: Imagined, lockstep: Clock) -> bool:
    """Whether `sequence` still ends at tick `end`: it may have left since, and come back behind the others."""
    return sequence.clock is lockstep and sequence.target - sequence.num_tokens == end - lockstep.ticks
