"""The command's side of its workers: starts their processes, asks, and ends them. Knows no engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from distserve.engine.base import EngineOptions
from distserve.errors import DistserveError, UsageError
from distserve.profiler.messages import (
    Busy,
    Failed,
    FromWorker,
    Loading,
    Published,
    Ready,
    Start,
    Stop,
    Took,
    ToWorker,
    Work,
    decode_from_worker,
    encode,
)

COMMAND = (sys.executable, "-m", "distserve.profiler.worker")
_PATIENCE = 5.0  # seconds for a worker to end its step and leave
Kind = TypeVar("Kind", Took, Published, Ready)


class WorkerDied(DistserveError):
    """A worker ended in the middle (out of memory, killed)."""


class Remote:
    """One worker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.ready: Ready

    async def wait_ready(self, progress: Callable[[float, str], None]) -> None:
        while isinstance(said := await self._hear(), Loading):
            progress(said.fraction, said.what)
        assert isinstance(said, Ready)
        self.ready = said

    async def time(self, work: Work) -> Took:
        return await self.ask(work, Took)

    async def begin(self, work: Work) -> None:
        """It goes on with it until `end`."""
        self._say(Busy(work))

    async def end(self) -> Took:
        return await self.ask(Stop(), Took)

    async def ask(self, message: ToWorker, kind: type[Kind]) -> Kind:
        self._say(message)
        said = await self._hear()
        assert isinstance(said, kind), said
        return said

    def _say(self, message: ToWorker) -> None:
        self._writer.write(encode(message) + b"\n")

    async def _hear(self) -> FromWorker:
        try:
            line = await self._reader.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise WorkerDied("the engine's process ended in the middle of a measurement: is there memory enough?")
        said: FromWorker = decode_from_worker(line)
        if isinstance(said, Failed):
            raise (UsageError if said.usage else WorkerDied)(said.text)
        return said

    def close(self) -> None:
        self._writer.close()


class Workers:
    """As an asynchronous context: workers on a device each, or on several with a rank on each. `options` of each; on a
    CPU one process loads for all."""

    def __init__(
        self, options: Sequence[EngineOptions], progress: Callable[[float, str], None] = lambda fraction, what: None
    ) -> None:
        self._options = list(options)
        self._progress = progress
        self._processes: list[asyncio.subprocess.Process] = []
        self._meeting = tempfile.TemporaryDirectory(prefix="distserve-", ignore_cleanup_errors=True)
        self.all: list[Remote] = []

    async def __aenter__(self) -> Workers:
        first = self._options[0]
        groups = [self._options] if first.device == "cpu" else [[each] for each in self._options]
        try:
            for group in groups:
                await self._spawn(group)
            await asyncio.gather(*(remote.wait_ready(self._progress) for remote in self.all))
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _spawn(self, group: Sequence[EngineOptions]) -> None:
        pairs = [socket.socketpair() for _ in group]
        theirs = [pair[1].fileno() for pair in pairs]
        process = await asyncio.create_subprocess_exec(
            *COMMAND, stdin=asyncio.subprocess.PIPE, pass_fds=theirs, env=_environ(group)
        )
        self._processes.append(process)
        assert process.stdin is not None
        start = Start(list(group), theirs, self._meeting.name)
        process.stdin.write(encode(start) + b"\n")
        for ours, other in pairs:
            other.close()
            self.all.append(Remote(*await asyncio.open_connection(sock=ours, limit=1 << 24)))

    async def _end(self) -> None:
        for remote in self.all:
            remote.close()
        for process in self._processes:
            try:
                await asyncio.wait_for(process.wait(), _PATIENCE)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()  # and the kernel kills what it has forked
                await process.wait()
        self._meeting.cleanup()


def _environ(group: Sequence[EngineOptions]) -> dict[str, str]:
    """A maths library counts its threads when it is loaded: one where that forks, else as many as there are cores; of
    several ranks each has its own."""
    first = group[0]
    each = max(map(len, first.ranks)) if first.ranks else len(first.cores) or 1
    threads = str(each if len(group) == 1 or first.ranks else 1)
    return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
