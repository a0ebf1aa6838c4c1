"""All instances of a server: their processes, the one socket to them, and the timers that keep them honest.

Starts them together, watches for hangs, introduces the decode side to the sources of KV, reconciles once a second what
each side believes to be alive, and takes everything down again. It routes no request.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distserve.errors import DistserveError, UsageError
from distserve.plan import Role
from distserve.serve.config import InstanceConfig, encode_config
from distserve.serve.messages import Loading, Meet, Part
from distserve.serve.rpc import RemoteInstance
from distserve.serve.spawn import ForkSpawner, InterpreterSpawner, Spawner
from distserve.serve.supervisor import Supervisor
from distserve.serve.switchboard import Switchboard
from distserve.serve.telemetry import Telemetry

TICK = 0.25  # seconds between looks at the instances
AUDIT = 1.0  # seconds between reconciliations; well below any lease


@dataclass(frozen=True, slots=True)
class Start:
    """An instance to start. `configure(epoch, gateway address, notices address)` tells its process what to be."""

    name: str
    role: Role
    configure: Callable[[int, str, str], InstanceConfig]
    forkable: bool  # its weights are the others', and its device allows it
    num_threads: int = 1  # of the rank that has most cores
    num_ranks: int = 1


class Fleet:
    """`on_change` hears of every instance that became ready or was lost, `on_loading` of progress."""

    def __init__(self, starts: list[Start], on_loading: Callable[[RemoteInstance, Loading], None]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="distserve-"))  # mode 0700: nobody else may speak to the instances
        self._switchboard = Switchboard(f"{self._folder}/gateway")
        # One thread until the fork; each fork then takes its own cores. Ranks do not want weights that are whole.
        self._forks, self._groups = ForkSpawner(_environ(1)), ForkSpawner(_environ(1))
        self.remotes = [RemoteInstance(start.name, start.role, time.monotonic) for start in starts]
        self.supervisors = [self._supervisor(*pair) for pair in zip(self.remotes, starts, strict=True)]
        self._known: dict[str, int] = {}  # by name: the epoch that the decode side was introduced to
        self.on_change: Callable[[], None] | None = None
        for remote in self.remotes:
            remote.on_change = partial(self._changed, remote)
            remote.on_loading = partial(on_loading, remote)
        self._tasks: list[asyncio.Task[None]] = []

    def _supervisor(self, remote: RemoteInstance, start: Start) -> Supervisor:
        def configure(epoch: int) -> bytes:
            notices = f"{self._folder}/{start.name}.{epoch}"
            return encode_config(start.configure(epoch, self._switchboard.address, notices))

        if start.forkable and sys.platform == "linux" and os.environ.get("DISTSERVE_FORK") != "off":
            spawner: Spawner = self._forks if start.num_ranks == 1 else self._groups
        else:
            spawner = InterpreterSpawner(_environ(start.num_threads))
        return Supervisor(remote, self._switchboard, configure, spawner)

    def observe(self, telemetry: Telemetry) -> None:
        """Passes on what the instances report of themselves."""
        for remote, supervisor in zip(self.remotes, self.supervisors, strict=True):
            telemetry.add_instance(remote)
            remote.on_step = telemetry.observe_step
            remote.on_timing = telemetry.observe_timing
            supervisor.on_restart = telemetry.restarts.labels(telemetry.model, remote.name, remote.role).inc

    async def start(self) -> None:
        await self._switchboard.start()
        timers: list[Callable[[], Awaitable[None]]] = [self._watch, self._audit]
        runs = [supervisor.run for supervisor in self.supervisors]
        self._tasks = [asyncio.ensure_future(work()) for work in (*timers, *runs)]

    async def wait_ready(self) -> None:
        """Until every instance is ready. Raises `UsageError` where one says that the user can mend it, `DistserveError`
        where it cannot start for another reason."""
        while not all(remote.alive for remote in self.remotes):
            for remote in self.remotes:
                if remote.fatal is not None:
                    kind = UsageError if remote.fatal.usage else DistserveError
                    raise kind(remote.fatal.text if remote.fatal.usage else f"{remote.name}: {remote.fatal.text}")
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Ends every process and leaves nothing behind. Idempotent."""
        await asyncio.gather(*(supervisor.stop() for supervisor in self.supervisors))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.gather(self._forks.close(), self._groups.close())
        self._switchboard.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _watch(self) -> None:
        """Where this timer itself is late, the machine or this process stood still: no instance is blamed for that."""
        due = time.monotonic()
        while True:
            now = time.monotonic()
            if now < due + TICK:
                for supervisor in self.supervisors:
                    supervisor.watch(now)
            due = now + TICK
            await asyncio.sleep(TICK)

    async def _audit(self) -> None:
        while True:
            await asyncio.sleep(AUDIT)
            for remote in self.remotes:
                remote.audit()

    def _changed(self, changed: RemoteInstance) -> None:
        """Introduces new sources of KV to the decode side, and tells it of those that are over."""
        decoders = [remote for remote in self.remotes if remote.role is Role.DECODE and remote.alive]
        if changed.role is Role.DECODE and changed in decoders:
            sources = [r.ready.source for r in self.remotes if r.role is Role.PREFILL and r.ready is not None]
            changed.tell(Meet(changed.epoch, sources))
        elif changed.role is Role.PREFILL:
            if changed.ready is not None:
                self._known[changed.name] = changed.epoch
                for decoder in decoders:
                    decoder.tell(Meet(decoder.epoch, [changed.ready.source]))
            elif (epoch := self._known.pop(changed.name, None)) is not None:
                for decoder in decoders:
                    decoder.tell(Part(decoder.epoch, changed.name, epoch))
        if self.on_change is not None:
            self.on_change()


def _environ(num_threads: int) -> dict[str, str]:
    """Read when torch is imported, before anybody can be told."""
    return {**os.environ, "OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
