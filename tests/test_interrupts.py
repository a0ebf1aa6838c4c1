"""Real signals, sent to the test's own process while its event loop runs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from distserve.interrupts import interruptible, interrupts

RUNS = [asyncio.run, uvloop.run]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_work_which_then_ends_its_processes(
    run: Callable[[Coroutine[Any, Any, bool]], bool], number: int
) -> None:
    codes: list[int | None] = []

    async def work() -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(60)")
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            process.terminate()
            codes.append(await process.wait())

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without it
    try:
        assert run(interruptible(work))
        assert codes == [-signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_work_that_ends_was_not_cut_short() -> None:
    done = []

    async def work() -> None:
        await asyncio.sleep(0)
        done.append(True)

    assert not asyncio.run(interruptible(work))
    assert done == [True]


def test_an_error_of_the_work_is_its_own() -> None:
    async def work() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(interruptible(work))


def test_work_may_end_itself_as_interrupted() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    assert asyncio.run(interruptible(work))


SECOND = """
import asyncio, os, signal
from distserve.interrupts import interrupts

async def main():
    told = asyncio.Event()
    with interrupts(told.set):
        os.kill(os.getpid(), signal.SIGINT)
        await told.wait()
        print("stopping", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("at once")
"""


def test_a_second_ctrl_c_does_not_wait() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.split("\n") == ["stopping", "at once", ""]


def test_every_sigterm_is_told() -> None:
    async def main() -> None:
        told = asyncio.Event()
        with interrupts(told.set):
            for _ in range(2):
                told.clear()
                os.kill(os.getpid(), signal.SIGTERM)
                await told.wait()

    asyncio.run(main())
