"""From a fleet and an app to a running server: port, progress, banner, signals, orderly end.

bind the port -> start instances and HTTP (not ready: 503) -> ready: banner -> signal: drain -> stop instances
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from distserve.errors import UsageError
from distserve.serve.fleet import Fleet
from distserve.serve.gateway import Gateway
from distserve.serve.messages import Loading
from distserve.serve.rpc import RemoteInstance

log = logging.getLogger(__name__)

DRAIN_SLICE = 0.05  # seconds between looks at whether running requests have ended


def bind(host: str, port: int) -> socket.socket:
    """Takes the port before anything is loaded. Raises `UsageError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        cure = (
            f"choose another with --port, such as --port {port + 1}" if port < 65535 else "choose another with --port"
        )
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; {cure}") from None
    listener.set_inheritable(False)
    return listener


class _Http(uvicorn.Server):
    """uvicorn without its own signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class LoadingDisplay:
    """One bar an instance on a terminal, a line a stage elsewhere; on stderr, gone when all are ready."""

    def __init__(self, names: list[str]) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.fields[what]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}
        if self._console.is_terminal:
            self._tasks = {name: self._progress.add_task(name, total=1.0, what="starting") for name in names}
            self._progress.start()

    def show(self, remote: RemoteInstance, message: Loading) -> None:
        if (task := self._tasks.get(remote.name)) is not None:
            self._progress.update(task, completed=message.fraction, what=message.what)
        elif self._stages.get(remote.name) != message.what:
            self._stages[remote.name] = message.what
            print(f"{remote.name}: {message.what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._progress.stop()
        self._tasks = {}


class Server:
    """Owns the life of everything in the gateway's process. `banner` is printed when requests can be answered."""

    def __init__(
        self, app: Any, listener: socket.socket, fleet: Fleet, gateway: Gateway, shutdown_timeout: float
    ) -> None:
        self._fleet = fleet
        self._gateway = gateway
        self._listener = listener
        self._timeout = shutdown_timeout
        config = uvicorn.Config(
            app, http="httptools", ws="none", lifespan="off", access_log=False, log_config=None, server_header=False,
            timeout_graceful_shutdown=1, timeout_keep_alive=75, proxy_headers=False,
        )  # fmt: skip
        self._http = _Http(config)
        self._signals = 0
        self._leave = asyncio.Event()

    async def run(self, banner: str, display: LoadingDisplay) -> None:
        """Until a signal; the fleet has been started. Raises `UsageError` or `DistserveError` where an instance cannot
        start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        http = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        leave = asyncio.create_task(self._leave.wait())
        ready = asyncio.create_task(self._fleet.wait_ready())
        try:
            await asyncio.wait((ready, leave, http), return_when=asyncio.FIRST_COMPLETED)
            display.close()
            if ready.done():
                ready.result()
                gc.collect()
                gc.freeze()  # what is here now stays; collections need not look at it again
                print(banner, file=sys.stderr, flush=True)
                await asyncio.wait((leave, http), return_when=asyncio.FIRST_COMPLETED)
            await self._drain()
        finally:
            display.close()
            for task in (leave, ready):
                task.cancel()
            self._http.should_exit = True
            await asyncio.wait((http,))
            await self._fleet.stop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        """Once: finish what runs. Twice: leave now."""
        self._signals += 1
        if self._signals == 1:
            running = self._gateway.num_live
            wait = f"; waiting up to {self._timeout:g} s for {running} running requests (again to stop at once)"
            print(f"\nstopping{wait if running else ''}", file=sys.stderr, flush=True)
        else:
            self._http.force_exit = True
        self._leave.set()

    async def _drain(self) -> None:
        """New requests are refused (503), running ones end; the port stays open so that health checks see it."""
        self._gateway.close_door()
        deadline = asyncio.get_running_loop().time() + self._timeout
        while self._gateway.num_live and self._signals < 2:
            if asyncio.get_running_loop().time() > deadline:
                log.warning(
                    "%d requests did not end within %g s and are cut off", self._gateway.num_live, self._timeout
                )
                break
            await asyncio.sleep(DRAIN_SLICE)
