r"""A request's way through the instances, written once as straight-line code: prefill, hand-off, decode, try again.

    ADMITTED -> PREFILLING -> HANDED_OFF -> DECODING -> DONE
        \__________\_____________\____________\-> RETRY (next attempt: generated tokens become prompt) or FAILED

Only the gateway starts attempts. It knows instances by their contract (`base.py`), no process, no socket and no HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distserve.errors import InstanceError, InstanceGone, OverloadedError, PullError, UnavailableError
from distserve.plan import Role
from distserve.request import Request
from distserve.sched.router import Candidate, Router
from distserve.serve.base import Instance, Sink
from distserve.serve.stream import RequestStream
from distserve.serve.telemetry import Telemetry
from distserve.transfer.base import KVHandle

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """When to give up. Whom not to let in is `sched.policy.AdmissionPolicy`."""

    max_attempts: int = 4  # of one request
    restart_deadline: float = 30.0  # seconds a running request waits for an instance to come back


class Gateway:
    """Admits, routes, retries. `generate` is all that the API calls."""

    def __init__(
        self,
        instances: Sequence[Instance],
        router: Router,
        telemetry: Telemetry,
        clock: Callable[[], float],
        *,
        max_model_len: int,
        limits: GatewayLimits | None = None,
        ended: Callable[[RequestStream], None] = lambda stream: None,
    ) -> None:
        """`ended` hears of every request that is over, also of refused ones."""
        self.instances = instances
        self.max_model_len = max_model_len
        self.max_kv_tokens: int | None = None  # known when instances have told what they can hold
        self._router = router
        self._telemetry = telemetry
        self._clock = clock
        self._limits = limits or GatewayLimits()
        self._ended = ended
        self._ids = itertools.count(1)
        self.num_live = 0
        self._mean_seconds = 1.0  # from a request's admission to its end, over the last requests
        self._changed = asyncio.Event()  # an instance came or went; replaced each time
        self._closing = False

    # -- state --------------------------------------------------------------------------------------------------------

    def next_id(self) -> int:
        return next(self._ids)

    def ready(self) -> bool:
        return not self._closing and not self._missing()

    def status(self) -> dict[str, object]:
        """What `/health` tells beside yes or no."""
        instances = [
            {"name": instance.name, "role": instance.role, "alive": instance.alive, "pid": instance.pid}
            for instance in self.instances
        ]
        return {
            "missing": self._missing(),
            "instances": instances,
            "draining": self._closing,
            "requests": self.num_live,
        }

    def changed(self) -> None:
        """An instance became ready or was lost: whoever waits for one looks again."""
        lengths = [instance.max_model_len for instance in self.instances if instance.alive]
        if lengths:  # a request may be sent to any of them, so the smallest decides
            self.max_kv_tokens = min(lengths)
        self._changed.set()
        self._changed = asyncio.Event()

    def close_door(self) -> None:
        """No new requests; those that run go on."""
        self._closing = True

    def _alive(self, *roles: Role) -> list[Instance]:
        return [instance for instance in self.instances if instance.role in roles and instance.alive]

    def _missing(self) -> list[str]:
        """The phases that nobody can run now."""
        return [str(phase) for phase in (Role.PREFILL, Role.DECODE) if not self._alive(phase, Role.COLOCATED)]

    # -- one request --------------------------------------------------------------------------------------------------

    def generate(self, request: Request) -> RequestStream:
        """Tokens as they arrive. Raises `RequestError`, `OverloadedError`, `UnavailableError`, `InstanceError`."""
        return RequestStream(request, self._telemetry, self._clock, self._live)

    async def _live(self, stream: RequestStream) -> None:
        """A request's life. It is cancelled when its stream is closed."""
        request = stream.request
        try:
            self._admit(request)
        except (OverloadedError, UnavailableError) as error:
            stream.fail(error)
            self._ended(stream)
            return
        request.arrival = self._clock()
        self.num_live += 1
        try:
            await self._attempts(stream)
        except Exception as error:  # noqa: BLE001  whatever it is, the reader must be told
            self._telemetry.observe_failure(type(error).__name__)
            stream.fail(error)
        finally:
            self.num_live -= 1
            self._mean_seconds += 0.1 * (self._clock() - request.arrival - self._mean_seconds)
            self._telemetry.prompt_tokens.inc(len(request.prompt))
            self._telemetry.output_tokens.inc(len(request.output))
            self._ended(stream)

    def _admit(self, request: Request) -> None:
        if self._closing:
            raise UnavailableError("the server is shutting down", 5.0)
        if missing := self._missing():
            raise UnavailableError(f"no instance is up for: {', '.join(missing)}", 2.0)
        admission = self._router.admit(
            request.num_tokens,
            [self._candidate(instance) for instance in self._alive(Role.PREFILL, Role.COLOCATED)],
            num_requests=self.num_live,
            mean_seconds=self._mean_seconds,
        )
        if admission.retry_after is not None:
            self._telemetry.observe_failure("refused")
            raise OverloadedError(f"the server is at its limit: {admission.reason}", admission.retry_after)

    async def _attempts(self, stream: RequestStream) -> None:
        """Attempts until one ends. A token is passed on once: a retry goes on behind `request.output`."""
        request = stream.request
        while True:
            try:
                await self._attempt(request, stream.push)
                if stream.finish is not None:
                    return
                raise InstanceError(f"attempt {request.attempt} ended without a last token")
            except InstanceError as error:
                if isinstance(error, PullError):
                    self._telemetry.observe_pull_failure(error.reason)
                if request.attempt >= self._limits.max_attempts:
                    raise InstanceError(f"gave up after {request.attempt} attempts; the last: {error}") from error
                log.warning("request %d, attempt %d: %s; trying again", request.id, request.attempt, error)
                self._telemetry.observe_retry(type(error).__name__)
                request.attempt += 1

    async def _attempt(self, request: Request, sink: Sink) -> None:
        first = await self._pick_first(request)
        attempt = first.prefill(request, sink) if first.role is Role.PREFILL else first.decode(request, None, sink)
        over = False
        try:
            await attempt.over()
            over = True
        finally:
            if not over:
                attempt.close()
        if attempt.handle is not None:
            await self._decode(request, attempt.handle, first, sink)

    async def _decode(self, request: Request, handle: KVHandle, prefill: Instance, sink: Sink) -> None:
        """Offers the KV to decode instances until one has pulled it; whoever pulled it decodes it. However this ends,
        KV that was not pulled is given back."""
        pulled = False
        try:
            while True:
                decoder = await self._pick_decode(request)
                try:
                    attempt = decoder.decode(request, handle, sink)
                    try:
                        await attempt.settled()
                        if attempt.pulled:
                            prefill.spent(handle)
                        await attempt.over()
                        return
                    finally:
                        pulled = attempt.pulled
                        attempt.close()
                except InstanceGone:
                    if pulled or not prefill.holds(handle):
                        raise
                    log.warning("request %d: %s died before its pull; offered to another", request.id, decoder.name)
        finally:
            if not pulled:
                prefill.release(handle)

    # -- choosing -----------------------------------------------------------------------------------------------------

    async def _pick_first(self, request: Request) -> Instance:
        """Who computes the prompt. A retry may also go to a decode instance, which can compute what it cannot pull."""

        def candidates() -> list[Instance]:
            roles = [Role.COLOCATED, *([Role.PREFILL] if self._alive(Role.DECODE) else [])]
            return self._alive(*roles) or (self._alive(Role.DECODE) if request.attempt > 1 else [])

        return await self._pick(candidates, lambda found: self._router.pick_prefill(request.num_tokens, found))

    async def _pick_decode(self, request: Request) -> Instance:
        return await self._pick(
            lambda: self._alive(Role.DECODE), lambda found: self._router.pick_decode(request.num_tokens, found)
        )

    async def _pick(
        self, candidates: Callable[[], list[Instance]], choose: Callable[[list[Candidate]], str | None]
    ) -> Instance:
        """Waits for an instance, but no longer than one needs to come back."""
        deadline = self._clock() + self._limits.restart_deadline
        while True:
            found = {instance.name: instance for instance in candidates()}
            name = choose([self._candidate(instance) for instance in found.values()])
            if name is not None:
                return found[name]
            remaining = deadline - self._clock()
            if remaining <= 0:
                raise UnavailableError("no instance came back in time")
            try:
                await asyncio.wait_for(self._changed.wait(), remaining)
            except TimeoutError:
                continue

    def _candidate(self, instance: Instance) -> Candidate:
        return Candidate(instance.name, instance.load(), instance.tokens_per_second)
