"""Ctrl-C and SIGTERM for a command that has begun something: the first one ends the work, not the command, which keeps
what it has. Knows no command.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any


async def interruptible(work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
    """Does the work; True: it was cut short. Ctrl-C and SIGTERM cancel it, and are waited for: on its way out it ends
    the processes that it started. Work that raises `CancelledError` by itself counts as cut short, too."""
    task = asyncio.ensure_future(work())
    with interrupts(task.cancel):
        try:
            await task
        except asyncio.CancelledError:
            return True
    return False


@contextmanager
def interrupts(stop: Callable[[], object]) -> Iterator[None]:
    """Inside a running event loop Ctrl-C and SIGTERM call `stop`; a second Ctrl-C is an ordinary KeyboardInterrupt, for
    who does not want to wait."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    loop.add_signal_handler(signal.SIGINT, first)
    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)
