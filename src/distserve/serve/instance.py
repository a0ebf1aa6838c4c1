"""Driver 2: connects a scheduler, an executor and a transport to the wall clock and to the gateway.

Knows no policy (that is the scheduler's) and no tensor (the executor's). The loop reads like the protocol: let go of
what expired, start the pulls that were admitted, run the next batch, tell what happened.

An executor with stages has several batches under way at once. They are launched as the scheduler finds work for them,
and land in the order of their launches; whatever happens meanwhile is heard at once, as during a single step.

A role is which scheduler runs: `release` and `renew` exist on a prefill scheduler only, `next_pulls` and `pulled` on a
decode scheduler only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace

from distserve.engine.base import EngineResult, Executor
from distserve.errors import DistserveError, PullError, RequestError
from distserve.request import Request
from distserve.sched.base import Batch, HoldingScheduler, Outcome, PullingScheduler, Scheduler, Sequence, State
from distserve.serve.live import Live, key_of
from distserve.serve.messages import (
    Abort,
    Audit,
    Beat,
    Drain,
    Drained,
    Event,
    Failure,
    Meet,
    Name,
    Notice,
    Part,
    Pulled,
    Release,
    Renew,
    Step,
    Stop,
    Submit,
    Timing,
    ToGateway,
    ToInstance,
    Unknown,
)
from distserve.serve.pace import Pace
from distserve.serve.steplog import Silent, StepLog
from distserve.transfer.base import KVHandle, KVSource, Source, Transport

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Flight:
    """A batch on its way."""

    batch: Batch
    launched: float
    result: asyncio.Future[EngineResult]


@dataclass(frozen=True, slots=True)
class Wiring:
    """How an instance reaches the others. `send` and `notify` never block."""

    source: KVSource
    publisher: Source
    transport: Transport | None  # decode only
    send: Callable[[ToGateway], None]
    notify: Callable[[str, Notice], None]  # to the address of a source
    steps: StepLog | Silent = Silent()  # noqa: RUF009  # has no state


class InstanceLoop:
    """One instance's life between `Ready` and `Stop`. `handle` takes messages at any time, also during a step."""

    def __init__(self, scheduler: Scheduler, executor: Executor, wiring: Wiring, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._executor = executor
        executor.on_broken(self._break)
        self._broken: DistserveError | None = None  # why nothing can be computed any more
        self._wiring = wiring
        self._clock = clock
        self._epoch = wiring.source.epoch
        self._live: dict[int, Live] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()  # pulls and first contacts
        self._flights: deque[_Flight] = deque()
        self._max_in_flight = executor.max_in_flight
        self._landed = 0.0  # when the latest flight was over
        self._pace = Pace()
        self._clear()

    def _clear(self) -> None:
        self._events: list[Event] = []
        self._handles: list[KVHandle] = []
        self._pulled: list[Name] = []
        self._failures: list[Failure] = []
        self._timings: list[Timing] = []
        self._publishing: list[float] = []

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `Stop`. An exception out of here means that the instance is broken and must be restarted."""
        try:
            while not self._stopping:
                await self._turn()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _turn(self) -> None:
        """Launches what can be launched; then waits until the oldest flight lands or there is news."""
        flights = self._flights
        if self._broken is not None:
            raise self._broken
        self._wake.clear()
        now = self._clock()
        self._forget(self._scheduler.expire(now))
        while len(flights) < self._max_in_flight and self._launch(now):
            pass
        if len(flights) < self._max_in_flight:
            self._flush()
            if self._draining and not self._live:
                self._wiring.send(Drained(self._epoch))
            if not (flights and flights[0].result.done()):
                await self._wake.wait()
            if not (flights and flights[0].result.done()):
                return
        self._land(await flights[0].result)

    def _launch(self, now: float) -> bool:
        """Starts what can start; False: no batch can."""
        self._start_pulls(now)
        batch = self._scheduler.next_batch(now)
        if batch is None:
            return False
        for sequence, _ in batch.items:
            live = self._live.get(sequence.id)
            if live is not None and not live.ready:
                live.started = live.started or now
                live.ready = now
        result = self._executor.launch(batch)
        self._flights.append(_Flight(batch, now, result))
        if self._max_in_flight > 1:
            result.add_done_callback(lambda _: self._wake.set())
        self._start_pulls(now)  # the batch may have made room
        return True

    def _land(self, result: EngineResult) -> None:
        """The oldest flight is over."""
        since, batch, now = self._oldest_since(), self._flights.popleft().batch, self._clock()
        self._pace.record(batch.num_tokens, now - since)
        self._landed = now
        self._wiring.steps.note(batch, now - result.seconds, result.seconds)
        self._tell(self._scheduler.complete(batch, result.ended, now), result, batch.num_tokens)

    def _break(self, error: DistserveError) -> None:
        self._broken = error
        self._wake.set()

    def _oldest_since(self) -> float:
        """When the oldest flight was launched or, in a full pipeline, the one before it landed: its own time."""
        return max(self._flights[0].launched, self._landed)

    def idle(self) -> float:
        """Seconds since there was anything to do."""
        return 0.0 if self._live else self._clock() - self._landed

    def beat(self) -> None:
        """Tells the gateway that the event loop lives and how the step goes; called by a timer. Leases run on even when
        there is nothing to compute, so the loop is woken too."""
        busy = self._clock() - self._oldest_since() if self._flights else 0.0
        expected = self._pace.expected(self._flights[0].batch.num_tokens) if busy else 0.0
        self._wiring.send(Beat(self._epoch, busy, expected, self._scheduler.load()))
        self._renew_leases()
        self._wake.set()

    def _renew_leases(self) -> None:
        """Word to each source whose KV is still wanted here."""
        wanted: dict[tuple[str, int], list[Name]] = {}
        for live in self._live.values():
            if live.handle is not None and live.sequence.state in (State.WAITING, State.PULLING):
                wanted.setdefault((live.handle.source.notices, live.handle.source.epoch), []).append(live.name)
        for (address, epoch), names in wanted.items():
            self._wiring.notify(address, Renew(epoch, names))

    # -- what the step changed ----------------------------------------------------------------------------------------

    def _tell(self, outcome: Outcome, result: EngineResult, num_batched_tokens: int) -> None:
        for sequence in outcome.sampled:
            live = self._live.get(sequence.id)
            if live is None:
                continue
            token = result.tokens.get(sequence.id)
            if token is None:
                self._failures.append(Failure(*live.name, "engine", result.failures[sequence.id]))
                continue
            index = sequence.num_tokens - 1 - len(live.request.prompt)
            self._events.append(Event(*live.name, index, token))
            if not live.timed:
                self._time(live)
        self._forget(outcome)
        self._flush(num_batched_tokens, result.seconds)  # the first tokens do not wait for the digests
        for sequence in outcome.held:
            if (live := self._live.get(sequence.id)) is not None:
                self._publish(live)
        self._flush()

    def _publish(self, live: Live) -> None:
        sequence, began = live.sequence, self._clock()
        generations, digest = self._wiring.publisher.publish(sequence.blocks)
        handle = KVHandle(
            source=self._wiring.source,
            request=live.request.id,
            attempt=live.request.attempt,
            num_tokens=sequence.num_computed,
            blocks=tuple(sequence.blocks),
            generations=generations,
            digest=digest,
        )
        self._handles.append(handle)
        self._publishing.append(self._clock() - began)

    def _time(self, live: Live) -> None:
        live.timed = True
        now = self._clock()
        queued = live.started - live.added
        self._timings.append(Timing(*live.name, queued, live.pull, live.pull_bytes, now - live.ready))

    def _forget(self, outcome: Outcome) -> None:
        for sequence in (*outcome.finished, *outcome.dropped):
            self._executor.forget(sequence.id)
            self._live.pop(sequence.id, None)

    def _flush(self, num_batched_tokens: int = 0, seconds: float = 0.0) -> None:
        if num_batched_tokens or self._events or self._handles or self._pulled or self._failures:
            load = self._scheduler.load()
            lists = (self._events, self._handles, self._pulled, self._failures, self._timings, self._publishing)
            self._wiring.send(Step(self._epoch, *lists, load, num_batched_tokens, seconds))
            self._clear()

    # -- pulls --------------------------------------------------------------------------------------------------------

    def _start_pulls(self, now: float) -> None:
        if self._wiring.transport is None:
            return
        scheduler: PullingScheduler = self._scheduler  # type: ignore[assignment]  # a transport means the decode role
        for sequence in scheduler.next_pulls(now):
            live = self._live[sequence.id]
            live.started = now
            self._background(self._pull(live, scheduler, self._wiring.transport))

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pull(self, live: Live, scheduler: PullingScheduler, transport: Transport) -> None:
        """One request's KV. A transport's failure or a digest that differs is tried once more; what else can happen
        will not get better."""
        assert live.handle is not None
        key = live.sequence.id
        for trial in (1, 2):
            try:
                live.pull_bytes = await transport.pull(live.handle, live.sequence.blocks)
                break
            except PullError as error:
                if trial == 2 or error.reason not in ("transport", "digest"):
                    if key in self._live:
                        self._failures.append(Failure(*live.name, "pull", str(error), error.reason))
                    self._forget(scheduler.pull_failed(key, self._clock()))
                    self._wake.set()
                    return
        now = self._clock()
        live.pull, live.ready = now - live.started, now
        source = live.handle.source
        self._wiring.notify(source.notices, Pulled(source.epoch, live.name))
        self._forget(scheduler.pulled(key, now))
        if key in self._live:
            self._pulled.append(live.name)
        self._wake.set()

    # -- messages -----------------------------------------------------------------------------------------------------

    def handle(self, message: ToInstance) -> None:
        if message.epoch != self._epoch:
            log.debug("ignored a message to epoch %d, this is %d", message.epoch, self._epoch)
            return
        match message:
            case Submit(request=request, handle=handle):
                self._submit(request, handle)
            case Abort(names=names):
                for name in names:
                    self._drop(key_of(name))
            case Release(names=names):
                for name in names:
                    self._release(key_of(name))
            case Pulled(name=name):
                self._release(key_of(name))
            case Renew(names=names):
                for name in names:
                    self._renew(name)
            case Audit(awaited=awaited, held=held):
                self._audit(awaited, held)
            case Meet(sources=sources):
                self._meet(sources)
            case Part(instance=instance, source_epoch=epoch):
                self._part(instance, epoch)
            case Drain():
                self._draining = True
            case Stop():
                self._stopping = True
        self._start_pulls(self._clock())  # a step that runs keeps nobody from pulling
        self._wake.set()

    def _submit(self, request: Request, handle: KVHandle | None) -> None:
        name = (request.id, request.attempt)
        key = key_of(name)
        if key in self._live:
            return  # said twice
        for older in range(1, request.attempt):
            self._drop(key_of((request.id, older)))
        if self._draining:
            self._failures.append(Failure(*name, "draining", "the instance takes no new work"))
            return
        sequence = Sequence(
            id=key,
            num_tokens=request.num_tokens,
            attempt=request.attempt,
            num_kv_tokens=handle.num_tokens if handle is not None else 0,
        )
        now = self._clock()
        try:
            self._executor.add(replace(request, id=key))
            self._scheduler.add(sequence, now)
        except RequestError as error:
            self._executor.forget(key)
            self._failures.append(Failure(*name, "request", str(error), error.param or ""))
            return
        self._live[key] = Live(request, sequence, handle, now)

    def _drop(self, key: int) -> None:
        """Abort. What a batch in flight is writing to is freed when that batch completes."""
        if key in self._live:
            self._forget(self._scheduler.abort(key, self._clock()))

    def _release(self, key: int) -> None:
        live = self._live.get(key)
        if live is not None and live.is_held:
            scheduler: HoldingScheduler = self._scheduler  # type: ignore[assignment]  # only prefill holds
            self._forget(scheduler.release(key, self._clock()))

    def _meet(self, sources: list[KVSource]) -> None:
        if self._wiring.transport is not None:
            for source in sources:
                self._background(self._connect(self._wiring.transport, source))

    async def _connect(self, transport: Transport, source: KVSource) -> None:
        try:
            await transport.connect(source)
        except PullError as error:
            log.warning("no contact with %s yet: %s", source.instance, error)  # its first pull will try again, and tell

    def _part(self, instance: str, epoch: int) -> None:
        """A source died. Pulls on their way fail by themselves; those that wait fail now."""
        if self._wiring.transport is None:
            return
        self._wiring.transport.disconnect(instance, epoch)
        for key, live in list(self._live.items()):
            if live.handle is not None and live.handle.source.epoch == epoch and live.sequence.state is State.WAITING:
                self._failures.append(Failure(*live.name, "pull", f"{instance} died before the pull", "gone"))
                self._drop(key)

    def _renew(self, name: Name) -> bool:
        """Extends a lease; False where nothing is held."""
        live = self._live.get(key_of(name))
        if live is None or not live.is_held:
            return False
        scheduler: HoldingScheduler = self._scheduler  # type: ignore[assignment]  # only prefill holds
        scheduler.renew(key_of(name), self._clock())
        return True

    def _audit(self, awaited: list[Name], held: list[Name]) -> None:
        for key in self._live.keys() - {key_of(name) for name in awaited} - {key_of(name) for name in held}:
            self._drop(key)
        lost = [name for name in awaited if (live := self._live.get(key_of(name))) is None or live.is_held]
        gone = [name for name in held if not self._renew(name)]
        if lost or gone:
            self._flush()  # a token that is on its way must arrive before the news that none will come
            self._wiring.send(Unknown(self._epoch, lost, gone))
