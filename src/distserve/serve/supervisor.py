"""Keeps one instance's process alive: starts it, notices its death and its hanging, restarts it with back-off.

    starting -> ready -> (died | hung: fenced, killed) -> back-off -> starting ...          stop: ends it for good

Knows no request: what was running on a dead instance is told by `RemoteInstance.lost` and retried by the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from distserve.serve.messages import Fatal, Loading, Stop
from distserve.serve.pace import FLOOR
from distserve.serve.rpc import RemoteInstance
from distserve.serve.spawn import Spawned, Spawner, StartError
from distserve.serve.switchboard import Switchboard

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.25  # seconds before the first restart; doubles each time
LONGEST_PAUSE = 30.0
HEALTHY = 60.0  # seconds alive after which the back-off starts anew
BEAT = 0.25  # seconds between signs of life
MARGIN = 1.0  # seconds over the predicted step before an instance counts as hung (protocol: a missed progress beat)
KILL_AFTER = 3.0  # seconds an instance gets to leave by itself


class Supervisor:
    """Restarts what was ready once, for ever; what cannot even start is not tried again: `remote.fatal` says why.

    `configure(epoch)` gives the `InstanceConfig`, encoded, that `spawner` makes a process of."""

    def __init__(
        self,
        remote: RemoteInstance,
        switchboard: Switchboard,
        configure: Callable[[int], bytes],
        spawner: Spawner,
    ) -> None:
        self.remote = remote
        self.num_restarts = 0
        self.on_restart: Callable[[], None] | None = None
        self._switchboard = switchboard
        self._configure = configure
        self._spawner = spawner
        self._process: Spawned | None = None
        self._stop = asyncio.Event()
        self._was_ready = False
        self._why = ""

    async def run(self) -> None:
        """Until `stop`. Returns early only where the instance was never ready: `remote.fatal` then says why."""
        pause = FIRST_PAUSE
        while not self._stop.is_set():
            began = time.monotonic()
            status = await self._live_once()
            if self._stop.is_set():
                return
            lived = time.monotonic() - began
            if not self._was_ready:
                self.remote.fatal = self.remote.fatal or Fatal(
                    0, f"died while it started (status {status})", usage=False
                )
                return
            pause = FIRST_PAUSE if lived > HEALTHY or not self.num_restarts else min(pause * 2, LONGEST_PAUSE)
            log.warning("%s ended (%s); restarting in %.2g s", self.remote.name, self._why or f"status {status}", pause)
            self.num_restarts += 1
            if self.on_restart is not None:
                self.on_restart()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)

    async def _live_once(self) -> int:
        epoch = time.time_ns()  # later processes have greater epochs, also across restarts of the gateway
        self._why, status = "", -1
        self.remote.begin(epoch, self._switchboard.open_line(self.remote, epoch))
        try:
            self._process = await self._spawner.start(epoch, self._configure(epoch), self._loading)
            status = await self._process.wait()
        except StartError as error:
            self._why = f"could not be started: {error}"
            self.remote.fatal = Fatal(epoch, str(error), error.usage)
        finally:
            self._was_ready = self._was_ready or self.remote.alive
            if self._process is not None and not self._process.ended:
                self._process.kill()
                await self._process.wait()
            self._process = None
            self._switchboard.close_line(self.remote, epoch)
            self.remote.lost(self._why or f"died (status {status})")
        return status

    def _loading(self, fraction: float, what: str) -> None:
        self.remote.receive(Loading(self.remote.epoch, fraction, what))

    def watch(self, now: float) -> None:
        """Fences the instance where it has stopped making progress. Called by a timer that itself ran on time."""
        remote = self.remote
        if self._stop.is_set() or not remote.alive or self._process is None:
            return
        if remote.suspicious_at and now > remote.suspicious_at + MARGIN:
            self.fence(f"hung: its step is {now - remote.suspicious_at:.1f} s late")
        elif now > remote.beat_at + BEAT + FLOOR + MARGIN:
            self.fence(f"hung: no sign of life for {now - remote.beat_at:.1f} s")

    def fence(self, why: str) -> None:
        """Revokes the epoch at once and kills the process."""
        if self._process is None or self._process.ended:
            return
        log.error("%s %s; killing process %d", self.remote.name, why, self._process.pid)
        self._why, self._was_ready = why, True
        self.remote.lost(why)
        self._process.kill()

    async def stop(self) -> None:
        """Asks the process to leave, and makes it."""
        self._stop.set()
        process = self._process
        if process is None:
            return
        if self.remote.alive:
            self.remote.tell(Stop(self.remote.epoch))
        else:
            process.kill()  # it still loads, and does not listen
        try:
            await asyncio.wait_for(process.wait(), KILL_AFTER)
        except TimeoutError:
            log.warning("%s did not leave within %g s; killing it", self.remote.name, KILL_AFTER)
            process.kill()
            await process.wait()
