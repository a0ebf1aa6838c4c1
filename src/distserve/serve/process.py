"""The inside of an instance's process: from one line of configuration to a running `InstanceLoop`, and out again.

Its standard input is its life line: when that pipe ends, the gateway is no more, and so is this process. It ignores the
terminal's and the service manager's signals, because the gateway drains first and then tells it to stop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from distserve.engine.base import Executor
from distserve.errors import DistserveError, UsageError
from distserve.line import Caller, Line, connect, listen
from distserve.ranks import die_with_parent
from distserve.sched.base import Scheduler
from distserve.serve import eventloop
from distserve.serve.awake import Vigil
from distserve.serve.config import InstanceConfig
from distserve.serve.instance import InstanceLoop, Wiring
from distserve.serve.messages import Fatal, Loading, Notice, Ready, ToGateway, decode_to_instance, encode
from distserve.serve.steplog import step_log
from distserve.serve.supervisor import BEAT
from distserve.serve.switchboard import identity
from distserve.sharding import Sharding
from distserve.specs import KVLayout
from distserve.transfer.base import KVSource, Source, Transport
from distserve.transfer.layout import InstanceLayout

log = logging.getLogger(__name__)

FAREWELL = 1.0  # seconds that last words may take to leave


class SharingExecutor(Executor, Protocol):
    """An executor whose KV memory others can read."""

    layout: KVLayout  # of the whole model
    sharding: Sharding  # among its ranks

    def export_blocks(self, blocks: list[int]) -> None: ...

    def import_blocks(self, blocks: list[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What `launch.py` builds for a configuration, once the executor has started."""

    scheduler: Scheduler
    executor: Executor
    publisher: Source
    transport: Transport | None
    layout: InstanceLayout


Build = Callable[[InstanceConfig, Callable[[float, str], None]], Coroutine[None, None, Parts]]


def live(config: InstanceConfig, build: Build, life_line: BinaryIO | None = None) -> int:
    """An instance's life in this process. Without a life line the process must be a child of one that has it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(levelname)s {config.name}: %(message)s",
        force=True,
        stream=sys.stderr,
    )
    if config.engine.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, config.engine.cores)
    return eventloop.run(_Process(config).run(build, life_line))


class _Process:
    def __init__(self, config: InstanceConfig) -> None:
        self._config = config
        self._line: Line | None = None  # to the gateway
        self._callers: dict[str, Caller] = {}  # to the sources of pulled KV, by their address for notices
        self._loop: InstanceLoop | None = None

    async def run(self, build: Build, life_line: BinaryIO | None) -> int:
        config = self._config
        try:
            self._line = await connect(config.gateway, self._receive)
        except OSError as error:
            log.warning("the gateway is gone (%s); leaving", error)
            return 0
        self._line.send(identity(config.name, config.epoch))
        notices = await listen(config.notices, lambda: Line(self._receive))
        orphaned = asyncio.create_task(_pipe_end(life_line))
        cut_off = asyncio.create_task(self._line.lost.wait())
        work = asyncio.create_task(self._work(build))
        await asyncio.wait((orphaned, cut_off, work), return_when=asyncio.FIRST_COMPLETED)
        try:
            if not work.done():
                log.warning("the gateway is gone; leaving")
                work.cancel()
                await asyncio.wait((work,))
                return 0
            return work.result()
        finally:
            orphaned.cancel()
            for caller in self._callers.values():
                caller.close()
            notices.close()
            self._line.close()
            await asyncio.wait((cut_off,), timeout=FAREWELL)
            cut_off.cancel()

    async def _work(self, build: Build) -> int:
        config = self._config
        try:
            parts = await build(config, lambda fraction, what: self._send(Loading(config.epoch, fraction, what)))
        except UsageError as error:
            self._send(Fatal(config.epoch, str(error), usage=True))
            return 2
        except Exception as error:
            log.exception("cannot start")
            self._send(Fatal(config.epoch, f"{type(error).__name__}: {error}", usage=False))
            return 1
        source = KVSource(config.name, config.epoch, parts.layout, parts.publisher.location, config.notices)
        steps = step_log(config.steps, config.name, asyncio.get_running_loop().call_later)
        wiring = Wiring(source, parts.publisher, parts.transport, self._send, self._notify, steps)
        self._loop = InstanceLoop(parts.scheduler, parts.executor, wiring, time.monotonic)
        executor = parts.executor
        self._send(
            Ready(config.epoch, source, executor.num_blocks, executor.block_size, executor.max_model_len, os.getpid())
        )
        vigil = Vigil(config.engine.cores or (), config.awake)
        beats = asyncio.create_task(self._beats(self._loop, vigil))
        try:
            await self._loop.run()
            return 0
        except DistserveError as error:
            log.error("cannot go on: %s", error)
            return 1
        finally:
            beats.cancel()
            vigil.close()
            steps.close()
            await executor.stop()
            if parts.transport is not None:
                parts.transport.close()
            parts.publisher.close()

    async def _beats(self, loop: InstanceLoop, vigil: Vigil) -> None:
        while True:
            loop.beat()
            vigil.beat(loop.idle())
            await asyncio.sleep(BEAT)

    def _send(self, message: ToGateway) -> None:
        assert self._line is not None
        if not self._line.closed:  # else the gateway is gone, and this process is about to leave
            self._line.send(encode(message))

    def _notify(self, address: str, notice: Notice) -> None:
        """One line a source; where the source is gone its lease is over anyway."""
        caller = self._callers.get(address)
        if caller is None:
            caller = self._callers[address] = Caller(address)
        try:
            caller.send(encode(notice))
        except ConnectionError as error:
            log.warning("no notice sent to %s: %s", address, error)

    def _receive(self, message: bytes) -> None:
        if self._loop is not None:
            self._loop.handle(decode_to_instance(message))


async def _pipe_end(pipe: BinaryIO | None) -> None:
    """Returns when the other end of `pipe` is closed; without a pipe, never."""
    if pipe is None:
        await asyncio.Event().wait()
        return
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    while await reader.read(1024):
        pass
