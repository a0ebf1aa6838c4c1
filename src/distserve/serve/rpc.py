"""The gateway's side of the wire: an instance in another process, spoken to as an `Instance`.

    state of one epoch:   down -> loading -> ready -> down (died, was fenced, stopped)

Whatever was awaited from an epoch that ends fails with `InstanceGone`. Nothing here starts or kills processes
(`supervisor.py`), and nothing decides where a request goes (`gateway.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from distserve.errors import InstanceError, InstanceGone, PullError, RequestError, StaleError
from distserve.plan import Role
from distserve.request import Request, Token
from distserve.sched.base import Load
from distserve.sched.router import NOMINAL
from distserve.serve.base import Sink
from distserve.serve.messages import (
    Abort,
    Audit,
    Beat,
    Drain,
    Drained,
    Failure,
    Fatal,
    Loading,
    Name,
    Ready,
    Release,
    Step,
    Submit,
    Timing,
    ToGateway,
    ToInstance,
    Unknown,
)
from distserve.transfer.base import KVHandle

log = logging.getLogger(__name__)

Send = Callable[[ToInstance], None]  # raises ConnectionError

MEASURED_TOKENS = 64  # a step of fewer says little about the pace at which prompts are computed


class RemoteAttempt:
    """One attempt on one instance, see `base.Attempt`. `push`, `offer`, `arrived` and `fail` come from the wire."""

    __slots__ = ("_error", "_on_close", "_over", "_sink", "_waiter", "handle", "num_tokens", "pulled")

    def __init__(self, num_tokens: int, sink: Sink, on_close: Callable[[], None]) -> None:
        self.num_tokens = num_tokens  # of the request's output so far: the index of the next one
        self.pulled = False
        self.handle: KVHandle | None = None
        self._sink = sink
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._over = False
        self._on_close = on_close

    def push(self, token: Token) -> None:
        self.num_tokens += 1
        self._sink(token)
        if token.finish is not None:
            self._end()

    def offer(self, handle: KVHandle) -> None:
        """Prefill is over."""
        self.handle = handle
        self._end()

    def arrived(self) -> None:
        """Its KV has been pulled."""
        self.pulled = True
        self._notify()

    def fail(self, error: Exception) -> None:
        if not self._over:
            self._error = error
            self._end()

    def _end(self) -> None:
        self._over = True
        self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def settled(self) -> None:
        while not (self.pulled or self._over):
            await self._news()

    async def over(self) -> None:
        while not self._over:
            await self._news()
        if self._error is not None:
            raise self._error

    async def _news(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def close(self) -> None:
        """Aborts what is left on the instance. Idempotent."""
        self._on_close()


class RemoteInstance:
    """An instance behind a wire. `on_step` and `on_timing` feed the metrics."""

    def __init__(self, name: str, role: Role, clock: Callable[[], float]) -> None:
        self.name = name
        self.role = role
        self.epoch = 0
        self.ready: Ready | None = None
        self.on_step: Callable[[str, Role, Step], None] | None = None
        self.on_timing: Callable[[Role, Timing], None] | None = None
        self.on_change: Callable[[], None] | None = None  # became ready, or was lost
        self.on_loading: Callable[[Loading], None] | None = None
        self.fatal: Fatal | None = None  # why this epoch could not start
        self.tokens_per_second = NOMINAL
        self._clock = clock
        self._send: Send | None = None
        self._attempts: dict[Name, RemoteAttempt] = {}
        self._held: dict[Name, KVHandle] = {}  # prefilled here, not pulled yet
        self._load = Load()
        self._drained = asyncio.Event()
        self.beat_at = 0.0  # clock of the last sign of life
        self.suspicious_at = 0.0  # clock after which the step it is in takes too long (0: idle)

    # -- its epochs ---------------------------------------------------------------------------------------------------

    def begin(self, epoch: int, send: Send) -> None:
        """A new process loads under this name."""
        self.epoch, self._send, self.ready = epoch, send, None
        self._load, self.suspicious_at, self.fatal = Load(), 0.0, None
        self._drained.clear()

    def lost(self, why: str) -> None:
        """The epoch is over: nothing of it will be answered any more."""
        self._send, self.ready, self.epoch = None, None, 0
        self._load = Load()
        attempts, self._attempts, self._held = list(self._attempts.values()), {}, {}
        for attempt in attempts:
            attempt.fail(InstanceGone(f"{self.name} {why}"))
        self._drained.set()
        if self.on_change is not None:
            self.on_change()

    @property
    def alive(self) -> bool:
        return self.ready is not None

    @property
    def pid(self) -> int | None:
        return self.ready.pid if self.ready is not None else None

    @property
    def max_model_len(self) -> int:
        return self.ready.max_model_len if self.ready is not None else 0

    @property
    def num_requests(self) -> int:
        return len(self._attempts) + len(self._held)

    def load(self) -> Load:
        return self._load

    # -- calls --------------------------------------------------------------------------------------------------------

    def prefill(self, request: Request, sink: Sink) -> RemoteAttempt:
        return self._submit(request, None, sink)

    def decode(self, request: Request, handle: KVHandle | None, sink: Sink) -> RemoteAttempt:
        return self._submit(request, handle, sink)

    def _submit(self, request: Request, handle: KVHandle | None, sink: Sink) -> RemoteAttempt:
        if self.ready is None:
            raise InstanceGone(f"{self.name} is not ready")
        name = (request.id, request.attempt)
        attempt = RemoteAttempt(len(request.output), sink, lambda: self._close(name))
        self._attempts[name] = attempt
        try:
            self._tell(Submit(self.epoch, request, handle))
        except InstanceGone:
            self._attempts.pop(name, None)
            raise
        return attempt

    def _close(self, name: Name) -> None:
        if self._attempts.pop(name, None) is not None:
            self.tell(Abort(self.epoch, [name]))
        elif (handle := self._held.get(name)) is not None:  # it arrived, but nobody looked any more
            self.release(handle)

    def release(self, handle: KVHandle) -> None:
        name = (handle.request, handle.attempt)
        if handle.source.epoch == self.epoch and self._held.pop(name, None) is not None:
            self.tell(Release(self.epoch, [name]))

    def spent(self, handle: KVHandle) -> None:
        if handle.source.epoch == self.epoch:
            self._held.pop((handle.request, handle.attempt), None)  # should its notice be lost, the next audit frees it

    def holds(self, handle: KVHandle) -> bool:
        return handle.source.epoch == self.epoch and (handle.request, handle.attempt) in self._held

    def audit(self) -> None:
        """Reconciles what each side believes to be alive; renews leases. Called by a timer."""
        self.tell(Audit(self.epoch, [*self._attempts], [*self._held]))

    async def drain(self) -> None:
        self.tell(Drain(self.epoch))
        if self.alive:
            await self._drained.wait()

    def _tell(self, message: ToInstance) -> None:
        if self._send is None:
            raise InstanceGone(f"{self.name} is down")
        try:
            self._send(message)
        except ConnectionError as error:
            raise InstanceGone(f"{self.name} cannot be reached: {error}") from None

    def tell(self, message: ToInstance) -> None:
        """For messages that need no answer: where the instance is gone, so is what they speak of."""
        if self.alive and self._send is not None:
            try:
                self._send(message)
            except ConnectionError:
                log.debug("%s is gone; not told: %s", self.name, type(message).__name__)

    # -- answers ------------------------------------------------------------------------------------------------------

    def receive(self, message: ToGateway) -> None:
        if message.epoch != self.epoch:
            return
        self.beat_at = self._clock()
        match message:
            case Step():
                self._step(message)
            case Beat(busy=busy, expected=expected, load=load):
                self._load = load
                self.suspicious_at = self.beat_at - busy + expected if busy else 0.0
            case Ready():
                self.ready = message
                if self.on_change is not None:
                    self.on_change()
            case Unknown(awaited=awaited, held=held):
                for name in held:
                    self._held.pop(name, None)
                for name in awaited:
                    self._fail(name, StaleError(f"{self.name} knows nothing of request {name[0]}, attempt {name[1]}"))
            case Drained():
                self._drained.set()
            case Loading():
                if self.on_loading is not None:
                    self.on_loading(message)
            case Fatal():
                self.fatal = message

    def _step(self, step: Step) -> None:
        self._load = step.load
        self.suspicious_at = 0.0
        for name in step.pulled:
            if (attempt := self._attempts.get(name)) is not None:
                attempt.arrived()
        for event in step.events:
            name = (event.id, event.attempt)
            attempt = self._attempts.get(name)
            if attempt is None:
                continue
            if event.index != attempt.num_tokens:
                if event.index > attempt.num_tokens:
                    self._abandon(
                        name, StaleError(f"{self.name}: token {attempt.num_tokens} of request {name[0]} was lost")
                    )
                continue
            attempt.push(event.token)
            if event.token.finish is not None:
                del self._attempts[name]
        for handle in step.handles:
            name = (handle.request, handle.attempt)
            if (attempt := self._attempts.pop(name, None)) is not None:
                self._held[name] = handle
                attempt.offer(handle)
        for failure in step.failures:
            self._fail((failure.id, failure.attempt), _error(self.name, failure))
        if step.num_batched_tokens >= MEASURED_TOKENS and step.seconds > 0:
            pace = step.num_batched_tokens / step.seconds
            self.tokens_per_second = (
                pace if self.tokens_per_second == NOMINAL else 0.9 * self.tokens_per_second + 0.1 * pace
            )
        for timing in step.timings:
            if self.on_timing is not None:
                self.on_timing(self.role, timing)
        if self.on_step is not None:
            self.on_step(self.name, self.role, step)

    def _abandon(self, name: Name, error: Exception) -> None:
        self._fail(name, error)
        self.tell(Abort(self.epoch, [name]))

    def _fail(self, name: Name, error: Exception) -> None:
        attempt = self._attempts.pop(name, None)
        if attempt is not None:
            attempt.fail(error)


def _error(instance: str, failure: Failure) -> Exception:
    if failure.kind == "request":
        return RequestError(failure.text, param=failure.reason or None)
    if failure.kind == "pull":
        return PullError(f"{instance}: {failure.text}", failure.reason)
    return InstanceError(f"{instance}: {failure.text}")
