"""Offers a workload to a server on time, whatever the server does: an open loop. Knows no HTTP and no prompt.

A client that waits for answers before it sends goes easy on a slow server, and one that starts its watch when it sends
forgives itself for being late; both flatter (coordinated omission). Here a request is sent when it is due, and its
latencies count from then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from distserve import metrics
from distserve.bench.client import UNREACHABLE, Result, clock
from distserve.metrics import Record
from distserve.traces import Arrival

GIVE_UP = 30.0  # seconds without any connection after which a server counts as gone for good
_LEAD = 0.2  # seconds before the first request, for the display and the first prompt to be ready
_SLIP = 0.25  # seconds by which the last request may leave late: a hiccup, not a rate that is too high
_BEAT = 0.05  # seconds between two looks at how late this client's own loop is


@dataclass(slots=True)
class Run:
    """What was measured so far; grows while the load runs."""

    offered: int = 0
    results: list[Result] = field(default_factory=list)  # in order of completion
    start: float = 0.0  # when the first request was due, on `clock`
    origin: float = 0.0  # the arrival that `start` stands for
    lags: list[float] = field(default_factory=list)  # seconds by which the client's loop came too late to its own beat
    cpu: float = 0.0  # CPU seconds of this process during the load
    seconds: float = 0.0  # of wall time during the load
    interrupted: bool = False
    gave_up: bool = False
    dropped: list[tuple[int, Arrival, float]] = field(default_factory=list)  # (number, request, due): in flight at stop

    @property
    def in_flight(self) -> int:
        return self.offered - len(self.results)

    @property
    def records(self) -> list[Record]:
        return [result.record for result in self.results]

    @property
    def end(self) -> float:
        """When the last request was over, on the clock of the arrivals."""
        return max((result.end for result in self.results), default=self.start) - self.start + self.origin


Send = Callable[[int, Arrival, float], Awaitable[Result]]  # (number, request, when it is due on `clock`)
Prepare = Callable[[int, Arrival], None]  # makes what `Send` will send; called ahead of time
Enough = Callable[[int, Result], bool]  # (number, its result): whether the run may end


class Load:
    """One run of a workload. `stop` ends it early; requests in flight are then dropped and count as not offered.
    `enough` hears of every result, and ends the run when it is told all that it wants to know."""

    def __init__(
        self, arrivals: Sequence[Arrival], send: Send, prepare: Prepare, enough: Enough = lambda number, result: False
    ) -> None:
        self.run = Run(origin=arrivals[0].arrival)
        self.total = len(arrivals)
        self._arrivals = arrivals
        self._send = send
        self._prepare = prepare
        self._enough = enough
        self._in_flight: dict[int, tuple[Arrival, float]] = {}
        self._offering: asyncio.Task[None] | None = None
        self._sent: set[asyncio.Task[None]] = set()
        self._unreachable_since: float | None = None
        self._bug: BaseException | None = None

    async def go(self) -> Run:
        """Returns when every request is over (or `stop` was called)."""
        beat = asyncio.create_task(self._beat())
        cpu, began = time.process_time(), clock()
        self._offering = asyncio.create_task(self._offer())
        try:
            await asyncio.wait([self._offering])
            while self._sent:
                await asyncio.wait(self._sent)
        finally:
            beat.cancel()
            self.stop(interrupted=False)
            await asyncio.gather(beat, self._offering, *self._sent, return_exceptions=True)
        self.run.cpu, self.run.seconds = time.process_time() - cpu, clock() - began
        if not self._offering.cancelled():
            self._offering.result()  # raises what our own mistake raised there
        if self._bug is not None:
            raise self._bug
        self.run.dropped = [(number, request, due) for number, (request, due) in self._in_flight.items()]
        return self.run

    def stop(self, *, interrupted: bool = True) -> None:
        """Sends nothing more and drops what is in flight. `interrupted`: it was not meant to end here."""
        tasks = [task for task in (self._offering, *self._sent) if task is not None and not task.done()]
        self.run.interrupted = self.run.interrupted or (interrupted and bool(tasks))
        for task in tasks:
            task.cancel()

    async def _offer(self) -> None:
        run = self.run
        run.start = clock() + _LEAD
        for number, request in enumerate(self._arrivals):
            self._prepare(number, request)  # before it is due, so that making a prompt delays nobody
            due = run.start + request.arrival - run.origin
            await asyncio.sleep(max(0.0, due - clock()))
            if self._unreachable_since is not None and clock() - self._unreachable_since > GIVE_UP:
                self._give_up(self._arrivals[number:])
                return
            run.offered += 1
            self._in_flight[number] = request, due
            task = asyncio.create_task(self._one(number, request, due))
            self._sent.add(task)
            task.add_done_callback(self._over)

    async def _one(self, number: int, request: Arrival, due: float) -> None:
        result = await self._send(number, request, due)
        del self._in_flight[number]
        self.run.results.append(result)
        if result.record.status != UNREACHABLE:
            self._unreachable_since = None
        elif self._unreachable_since is None:
            self._unreachable_since = result.end
        if self._enough(number, result):
            self.stop(interrupted=False)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._sent.discard(task)
        if not task.cancelled() and task.exception() is not None and self._bug is None:
            self._bug = task.exception()
            self.stop()

    def _give_up(self, rest: Sequence[Arrival]) -> None:
        self.run.gave_up = True
        self.run.offered += len(rest)
        for request in rest:
            record = Record(
                request.arrival, request.prompt_tokens, request.output_tokens, status=UNREACHABLE, app=request.app
            )
            self.run.results.append(Result(record, clock(), 0.0, request, f"not sent: no connection for {GIVE_UP:g} s"))

    async def _beat(self) -> None:
        while True:
            before = clock()
            await asyncio.sleep(_BEAT)
            self.run.lags.append(max(0.0, clock() - before - _BEAT))


def lateness(run: Run) -> tuple[float, float]:
    """p99 in seconds of how late requests were sent, and of how late the client's loop was to its beat."""
    late = sorted(result.late for result in run.results)
    lags = sorted(run.lags)
    return (metrics.quantile(late, 0.99) if late else 0.0), (metrics.quantile(lags, 0.99) if lags else 0.0)


def sent_share(run: Run) -> float:
    """The rate at which requests left over the rate at which they were due; 1: the client kept up."""
    sent = [(result.asked.arrival, result.asked.arrival + result.late) for result in run.results]
    if not sent:
        return 1.0
    due = max(sent)[0] - min(sent)[0]
    taken = max(at for _, at in sent) - min(at for _, at in sent)
    return due / taken if taken > due + _SLIP else 1.0
