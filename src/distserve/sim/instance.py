"""Driver 1: connects a scheduler to imagined time. The counterpart of `serve/instance.py`; knows no policy.

    kick: start the admitted pulls -> ask for the next batch -> launch it -> (its end) complete -> tell -> kick

A decode batch whose members stay is launched for as many steps as nothing can change it, and ends in closed form. What
touches the instance meanwhile (`settle`) cuts it after the step that runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from distserve.costs.base import Engine
from distserve.costs.latency import Latency
from distserve.plan import Role
from distserve.sched.base import Batch, Clock, Item, Load, Outcome
from distserve.sched.continuous import ContinuousScheduler
from distserve.sched.decode import DecodeScheduler
from distserve.sched.prefill import PrefillScheduler
from distserve.sim.events import Event, Events
from distserve.sim.flight import Crew, Ends, Flight, known
from distserve.sim.life import NEVER, Imagined
from distserve.sim.swap import kept, swapped
from distserve.sim.usage import Usage
from distserve.sim.weather import Weather

Trace = Callable[[str, float, list[tuple[int, int]]], None]  # (instance, start, [(sequence, tokens)])


_NO_IDS: Final[list[int]] = []  # never changed
_NOTHING: Final = 0  # what an instance does, as its neighbours feel it
_PROMPTS: Final = 1
_DECODES: Final = 2


class Surroundings(ABC):
    """Whom an instance tells."""

    @abstractmethod
    def start_pull(self, instance: Instance, sequence: Imagined, now: float) -> float:
        """Starts it; its end comes as `pull_ended`. Returns the seconds that it takes if nothing else is pulled, 0
        where nobody stands still for them."""

    @abstractmethod
    def held(self, instance: Instance, sequence: Imagined, now: float) -> None:
        """Its first token is out and its KV waits here to be pulled."""

    @abstractmethod
    def finished(self, sequence: Imagined, now: float) -> None: ...


class _Wake(Event):
    """An instance looks what it can start."""

    __slots__ = ("instance", "resumes")

    def __init__(self, instance: Instance, resumes: bool) -> None:
        super().__init__()
        self.instance = instance
        self.resumes = resumes  # it stood still until now

    def happen(self, now: float) -> None:
        self.instance.wake(now, self.resumes)


class Instance(Crew):
    """One replica."""

    def __init__(
        self,
        name: str,
        role: Role,
        scheduler: PrefillScheduler | ContinuousScheduler,
        latency: Latency,
        engine: Engine,
        events: Events,
        world: Surroundings,
        *,
        token_bytes: float = 0.0,  # KV of a token on one rank
        publish_bandwidth: float = 0.0,  # tokens/s whose KV it shows to pullers; 0: endless
        reports: bool = True,  # False: nobody asks for its load
    ) -> None:
        self.name = name
        self.role = role
        self.scheduler = scheduler
        self.usage = Usage()
        self.trace: Trace | None = None
        self.weather: Weather | None = None  # its device is not always as fast as it can be
        self._latency = latency
        self._pp = latency.pp
        self._stalls: bool = engine.pulls_stall
        self._poll: float = engine.poll
        self._swap_bandwidth: float = engine.swap_bandwidth or 0.0
        self._events = events
        self._world = world
        self._token_bytes = token_bytes
        self._publish: float = engine.publish
        self._publish_token = 1.0 / publish_bandwidth if publish_bandwidth else 0.0
        self._prefill = scheduler if isinstance(scheduler, PrefillScheduler) else None
        self._decode = scheduler if isinstance(scheduler, DecodeScheduler) else None
        self._num_flights = 0
        self._run: Flight | None = None  # the one that takes several steps; it is then the only one
        self._free = 0.0  # when the host may prepare another batch
        self._stages = [0.0] * latency.pp  # when each is free
        self._woken = -1.0  # a kick is planned for then
        self._idle_since = 0.0
        self._stalled = False
        self._reports = reports
        self._report = scheduler.load()
        self._ends: list[Ends] = []  # of each lockstep
        self._remnants: list[Imagined] = []  # prompts of which one token is left: they go on like those that decode
        self._neighbours: list[Instance] = []  # who slows whom
        self._doing = _NOTHING
        mine = (engine.prefill_beside, engine.decode_beside)
        self._prompts_beside = [0.0, mine[0].prefill - 1.0, mine[0].decode - 1.0]  # by what a neighbour does
        self._decodes_beside = [0.0, mine[1].prefill - 1.0, mine[1].decode - 1.0]

    # -- what the world does to it -------------------------------------------------------------------------------------

    def meet(self, neighbour: Instance) -> None:
        """It computes beside this one, on a device whose work slows this one down."""
        self._neighbours.append(neighbour)

    def add(self, sequence: Imagined, now: float) -> None:
        self.settle(now)
        self.scheduler.add(sequence, now)
        self.look(now)

    def look(self, now: float) -> None:
        """Something may have changed what can run."""
        poll = self._poll
        if poll and not self._num_flights and not self._stalled:
            self._wake(now + poll - (now - self._idle_since) % poll)
        elif not (self._num_flights and self._stalls):
            self._kick(now)

    def pull_ended(self, sequence: Imagined, now: float) -> None:
        self.settle(now)
        assert self._decode is not None, "only decode pulls"
        self._decode.pulled(sequence.id, now)
        if not self._stalled:
            self._kick(now)

    def release(self, sequence_id: int, now: float) -> None:
        """The KV that was held here has been pulled."""
        assert self._prefill is not None, "only prefill holds"
        self._prefill.release(sequence_id, now)
        self.look(now)

    def load(self, now: float) -> Load:
        """As it reported at the end of its last step; where it does not report, as it is."""
        self.settle(now)
        return self._report if self._reports else self.scheduler.load()

    def settle(self, now: float) -> None:
        """Brings the scheduler to `now`: the steps that are over are completed, the one that runs will end alone."""
        flight = self._run
        if flight is None:
            return
        self._run = None
        self._num_flights -= 1
        flight.void = True
        done = flight.steps_by(now)
        batch, start = flight.batch, flight.start
        if done:
            start = flight.time_of(done)
            self._count(flight, done, start)
            self.scheduler.complete(batch, _NO_IDS, start, done)
            if self._reports:
                self._report = self.scheduler.load()
            again = self.scheduler.next_batch(start)
            assert again is not None
            assert len(again.members) == len(batch.members), "a batch that should have been made again was not"
            batch = again
        self._take_off(Flight(self, batch, start, flight.remaining - done), flight.time_of(done + 1))

    # -- the loop ------------------------------------------------------------------------------------------------------

    def wake(self, now: float, resumes: bool) -> None:
        if resumes:
            self._stalled = False
        if not self._stalled:
            self._kick(now)

    def _wake(self, time: float) -> None:
        if self._woken < time:
            self._woken = time
            self._events.at(time, _Wake(self, False))

    def _kick(self, now: float) -> None:
        """Starts whatever can start."""
        decode = self._decode
        while not self._stalled and self._num_flights < self._pp:
            if self._free > now:
                self._wake(self._free)
                return
            if decode is not None and self._start_pulls(decode, now):
                return
            batch = self.scheduler.next_batch(now)
            if batch is None:
                if not self._num_flights:
                    self._idle_since = now
                    self._do(_NOTHING, now)
                return
            self._launch(batch, now)
        if decode is not None and not self._stalls:  # a step that runs keeps nobody from pulling
            self._start_pulls(decode, now)

    def _start_pulls(self, decode: DecodeScheduler, now: float) -> bool:
        """True: the instance stands still until they are over."""
        pulls = decode.next_pulls(now)
        if not pulls:
            return False
        end = now
        for pulled in pulls:
            sequence = known(pulled)
            sequence.life.pull_started = end
            seconds = self._world.start_pull(self, sequence, end)
            if self._stalls:
                end += seconds
        if end > now:
            self._stalled = True
            self._events.at(end, _Wake(self, True))
        return end > now

    def _launch(self, batch: Batch, now: float) -> None:
        alone = self._pp == 1 and batch.members and not self._remnants
        times = self.scheduler.repeats(batch) if alone else 1
        if times > 1:
            self._launch_run(batch, now, times)
        else:
            self._launch_step(batch, now)

    def _do(self, doing: int, now: float) -> None:
        """What neighbours launched for many steps, as long as nothing changes, is cut after the step that runs."""
        if doing != self._doing:
            self._doing = doing
            for neighbour in self._neighbours:
                neighbour.settle(now)

    def _slowed(self, beside: list[float]) -> float:
        """How many times as long a step takes that is launched now."""
        slowed = 1.0
        for neighbour in self._neighbours:
            slowed += beside[neighbour._doing]
        return slowed

    def _take_off(self, flight: Flight, end: float) -> None:
        self._num_flights += 1
        if flight.times > 1:
            self._run = flight
        self._events.at(end, flight)

    def _launch_run(self, batch: Batch, now: float, times: int) -> None:
        """A batch in lockstep, until somebody ends or blocks are short."""
        lockstep = batch.lockstep
        assert lockstep is not None
        num, context = len(batch.members), lockstep.context
        flight = Flight(self, batch, now, self._ends_of(lockstep).steps())
        run = self._latency.run(num, context)
        times = min(times, flight.remaining)
        if run.steps < times:
            times = int(run.steps)
        slowed = self._slowed(self._decodes_beside) if self._neighbours else 1.0
        weather = self.weather
        if weather is not None:
            slowed *= weather.slows(now, False)
        flight.times, flight.seconds, flight.growth = times, run.seconds * slowed, run.growth * slowed
        if weather is not None and flight.time_of(times) > weather.until:  # another pace from the next step on
            flight.times = times = flight.steps_by(weather.until) + 1
        self._take_off(flight, flight.time_of(times))
        self.usage.saw(0, num, context + num * (times - 1))
        self._do(_DECODES, now)

    def _launch_step(self, batch: Batch, now: float) -> None:
        lockstep, num, others, context, remaining = batch.lockstep, len(batch.members), batch.others, 0, 0
        if lockstep is not None:
            context, remaining = lockstep.context, self._ends_of(lockstep).steps()
        tokens = 0
        for sequence, n in others:
            life = known(sequence).life
            if life.started == NEVER:
                life.started = now
            if n > 1 or not sequence.num_computed:
                tokens += n
        swap = 0.0
        if tokens and self._swap_bandwidth:
            swap = swapped(others) * self._token_bytes / self._swap_bandwidth
            if swap:
                others = kept(others)
        host, stage = self._latency.batch(others, num, context)
        self.usage.saw(tokens, num, context)
        if self._neighbours:
            stage *= self._slowed(self._prompts_beside if tokens else self._decodes_beside)
        if self.weather is not None:
            stage *= self.weather.slows(now, tokens > 0)
        host += swap
        time = self._free = now + host
        stages = self._stages
        for i in range(self._pp):
            time = stages[i] = max(time, stages[i]) + stage
        flight = Flight(self, batch, now, remaining)
        flight.prompts, flight.stage = tokens > 0 or bool(self._remnants), stage
        self._take_off(flight, time)
        self._do(_PROMPTS if tokens else _DECODES, now)

    def _ends_of(self, lockstep: Clock) -> Ends:
        for ends in self._ends:
            if ends.clock is lockstep:
                return ends
        ends = Ends(lockstep)
        self._ends.append(ends)
        return ends

    def ended(self, flight: Flight, now: float) -> None:
        self._num_flights -= 1
        self._run = None
        times = flight.times
        self._count(flight, times, now)
        outcome = self.scheduler.complete(flight.batch, self._whose_last(flight), now, times)
        if self._reports:
            self._report = self.scheduler.load()
        self._tell(outcome, flight.prompts, now)
        if flight.prompts:
            self._note_remnants(flight.batch.others)
        self._idle_since = now
        self._kick(now)

    def _note_remnants(self, others: list[Item]) -> None:
        if self._remnants:
            self._remnants = [sequence for sequence in self._remnants if sequence.life.first == NEVER]
        for scheduled, _ in others:
            sequence = known(scheduled)
            if sequence.life.first == NEVER and sequence.num_tokens - sequence.num_computed == 1:
                self._remnants.append(sequence)

    def _whose_last(self, flight: Flight) -> list[int]:
        """Ids of those who end with this flight's last step."""
        batch = flight.batch
        lockstep = batch.lockstep
        ended = _NO_IDS
        if lockstep is not None and flight.remaining <= flight.times:
            ended = self._ends_of(lockstep).by(lockstep.ticks + flight.times)
        for scheduled, n in batch.others:
            sequence = known(scheduled)
            if sequence.left() <= 1 and sequence.num_computed + n >= sequence.num_tokens:
                if ended is _NO_IDS:
                    ended = []
                ended.append(sequence.id)
        return ended

    def _tell(self, outcome: Outcome, prompts: bool, now: float) -> None:
        world = self._world
        if prompts:
            prefill = self._prefill is not None
            for sampled in outcome.sampled:
                sequence = known(sampled)
                if sequence.life.first == NEVER:
                    sequence.life.first = now
                if prefill and sequence.left() > 0:
                    self._free = max(self._free, now) + self._publish + sequence.num_computed * self._publish_token
                    world.held(self, sequence, now)
        for finished in outcome.finished:
            world.finished(known(finished), now)

    def _count(self, flight: Flight, times: int, end: float) -> None:
        """The first `times` steps of a flight are over."""
        self.usage.busy += end - flight.start if self._pp == 1 else flight.stage
        self.usage.steps += times
        if self.trace is not None:
            items = [(sequence.id, n) for sequence, n in flight.batch.items]
            for i in range(times):
                self.trace(self.name, flight.time_of(i), items)
