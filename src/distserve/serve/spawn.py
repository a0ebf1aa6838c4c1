"""How an instance's process comes to be: a new interpreter, or a fork of one that has the weights already.

A fork shares the weights (and all of PyTorch) with its siblings, so that a host holds them once, and a restart after a
crash takes milliseconds instead of a load. It needs a CPU and Linux: what CUDA has begun cannot be forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "distserve.serve.launch")
OnLoading = Callable[[float, str], None]


class Spawned(Protocol):
    """A process that was started."""

    pid: int

    @property
    def ended(self) -> bool: ...

    async def wait(self) -> int:
        """Its exit status; negative: the signal that killed it."""
        ...

    def kill(self) -> None: ...


class Spawner(Protocol):
    async def start(self, epoch: int, config: bytes, on_loading: OnLoading) -> Spawned:
        """Starts a process for an `InstanceConfig` of that epoch. Raises `StartError` where it cannot be."""
        ...


class StartError(Exception):
    """No process could be made; `usage`: the user can mend it."""

    def __init__(self, text: str, usage: bool) -> None:
        super().__init__(text)
        self.usage = usage


# -- a new interpreter ------------------------------------------------------------------------------------------------


class _Interpreter:
    """Its standard input stays open as its life line: its end says that the gateway is no more."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def wait(self) -> int:
        return await self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


class InterpreterSpawner:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    async def start(self, epoch: int, config: bytes, on_loading: OnLoading) -> Spawned:
        process = await asyncio.create_subprocess_exec(*COMMAND, stdin=asyncio.subprocess.PIPE, env=self._environ)
        assert process.stdin is not None
        process.stdin.write(config + b"\n")
        return _Interpreter(process)


# -- a fork -----------------------------------------------------------------------------------------------------------


class Report(msgspec.Struct, frozen=True, tag=True):
    """A line that the fork server says on its standard output."""


class LoadingReport(Report, frozen=True):
    fraction: float
    what: str


class ForkedReport(Report, frozen=True):
    epoch: int
    pid: int


class EndedReport(Report, frozen=True):
    pid: int
    status: int


class FatalReport(Report, frozen=True):
    text: str
    usage: bool


encode_report = msgspec.json.Encoder().encode
_decode_report = msgspec.json.Decoder(LoadingReport | ForkedReport | EndedReport | FatalReport).decode


class _Fork:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def ended(self) -> bool:
        return self._status.done()

    def end(self, status: int) -> None:
        if not self._status.done():
            self._status.set_result(status)

    async def wait(self) -> int:
        return await asyncio.shield(self._status)

    def kill(self) -> None:
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class ForkSpawner:
    """Instances that compute with the same weights, forked off one server that has loaded them.

    The server dies with the gateway (its standard input ends), its forks die with the server (the kernel sees to it). A
    server that died is started again by the next `start`.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._server: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting: dict[int, tuple[asyncio.Future[Spawned], OnLoading]] = {}  # by epoch
        self._forks: dict[int, _Fork] = {}  # by process id
        self._lock = asyncio.Lock()
        self._closing = False

    async def start(self, epoch: int, config: bytes, on_loading: OnLoading) -> Spawned:
        async with self._lock:
            if self._server is None:
                pipe = asyncio.subprocess.PIPE
                command = (*COMMAND, "fork-server")
                self._server = await asyncio.create_subprocess_exec(
                    *command, stdin=pipe, stdout=pipe, env=self._environ
                )
                self._reader = asyncio.create_task(self._read(self._server))
            server = self._server
        assert server.stdin is not None
        started: asyncio.Future[Spawned] = asyncio.get_running_loop().create_future()
        self._starting[epoch] = started, on_loading
        server.stdin.write(config + b"\n")
        try:
            return await started
        finally:
            self._starting.pop(epoch, None)

    async def _read(self, server: asyncio.subprocess.Process) -> None:
        """Until the server ends; then everything that came from it has ended too."""
        assert server.stdout is not None
        failure = StartError("the fork server ended", usage=False)
        async for line in server.stdout:
            match _decode_report(line):
                case LoadingReport(fraction=fraction, what=what):
                    for _, on_loading in self._starting.values():
                        on_loading(fraction, what)
                case ForkedReport(epoch=epoch, pid=pid):
                    fork = self._forks[pid] = _Fork(pid)
                    if epoch in self._starting:
                        self._starting[epoch][0].set_result(fork)
                    else:  # nobody waits for it any more
                        fork.kill()
                case EndedReport(pid=pid, status=status):
                    self._forks.pop(pid).end(status)
                case FatalReport(text=text, usage=usage):
                    failure = StartError(text, usage)
        status = await server.wait()
        self._server = None
        for started, _ in self._starting.values():
            if not started.done():
                started.set_exception(failure)
        forks, self._forks = self._forks, {}
        for fork in forks.values():
            fork.end(-signal.SIGKILL)
        if status and not self._closing:
            log.error("the fork server ended with status %d", status)

    async def close(self) -> None:
        """Ends the server, and with it whatever of its forks is left. It holds nothing that must be put in order."""
        self._closing = True
        if self._server is not None and self._reader is not None:
            with contextlib.suppress(ProcessLookupError):
                self._server.kill()
            await self._reader
